"""The P-weighted projection onto a set of sparse arrays.

P is diagonal and the set is a union of coordinate subspaces, so the nearest point
keeps the entries on the best support and zeroes the rest. Projecting is choosing a
support: score each unit, keep the best units of each comparison pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of, selecting_on_host, selects_on_host

from .arguments import read_arguments, read_sparsity
from .layout import Layout, resolve
from .patterns import Pattern
from .scores import common, entry_scores, unit_squares

__all__ = ["Projection", "apply_support", "project", "select"]


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
    """Return masks of the support that maximises the sum of ``P_ii v_i**2``.

    The kernel of `project`, without its checks of values, so that it can be traced.
    ``step`` picks the stage of a sparsity that changes over time; None is its end.
    """
    if not arrays:
        return []
    if selects_on_host() and any(backend_of(x).on_several_devices(x) for x in arrays):
        raise ValueError(
            "select_on_host must be False for arrays on several devices, got True and an array "
            f"of shape {tuple(arrays[0].shape)}"
        )
    xp = array_namespace(*arrays)
    resolved = [
        None if layout is None else resolve(layout, x.ndim, name)
        for x, layout, name in zip(arrays, layouts, names, strict=True)
    ]
    if pattern.ranks == "entries":
        scores = entry_scores(arrays, importance, names, joint=pattern.joint, xp=xp)
    else:
        scores = unit_squares(arrays, importance, joint=pattern.joint, xp=xp)
    units = [
        pattern.units(score, layout, name, xp=xp)
        for score, layout, name in zip(scores, resolved, names, strict=True)
    ]
    # Sums over units can differ in dtype; units that compete need one.
    alike = common([unit.scores for unit in units], joint=pattern.joint, xp=xp)
    units = [unit._replace(scores=s) for unit, s in zip(units, alike, strict=True)]
    masks = pattern.keep(units, names, pattern.stage(step), xp=xp)
    return [unit.expand(mask) for unit, mask in zip(units, masks, strict=True)]
