"""Numerics that backends share: the threshold of each row, and exponents of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Array

__all__ = ["NO_EXPONENT", "keep_largest_per_row", "parts"]

NO_EXPONENT = -1100
"""The exponent where there is no finite number but zero: below that of every float64."""

KthLargest = Callable[[Array, int], Array]
"""``(keys of shape (rows, n), k) -> k-th largest key of each row, shape (rows, 1)``."""


def parts(exponents: Array, *, wide: bool, xp: Any) -> tuple[Array, Array, Array]:
    """Return three integer arrays that sum to ``exponents``; 2 to each is a normal float.

    One factor from the smallest to the largest float64 or, if not ``wide``, float32 would itself
    overflow. Exponents beyond all quotients of two numbers are clipped.
    """
    bound = 3 * 1000 if wide else 3 * 120
    clipped = xp.clip(exponents, -bound, bound)
    part = clipped // 3
    return part, part, clipped - 2 * part


def keep_largest_per_row(
    keys: Array, *, k: int, kth_largest: KthLargest, xp: Any, can_branch: bool = True
) -> Array:
    """Return the mask of the ``k`` largest keys of each row.

    Keys above the k-th largest are kept. Ties with it fill the places that remain, the
    lowest index first.

    Parameters
    ----------
    keys : array of shape (rows, n)
        Keys that order as the scores do.
    k : int
        Number of entries to keep in each row.
    kth_largest : callable
        Finds the k-th largest key of each row.
    xp : namespace
        The array API namespace of ``keys``.
    can_branch : bool
        Whether a value may be read from the device to skip the work on ties.
    """
    rows, n = keys.shape
    if k == 0 or n == 0 or rows == 0:
        return xp.zeros_like(keys, dtype=xp.bool)
    if k == n:
        return xp.ones_like(keys, dtype=xp.bool)
    threshold = kth_largest(keys, k)
    at_least = keys >= threshold
    # Each row has at least k keys that reach its threshold, so a total of k per row means
    # that no row has a tie to cut. This is the common case for real weights. On an
    # accelerator the read would wait for all queued work, which costs more than the ties.
    if can_branch and int(xp.count_nonzero(at_least)) == k * rows:
        return at_least
    tied = keys == threshold
    above = at_least & ~tied
    missing = k - xp.count_nonzero(above, axis=1, keepdims=True)
    # A running count numbers the ties of a row from the left. It cuts them by index, which
    # makes the mask the same in every library, whatever order a sort leaves ties in.
    order = xp.cumulative_sum(xp.astype(tied, xp.int64), axis=1)
    return above | (tied & (order <= missing))
