"""How the leaves of a parameter tree map to the lists that a method takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_core import Targets
from safe_core.layout import chosen_layout

from .flax_weights import is_prunable, layout_of

__all__ = ["SparseTree", "is_masked", "is_sparse_in", "leaves_like"]

PyTree = Any


class SparseTree(NamedTuple):
    """How the leaves of a parameter tree map to the lists that the method takes."""

    treedef: Any
    indices: list[int]  # of the sparse leaves
    targets: Targets

    @classmethod
    def read(cls, params: PyTree, where: Any, layout: Any, on_host: bool) -> SparseTree:
        """Select the sparse leaves of ``params`` and the roles of their axes."""
        if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
            raise ValueError(
                "params must not be masked: sparse_optimizer takes the norm over all parameters, "
                "so do not wrap it in masked or multi_transform; choose the sparse leaves with "
                "where= and mask within base"
            )
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in paths]
        if where is None or callable(where):
            choose = is_prunable if where is None else where
            chosen = [bool(choose(name, leaf)) for name, leaf in named]
        else:
            chosen = [_read_flag(flag) for flag in leaves_like("where", where, treedef)]
        indices = [i for i, flag in enumerate(chosen) if flag]
        if named and not indices:  # `optax.tree.map_params` looks at a tree without leaves
            raise ValueError(
                "no parameter is sparse: pass where=, a function of path and leaf or a pytree of "
                f"bool; the paths are {', '.join(name for name, _ in named)}"
            )
        for name, leaf in named:
            if jnp.iscomplexobj(leaf):
                raise TypeError(f"{name} must be real, for the norm is over all, got {leaf.dtype}")
        for i in indices:
            if not jnp.issubdtype(named[i][1].dtype, jnp.floating):
                raise TypeError(
                    f"{named[i][0]} must be real floating to be sparse, got {named[i][1].dtype}"
                )
        if isinstance(layout, Mapping):
            strange = sorted(set(layout) - {name for name, _ in named})
            if strange:
                raise ValueError(
                    f"layout names {strange[0]!r}, which is no path of params; they are "
                    f"{', '.join(name for name, _ in named)}"
                )
        layouts = tuple(chosen_layout(*named[i], layout, layout_of(*named[i])) for i in indices)
        names = tuple(named[i][0] for i in indices)
        return cls(treedef, indices, Targets(names, layouts, on_host))

    def leaves(self, tree: PyTree) -> list[Any]:
        """All leaves of a tree of the structure of the parameters."""
        return list(self.treedef.flatten_up_to(tree))

    def sparse(self, tree: PyTree) -> list[Any]:
        """The sparse leaves of such a tree."""
        leaves = self.leaves(tree)
        return [leaves[i] for i in self.indices]

    def replaced(self, leaves: Sequence[Any], sparse: Sequence[Any]) -> PyTree:
        """A tree of ``leaves``, with the sparse ones replaced."""
        found = list(leaves)
        for i, leaf in zip(self.indices, sparse, strict=True):
            found[i] = leaf
        return self.treedef.unflatten(found)

    def masked(self, sparse: Sequence[Any]) -> PyTree:
        """A tree of the sparse leaves, masked elsewhere."""
        return self.replaced([optax.MaskedNode()] * self.treedef.num_leaves, sparse)


def is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _read_flag(flag: Any) -> bool:
    if not isinstance(flag, (bool, np.bool_)):
        raise TypeError(f"where must be a function, or hold True or False, got {flag!r}")
    return bool(flag)


def leaves_like(argument: str, tree: PyTree, treedef: Any) -> list[Any]:
    """The leaves of a tree that must have the structure of the parameters."""
    try:
        return list(treedef.flatten_up_to(tree))
    except (ValueError, TypeError):
        # Not JAX's message, which prints every array.
        given = jax.tree.structure(tree)
        raise ValueError(
            f"{argument} must have the structure of params, {treedef}, got {given}"
        ) from None


def is_sparse_in(held: PyTree) -> PyTree:
    """A tree of bool that is true where a tree of our state holds an array."""
    return jax.tree.map(lambda leaf: not is_masked(leaf), held, is_leaf=is_masked)
