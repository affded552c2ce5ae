"""Selection within rows by threshold, for libraries that run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Array

__all__ = ["keep_largest_per_row"]

KthLargest = Callable[[Array, int], Array]
"""``(keys of shape (rows, n), k) -> k-th largest key of each row, shape (rows, 1)``."""


def keep_largest_per_row(
    keys: Array, k: int, kth_largest: KthLargest, *, xp: Any, can_branch: bool = True
) -> Array:
    """Mask of the ``k`` largest of each row; ``can_branch`` where reading a value is free.

    Keys above the k-th largest are kept; of those equal to it, as many as are still
    missing, the lowest index first.
    """
    rows, n = keys.shape
    if k == 0 or n == 0 or rows == 0:
        return xp.zeros_like(keys, dtype=xp.bool)
    if k == n:
        return xp.ones_like(keys, dtype=xp.bool)
    threshold = kth_largest(keys, k)
    at_least = keys >= threshold
    if can_branch and int(xp.count_nonzero(at_least)) == k * rows:
        return at_least
    tied = keys == threshold
    above = at_least & ~tied
    missing = k - xp.count_nonzero(above, axis=1, keepdims=True)
    order = xp.cumulative_sum(xp.astype(tied, xp.int64), axis=1)
    return above | (tied & (order <= missing))
