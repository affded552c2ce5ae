"""Any library of the array API standard, by the standard alone.

The standard's only order primitive is a sort, which is exact and slow. The backends
of the libraries that people train with do better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from . import Array, threshold

__all__ = [
    "blockwise",
    "cond",
    "detached",
    "frexp",
    "has_nan",
    "is_concrete",
    "keep_largest",
    "keep_largest_per_row",
    "known_finite",
    "linalg_errors",
    "norms",
    "ordering_key",
    "peaks",
    "regrouped",
    "resharded_as",
    "shardwise",
    "stochastic_bfloat16",
    "where_kept",
]


def is_concrete(x: Array) -> bool:
    return True


def detached(x: Array) -> Array:
    return x


def has_nan(arrays: Sequence[Array]) -> bool:
    return any(bool(array_namespace(x).any(array_namespace(x).isnan(x))) for x in arrays)


def ordering_key(x: Array) -> Array:
    # The standard has no bit views; plain comparison orders subnormals right here.
    return array_namespace(x).abs(x)


def frexp(x: Array) -> tuple[Array, Array]:
    xp = array_namespace(x)
    mantissa, exponent = math.frexp(float(x))
    return xp.asarray(mantissa, dtype=x.dtype), xp.asarray(exponent)


def norms(arrays: Sequence[Array], dtype: Any) -> Array:
    xp = array_namespace(*arrays)
    return xp.stack([xp.linalg.vector_norm(xp.astype(a, dtype)) for a in arrays])


def peaks(arrays: Sequence[Array]) -> Array:
    xp = array_namespace(*arrays)
    zero = xp.zeros((), dtype=arrays[0].dtype)
    return xp.stack([xp.max(xp.abs(a)) if math.prod(a.shape) else zero for a in arrays])


def known_finite(arrays: Sequence[Array]) -> bool:
    return False


def blockwise(
    fn: Callable[..., Array], *lists: Sequence[Array], out: Sequence[Array] | None = None
) -> list[Array]:
    return [fn(*arrays) for arrays in zip(*lists, strict=True)]


def stochastic_bfloat16(
    arrays: Sequence[Array], step: int | Array, out: Sequence[Array] | None = None
) -> list[Array]:
    raise TypeError(
        "state_dtype must be None where the library has no bfloat16, got 'bfloat16' and an array "
        f"of type {type(arrays[0])!r}"
    )


def where_kept(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    return [
        array_namespace(x).where(mask, x, array_namespace(x).zeros_like(x))
        for x, mask in zip(arrays, masks, strict=True)
    ]


def _kth_largest(keys: Array, k: int) -> Array:
    return array_namespace(keys).sort(keys, axis=1, descending=True)[:, k - 1 : k]


def keep_largest(scores: Sequence[Array], counts: tuple[int, ...], stage: int) -> list[Array]:
    xp = array_namespace(*scores)
    row = xp.concat([xp.reshape(score, (1, -1)) for score in scores], axis=1)
    mask = keep_largest_per_row(row, counts, stage)[0, :]
    ends = list(itertools.accumulate(math.prod(score.shape) for score in scores))
    return [
        xp.reshape(mask[end - math.prod(score.shape) : end], score.shape)
        for score, end in zip(scores, ends, strict=True)
    ]


def keep_largest_per_row(scores: Array, counts: tuple[int, ...], stage: int) -> Array:
    keys = ordering_key(scores)
    xp = array_namespace(keys)
    return threshold.keep_largest_per_row(keys, counts[stage], _kth_largest, xp=xp)


def regrouped(x: Array, units: Mapping[int, int]) -> Array:
    return x


def resharded_as(x: Array, result: Array) -> Array:
    return result


def shardwise(
    fn: Callable[..., Array], *arrays: Array, axes: Mapping[int, int] | None = None
) -> Array:
    return fn(*arrays)


def cond(
    predicate: bool,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
) -> Any:
    return true_fun(*operands) if predicate else false_fun(*operands)


def linalg_errors() -> tuple[type[Exception], ...]:
    # Libraries that wrap NumPy, such as array_api_strict, raise its error.
    return (np.linalg.LinAlgError,)
