"""The P-weighted projection onto a set of sparse arrays.

P is diagonal and the set is a union of coordinate subspaces, so the nearest point
keeps the entries on the best support and zeroes the rest. Projecting is choosing a
support: score each unit, keep the best units of each comparison pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of, selecting_on_host

from .arguments import read_arguments, read_sparsity
from .budgets import layer_fractions
from .layout import Layout, inverse, merge, resolve, rows_first
from .scores import common, entry_scores, unit_squares
from .sparsity import (
    NM,
    Block,
    Channel,
    Pattern,
    Unstructured,
    fractions,
    kept_counts,
    stage,
)

__all__ = ["Projection", "project", "select"]

_RANKED_GROUP = 16  # up to this size a group is ranked by comparing all pairs


class Projection(NamedTuple):
    """A projected point.

    Attributes
    ----------
    values : array, or list, tuple or dict of arrays
        The nearest sparse point, of the structure, shapes and dtypes of the argument.
        Kept entries are the argument's own, bit for bit; the others are +0.
    support : bool array, or list, tuple or dict of them
        True where an entry is kept. A kept entry may itself be zero.

    Examples
    --------
    >>> import numpy
    >>> values, support = project(numpy.asarray([3.0, -1.0]), 0.5)
    >>> values, support
    (array([3., 0.]), array([ True, False]))
    """

    values: Any
    support: Any


def project(
    arrays: Any,
    sparsity: Any,
    importance: Any = None,
    layout: Any = None,
    *,
    select_on_host: bool = False,
) -> Projection:
    """Project onto the nearest sparse point in the norm of a diagonal ``P``.

    ``argmin_{z in C} sum_i P_ii (z_i - v_i)**2``, where C is the set of points whose
    support the pattern allows. Every pool of ``n`` units loses exactly
    ``floor(sparsity * n)`` of them. Of equal scores the lowest (position of the array
    in the list, row-major index) is kept.

    Parameters
    ----------
    arrays : array, or list, tuple or mapping of arrays
        The point ``v``: real floating arrays of any array API library, of any shape.
    sparsity : float, str or pattern
        A fraction of zeros in [0, 1), ``"N:M"``, or `Unstructured`, `NM`, `Block` or
        `Channel`.
    importance : optional
        The diagonal of P, finite and non-negative, in the structure of ``arrays``: for
        each array a scalar, an array that broadcasts axis by axis, or one value per
        input feature. P = 1 where omitted.
    layout : Layout, or list or mapping of Layout, optional
        Roles of the axes; (output, input, ...) unless told otherwise.
    select_on_host : bool
        Copy the scores to the host and select there: faster in JAX on the CPU, and one
        transfer elsewhere. Not for sharded arrays.

    Returns
    -------
    Projection
        ``values`` and ``support`` in the structure of ``arrays``. The arrays of one call
        may share one allocation.

    Raises
    ------
    TypeError
        If an array is not real floating or ``sparsity`` is not a static value.
    ValueError
        If an entry is NaN, an importance is negative, not finite or of the wrong shape,
        or a pattern does not fit an array. The message names the array. Values are
        checked where they can be read, which a traced program cannot. If
        ``select_on_host`` is set for sharded arrays.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning",
    section 3.4.

    Examples
    --------
    >>> import numpy
    >>> v = numpy.asarray([[1.0, -3.0, 2.0, 0.5]])
    >>> project(v, "2:4").values
    array([[ 0., -3.,  2.,  0.]])
    >>> project(v, 0.75, importance=numpy.asarray([100.0, 1.0, 1.0, 1.0])).support
    array([[ True, False, False, False]])
    """
    pattern = read_sparsity(sparsity, arrays)
    point = read_arguments(arrays, importance, layout)
    with selecting_on_host(select_on_host):
        support = select(
            point.arrays,
            pattern,
            importance=point.importance,
            layouts=point.layouts,
            names=point.names,
        )
    return Projection(point.rebuild(apply_support(point.arrays, support)), point.rebuild(support))


def apply_support(arrays: Sequence[Array], support: Sequence[Array]) -> list[Array]:
    """Keep the entries on the support, bit for bit, and zero the rest."""
    return backend_of(arrays[0]).where_kept(arrays, support) if arrays else []


def select(
    arrays: Sequence[Array],
    pattern: Pattern,
    *,
    importance: Sequence[Array | None],
    layouts: Sequence[Layout | None],
    names: Sequence[str],
    step: int | Array | None = None,
) -> list[Array]:
    """Masks of the support that maximises the sum of ``P_ii v_i**2``.

    The kernel of `project`, without its checks of values: it traces. ``step`` picks the
    stage of a sparsity that changes over time; None is its end.
    """
    if not arrays:
        return []
    xp = array_namespace(*arrays)
    resolved = [
        None if layout is None else resolve(layout, x.ndim, name)
        for x, layout, name in zip(arrays, layouts, names, strict=True)
    ]
    at = stage(pattern, step)
    if isinstance(pattern, NM):
        scores = entry_scores(xp, arrays, importance, names, joint=False)
        return [
            _select_groups(xp, score, pattern, layout, name)
            for score, layout, name in zip(scores, resolved, names, strict=True)
        ]
    joint = pattern.scope == "global"
    expand: Callable[[int, Array], Array]
    if isinstance(pattern, Unstructured):
        scores = entry_scores(xp, arrays, importance, names, joint=joint)
        plans, expand = resolved, lambda i, mask: mask
    else:
        squares = unit_squares(xp, arrays, importance, joint=joint)
        units = [
            _channels(xp, square, layout, name)
            if isinstance(pattern, Channel)
            else _blocks(xp, square, pattern, layout, name)
            for square, layout, name in zip(squares, resolved, names, strict=True)
        ]
        scores = common(xp, [unit.scores for unit in units], joint=joint)
        plans = [unit.layout for unit in units]
        expand = lambda i, mask: units[i].expand(mask)  # noqa: E731
    if joint:
        counts = kept_counts(fractions(pattern), sum(math.prod(s.shape) for s in scores))
        masks = backend_of(scores[0]).keep_largest(scores, counts, at)
    else:
        by_output = pattern.scope == "row"
        spread = layer_fractions(pattern, [tuple(s.shape) for s in scores], plans, names)
        masks = [
            _select_rows(xp, score, stages, by_output, plan, name, at)
            for score, stages, plan, name in zip(scores, spread, plans, names, strict=True)
        ]
    return [expand(i, mask) for i, mask in enumerate(masks)]


# Pools


def _select_rows(
    xp: Any,
    score: Array,
    stages: Sequence[Fraction],
    by_output: bool,
    layout: Layout | None,
    name: str,
    at: int | Array,
) -> Array:
    """Select within one array, or each of its rows, by fractions of zeros."""
    if by_output:
        layout = _roles(layout, name, "scope 'row'")
    order = rows_first(layout or Layout(), score.ndim, by_output=by_output)
    pools = len(layout.batch_axes + layout.output_axes * by_output) if layout else 0
    n = math.prod(score.shape[axis] for axis in order[pools:])
    counts = kept_counts(stages, n)
    if math.prod(score.shape[axis] for axis in order[:pools]) == 1:
        return backend_of(score).keep_largest([score], counts, at)[0]

    def within(score: Array) -> Array:
        shape = tuple(score.shape[axis] for axis in order)
        table = xp.reshape(xp.permute_dims(score, order), (math.prod(shape[:pools]), n))
        mask = backend_of(score).keep_largest_per_row(table, counts, at)
        return xp.permute_dims(xp.reshape(mask, shape), inverse(order))

    return _by_unit(within, score, dict.fromkeys(order[pools:], 0))


def _by_unit(fn: Callable[[Array], Array], score: Array, units: dict[int, int]) -> Array:
    """A mask by ``fn``, which sees whole units only where the scores are sharded."""
    backend = backend_of(score)
    whole = backend.regrouped(score, units)
    return backend.resharded_as(score, backend.shardwise(fn, whole))


def _select_groups(xp: Any, score: Array, pattern: NM, layout: Layout | None, name: str) -> Array:
    """Keep ``n`` of every ``m`` along the input axis."""
    layout = _roles(layout, name, "an N:M pattern", inputs=True)
    axes = layout.input_axes
    shape, axis = merge(score.shape, axes, name)
    whole_units(shape[axis], pattern.m, pattern.ragged, name, "input")

    def within(score: Array) -> Array:
        shape, axis = merge(score.shape, axes, name)
        whole = shape[axis] - shape[axis] % pattern.m
        full = xp.reshape(score, shape)
        head = _slice(full, axis, whole)
        grouped = (*shape[:axis], whole // pattern.m, pattern.m, *shape[axis + 1 :])
        mask = _keep_in_groups(xp, xp.reshape(head, grouped), axis + 1, pattern.n)
        return xp.reshape(_pad(xp, xp.reshape(mask, head.shape), axis, full), score.shape)

    return _by_unit(within, score, dict.fromkeys(axes, pattern.m if len(axes) == 1 else 0))


def _keep_in_groups(xp: Any, scores: Array, axis: int, n: int) -> Array:
    m = scores.shape[axis]
    if m > _RANKED_GROUP:
        order = (*(a for a in range(scores.ndim) if a != axis), axis)
        moved = xp.permute_dims(scores, order)
        table = xp.reshape(moved, (math.prod(moved.shape[:-1]), m))
        mask = backend_of(scores).keep_largest_per_row(table, (n,), 0)
        return xp.permute_dims(xp.reshape(mask, moved.shape), inverse(order))
    keys = backend_of(scores).ordering_key(scores)
    entries = [_slice(keys, axis, j + 1, start=j) for j in range(m)]
    masks = []
    for i, key in enumerate(entries):
        rank = xp.zeros_like(key, dtype=xp.int32)
        for j, other in enumerate(entries):
            # Entry j goes before entry i if it is larger, or equal and lower in index.
            if j != i:
                rank = rank + xp.astype(other >= key if j < i else other > key, xp.int32)
        masks.append(rank < n)
    return xp.concat(masks, axis=axis)


class _Units(NamedTuple):
    """Scores of the units of one array, and how a mask of units covers its entries."""

    scores: Array
    layout: Layout
    expand: Callable[[Array], Array]


def _channels(xp: Any, squares: Array, layout: Layout | None, name: str) -> _Units:
    layout = _roles(layout, name, "a Channel pattern", outputs=True)
    kept = layout.output_axes + layout.batch_axes
    axes = tuple(axis for axis in range(squares.ndim) if axis not in kept)
    backend = backend_of(squares)
    whole = backend.regrouped(squares, dict.fromkeys(axes, 0))
    scores = whole
    if axes:
        scores = backend.shardwise(lambda part: xp.sum(part, axis=axes, keepdims=True), whole)

    def cover(part: Array, mask: Array) -> Array:
        return mask & xp.ones_like(part, dtype=xp.bool)

    return _Units(scores, layout, _expansion(squares, whole, cover))


def _blocks(xp: Any, squares: Array, pattern: Block, layout: Layout | None, name: str) -> _Units:
    """Cut the output and input axes into blocks; the units keep their storage order."""
    layout = _roles(layout, name, "a Block pattern", inputs=True, outputs=True)
    plan = _BlockPlan.of(squares.shape, pattern, layout, name)
    for size, unit, role in plan.blocks.values():
        whole_units(size, unit, pattern.ragged, name, role)
    backend = backend_of(squares)
    whole = backend.regrouped(squares, plan.units(squares.ndim))

    def add(part: Array) -> Array:
        own = _BlockPlan.of(part.shape, pattern, layout, name)
        head = xp.reshape(part, own.merged)
        for axis, size in enumerate(own.wholes):
            head = _slice(head, axis, size)
        return xp.sum(xp.reshape(head, own.split), axis=own.inner, keepdims=True)

    def cover(part: Array, mask: Array) -> Array:
        own = _BlockPlan.of(part.shape, pattern, layout, name)
        mask = xp.reshape(xp.broadcast_to(mask, own.split), own.wholes)
        like = xp.reshape(part, own.merged)
        for axis in range(mask.ndim):
            mask = _pad(xp, mask, axis, like)
        return xp.reshape(mask, part.shape)

    scores = backend.shardwise(add, whole, axes=plan.places)
    return _Units(scores, Layout(batch_axes=plan.batch), _expansion(squares, whole, cover))


def _expansion(
    squares: Array, whole: Array, cover: Callable[[Array, Array], Array]
) -> Callable[[Array], Array]:
    """From a mask of units to one of entries, by ``cover`` on shards that cut no unit."""
    backend = backend_of(squares)
    return lambda mask: backend.resharded_as(squares, backend.shardwise(cover, whole, mask))


class _BlockPlan(NamedTuple):
    """How an array of one shape is cut into blocks."""

    merged: tuple[int, ...]  # shape with each role on one axis
    wholes: tuple[int, ...]  # the same, less the ragged tails
    split: tuple[int, ...]  # wholes, with each role cut into (blocks, block)
    inner: tuple[int, ...]  # axes of split that run within a block
    batch: tuple[int, ...]  # axes of split along which tensors are stacked
    places: dict[int, int]  # axis to axis of split, where it may be cut by shards
    blocks: dict[int, tuple[int, int, str]]  # first axis of a role: its size, a block's, its name

    @classmethod
    def of(cls, shape: Sequence[int], pattern: Block, layout: Layout, name: str) -> _BlockPlan:
        shape = tuple(shape)
        units = dict(zip(("output", "input"), pattern.shape, strict=True))
        axes_of = {"output": layout.output_axes, "input": layout.input_axes}
        roles = {axes[0]: role for role, axes in axes_of.items()}
        merged: list[int] = []
        wholes: list[int] = []
        split: list[int] = []
        inner: list[int] = []
        batch: list[int] = []
        places, blocks = {}, {}
        for axis, size in enumerate(shape):
            if axis in roles:
                role = roles[axis]
                unit = units[role]
                size = merge(shape, axes_of[role], name)[0][axis]
                blocks[axis] = (size, unit, role)
                if len(axes_of[role]) == 1:
                    places[axis] = len(split)
                merged.append(size)
                wholes.append(size - size % unit)
                inner.append(len(split) + 1)
                split += [size // unit, unit]
            elif axis not in layout.output_axes + layout.input_axes:
                if axis in layout.batch_axes:
                    batch.append(len(split))
                places[axis] = len(split)
                merged.append(size)
                wholes.append(size)
                split.append(size)
        axes = tuple(inner), tuple(batch)
        return cls(tuple(merged), tuple(wholes), tuple(split), *axes, places, blocks)

    def units(self, ndim: int) -> dict[int, int]:
        """Lengths along the axes that shards must not cut, 0 for the whole axis."""
        alone = {axis: self.blocks[axis][1] if axis in self.blocks else 1 for axis in self.places}
        return {axis: alone.get(axis, 0) for axis in range(ndim)}


def _roles(
    layout: Layout | None, name: str, what: str, *, inputs: bool = False, outputs: bool = False
) -> Layout:
    """Return the layout, or raise where it does not say what a pattern needs."""
    if layout is None:
        raise ValueError(
            f"layout of {name} is unknown, and {what} needs the roles of its axes; "
            "pass layout=Layout(input_axes=..., output_axes=...) for it"
        )
    if (inputs and not layout.input_axes) or (outputs and not layout.output_axes):
        role = "input_axes" if inputs and not layout.input_axes else "output_axes"
        raise ValueError(f"layout of {name} must name {role} for {what}, got {layout!r}")
    return layout


def whole_units(size: int, unit: int, ragged: str, name: str, role: str) -> int:
    if size % unit and ragged == "error":
        raise ValueError(
            f"the {role} axis of {name} has {size} entries, which {unit} does not divide; "
            "pass ragged='dense' to the pattern to leave its tail dense"
        )
    return size - size % unit


def _slice(x: Array, axis: int, stop: int, start: int = 0) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop), Ellipsis)]


def _pad(xp: Any, mask: Array, axis: int, like: Array) -> Array:
    """Append kept entries along an axis, up to the size that ``like`` has there."""
    if mask.shape[axis] == like.shape[axis]:
        return mask
    tail = tuple(
        slice(size, None) if a == axis else slice(0, size) for a, size in enumerate(mask.shape)
    )
    return xp.concat([mask, xp.ones_like(like[tail], dtype=xp.bool)], axis=axis)
