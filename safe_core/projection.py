"""Project onto the nearest sparse point in the norm of a diagonal P.

The set C of sparse points is a union of coordinate subspaces and P is diagonal. So the
nearest point keeps the entries on the best support unchanged and zeroes the rest. Projecting
thus means to choose a support: score every unit and keep the best units of each pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of, selecting_on_host, selects_on_host

from .arguments import read_arguments, read_sparsity
from .layout import Layout, resolve
from .patterns import Pattern, Units
from .scores import common, entry_scores, unit_squares
from .stacking import alike, apart, stacked, with_batch_axis, without_batch_axis

__all__ = ["Projection", "apply_support", "project", "select"]


class Projection(NamedTuple):
    """A projected point.

    Attributes
    ----------
    values : array, or list, tuple or dict of arrays
        Nearest sparse point, with the structure, shapes and dtypes of the argument. Kept
        entries equal those of the argument bit for bit; the others are +0.
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

    Returns ``argmin_{z in C} sum_i P_ii (z_i - v_i)**2``, where C is the set of points whose
    support the pattern allows. In every pool of ``n`` units exactly ``floor(sparsity * n)``
    are zeroed. Ties are broken by position: the earlier array in the list, then the lower
    row-major index, is kept.

    Parameters
    ----------
    arrays : array, or list, tuple or mapping of arrays
        Point ``v``: real floating arrays of any array API library, of any shape, stride and
        byte order.
    sparsity : float, str, pattern or mapping
        A fraction of zeros in [0, 1), ``"N:M"``, `Unstructured`, `NM`, `Block` or `Channel`, or
        a mapping of names to them, see `ByName`.
    importance : optional
        Diagonal of P, finite and non-negative, in the structure of ``arrays``: for each array
        a scalar, an array that broadcasts axis by axis, or one value per input feature. P = 1
        where omitted.
    layout : Layout, or list or mapping of Layout, optional
        Roles of the axes. The default is (output, input, ...).
    select_on_host : bool
        Whether to copy the scores to the host and select there. It is faster in JAX on the
        CPU; on an accelerator it costs one transfer. Sharded arrays are refused.

    Returns
    -------
    Projection
        ``values`` and ``support`` in the structure of ``arrays``. The arrays of one call may
        be views of one allocation, so keeping one of them can keep all of them alive.

    Raises
    ------
    TypeError
        If an array is not real floating, has a mask or is not dense, or ``sparsity`` is not a
        static value.
    ValueError
        If an entry is NaN, an importance is negative, not finite or of the wrong shape, a
        pattern does not fit an array, or ``select_on_host`` is set for sharded arrays. The
        message names the array. Values of traced arrays are not checked.

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
    pattern.check_names(point.names)
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
    """Return the arrays with the entries on the support unchanged and the others +0.

    Multiplying by the mask would turn infinity into NaN and leave -0 for negative entries.
    """
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
    """Return masks of the support that maximises the sum of ``P_ii v_i**2``.

    That support minimises the distance, which is the sum over the entries it drops. This is
    `project` without checks of values, so that it can be traced. ``step`` selects the stage
    of a sparsity schedule; None selects the last.
    """
    if not arrays:
        return []
    if selects_on_host() and any(backend_of(x).on_several_devices(x) for x in arrays):
        raise ValueError(
            "select_on_host must be False for arrays on several devices, got True and an array "
            f"of shape {tuple(arrays[0].shape)}"
        )
    resolved = tuple(
        None if layout is None else resolve(layout, x.ndim, name)
        for x, layout, name in zip(arrays, layouts, names, strict=True)
    )
    chosen = (pattern, resolved, tuple(names))
    # Stages are operands and not static, so all steps share a program. A single stage is known.
    stages = [part.stage(step) if len(part.fractions()) > 1 else None for part in pattern.parts]
    program = backend_of(arrays[0]).as_program
    found: list[Array] = program(_select_by_pattern, chosen, list(arrays), list(importance), stages)
    return found


def _select_by_pattern(
    pattern: Pattern,
    layouts: Sequence[Layout | None],
    names: Sequence[str],
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    stages: Sequence[int | Array | None],
) -> list[Array]:
    """Return the masks of `select`, with each array under its own pattern.

    Axes of ``layouts`` are not negative. ``stages`` holds the stage of each part of the pattern,
    or None for a part that has one stage.
    """
    if all(pattern.of(name) is pattern for name in names):
        return _select(arrays, importance, layouts, names, pattern, stages[0])
    stage_of = dict(zip(pattern.parts, stages, strict=True))
    masks: list[Array] = list(arrays)
    by_pattern: dict[Pattern, list[int]] = {}
    for i, name in enumerate(names):
        by_pattern.setdefault(pattern.of(name), []).append(i)
    for own, members in by_pattern.items():
        found = _select(
            [arrays[i] for i in members],
            [importance[i] for i in members],
            [layouts[i] for i in members],
            [names[i] for i in members],
            own,
            stage_of[own],
        )
        for i, mask in zip(members, found, strict=True):
            masks[i] = mask
    return masks


def _select(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    layouts: Sequence[Layout | None],
    names: Sequence[str],
    pattern: Pattern,
    stage: int | Array | None,
) -> list[Array]:
    """Return masks of the support of arrays that have one pattern."""
    stage = pattern.stage(None) if stage is None else stage
    groups = _groups(arrays, importance, layouts, names, pattern)
    masks = _select_each(arrays, importance, layouts, names, pattern, stage, groups)
    return apart(masks, groups)


def _groups(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    resolved: Sequence[Layout | None],
    names: Sequence[str],
    pattern: Pattern,
) -> list[list[int]]:
    """Return lists of the positions of arrays that are pruned as one stack."""
    # Arrays whose entries compete by magnitude need no score of their own, nor a stack.
    scored = pattern.ranks == "units" or pattern.counts_in_tensors or importance[0] is not None
    gains = scored if pattern.joint else not pattern.couples_arrays
    if not (pattern.stacks and gains and backend_of(arrays[0]).joins(arrays)):
        return [[i] for i in range(len(arrays))]
    for x, layout, name in zip(arrays, resolved, names, strict=True):
        pattern.check(tuple(x.shape), layout, name)
    return alike(arrays, importance, resolved)


def _select_each(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    resolved: Sequence[Layout | None],
    names: Sequence[str],
    pattern: Pattern,
    stage: int | Array,
    groups: Sequence[Sequence[int]],
) -> list[Array]:
    """Return masks of the support for each stack, given layouts with non-negative axes."""
    xp = array_namespace(*arrays)
    values = [stacked(arrays, members) for members in groups]
    weights = [stacked(importance, members) for members in groups]
    layouts = [resolved[m[0]] if len(m) == 1 else with_batch_axis(resolved[m[0]]) for m in groups]
    first = [names[members[0]] for members in groups]
    # Entries rank by sqrt(P) |v|, which has the order of P v^2 but does not underflow. Units
    # of several entries rank by a sum, which needs the squares themselves.
    if pattern.ranks == "entries":
        scores = entry_scores(values, weights, pattern, layouts, first, xp=xp)
    else:
        scores = unit_squares(values, weights, pattern, layouts, first, xp=xp)
    units = [
        pattern.units(score, layout, name, xp=xp)
        for score, layout, name in zip(scores, layouts, first, strict=True)
    ]
    # Sums over units can differ in dtype; units that compete need one.
    comparable = common([unit.scores for unit in units], joint=pattern.joint, xp=xp)
    units = [unit._replace(scores=s) for unit, s in zip(units, comparable, strict=True)]
    units = pattern.with_floor(units, first, stage, xp=xp)
    if pattern.joint and len(groups) < len(arrays):
        masks = _keep_apart(units, names, pattern, stage, groups, xp)
    else:
        masks = pattern.keep(units, first, stage, xp=xp)
    return [unit.expand(mask) for unit, mask in zip(units, masks, strict=True)]


def _keep_apart(
    units: Sequence[Units],
    names: Sequence[str],
    pattern: Pattern,
    stage: int | Array,
    groups: Sequence[Sequence[int]],
    xp: Any,
) -> list[Array]:
    """Return masks of stacked units that compete in the order of their arrays.

    Of equal scores the first is kept, and a stack would change which is the first.
    """
    layouts: dict[int, Layout | None] = {}
    for unit, members in zip(units, groups, strict=True):
        layout = unit.layout if len(members) == 1 else without_batch_axis(unit.layout)
        layouts |= dict.fromkeys(members, layout)
    scores = apart([unit.scores for unit in units], groups)
    single = [Units(score, layouts[i], lambda mask: mask) for i, score in enumerate(scores)]
    masks = pattern.keep(single, names, stage, xp=xp)
    return [stacked(masks, members) for members in groups]
