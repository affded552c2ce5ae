"""Selection by threshold, for libraries that run eagerly.

The threshold is the k-th largest key. Entries above it are kept; of those equal to
it, as many as are still missing, the lowest index first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from . import Array

__all__ = ["keep_largest", "keep_largest_per_row"]

KthLargest = Callable[[Array, int], Array]
"""``(keys of shape (rows, n), k) -> k-th largest key of each row, shape (rows, 1)``."""


def keep_largest_per_row(
    keys: Array, k: int, kth_largest: KthLargest, *, xp: Array, can_branch: bool = True
) -> Array:
    """Mask of the ``k`` largest of each row; ``can_branch`` where reading a value is free."""
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


def keep_largest(
    keys: Sequence[Array], k: int, kth_largest: KthLargest, *, xp: Array, can_branch: bool = True
) -> list[Array]:
    """Masks of the ``k`` largest of all arrays together."""
    sizes = [math.prod(key.shape) for key in keys]
    row = xp.concat([xp.reshape(key, (1, -1)) for key in keys], axis=1)
    mask = keep_largest_per_row(row, k, kth_largest, xp=xp, can_branch=can_branch)[0, :]
    starts = itertools.accumulate(sizes, initial=0)
    return [
        xp.reshape(mask[start : start + size], key.shape)
        for key, start, size in zip(keys, starts, sizes, strict=False)
    ]
