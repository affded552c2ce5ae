"""NumPy: selection by partition, whose cost is linear."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat.numpy as xp
import numpy as np

from . import Array, threshold
from .standard import cond, is_concrete

__all__ = [
    "cond",
    "frexp",
    "is_concrete",
    "keep_largest",
    "keep_largest_per_row",
    "ordering_key",
]


def ordering_key(x: Array) -> Array:
    # Non-negative floats order as their bits do.
    return np.abs(x).view(f"i{x.dtype.itemsize}")


def frexp(x: Array) -> tuple[Array, Array]:
    mantissa, exponent = np.frexp(x)
    return mantissa, exponent


def kth_largest(keys: Array, k: int) -> Array:
    n = keys.shape[1]
    return np.partition(keys, n - k, axis=1)[:, n - k : n - k + 1]


def keep_largest(keys: Sequence[Array], counts: tuple[int, ...], stage: int) -> list[Array]:
    return threshold.keep_largest(keys, counts[stage], kth_largest, xp=xp)


def keep_largest_per_row(keys: Array, counts: tuple[int, ...], stage: int) -> Array:
    return threshold.keep_largest_per_row(keys, counts[stage], kth_largest, xp=xp)
