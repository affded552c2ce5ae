"""Tell which parts of a file a function uses, without running the file."""

from __future__ import annotations

import ast

from safe_core.adapters.loading import digest

__all__ = ["reached"]


def reached(content: bytes, function: str) -> str:
    """Return a digest of the code that a function of a file uses.

    It covers the definitions at the top of the file that the function names, those which they
    name in turn, and all other statements, such as imports. Comments, layout, and definitions
    that the function does not use do not count. Code that cannot be parsed counts as a whole.

    Examples
    --------
    >>> one = b"def f(x): return g(x)\\ndef g(x): return x\\ndef other(): return 1"
    >>> two = b"def f(x): return g(x)  # a comment\\ndef g(x): return x\\ndef other(): return 2"
    >>> reached(one, "f") == reached(two, "f"), reached(one, "other") == reached(two, "other")
    (True, False)
    """
    try:
        body = ast.parse(content).body
    except (SyntaxError, ValueError):
        return digest(content)
    defined = {name: node for node in body for name in _defined(node)}
    used, waiting = [node for node in body if not _defined(node)], [function]
    for node in used:
        waiting += _named(node)
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in defined and name not in found:
            found.add(name)
            waiting += _named(defined[name])
    kept = [n for n in body if not _defined(n) or found & set(_defined(n))]
    return digest("\n".join(ast.dump(node) for node in kept).encode())


def _defined(node: ast.stmt) -> list[str]:
    """Return the names of a definition or a plain assignment; none for other statements."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else ()
    names = [t.id for t in targets if isinstance(t, ast.Name)]
    return names if len(names) == len(targets) else []


def _named(node: ast.AST) -> list[str]:
    """Return the names in a piece of code, and its texts, which may name things too."""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return names + [text for text in texts if isinstance(text, str)]
