"""Select the largest entries of JAX arrays by counting, under `jax.jit`, `vmap` and sharding.

The threshold is the largest t that at least k keys reach, where the keys are the bits of
the magnitudes. It is found digit by digit, from the highest: one pass over memory counts
the keys that reach each candidate for a digit. The counts of shards simply add up.

A sort would take many more passes, and it would gather sharded arrays on every device.
Counting needs no sort, no gather and no transfer to the host. The same search finds the row-major
position up to which ties are kept, so that the mask is the same in every library.

Counts of all arrays together can exceed 32 bits, and JAX has 64-bit integers only where
the user enables them. Only where the sum can exceed 32 bits, counts are pairs (high, low) in
uint32, and low has 16 bits. They are exact up to 2**48.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from . import Array

__all__ = ["joins", "keep_largest", "keep_largest_per_row"]

_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
# Entries of arrays that are joined to one, 128 MB in float32.
_CHUNK = 2**25
# Entries of an array that is joined. Copying more takes longer than starting a kernel.
_SMALL = 2**20
# The most entries of a piece. Its counts, its row-major indices and the bounds of the search
# that cuts ties then all fit uint32.
_PIECE = 2**31 - 1
# The largest sum of counts that is taken in uint32.
_SUMMAND = 2**32 - 1
_LOW = 0xFFFF
Count: TypeAlias = Any  # a number or several, in uint32, or a pair (high, low) of them


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
    size = 0  # of the last list
    for x in scores:
        if not chunks or x.size > _SMALL or size + x.size > _CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(x)
        size += _CHUNK if x.size > _SMALL else x.size  # nothing joins a large array
    return chunks


def _keep_largest(scores: list[Array], counts: tuple[int, ...], stage: int | Array) -> list[Array]:
    pieces = [piece for score in scores for piece in _split(score)]
    sizes = [piece.size for piece in pieces]
    large = sum(sizes) > _SUMMAND
    k = _typed_as(scores, _pick(counts, stage, large))
    zero = jnp.zeros((), _UNSIGNED[scores[0].dtype.itemsize])
    zero, whole = _typed_as(k, (zero, _pick((sum(sizes),), 0, large)))

    def at_least(thresholds: Array) -> Count:
        held, thresholds = _within_loop((pieces, thresholds))
        keys = [_unsigned_key(piece) for piece in held]
        each = [thresholds[i] for i in range(thresholds.size)]
        return _sum_of([jnp.stack(_reduced([key >= t for t in each])) for key in keys], sizes)

    def before(threshold: Array, positions: Count) -> Count:
        held, positions, one = _within_loop((pieces, positions, jnp.uint32(1)))
        found = []
        for piece, ends in zip(held, _ends(positions, sizes), strict=True):
            key, index = _unsigned_key(piece), _index(piece.shape, one)
            masks = [_kept(key, threshold, index, ends[i]) for i in range(ends.size)]
            found.append(jnp.stack(_reduced(masks)))
        return _sum_of(found, sizes)

    threshold, position = _threshold_and_position(at_least, before, zero, whole, k, sum(sizes))
    kept = iter(
        _kept(_unsigned_key(piece), threshold, _index(piece.shape), end)
        for piece, end in zip(pieces, _ends(position, sizes), strict=True)
    )
    return [_join(score, kept) for score in scores]


@partial(jax.jit, static_argnames="counts")
def keep_largest_per_row(scores: Array, *, counts: tuple[int, ...], stage: int | Array) -> Array:
    """Return the mask of the ``counts[stage]`` largest magnitudes of each row."""
    k = _typed_as(scores, jnp.asarray(counts, jnp.uint32)[stage])
    rows, width = scores.shape
    zero = jnp.zeros_like(scores, _UNSIGNED[scores.dtype.itemsize], shape=(rows, 1))
    zero, whole = _typed_as(k, (zero, jnp.full_like(zero, width, dtype=jnp.uint32)))

    def at_least(thresholds: Array) -> Array:
        held, thresholds = _within_loop((scores, thresholds))
        keys, each = _unsigned_key(held), jnp.split(thresholds, thresholds.shape[1], axis=1)
        return jnp.stack(_reduced([keys >= t for t in each], axes=(1,)), axis=1)

    def kept(scores: Array, threshold: Array, end: Array) -> Array:
        index = lax.broadcasted_iota(jnp.uint32, scores.shape, 1)
        return _kept(_unsigned_key(scores), threshold, index, end)

    def before(threshold: Array, ends: Array) -> Array:
        held, ends = _within_loop((scores, ends))
        each = jnp.split(ends, ends.shape[1], axis=1)
        return jnp.stack(_reduced([kept(held, threshold, end) for end in each], axes=(1,)), axis=1)

    return kept(scores, *_threshold_and_position(at_least, before, zero, whole, k, width))


def _threshold_and_position(
    at_least: Callable[[Array], Count],
    before: Callable[[Array, Count], Count],
    zero: Array,
    whole: Count,
    k: Count,
    entries: int,
) -> tuple[Array, Count]:
    """Find the threshold, and the position before which the keys equal to it are kept.

    Parameters
    ----------
    at_least : callable
        Returns the number of keys that reach each of several thresholds.
    before : callable
        Returns the number of keys that are kept by a threshold and each of several positions.
    zero : array
        The threshold 0, in the dtype of the keys.
    whole, k : Count
        The numbers of all keys and of those to keep.
    entries : int
        The number of entries, which is the last position.
    """
    same, bits = partial(_same, k), 8 * zero.dtype.itemsize
    threshold, exact = _search(at_least, zero, whole, lambda count: _at_least(count, k), same, bits)
    # Real weights hardly ever tie. Then all ties are kept, and this search makes no pass.
    nothing = jax.tree.map(jnp.zeros_like, whole)
    start, count = jax.tree.map(partial(jnp.where, exact), (whole, k), (nothing, nothing))
    bits, fits = entries.bit_length(), lambda count: _at_least(k, count)
    position, _ = _search(partial(before, threshold), start, count, fits, same, bits)
    return threshold, position


def _search(
    counts_at: Callable[[Any], Any],
    start: Count,
    count: Count,
    reaches: Callable[[Any], Array],
    same: Callable[[Any], Array],
    bits: int,
) -> tuple[Any, Array]:
    """Find the largest t whose count will do, or any t whose count is exactly the one wanted.

    Each pass settles the next digit of t, from the highest: it takes the counts at every
    candidate for the digit, and keeps the largest candidate that will do. The search ends early
    once a count is exact, because every such t selects the same keys.

    Parameters
    ----------
    counts_at : callable
        Returns the number of keys that each of several candidates selects. The candidates lie
        along the last axis.
    start : Count
        The number to start from. It has no bits that the search sets, unless its count is exact.
    count : Count
        The number of keys that ``start`` selects, or any that is not exact.
    reaches, same : callable
        Tell whether a count will do, and whether it is exactly the number wanted. If a candidate
        will not do, then no larger one does.
    bits : int
        Number of bits that t may have.

    Returns
    -------
    t, exact : array
        t, and whether it selects exactly the number wanted.
    """
    width = _digit_bits()

    def unsettled(carry: Any) -> Array:
        shift, _, count = carry
        return (shift >= 0) & ~jnp.all(same(count))

    def settle(carry: Any) -> Any:
        shift, found, count = carry
        axes = jax.tree.leaves(found)[0].ndim
        digits = jnp.reshape(jnp.arange(1, 2**width, dtype=jnp.uint32), (1,) * (axes - 1) + (-1,))
        counts = counts_at(_with_digit(found, digits, shift))
        enough = reaches(counts)
        digit = jnp.sum(enough, axis=-1, keepdims=axes > 0, dtype=jnp.uint32)
        picked = digits == digit

        def pick(counts: Array, before: Array) -> Array:
            found = jnp.sum(jnp.where(picked, counts, 0), axis=-1, keepdims=axes > 0)
            return jnp.where(digit == 0, before, found.astype(before.dtype))

        return shift - width, _with_digit(found, digit, shift), jax.tree.map(pick, counts, count)

    first = (bits - 1) // width * width
    shift = _typed_as(start, jnp.asarray(first, jnp.int32))
    _, found, count = lax.while_loop(unsettled, settle, (shift, start, count))
    return found, same(count)


def _digit_bits() -> int:
    """Return the number of bits that a pass settles, by ``2**bits - 1`` counts.

    Each pass reads all keys. Wider digits need fewer passes, but the number of counts doubles
    with each bit. On the CPU, two bits take as long as four, and their code compiles faster. One
    count alone is slow there, because XLA compiles no vector code for it.
    """
    return 2 if jax.default_backend() == "cpu" else 4


def _with_digit(found: Count, digit: Array, shift: Array) -> Any:
    """Return a number, or a pair, with the bits of a digit of the search set."""
    if not isinstance(found, tuple):
        return found | jnp.left_shift(digit.astype(found.dtype), shift.astype(found.dtype))
    # Digits of 2 or 4 bits never lie in both numbers of a pair.
    high, low = found
    upper = shift >= 16
    moved = jnp.left_shift(digit, jnp.where(upper, shift - 16, shift).astype(jnp.uint32))
    return high | jnp.where(upper, moved, 0), low | jnp.where(upper, 0, moved)


def _typed_as(operands: Any, constants: Any) -> Any:
    """Return constants with the mesh and the varying axes of the operands.

    The type of an array includes its mesh and, under `jax.shard_map`, the mesh axes along which
    its values vary. Constants have neither, but a loop must return the types that it takes, and
    `jax.vmap` over an explicit mesh axis needs the mesh. So this adds zero times a sum of the
    operands, which the compiler removes.
    """
    sums = [jnp.sum(x, dtype=jnp.uint32) for x in jax.tree.leaves(operands)]
    zero = jnp.uint32(0) * sum(sums)
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


def _within_loop(operands: Any) -> Any:
    """Return the operands, so that XLA computes within a loop what depends on them.

    It would otherwise compute what no pass changes before the loop, such as the keys and
    indices, and keep it in memory. One of the operands must change from pass to pass.
    """
    return lax.optimization_barrier(operands)  # type: ignore[no-untyped-call]


def _unsigned_key(x: Array) -> Array:
    """Return the bits of the magnitudes, unsigned.

    Unsigned, a candidate with a higher digit is always the larger number, even when the
    digit reaches into the sign bit.
    """
    unsigned = _UNSIGNED[x.dtype.itemsize]
    bits: Array = lax.bitcast_convert_type(x, unsigned)
    return bits & jnp.asarray(2 ** (8 * x.dtype.itemsize - 1) - 1, unsigned)


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


def _kept(keys: Array, threshold: Array, index: Array, end: Array) -> Array:
    """Return the mask of the keys above the threshold, and of those equal to it before ``end``."""
    return keys >= threshold + (index >= end).astype(threshold.dtype)


def _index(shape: tuple[int, ...], one: Any = 1) -> Array:
    """Return the row-major index of every entry. ``one`` is 1, and may come from `_within_loop`.

    XLA fuses it into what reads it, so no array of indices is written to memory.
    """
    index = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) if shape else jnp.uint32(0)
    for axis in range(len(shape) - 1):
        if shape[axis] > 1:
            stride = jnp.uint32(math.prod(shape[axis + 1 :])) * one
            index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def _ends(position: Count, sizes: list[int]) -> list[Array]:
    """Return, for each piece, the index before which its entries lie before the position.

    The position counts the entries of all pieces. The index is 0 in the pieces after it, and the
    size or more in those before it.
    """
    if not isinstance(position, tuple):
        totals = zip(accumulate(sizes), sizes, strict=True)
        offsets = [jnp.uint32(total - size) for total, size in totals]
        return [jnp.maximum(position, offset) - offset for offset in offsets]
    ends = []
    for size in sizes:
        high, low = position
        # Where `high` needs more than 16 bits, the position is past every piece.
        small = jnp.left_shift(high, 16) | low
        end = jnp.where(high > _LOW, jnp.uint32(size), jnp.minimum(jnp.uint32(size), small))
        position = _subtract(position, _pair(end))
        ends.append(end)
    return ends


def _pick(counts: tuple[int, ...], stage: int | Array, large: bool) -> Count:
    """Return ``counts[stage]``, as a pair if ``large``. ``stage`` can be traced."""
    if not large:
        return jnp.asarray(counts, jnp.uint32)[stage]
    high = jnp.asarray([count >> 16 for count in counts], jnp.uint32)
    low = jnp.asarray([count & _LOW for count in counts], jnp.uint32)
    return high[stage], low[stage]


def _pair(count: Array) -> tuple[Array, Array]:
    return count >> 16, count & _LOW


def _sum_of(counts: list[Array], sizes: list[int]) -> Count:
    """Return the sum of counts, none of which exceeds its size."""
    if sum(sizes) <= _SUMMAND:
        return sum(counts, jnp.uint32(0))
    # Add plain uint32 numbers as long as they cannot overflow.
    high = low = jnp.uint32(0)
    together, size = jnp.uint32(0), 0
    for count, limit in zip(counts, sizes, strict=True):
        if size + limit > _SUMMAND:
            high, low = high + (together >> 16), low + (together & _LOW)
            together, size = jnp.uint32(0), 0
        together, size = together + count, size + limit
    high, low = high + (together >> 16), low + (together & _LOW)
    return high + (low >> 16), low & _LOW


def _subtract(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return ``a - b`` for pairs with ``a >= b``."""
    borrow = (a[1] < b[1]).astype(jnp.uint32)
    return a[0] - b[0] - borrow, a[1] + jnp.left_shift(borrow, 16) - b[1]


def _at_least(a: Count, b: Count) -> Array:
    if isinstance(a, tuple):
        return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))
    return a >= b


def _same(a: Count, b: Count) -> Array:
    if isinstance(a, tuple):
        return (a[0] == b[0]) & (a[1] == b[1])
    return a == b
