"""Read trees of Flax NNX, whose leaves are in variables.

Flax is not imported here: no tree holds a variable unless ``flax.nnx`` is imported already.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

__all__ = ["as_pure", "is_nnx_state"]

PyTree = Any


def as_pure(tree: PyTree) -> PyTree:
    """Return a tree with plain arrays in place of NNX variables; other trees as they are."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    held = any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))
    return nnx.as_pure(tree) if held else tree


def is_nnx_state(tree: PyTree) -> bool:
    """Return whether a tree is a state of NNX, with or without variables."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(tree, nnx.State)
