"""The backend of any other library, written in the array API standard alone.

The standard's only order primitive is a sort, which is exact and slow. The backends
of NumPy, PyTorch and JAX replace it. Functions that they can share are imported from
here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from . import Array, threshold

__all__ = [
    "as_program",
    "blockwise",
    "cond",
    "detached",
    "exponents",
    "exponents_along",
    "has_bfloat16",
    "has_nan",
    "is_concrete",
    "joins",
    "keep_largest",
    "keep_largest_per_row",
    "known_finite",
    "linalg_errors",
    "norms",
    "on_several_devices",
    "ordering_key",
    "peaks",
    "positions",
    "regrouped",
    "resharded_as",
    "scaled",
    "shardwise",
    "stochastic_bfloat16",
    "unreadable",
    "where_kept",
    "widened",
]


def unreadable(x: Array) -> str:
    return ""


def is_concrete(x: Array) -> bool:
    return True


def detached(x: Array) -> Array:
    return x


def has_nan(arrays: Sequence[Array]) -> bool:
    return any(bool(array_namespace(x).any(array_namespace(x).isnan(x))) for x in arrays)


def joins(arrays: Sequence[Array]) -> bool:
    return False


def known_finite(arrays: Sequence[Array]) -> bool:
    # A library on an accelerator would have to wait for the answer, so claim nothing.
    return False


def ordering_key(x: Array) -> Array:
    # The standard cannot view floats as integers. Libraries on the CPU compare subnormal
    # numbers correctly, so the magnitudes themselves serve as keys.
    return array_namespace(x).abs(x)


def exponents(arrays: Sequence[Array]) -> Array:
    xp = array_namespace(*arrays)
    zero = xp.zeros((1,), dtype=arrays[0].dtype)  # `max` refuses an array without entries
    rows = [xp.concat([zero, xp.reshape(x, (-1,))]) for x in arrays]
    return xp.concat([exponents_along(row, axes=(0,)) for row in rows])


def exponents_along(x: Array, *, axes: tuple[int, ...]) -> Array:
    xp = array_namespace(x)
    finite = xp.where(xp.isinf(x), xp.zeros_like(x), xp.abs(x))
    peaks = xp.max(finite, axis=axes, keepdims=True)
    # The standard has no frexp, so Python computes it, entry by entry.
    flat = xp.reshape(peaks, (-1,))
    numbers = [float(flat[i]) for i in range(flat.shape[0])]
    found = [math.frexp(n)[1] if n else threshold.NO_EXPONENT for n in numbers]
    return xp.reshape(xp.asarray(found, dtype=xp.int32), peaks.shape)


def scaled(x: Array, exponents: Array, *, dtype: Any) -> Array:
    xp = array_namespace(x)
    x = xp.astype(xp.abs(x), dtype, copy=False)
    for part in threshold.parts(exponents, wide=dtype == xp.float64, xp=xp):
        flat = xp.reshape(part, (-1,))
        powers = [2.0 ** -int(flat[i]) for i in range(flat.shape[0])]
        x = x * xp.reshape(xp.asarray(powers, dtype=dtype), part.shape)
    return xp.where(x < float(xp.finfo(dtype).smallest_normal), xp.zeros_like(x), x)


def norms(arrays: Sequence[Array], *, dtype: Any) -> Array:
    xp = array_namespace(*arrays)
    return xp.stack([xp.linalg.vector_norm(xp.astype(a, dtype)) for a in arrays])


def peaks(arrays: Sequence[Array]) -> Array:
    xp = array_namespace(*arrays)
    zero = xp.zeros((), dtype=arrays[0].dtype)  # `max` refuses an array without entries
    return xp.stack([xp.max(xp.abs(a)) if math.prod(a.shape) else zero for a in arrays])


def where_kept(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    return [
        array_namespace(x).where(mask, x, array_namespace(x).zeros_like(x))
        for x, mask in zip(arrays, masks, strict=True)
    ]


def blockwise(
    fn: Callable[..., Array],
    *lists: Sequence[Array],
    static: tuple[Any, ...] | None = None,
    out: Sequence[Array] | None = None,
) -> list[Array]:
    fn = partial(fn, *static or ())
    # The standard does not say which arrays can be written to, so `out` is not used.
    return [fn(*arrays) for arrays in zip(*lists, strict=True)]


def positions(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.arange(math.prod(x.shape), dtype=xp.int32, device=device(x))


def widened(arrays: Sequence[Array]) -> list[Array]:
    spaces = [array_namespace(x) for x in arrays]
    return [
        xp.astype(x, xp.float64 if x.dtype == xp.float64 else xp.float32, copy=False)
        for x, xp in zip(arrays, spaces, strict=True)
    ]


def has_bfloat16() -> bool:
    return False


def stochastic_bfloat16(
    arrays: Sequence[Array], *, step: int | Array, out: Sequence[Array] | None = None
) -> list[Array]:
    raise TypeError(f"the library must have bfloat16, got an array of type {type(arrays[0])!r}")


def keep_largest(scores: Sequence[Array], *, counts: tuple[int, ...], stage: int) -> list[Array]:
    # One row of all scores, in their order, makes ties of different arrays ties of a row.
    xp = array_namespace(*scores)
    row = xp.concat([xp.reshape(score, (1, -1)) for score in scores], axis=1)
    mask = keep_largest_per_row(row, counts=counts, stage=stage)[0, :]
    ends = list(itertools.accumulate(math.prod(score.shape) for score in scores))
    return [
        xp.reshape(mask[end - math.prod(score.shape) : end], score.shape)
        for score, end in zip(scores, ends, strict=True)
    ]


def keep_largest_per_row(scores: Array, *, counts: tuple[int, ...], stage: int) -> Array:
    keys = ordering_key(scores)
    return threshold.keep_largest_per_row(
        keys, k=counts[stage], kth_largest=_kth_largest, xp=array_namespace(keys)
    )


def _kth_largest(keys: Array, k: int) -> Array:
    return array_namespace(keys).sort(keys, axis=1, descending=True)[:, k - 1 : k]


def on_several_devices(x: Array) -> bool:
    return False


def regrouped(x: Array, *, units: Mapping[int, int]) -> Array:
    return x


def resharded_as(x: Array, result: Array) -> Array:
    return result


def shardwise(
    fn: Callable[..., Array], *arrays: Array, axes: Mapping[int, int] | None = None
) -> Array:
    # An array on one device is a single shard.
    return fn(*arrays)


def linalg_errors() -> tuple[type[Exception], ...]:
    # Libraries that wrap NumPy, such as array_api_strict, raise its error.
    return (np.linalg.LinAlgError,)


def as_program(fn: Callable[..., Any], static: tuple[Any, ...], *operands: Any) -> Any:
    return fn(*static, *operands)


def cond(
    predicate: bool,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
) -> Any:
    return true_fun(*operands) if predicate else false_fun(*operands)
