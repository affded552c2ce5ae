"""Measure how far the steps of the base optimizer move the sparse parameters."""

from __future__ import annotations

from array_api_compat import array_namespace

from safe_core.backends import Array

__all__ = ["MEASURE_INTERVAL", "is_measured", "mean_squares"]

MEASURE_INTERVAL = 8
"""Steps between two measurements of a step's length, which needs a copy of x in PyTorch."""


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
        Means before, 0 at the start. For `SAM` two: of ``|x_{t+1} - x_t|`` and ``|x_t|``.
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
