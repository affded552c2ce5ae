"""Measure how far a point is from solving the sparse problem to first order."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array

from . import _checks
from ._dtypes import wide_dtype
from .arguments import read_arguments, read_sparsity
from .projection import apply_support, select

__all__ = ["stationarity_gap"]


def stationarity_gap(
    x: Any,
    gradient: Any,
    delta: float,
    sparsity: Any,
    importance: Any = None,
    layout: Any = None,
) -> Array:
    """Return how far a point is from delta-stationarity, 0 if it is delta-stationary.

    The gap is ``|x - y|_P^2 - |proj(y) - y|_P^2`` with ``y = x - gradient / delta``. A
    sparse point is delta-stationary if no sparse point is nearer to its gradient step y. A
    fixed point of ADMM with a constant penalty lambda is delta-stationary for
    ``delta = lambda``.

    Parameters
    ----------
    x, gradient : array, or list, tuple or mapping of arrays
        A point and the loss gradient at that point, of the same shapes.
    delta : float
        Inverse step size, positive. Use lambda at a fixed point of ADMM.
    sparsity, importance, layout
        See `project`.

    Returns
    -------
    array
        A scalar. It is non-negative up to rounding if ``x`` is sparse; a dense ``x`` can make
        it negative.

    Raises
    ------
    TypeError, ValueError
        As `project`, or if ``delta`` is not positive.

    References
    ----------
    Lee et al. 2025, Definition 3.4 and Corollary 3.6.

    Examples
    --------
    >>> import numpy
    >>> x, gradient = numpy.asarray([2.0, 0.0]), numpy.asarray([0.0, 1.0])
    >>> float(stationarity_gap(x, gradient, 1.0, 0.5))
    0.0
    >>> float(stationarity_gap(x, gradient, 0.25, 0.5))  # -4 is worth keeping, not 2
    12.0
    """
    if _checks.real("delta", delta, low=0.0) == 0:
        raise ValueError(f"delta must be positive, got {delta!r}")
    pattern = read_sparsity(sparsity, x)
    point = read_arguments(x, importance, layout)
    slope = read_arguments(gradient, None, layout)
    shapes = [tuple(a.shape) for a in point.arrays], [tuple(g.shape) for g in slope.arrays]
    if shapes[0] != shapes[1]:
        raise ValueError(f"gradient must have the shapes of x {shapes[0]}, got {shapes[1]}")
    xp = array_namespace(*point.arrays, *slope.arrays)
    dtype = wide_dtype(xp, [*point.arrays, *slope.arrays])
    x_wide = [xp.astype(a, dtype) for a in point.arrays]
    y = [a - xp.astype(g, dtype) / delta for a, g in zip(x_wide, slope.arrays, strict=True)]
    support = select(
        y, pattern, importance=point.importance, layouts=point.layouts, names=point.names
    )
    gap = xp.zeros((), dtype=dtype)
    for a, b, nearest, p in zip(
        x_wide, y, apply_support(y, support), point.importance, strict=True
    ):
        # The two squares agree on most entries. Summing their differences entry by entry
        # cancels there exactly; a difference of two large sums would lose a small gap.
        terms = (a - b) ** 2 - (nearest - b) ** 2
        gap = gap + xp.sum(terms if p is None else xp.astype(p, dtype) * terms)
    return gap
