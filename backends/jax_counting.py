"""Select the largest entries of JAX arrays by counting, under `jax.jit`, `vmap` and sharding.

The threshold is the largest t that at least k keys reach, where the keys are the bits of
the magnitudes. It is found digit by digit, from the highest: one pass over memory counts
the keys that reach each of fifteen candidates. The counts of shards simply add up.

A sort would take many more passes, and it would gather sharded arrays on every device.
Counting needs no sort, no gather and no transfer to the host. The same search on the row-major
index cuts the ties, so that the mask is the same in every library.

Counts of all arrays together can exceed 32 bits, and JAX has 64-bit integers only where
the user enables them. So such counts are pairs (high, low) of 16-bit digits, each stored
in uint32. They are exact up to 2**48.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import Array

__all__ = ["joins", "keep_largest", "keep_largest_per_row"]

_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
# Bits settled in one pass, by 2**4 - 1 counts. Each pass reads all keys. Wider digits need
# fewer passes, but the number of counts doubles with each bit.
_DIGIT_BITS = 4
# Up to this many entries, passes cost less than compiling the code of many counts.
_FEW = 2**12
# Entries of arrays that are joined to one, 128 MB in float32.
_CHUNK = 2**25
# The most entries of a piece. Its counts, its row-major indices and the bounds of the search
# that cuts ties then all fit uint32.
_PIECE = 2**31 - 1
# The largest sum of counts that is taken in uint32.
_SUMMAND = 2**32 - 1
_DIGIT = 0xFFFF


@partial(jax.jit, static_argnames="counts")
def keep_largest(
    scores: list[Array], *, counts: tuple[int, ...], stage: int | Array
) -> list[Array]:
    """Return masks of the ``counts[stage]`` largest magnitudes over all arrays."""
    if not joins(scores):
        return _keep_largest(scores, counts, stage)
    chunks = _chunks(scores)
    joined = [jnp.concatenate([jnp.ravel(x) for x in chunk]) for chunk in chunks]
    found = []
    for chunk, mask in zip(chunks, _keep_largest(joined, counts, stage), strict=True):
        ends = list(accumulate(x.size for x in chunk))
        parts = jnp.split(mask, ends[:-1])
        found += [jnp.reshape(part, x.shape) for part, x in zip(parts, chunk, strict=True)]
    return found


def joins(arrays: list[Array]) -> bool:
    """Return whether to join small arrays: if the only device is an accelerator."""
    if jax.default_backend() == "cpu" or jax.device_count() > 1:
        return False
    # A mesh may have one device only, and its axes still restrict reshapes.
    return not any(jax.typeof(x).sharding.mesh.explicit_axes for x in arrays)


def _chunks(scores: list[Array]) -> list[list[Array]]:
    """Return lists of neighbours with up to `_CHUNK` entries together; large arrays stay alone."""
    chunks: list[list[Array]] = []
    size = 0
    for x in scores:
        if not chunks or size + x.size > _CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(x)
        size += x.size
    return chunks


def _keep_largest(scores: list[Array], counts: tuple[int, ...], stage: int | Array) -> list[Array]:
    keys = [_unsigned_key(score) for score in scores]
    pieces = [piece for key in keys for piece in _split(key)]
    sizes = [piece.size for piece in pieces]
    k = _typed_as(keys, _pick(counts, stage))

    def at_least(thresholds: list[Array]) -> list[tuple[Array, Array]]:
        found = [jnp.stack(_reduced([piece >= t for t in thresholds])) for piece in pieces]
        high, low = _sum_of(found, sizes)
        return [(high[i], low[i]) for i in range(len(thresholds))]

    whole, zero = _pick((sum(sizes),), 0), jnp.zeros((), keys[0].dtype)
    reaches, same = partial(_at_least, b=k), partial(_same, k)
    bits = _DIGIT_BITS if sum(sizes) > _FEW else 1
    zero, whole = _typed_as(k, (zero, whole))
    threshold, exact = _search(at_least, zero, whole, reaches, same, bits)

    # Real weights hardly ever tie. Then the comparison alone gives the masks, and the search
    # over indices is skipped at run time.
    def plain(pieces: list[Array]) -> list[Array]:
        return [piece >= threshold for piece in pieces]

    def with_ties(pieces: list[Array]) -> list[Array]:
        above = [piece > threshold for piece in pieces]
        tied = [piece == threshold for piece in pieces]
        found = [_reduced(list(pair)) for pair in zip(above, tied, strict=True)]
        missing = _subtract(k, _sum_of([a for a, _ in found], sizes))
        available = [t for _, t in found]
        masks = _cut(tied, available, _fill(available, missing))
        return [a | t for a, t in zip(above, masks, strict=True)]

    kept = iter(lax.cond(exact, plain, with_ties, pieces))
    return [_join(key, kept) for key in keys]


@partial(jax.jit, static_argnames="counts")
def keep_largest_per_row(scores: Array, *, counts: tuple[int, ...], stage: int | Array) -> Array:
    """Return the mask of the ``counts[stage]`` largest magnitudes of each row."""
    keys = _unsigned_key(scores)
    k = _typed_as([keys], jnp.asarray(counts, jnp.uint32)[stage])

    def at_least(thresholds: list[Array]) -> list[Array]:
        return [x[:, None] for x in _reduced([keys >= t for t in thresholds], axes=(1,))]

    zero = jnp.zeros_like(keys, shape=(keys.shape[0], 1))
    whole = jnp.full_like(zero, keys.shape[1], dtype=jnp.uint32)
    bits = _DIGIT_BITS if keys.size > _FEW else 1
    zero, whole = _typed_as([k], (zero, whole))
    threshold, exact = _search(at_least, zero, whole, lambda c: c >= k, lambda c: c == k, bits)

    def with_ties(keys: Array) -> Array:
        above, tied = keys > threshold, keys == threshold
        quota = k - _row_count(above)
        index = lax.broadcasted_iota(jnp.uint32, keys.shape, 1)
        width = keys.shape[1].bit_length()

        # The largest end with at most `quota` ties before it has exactly `quota`.
        def advance(i: Array, end: Array) -> Array:
            candidate = end | jnp.left_shift(jnp.uint32(1), jnp.asarray(width - 1 - i, jnp.uint32))
            return jnp.where(_row_count(tied & (index < candidate)) <= quota, candidate, end)

        return above | (tied & (index < lax.fori_loop(0, width, advance, jnp.zeros_like(quota))))

    return lax.cond(jnp.all(exact), lambda keys: keys >= threshold, with_ties, keys)


def _search(
    at_least: Callable[[list[Array]], list[Any]],
    zero: Array,
    whole: Any,
    reaches: Callable[[Any], Array],
    same: Callable[[Any], Array],
    bits: int = _DIGIT_BITS,
) -> tuple[Array, Array]:
    """Find the largest t that enough keys reach, or any t that exactly enough keys reach.

    Each pass settles the next ``bits`` bits of t, from the highest: it counts the keys that
    reach every candidate for them, and takes the largest candidate that enough reach. The
    search ends early once a count is exact, for every such t selects the same keys.

    Parameters
    ----------
    at_least : callable
        Returns the number of keys at or above each of several thresholds.
    zero : array
        The threshold to start from, in the dtype of the keys.
    whole : count
        The number of keys at or above ``zero``.
    reaches, same : callable
        Tell whether a count is at least, or exactly, the number wanted.
    bits : int
        Number of bits to settle in a pass.

    Returns
    -------
    threshold, exact : array
        t, and whether exactly the number wanted reach it.
    """

    def unsettled(carry: Any) -> Array:
        shift, _, count = carry
        return (shift >= 0) & ~jnp.all(same(count))

    def settle(carry: Any) -> Any:
        shift, found, count = carry
        digits = [jnp.asarray(digit, zero.dtype) for digit in range(1, 2**bits)]
        thresholds = [found | jnp.left_shift(digit, shift.astype(zero.dtype)) for digit in digits]
        for threshold, more in zip(thresholds, at_least(thresholds), strict=True):
            enough = reaches(more)
            found = jnp.where(enough, threshold, found)
            count = jax.tree.map(lambda new, old, e=enough: jnp.where(e, new, old), more, count)
        return shift - bits, found, count

    shift = _typed_as([zero], jnp.asarray(8 * zero.dtype.itemsize - bits, jnp.int32))
    _, found, count = lax.while_loop(unsettled, settle, (shift, zero, whole))
    return found, same(count)


def _typed_as(operands: Sequence[Array], constants: Any) -> Any:
    """Return constants with the mesh and the varying axes of the operands.

    The type of an array includes its mesh and, under `jax.shard_map`, the mesh axes along which
    its values vary. Constants have neither, but a loop must return the types that it takes, and
    `jax.vmap` over an explicit mesh axis needs the mesh. So this adds zero times a sum of the
    operands, which the compiler removes.
    """
    zero = jnp.uint32(0) * sum(jnp.sum(x, dtype=jnp.uint32) for x in operands)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), constants)


def _reduced(masks: list[Array], axes: tuple[int, ...] | None = None) -> tuple[Array, ...]:
    """Return the counts of several masks of one shape.

    One variadic reduce reads the keys once for all masks, and XLA compiles it to vector
    code. Separate sums would read the keys once per mask, which costs most of the time.
    """
    if axes is None:
        masks = [mask if mask.ndim else mask[None] for mask in masks]
        axes = tuple(range(masks[0].ndim))
    flags = tuple(mask.astype(jnp.uint32) for mask in masks)
    zeros = (jnp.uint32(0),) * len(flags)
    found: tuple[Array, ...] = tuple(
        lax.reduce(flags, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), axes)
    )
    return found


def _unsigned_key(x: Array) -> Array:
    """Return the bits of the magnitudes, unsigned.

    Unsigned, a candidate with a higher digit is always the larger number, even when the
    digit reaches into the sign bit.
    """
    unsigned = _UNSIGNED[x.dtype.itemsize]
    bits: Array = lax.bitcast_convert_type(x, unsigned)
    return bits & jnp.asarray(2 ** (8 * x.dtype.itemsize - 1) - 1, unsigned)


def _row_count(mask: Array) -> Array:
    return jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.uint32)


def _split(key: Array) -> list[Array]:
    """Return pieces of at most `_PIECE` entries, in row-major order."""
    if key.size <= _PIECE:
        return [key]
    row = key.size // key.shape[0]
    if row > _PIECE:
        return [piece for i in range(key.shape[0]) for piece in _split(key[i])]
    step = _PIECE // row
    return [key[i : i + step] for i in range(0, key.shape[0], step)]


def _join(key: Array, pieces: Any) -> Array:
    """Undo `_split`, and consume as many of ``pieces`` as ``key`` was split into."""
    if key.size <= _PIECE:
        return next(pieces)
    row = key.size // key.shape[0]
    if row > _PIECE:
        return jnp.stack([_join(key[i], pieces) for i in range(key.shape[0])])
    step = _PIECE // row
    return jnp.concatenate([next(pieces) for _ in range(0, key.shape[0], step)])


def _cut(tied: list[Array], available: list[Array], quotas: list[Array]) -> list[Array]:
    """Keep the first ``quota`` entries of each mask of ties in row-major order."""

    def advance(i: Array, ends: list[Array]) -> list[Array]:
        # Binary search for the index at which to cut, since a running count of ties would
        # need an array of counts and move data between shards. The largest end with at most
        # `quota` ties before it has exactly `quota`.
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

    # A quota parts the ties of one piece at most. Where it falls between pieces, no index has
    # to be searched for.
    width = max(mask.size for mask in tied).bit_length()
    parted = [(quota > 0) & (quota < n) for n, quota in zip(available, quotas, strict=True)]
    return lax.cond(jnp.any(jnp.stack(parted)), cut, whole, tied)


def _index(shape: tuple[int, ...]) -> Array:
    """Return the row-major index of every entry.

    XLA fuses it into what reads it, so no array of indices is written to memory.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return index


def _fill(available: list[Array], missing: tuple[Array, Array]) -> list[Array]:
    """Assign the ``missing`` ties to the pieces, as many as possible to the first ones."""
    quotas = []
    for count in available:
        high, low = missing
        # Where `high` needs more than 16 bits, `missing` exceeds every count of a piece.
        small = jnp.left_shift(high & _DIGIT, 16) | low
        quota = jnp.where(high > _DIGIT, count, jnp.minimum(count, small))
        missing = _subtract(missing, _digits(quota))
        quotas.append(quota)
    return quotas


def _pick(counts: tuple[int, ...], stage: int | Array) -> tuple[Array, Array]:
    """Return ``counts[stage]`` as a pair of digits. ``stage`` can be traced."""
    high = jnp.asarray([count >> 16 for count in counts], jnp.uint32)
    low = jnp.asarray([count & _DIGIT for count in counts], jnp.uint32)
    return high[stage], low[stage]


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.uint32)


def _digits(count: Array) -> tuple[Array, Array]:
    return count >> 16, count & _DIGIT


def _sum_of(counts: list[Array], sizes: list[int]) -> tuple[Array, Array]:
    """Return the sum of counts, none of which exceeds its size, as a pair of digits."""
    # Add plain uint32 numbers as long as they cannot overflow, which is always for arrays of
    # fewer than 2**32 entries in all.
    high = low = jnp.uint32(0)
    together, size = jnp.uint32(0), 0
    for count, limit in zip(counts, sizes, strict=True):
        if size + limit > _SUMMAND:
            high, low = high + (together >> 16), low + (together & _DIGIT)
            together, size = jnp.uint32(0), 0
        together, size = together + count, size + limit
    high, low = high + (together >> 16), low + (together & _DIGIT)
    return high + (low >> 16), low & _DIGIT


def _subtract(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return ``a - b`` for ``a >= b``."""
    borrow = (a[1] < b[1]).astype(jnp.uint32)
    return a[0] - b[0] - borrow, a[1] + jnp.left_shift(borrow, 16) - b[1]


def _at_least(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def _same(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] == b[0]) & (a[1] == b[1])
