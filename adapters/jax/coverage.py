"""List which weights of a parameter tree become sparse, and why the others stay dense."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from safe_core.coverage import Coverage, WeightCoverage
from safe_core.layout import chosen_layout

from .leaves import check_arrays, check_one_copy, flag_of
from .tree import is_function, layout_by_path, leaves_like
from .weights import is_prunable, known_layouts, name_of, owner_of

__all__ = ["coverage"]

PyTree = Any
_DENSE_BY_RULE = ("bias", "b", "scale", "offset", "embedding", "embeddings")


def coverage(params: PyTree, *, where: Any = None, layout: Any = None) -> Coverage:
    """List the weights that `sparse_optimizer` makes sparse, and why the others stay dense.

    A weight is a leaf of two or more axes, not counting the batch axes of its layout. Print
    the result once before training: a compiled step cannot warn about a weight that nobody
    selected. It needs no values, so ``params`` may come from `jax.eval_shape`.

    Parameters
    ----------
    params : pytree
    where, layout : optional
        As for `sparse_optimizer`.

    Returns
    -------
    safe_core.Coverage
        Its ``unexpected`` weights stay dense although neither ``where`` nor a rule excludes them.

    Raises
    ------
    TypeError, ValueError
        If a leaf is no array, or ``where`` or ``layout`` does not fit ``params``.

    Examples
    --------
    >>> params = {"Dense_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    ...           "decoder": {"weight": jnp.ones((2, 3))}}
    >>> found = coverage(params)
    >>> [w.name for w in found.sparse], [w.name for w in found.unexpected]
    (['Dense_0/kernel'], ['decoder/weight'])
    """
    check_one_copy(params)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    named = [(name_of(path), leaf) for path, leaf in paths]
    check_arrays("params", named)
    given = layout_by_path(layout, [name for name, _ in named], "params")
    if where is None or is_function(where):
        flags = [None if where is None else where(*leaf) for leaf in named]
    else:
        flags = leaves_like("where", where, treedef)
    found = []
    owners = [owner_of(params, path) for path, _ in paths]
    known = known_layouts(named, owners, params)
    for (name, leaf), owner, own, flag in zip(named, owners, known, flags, strict=True):
        chosen = is_prunable(name, leaf, owner) if where is None else flag_of("where", name, flag)
        axes = chosen_layout(name, leaf, given, own)
        stacked = 0 if axes is None else len(axes.batch_axes)
        if leaf.ndim - stacked >= 2 or chosen:
            reason, expected = ("", True) if chosen else _reason(name, leaf, where)
            found.append(WeightCoverage(name, tuple(leaf.shape), reason, expected))
    return Coverage(tuple(found))


def _reason(name: str, leaf: Any, where: Any) -> tuple[str, bool]:
    """Return why a leaf stays dense, and whether that was chosen or is documented."""
    if where is not None:
        return "where is False for it", True
    key = name.split("/")[-1]
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}", True
    if key in _DENSE_BY_RULE:
        return f"a leaf named {key!r} stays dense by default", True
    return f"its path ends in {key!r}, which names no weight (select it with where=)", False
