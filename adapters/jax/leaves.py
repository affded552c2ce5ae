"""Check the leaves of trees that a user passes, and name the one that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_core import _checks

from .weights import name_of

__all__ = [
    "WITHOUT_KEYS",
    "check_arrays",
    "check_differentiable",
    "check_gradient",
    "check_one_copy",
    "check_storable",
    "difference",
    "flag_of",
]

PyTree = Any
_FILTER = (
    "pass a tree of arrays alone, such as eqx.filter(model, eqx.is_inexact_array) of an Equinox "
    "module"
)
WITHOUT_KEYS = "for NNX, pass nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))"


def check_arrays(
    argument: str,
    named: Sequence[tuple[str, Any]],
    without_keys: str = "for NNX, pass nnx.state(model, nnx.Param)",
) -> None:
    """Raise unless every leaf is a numeric array.

    A Python number has no dtype to keep, and a function is no parameter. A PRNG key has a
    dtype, but no arithmetic; ``without_keys`` says how to leave keys out.
    """
    for name, leaf in named:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype") and hasattr(leaf, "ndim")):
            raise TypeError(
                f"{argument} must hold arrays, got {_checks.shown(leaf)} at {name or 'the root'}: "
                f"{_FILTER}"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"{argument} must hold numeric arrays, got a PRNG key at {name or 'the root'}: "
                f"keep keys out ({without_keys}), or store jax.random.key_data of them"
            )


def check_differentiable(argument: str, tree: PyTree) -> None:
    """Raise unless every leaf is a floating array, which `jax.grad` requires."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    named = [(name_of(path), leaf) for path, leaf in paths]
    check_arrays(argument, named)
    for name, leaf in named:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"{argument} must hold floating arrays to differentiate by, got {leaf.dtype} at "
                f"{name or 'the root'}: {_FILTER}"
            )


def check_storable(name: str, leaf: Any) -> None:
    """Raise unless a leaf can be sparse: real floating, with 16, 32 or 64 bits.

    Selection compares the bits of magnitudes, which it can do for these widths.
    """
    dtype = leaf.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4, 8):
        raise TypeError(
            f"{name} must be real floating with 16, 32 or 64 bits to be sparse, got {dtype}"
        )


def check_gradient(argument: str, name: str, leaf: Any, param: Any) -> None:
    """Raise unless a leaf is a gradient of a parameter: floating, and of its shape.

    A gradient of another shape would broadcast without an error.
    """
    dtype = getattr(leaf, "dtype", None)
    if leaf is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = "None" if leaf is None else _checks.shown(leaf) if dtype is None else dtype
        raise TypeError(
            f"{argument} must hold a floating gradient for every leaf of params, got {kind} for "
            f"{name}, a leaf of dtype {param.dtype}; for params, {_FILTER}"
        )
    if jnp.shape(leaf) != jnp.shape(param):
        raise ValueError(
            f"{argument} must have the shapes of params, which is {jnp.shape(param)} for "
            f"{name}, got {jnp.shape(leaf)}"
        )


def check_one_copy(params: PyTree) -> None:
    """Raise if ``params`` holds fast and slow copies, as `optax.LookaheadParams` does."""
    if isinstance(params, tuple) and hasattr(params, "fast") and hasattr(params, "slow"):
        raise ValueError(
            "params must hold one copy of the parameters, got the fast and slow copies of "
            f"{type(params).__name__}: sparse_optimizer supports lookahead neither within base "
            "nor around it; pass one copy to finalize, params.slow or params.fast"
        )


def flag_of(argument: str, name: str, flag: Any) -> bool:
    """Return a flag that selects a leaf; raise unless it is True or False.

    Any other value that counts as true would select every leaf, such as the string "no".
    """
    if not isinstance(flag, (bool, np.bool_)):
        kind = " (use the path, the shape and the dtype; values may be traced)"
        raise TypeError(
            f"{argument} must be a function that returns True or False, or hold True or False, got "
            f"{_checks.shown(flag)} for {name}{kind if isinstance(flag, jax.Array) else ''}"
        )
    return bool(flag)


def difference(wanted: PyTree, got: PyTree) -> str:
    """Return the first place where two trees differ, with the name of the path."""
    known, given = _paths(wanted), _paths(got)
    missing = [path for path in known if path not in given]
    surplus = [path for path in given if path not in known]
    parts = [f"lacks {paths[0] or 'the root'!r}" for paths in (missing,) if paths]
    parts += [f"has {paths[0] or 'the root'!r} in addition" for paths in (surplus,) if paths]
    if not parts:
        return _containers(wanted, got)
    more = len(missing) + len(surplus) - len(parts)
    return " and ".join(parts) + (f" ({more} more paths differ)" if more else "")


def _paths(tree: PyTree) -> dict[str, None]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): None for path, _ in found}


def _containers(wanted: PyTree, got: PyTree) -> str:
    """Return the first node at which two trees with the same paths have other containers."""
    queue = [("", wanted, got)]
    while queue:
        path, own, given = queue.pop(0)
        if type(own) is not type(given):
            kinds = f"{type(given).__name__} in place of {type(own).__name__}"
            return f"has {kinds} at {path or 'the root'}"
        nodes = [_children(own), _children(given)]
        if [key for key, _ in nodes[0]] != [key for key, _ in nodes[1]]:
            return f"has other nodes at {path or 'the root'}"
        queue += [
            (f"{path}/{key}" if path else key, a, b)
            for (key, a), (_, b) in zip(*nodes, strict=True)
        ]
    return "has containers with other static fields"


def _children(node: PyTree) -> list[tuple[str, PyTree]]:
    below = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(jax.tree_util.keystr(path, simple=True), child) for path, child in below if path]
