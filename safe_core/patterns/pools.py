"""Select units within one array: in the whole array, in each row, or in small groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from safe_core.backends import Array, backend_of
from safe_core.layout import Layout, inverse, rows_first

from .counts import kept_counts, require_roles

__all__ = [
    "expansion",
    "in_pools",
    "keep_in_groups",
    "keep_within",
    "on_whole_units",
    "pad_kept",
    "take",
]

# Up to this size comparing all pairs of a group is faster than selecting its largest entries.
_RANKED_GROUP = 16


def keep_within(
    scores: Array,
    stages: Sequence[Fraction],
    stage: int | Array,
    layout: Layout | None,
    name: str,
    *,
    by_output: bool,
    xp: Any,
) -> Array:
    """Return the mask of one array, with a fraction of zeros in each tensor or each row.

    ``stages`` holds the fraction of every stage of the sparsity schedule. Tensors stacked
    along batch axes are separate pools.
    """
    if by_output:
        layout = require_roles(layout, name, "scope 'row'", shape=scores.shape)
    order = rows_first(layout or Layout(), scores.ndim, by_output=by_output)
    pools = len(layout.batch_axes + layout.output_axes * by_output) if layout else 0
    n = math.prod(scores.shape[axis] for axis in order[pools:])
    counts = kept_counts(stages, n)
    # A single pool needs no table of rows, whose transposition would copy the array.
    if math.prod(scores.shape[axis] for axis in order[:pools]) == 1:
        return backend_of(scores).keep_largest([scores], counts=counts, stage=stage)[0]

    # A traced stage is an argument, because a function of local shards must not enclose it.
    traced = () if isinstance(stage, int) else (stage,)

    def within(scores: Array, stage: int | Array = stage) -> Array:
        shape = tuple(scores.shape[axis] for axis in order)
        table = xp.reshape(xp.permute_dims(scores, order), (math.prod(shape[:pools]), n))
        mask = backend_of(scores).keep_largest_per_row(table, counts=counts, stage=stage)
        return xp.permute_dims(xp.reshape(mask, shape), inverse(order))

    return on_whole_units(within, scores, dict.fromkeys(order[pools:], 0), *traced)


def in_pools(
    fn: Callable[[Array, tuple[int, ...] | None], Array],
    x: Array,
    layout: Layout | None,
    *,
    by_output: bool,
) -> Array:
    """Return ``fn(x, axes)``, where the entries of x along ``axes`` form one pool.

    The pools are those of `keep_within`. ``axes`` is None if there is a single pool.
    """
    order = rows_first(layout or Layout(), x.ndim, by_output=by_output)
    pools = len(layout.batch_axes + layout.output_axes * by_output) if layout else 0
    if math.prod(x.shape[axis] for axis in order[:pools]) == 1:
        return fn(x, None)
    axes = order[pools:]
    return on_whole_units(lambda part: fn(part, axes), x, dict.fromkeys(axes, 0))


def on_whole_units(
    fn: Callable[..., Array], scores: Array, units: Mapping[int, int], *others: Array
) -> Array:
    """Return ``fn(scores, *others)``, where each local shard of ``scores`` holds whole units only.

    ``units`` maps an axis to the length of a unit along it, 0 for the whole axis. Shards that
    cut a unit are resharded first. Arrays that are not sharded, as ``others``, are passed
    unchanged.
    """
    backend = backend_of(scores)
    whole = backend.regrouped(scores, units=units)
    return backend.resharded_as(scores, backend.shardwise(fn, whole, *others))


def expansion(
    scores: Array, whole: Array, cover: Callable[[Array, Array], Array]
) -> Callable[[Array], Array]:
    """Return the function that expands a mask of units to a mask of entries.

    ``cover(part, mask)`` expands the mask of one local shard. ``whole`` is ``scores``,
    resharded such that no shard cuts a unit.
    """
    backend = backend_of(scores)
    return lambda mask: backend.resharded_as(scores, backend.shardwise(cover, whole, mask))


def keep_in_groups(scores: Array, axis: int, n: int, *, xp: Any) -> Array:
    """Return the mask of the ``n`` entries of largest magnitude along ``axis``, one group."""
    m = scores.shape[axis]
    if m > _RANKED_GROUP:
        order = (*(a for a in range(scores.ndim) if a != axis), axis)
        moved = xp.permute_dims(scores, order)
        table = xp.reshape(moved, (math.prod(moved.shape[:-1]), m))
        mask = backend_of(scores).keep_largest_per_row(table, counts=(n,), stage=0)
        return xp.permute_dims(xp.reshape(mask, moved.shape), inverse(order))
    keys = backend_of(scores).ordering_key(scores)
    entries = [take(keys, axis, j + 1, start=j) for j in range(m)]
    masks = []
    for i, key in enumerate(entries):
        rank = xp.zeros_like(key, dtype=xp.int32)
        for j, other in enumerate(entries):
            # Entry j ranks before entry i if it is larger, or equal and lower in index.
            if j != i:
                rank = rank + xp.astype(other >= key if j < i else other > key, xp.int32)
        masks.append(rank < n)
    return xp.concat(masks, axis=axis)


def take(x: Array, axis: int, stop: int, start: int = 0) -> Array:
    """Return ``x[..., start:stop, ...]`` along one axis."""
    return x[(slice(None),) * axis + (slice(start, stop), Ellipsis)]


def pad_kept(mask: Array, axis: int, like: Array, *, xp: Any) -> Array:
    """Append kept entries along an axis, up to the size of ``like`` along it."""
    if mask.shape[axis] == like.shape[axis]:
        return mask
    tail = tuple(
        slice(size, None) if a == axis else slice(0, size) for a, size in enumerate(mask.shape)
    )
    return xp.concat([mask, xp.ones_like(like[tail], dtype=xp.bool)], axis=axis)
