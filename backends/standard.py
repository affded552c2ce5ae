"""Any library of the array API standard, by the standard alone.

The standard's only order primitive is a sort, which is exact and slow. The backends
of the libraries that people train with do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from array_api_compat import array_namespace

from . import Array, threshold

__all__ = [
    "cond",
    "frexp",
    "is_concrete",
    "keep_largest",
    "keep_largest_per_row",
    "ordering_key",
]


def is_concrete(x: Array) -> bool:
    return True


def ordering_key(x: Array) -> Array:
    # The standard has no bit views; plain comparison orders subnormals right here.
    return array_namespace(x).abs(x)


def frexp(x: Array) -> tuple[Array, Array]:
    xp = array_namespace(x)
    mantissa, exponent = math.frexp(float(x))
    return xp.asarray(mantissa, dtype=x.dtype), xp.asarray(exponent)


def _kth_largest(keys: Array, k: int) -> Array:
    return array_namespace(keys).sort(keys, axis=1, descending=True)[:, k - 1 : k]


def keep_largest(keys: Sequence[Array], counts: tuple[int, ...], stage: int) -> list[Array]:
    xp = array_namespace(*keys)
    return threshold.keep_largest(keys, counts[stage], _kth_largest, xp=xp)


def keep_largest_per_row(keys: Array, counts: tuple[int, ...], stage: int) -> Array:
    xp = array_namespace(keys)
    return threshold.keep_largest_per_row(keys, counts[stage], _kth_largest, xp=xp)


def cond(
    predicate: bool,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
) -> Any:
    return true_fun(*operands) if predicate else false_fun(*operands)
