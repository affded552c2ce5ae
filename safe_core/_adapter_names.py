"""Find the adapter that has a name, for the error about a name that `safe_core` has not.

The files are read, not imported, because importing an adapter imports its framework.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

__all__ = ["adapters_with", "missing_name"]

_ADAPTERS = ("torch", "optax", "torch.blocks", "jax", "jax.blocks", "jax.flax", "transformers")
# The guide imports most names of JAX from `optax`, and `transformers` repeats `torch.blocks`.
_REPEATED = {"jax": "optax", "transformers": "torch.blocks"}


def adapters_with(name: str) -> list[str]:
    """Return the adapters that export a name; of two that repeat each other, the first.

    Examples
    --------
    >>> adapters_with("SparseOptimizer"), adapters_with("sparse_optimizer")
    (['safe_core.adapters.torch'], ['safe_core.adapters.optax'])
    """
    found = [part for part in _ADAPTERS if name in _exported(part)]
    return [f"safe_core.adapters.{part}" for part in found if _REPEATED.get(part) not in found]


def _exported(part: str) -> list[str]:
    """Return ``__all__`` of an adapter, from its source."""
    package = find_spec("safe_core.adapters")
    for folder in (package and package.submodule_search_locations) or ():
        place = Path(folder, *part.split("."))
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return _assigned(ast.parse(file.read_bytes()))
    return []


def _assigned(tree: ast.Module) -> list[str]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return []


def missing_name(name: str) -> str:
    """Return the text of the error about a name that ``safe_core`` has not.

    Examples
    --------
    >>> missing_name("SparseOptimizer")
    'SparseOptimizer is in safe_core.adapters.torch'
    >>> missing_name("safer")
    "module 'safe_core' has no attribute 'safer'"
    """
    # Python looks up private names, such as `__path__`, and expects no more than the error.
    places = [] if name.startswith("_") else adapters_with(name)
    if places:
        return f"{name} is in {' and '.join(places)}"
    return f"module 'safe_core' has no attribute {name!r}"
