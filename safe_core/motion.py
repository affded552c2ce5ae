"""Measure what a radius in steps of the base optimizer depends on.

Its state ``motion`` is an array of three numbers: the mean squares of the steps' lengths and of
the length of the sparse parameters, and the shrinkage b, which multiplies the radius by exp(-b).
"""

from __future__ import annotations

from array_api_compat import array_namespace

from safe_core.backends import Array

__all__ = [
    "MEASURE_INTERVAL",
    "is_measured",
    "mean_squares",
    "next_shrinkage",
    "with_lengths",
    "with_shrinkage",
]

MEASURE_INTERVAL = 8
"""Steps between two measurements of a step's length, which needs a copy of x in PyTorch."""

# A radius that is too large slows training at once, and one that is too small only helps less. So
# it shrinks faster than it recovers.
_SHRINK, _RECOVER = 1 / 4, 1 / 50

# Without a bound, noise such as that of dropout could shrink the radius so far that it would not
# recover within the run.
_LARGEST = 4.0


def is_measured(step: int | Array) -> bool | Array:
    """Return whether the length of the base optimizer's ``step`` is measured."""
    return step % MEASURE_INTERVAL == 0


def mean_squares(before: Array, lengths: Array, step: int | Array) -> Array:
    """Return mean squares over the measured steps, after one more of them.

    ``s <- s + (length^2 - s) / n`` with the number n of measured steps up to ``step``. The first
    length that is not zero sets s, so a parameter can join late. A length that is not finite
    leaves s as it is.

    Parameters
    ----------
    before : array
        Means before, 0 at the start.
    lengths : array
        The lengths at this step, shaped as ``before``.
    step : int or integer array
        Step t, for which `is_measured` is True.

    Examples
    --------
    >>> import numpy
    >>> s = mean_squares(numpy.zeros(2), numpy.asarray([2.0, 5.0]), 0)
    >>> mean_squares(s, numpy.asarray([0.0, 5.0]), MEASURE_INTERVAL)
    array([ 2., 25.])
    """
    xp = array_namespace(before)
    count = step // MEASURE_INTERVAL + 1
    if not isinstance(count, int):
        count = xp.astype(count, before.dtype)
    square = xp.astype(lengths, before.dtype, copy=False) ** 2
    found = xp.where(before > 0, before + (square - before) / count, square)
    return xp.where(xp.isfinite(found), found, before)


def next_shrinkage(shrinkage: Array, first: Array, second: Array, max_growth: float) -> Array:
    """Return the shrinkage b after a step that perturbed.

    ``b <- min(b + 1/4, 4)`` if ``second > max_growth * first``, else ``b <- max(b - 1/50, 0)``. The
    radius settles where about one step in fourteen exceeds ``max_growth``. Without a finite,
    positive ``first`` e is zero, and b stays as it is.

    Parameters
    ----------
    shrinkage : array
        Scalar b before, 0 at the start.
    first, second : arrays
        Scalar norms of the gradients at x and at x + e, in any real floating dtype. A ``second``
        that is not finite exceeds every growth.
    max_growth : float
        Ratio of the two; see `SAM`.

    Returns
    -------
    array
        Scalar in the dtype of ``shrinkage``.

    Examples
    --------
    >>> import numpy
    >>> b = next_shrinkage(numpy.asarray(0.0), numpy.asarray(1.0), numpy.asarray(2.0), 1.5)
    >>> float(b), float(next_shrinkage(b, numpy.asarray(1.0), numpy.asarray(1.2), 1.5))
    (0.25, 0.23)
    """
    xp = array_namespace(shrinkage)
    first, second = (xp.astype(x, shrinkage.dtype, copy=False) for x in (first, second))
    fits = second <= max_growth * first
    recovered = shrinkage - xp.minimum(shrinkage, xp.full_like(shrinkage, _RECOVER))
    largest = xp.full_like(shrinkage, _LARGEST)
    found = xp.where(fits, recovered, xp.minimum(shrinkage + _SHRINK, largest))
    return xp.where((first > 0) & xp.isfinite(first), found, shrinkage)


def with_shrinkage(motion: Array, shrinkage: Array) -> Array:
    """Return ``motion`` with another shrinkage. It may hold one state in each row.

    Examples
    --------
    >>> import numpy
    >>> with_shrinkage(numpy.asarray([4.0, 9.0, 0.0]), numpy.asarray(0.25))
    array([4.  , 9.  , 0.25])
    """
    xp = array_namespace(motion)
    last = xp.reshape(xp.astype(shrinkage, motion.dtype, copy=False), (1,))
    rows = motion[..., :2]
    return xp.concat([rows, xp.broadcast_to(last, (*rows.shape[:-1], 1))], axis=-1)


def with_lengths(motion: Array, lengths: Array, step: int | Array) -> Array:
    """Return ``motion`` after one more measured step; see `mean_squares`.

    ``motion`` and ``lengths`` may hold one state in each row.

    Examples
    --------
    >>> import numpy
    >>> with_lengths(numpy.asarray([0.0, 0.0, 0.25]), numpy.asarray([2.0, 3.0]), 0)
    array([4.  , 9.  , 0.25])
    """
    xp = array_namespace(motion)
    return xp.concat([mean_squares(motion[..., :2], lengths, step), motion[..., 2:]], axis=-1)
