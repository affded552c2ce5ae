"""List which weights of a parameter tree become sparse, and why the others stay dense."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp

from safe_core._calls import level_of_caller
from safe_core.backends import backend_of
from safe_core.coverage import Coverage, DenseWeightWarning, WeightCoverage, by_reason
from safe_core.layout import resolve
from safe_core.patterns import as_pattern
from safe_core.where import as_names

from .leaves import check_arrays, check_one_copy
from .tree import NamedLeaves

__all__ = ["coverage", "warn_of_free_zeros"]

PyTree = Any
_DENSE_BY_RULE = ("bias", "b", "scale", "offset", "embedding", "embeddings")


def coverage(
    params: PyTree, *, where: Any = None, layout: Any = None, sparsity: Any = None
) -> Coverage:
    """List the weights that `sparse_optimizer` makes sparse, and why the others stay dense.

    A weight is a leaf of two or more axes, not counting the batch axes of its layout. Print
    the result once before training: a compiled step cannot warn about a weight that nobody
    selected. It needs no values, so ``params`` may come from `jax.eval_shape`.

    Parameters
    ----------
    params : pytree
    where, layout : optional
        As for `sparse_optimizer`.
    sparsity : float, str or pattern, optional
        As for `safe_core.safe`. With it, a leaf too small for a unit of a pattern with
        ``ragged="dense"`` is listed as dense.

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
    leaves = NamedLeaves.of(params)
    check_arrays("params", leaves.named)
    layouts = leaves.layouts(layout, params, range(len(leaves.named)))
    pattern = None if sparsity is None else as_pattern(sparsity)
    found = []
    for (name, leaf), chosen, axes in zip(leaves.named, leaves.chosen(where), layouts, strict=True):
        stacked = 0 if axes is None else len(axes.batch_axes)
        if leaf.ndim - stacked >= 2 or chosen:
            reason, expected = ("", True) if chosen else _reason(name, leaf, where)
            if chosen and pattern is not None and axes is not None:
                shape, roles = tuple(leaf.shape), resolve(axes, leaf.ndim, name)
                reason = pattern.of(name).why_whole(shape, roles, name)
            found.append(WeightCoverage(name, tuple(leaf.shape), reason, expected))
    return Coverage(tuple(found))


def warn_of_free_zeros(user: str, params: PyTree, where: Any) -> None:
    """Warn about weights whose zeros ``user`` does not keep, because it does not know their names.

    A leaf that is zero everywhere was not pruned; it starts at zero. Traced values cannot be read.
    """
    leaves = dict(NamedLeaves.of(params).named)
    lost = [
        weight
        for weight in coverage(params, where=where).unexpected
        if 0 < _count_nonzero(leaves[weight.name]) < leaves[weight.name].size
    ]
    if lost:
        warnings.warn(
            f"{user} does not keep the zeros of {by_reason(lost)}. To silence this, pass where=",
            DenseWeightWarning,
            stacklevel=level_of_caller(),
        )


def _count_nonzero(leaf: Any) -> int:
    """Return the number of entries that are not zero, or -1 if the values cannot be read."""
    found = jnp.count_nonzero(leaf)
    return int(found) if backend_of(found).is_concrete(found) else -1


def _reason(name: str, leaf: Any, where: Any) -> tuple[str, bool]:
    """Return why a leaf stays dense, and whether that was chosen or is documented."""
    if where is not None:
        listed = as_names(where) is not None
        return "where does not list it" if listed else "where is False for it", True
    key = name.split("/")[-1]
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}", True
    if key in _DENSE_BY_RULE:
        return f"a leaf named {key!r} stays dense by default", True
    return f"its path ends in {key!r}, which names no weight (select it with where=)", False
