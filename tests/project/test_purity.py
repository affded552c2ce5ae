"""The core is free of frameworks, and imports point from applications to the core."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
import tomllib
from pathlib import Path

PROGRAM = """
import sys
import numpy
import safe_core

safe_core.project(numpy.ones((2, 4)), "2:4")
safe_core.safe(0.9)
print(sorted({"jax", "jaxlib", "torch", "flax", "optax", "tensorflow", "cupy"} & set(sys.modules)))
"""


def test_the_core_imports_no_framework() -> None:
    finished = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", PROGRAM], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[]"


# Imports between the parts of the library, as they are written in the source

ROOT = Path(__file__).parents[2]
# The folder of every package; a subpackage lies in that of its parent unless it is named.
FOLDERS = {
    name: ROOT / folder
    for name, folder in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ].items()
}
APPLICATIONS = (
    "safe_core.adapters.command_line",  # where an editable install finds it too
    "safe_core.command_line",
    "safe_core.demo",
    "safe_core.study",
    "benchmarks",
)
FRAMEWORKS = ("flax", "jax", "optax", "torch", "transformers")


def imported(file: Path, package: str) -> set[str]:
    """Every module that a file of a package imports, in functions and in examples too."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, documented)]
    examples = "".join(
        x.source for d in docstrings for x in doctest.DocTestParser().get_examples(d)
    )
    found = set()
    for node in (*ast.walk(tree), *ast.walk(ast.parse(examples))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


def modules_of(package: str) -> list[tuple[Path, str]]:
    """The files of a package, each with the package that it is in; applications aside."""
    folder = FOLDERS[package]
    others = {path for path in FOLDERS.values() if folder in path.parents}
    return [
        (file, ".".join([package, *file.relative_to(folder).parts[:-1]]))
        for file in sorted(folder.rglob("*.py"))
        if not others.intersection(file.parents)
    ]


def crossings(package: str, *forbidden: str) -> list[str]:
    """The imports of a package that start with a forbidden name."""
    return [
        f"{file.relative_to(ROOT)} imports {module}"
        for file, inside in modules_of(package)
        for module in sorted(imported(file, inside))
        if module.startswith(tuple(f"{name}." for name in forbidden)) or module in forbidden
    ]


def test_adapters_import_no_application() -> None:
    assert len(modules_of("safe_core.adapters")) > 40
    assert crossings("safe_core.adapters", *APPLICATIONS) == []


def test_the_core_imports_no_adapter_and_no_framework() -> None:
    assert len(modules_of("safe_core")) > 20
    assert crossings("safe_core", "safe_core.adapters", *APPLICATIONS, *FRAMEWORKS) == []


def test_backends_import_nothing_of_the_library_but_themselves() -> None:
    found = crossings("safe_core.backends", "safe_core")
    assert [line for line in found if "imports safe_core.backends" not in line] == []


def test_imports_are_read_as_python_resolves_them(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b\nfrom . import c\nfrom .d import e\nfrom ..f import g\n"
        "def h():\n    '>>> import i'\n    from safe_core import study\n"
    )
    assert imported(file, "p.q") == {
        "a.b", "p.q", "p.q.c", "p.q.d", "p.q.d.e", "p.f", "p.f.g", "i", "safe_core",
        "safe_core.study",
    }  # fmt: skip
