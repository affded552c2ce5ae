"""JAX: selection by counting, which traces, maps and shards.

The k-th largest of non-negative floats is found bit by bit on their bit patterns: a
pass over memory counts the keys at or above a candidate, and the counts of shards
simply add. Ties are cut by the same counting on the index. No sort, no gather, no
concatenation, no host transfer.

Counts are pairs (high, low) of 16-bit digits in uint32, exact up to 2**48 whether or
not 64-bit integers are enabled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import Array

__all__ = [
    "blockwise",
    "cond",
    "frexp",
    "has_nan",
    "is_concrete",
    "keep_largest",
    "keep_largest_per_row",
    "known_finite",
    "norms",
    "ordering_key",
    "where_kept",
]

_INTEGER = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}
_PIECE = 2**31 - 1  # entries that one uint32 count and one uint32 index can cover
_DIGIT = 0xFFFF


def is_concrete(x: Array) -> bool:
    return not isinstance(x, jax.core.Tracer)


def has_nan(arrays: Sequence[Array]) -> bool:
    return bool(jnp.any(jnp.stack([jnp.any(jnp.isnan(x)) for x in arrays])))


def where_kept(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    return [jnp.where(mask, x, jnp.zeros_like(x)) for x, mask in zip(arrays, masks, strict=True)]


def norms(arrays: Sequence[Array], dtype: Any) -> Array:
    return jnp.stack([jnp.linalg.norm(a.astype(dtype).ravel()) for a in arrays])


def known_finite(arrays: Sequence[Array]) -> bool:
    return False


def blockwise(
    fn: Callable[..., Array], *lists: Sequence[Array], out: Sequence[Array] | None = None
) -> list[Array]:
    return [fn(*arrays) for arrays in zip(*lists, strict=True)]


def ordering_key(x: Array) -> Array:
    # Bits, for XLA flushes subnormal floats to zero in arithmetic and comparison.
    integer = _INTEGER[x.dtype.itemsize]
    bits: Array = lax.bitcast_convert_type(x, integer)
    return bits & (2 ** (8 * x.dtype.itemsize - 1) - 1)


def frexp(x: Array) -> tuple[Array, Array]:
    return jnp.frexp(x)


def cond(
    predicate: bool | Array,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
) -> Any:
    if isinstance(predicate, bool) or is_concrete(predicate):
        # Run eagerly, `lax.cond` would compile both branches at every call.
        return true_fun(*operands) if predicate else false_fun(*operands)
    return lax.cond(predicate, true_fun, false_fun, *operands)


def keep_largest(
    scores: Sequence[Array], counts: tuple[int, ...], stage: int | Array, *, on_host: bool
) -> list[Array]:
    return _keep_largest([ordering_key(score) for score in scores], counts, stage)


@partial(jax.jit, static_argnames="counts")
def _keep_largest(keys: list[Array], counts: tuple[int, ...], stage: int | Array) -> list[Array]:
    pieces = [piece for key in keys for piece in _split(key)]
    k = _pick(counts, stage)
    threshold = _kth_largest(pieces, k)
    missing = _subtract(k, _total([piece > threshold for piece in pieces]))
    tied = [piece == threshold for piece in pieces]
    quotas = _fill([_count(mask) for mask in tied], missing)
    masks = _cut(tied, quotas)
    kept = iter([(piece > threshold) | mask for piece, mask in zip(pieces, masks, strict=True)])
    return [_join(key, kept) for key in keys]


def keep_largest_per_row(
    scores: Array, counts: tuple[int, ...], stage: int | Array, *, on_host: bool
) -> Array:
    return _keep_largest_per_row(ordering_key(scores), counts, stage)


@partial(jax.jit, static_argnames="counts")
def _keep_largest_per_row(keys: Array, counts: tuple[int, ...], stage: int | Array) -> Array:
    k = jnp.asarray(counts, jnp.int32)[stage]

    def narrow(i: Array, found: Array) -> Array:
        candidate = found | jnp.left_shift(jnp.asarray(1, keys.dtype), (bits - 1 - i))
        return jnp.where(_row_count(keys >= candidate) >= k, candidate, found)

    bits = jnp.asarray(8 * keys.dtype.itemsize - 1, keys.dtype)
    start = jnp.zeros_like(keys, shape=(keys.shape[0], 1))
    threshold = lax.fori_loop(jnp.zeros_like(bits), bits, narrow, start)
    above, tied = keys > threshold, keys == threshold
    quota = k - _row_count(above)
    index = lax.broadcasted_iota(jnp.int32, keys.shape, 1)

    def cut(tied: Array) -> Array:
        # The largest end with at most `quota` ties before it has exactly `quota`.
        def advance(i: Array, end: Array) -> Array:
            candidate = end | jnp.left_shift(1, width - 1 - i)
            return jnp.where(_row_count(tied & (index < candidate)) <= quota, candidate, end)

        width = keys.shape[1].bit_length()
        return tied & (index < lax.fori_loop(0, width, advance, jnp.zeros_like(quota)))

    no_cut = jnp.all(_row_count(tied) == quota)
    return above | lax.cond(no_cut, lambda tied: tied, cut, tied)


def _row_count(mask: Array) -> Array:
    return jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)


def _split(key: Array) -> list[Array]:
    """Pieces of at most `_PIECE` entries, in row-major order."""
    if key.size <= _PIECE:
        return [key]
    row = key.size // key.shape[0]
    if row > _PIECE:
        return [piece for i in range(key.shape[0]) for piece in _split(key[i])]
    step = _PIECE // row
    return [key[i : i + step] for i in range(0, key.shape[0], step)]


def _join(key: Array, pieces: Any) -> Array:
    """Undo `_split`, taking as many of `pieces` as `key` was cut into."""
    if key.size <= _PIECE:
        return next(pieces)
    row = key.size // key.shape[0]
    if row > _PIECE:
        return jnp.stack([_join(key[i], pieces) for i in range(key.shape[0])])
    step = _PIECE // row
    return jnp.concatenate([next(pieces) for _ in range(0, key.shape[0], step)])


def _kth_largest(pieces: list[Array], k: tuple[Array, Array]) -> Array:
    """The largest t with at least ``k`` keys >= t, bit by bit from the top."""
    dtype = pieces[0].dtype
    bits = 8 * dtype.itemsize - 1

    def narrow(i: Array, found: Array) -> Array:
        shift = jnp.asarray(bits - 1 - i, dtype)
        candidate = found | jnp.left_shift(jnp.asarray(1, dtype), shift)
        enough = _at_least(_total([piece >= candidate for piece in pieces]), k)
        return jnp.where(enough, candidate, found)

    return lax.fori_loop(0, bits, narrow, jnp.asarray(0, dtype))


def _cut(tied: list[Array], quotas: list[Array]) -> list[Array]:
    """Keep of each tied mask the first ``quota`` entries in row-major order."""

    def advance(i: Array, ends: list[Array]) -> list[Array]:
        # The largest end with at most `quota` ties before it has exactly `quota`.
        bit = jnp.left_shift(jnp.uint32(1), jnp.asarray(width - 1 - i, jnp.uint32))
        return [
            jnp.where(_count(mask & (_index(mask.shape) < (end | bit))) <= quota, end | bit, end)
            for mask, end, quota in zip(tied, ends, quotas, strict=True)
        ]

    def cut(tied: list[Array]) -> list[Array]:
        ends = lax.fori_loop(0, width, advance, [jnp.zeros_like(quota) for quota in quotas])
        return [mask & (_index(mask.shape) < end) for mask, end in zip(tied, ends, strict=True)]

    def whole(tied: list[Array]) -> list[Array]:
        return [mask & (quota > 0) for mask, quota in zip(tied, quotas, strict=True)]

    width = max(mask.size for mask in tied).bit_length()
    partial_ = [
        (quota > 0) & (quota < _count(mask)) for mask, quota in zip(tied, quotas, strict=True)
    ]
    return lax.cond(jnp.any(jnp.stack(partial_)), cut, whole, tied)


def _index(shape: tuple[int, ...]) -> Array:
    """Row-major index of every entry, without an array of indices in memory."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return index


def _fill(available: list[Array], missing: tuple[Array, Array]) -> list[Array]:
    """Share ``missing`` out over the pieces, the first first."""
    quotas = []
    for count in available:
        high, low = missing
        small = jnp.left_shift(high & _DIGIT, 16) | low
        quota = jnp.where(high > _DIGIT, count, jnp.minimum(count, small))
        missing = _subtract(missing, _digits(quota))
        quotas.append(quota)
    return quotas


def _pick(counts: tuple[int, ...], stage: int | Array) -> tuple[Array, Array]:
    high = jnp.asarray([count >> 16 for count in counts], jnp.uint32)
    low = jnp.asarray([count & _DIGIT for count in counts], jnp.uint32)
    return high[stage], low[stage]


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.uint32)


def _digits(count: Array) -> tuple[Array, Array]:
    return count >> 16, count & _DIGIT


def _total(masks: list[Array]) -> tuple[Array, Array]:
    digits = [_digits(_count(mask)) for mask in masks]
    low = sum((low for _, low in digits), jnp.uint32(0))
    return sum((high for high, _ in digits), jnp.uint32(0)) + (low >> 16), low & _DIGIT


def _subtract(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    borrow = (a[1] < b[1]).astype(jnp.uint32)
    return a[0] - b[0] - borrow, a[1] + jnp.left_shift(borrow, 16) - b[1]


def _at_least(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))
