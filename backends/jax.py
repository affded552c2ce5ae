"""JAX: selection by counting, which traces, maps and shards.

The k-th largest of non-negative floats is found digit by digit on their bit patterns:
one pass over memory counts the keys at or above fifteen candidates, and the counts of
shards simply add. Ties are cut by counting on the index. No sort, no gather, no
concatenation, no host transfer.

Counts are pairs (high, low) of 16-bit digits in uint32, exact up to 2**48 whether or
not 64-bit integers are enabled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import Array, selects_on_host
from . import numpy as numpy_backend
from .standard import detached, peaks

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

_INTEGER = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
_DIGIT_BITS = 4  # settled in one pass, by 2**4 - 1 counts
_FEW = 2**12  # entries among which passes cost less than compiling many counts
_PIECE = 2**31 - 1  # entries that one uint32 count and one uint32 index can cover
_SUMMAND = 2**32 - 1  # the largest sum of counts that is taken in uint32
_DIGIT = 0xFFFF
_SIGN = 0x80000000
_LARGEST = 0x7F7FFFFF  # bits of the largest finite float32


def is_concrete(x: Array) -> bool:
    return not isinstance(x, jax.core.Tracer)


def has_nan(arrays: Sequence[Array]) -> bool:
    return bool(jnp.any(jnp.stack([jnp.any(jnp.isnan(x)) for x in arrays])))


def where_kept(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    return [jnp.where(mask, x, jnp.zeros_like(x)) for x, mask in zip(arrays, masks, strict=True)]


def norms(arrays: Sequence[Array], dtype: Any) -> Array:
    # Not of raveled arrays: shards of explicit type may lie along any axis.
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(a.astype(dtype)))) for a in arrays])


def regrouped(x: Array, units: Mapping[int, int]) -> Array:
    spec = _explicit_spec(x)
    cut = {axis for axis, names in enumerate(spec) if names and _cuts(x, axis, names, units)}
    if not cut:
        return x
    names = tuple(name for axis in sorted(cut) for name in spec[axis])
    mesh = jax.typeof(x).sharding.mesh

    def divides(axis: int) -> bool:
        return x.shape[axis] % math.prod(mesh.shape[name] for name in spec[axis] + names) == 0

    free = [axis for axis in range(x.ndim) if units.get(axis, 1) == 1 and divides(axis)]
    if not free:
        raise ValueError(
            f"axes {sorted(cut)} of an array of shape {x.shape} must be sharded at multiples of "
            f"the pattern's units, or not at all, got {jax.typeof(x).sharding}"
        )
    target = max(free, key=lambda axis: (not spec[axis], x.shape[axis]))
    moved = [() if axis in cut else held for axis, held in enumerate(spec)]
    moved[target] += names
    return _resharded(x, moved)


def resharded_as(x: Array, result: Array) -> Array:
    spec = _explicit_spec(x)
    if not any(spec):
        return result
    return _resharded(result, spec)


def shardwise(
    fn: Callable[..., Array], *arrays: Array, axes: Mapping[int, int] | None = None
) -> Array:
    specs = [_explicit_spec(x) for x in arrays]
    if not any(specs[0]):
        return fn(*arrays)
    cut = {(axes or {}).get(axis, axis): names for axis, names in enumerate(specs[0]) if names}
    out = [cut.get(axis, ()) for axis in range(max(cut) + 1)]
    mapped = jax.shard_map(
        fn,
        mesh=_mesh(arrays[0]),
        in_specs=tuple(_named(spec) for spec in specs),
        out_specs=_named(out),
        axis_names=set(jax.typeof(arrays[0]).sharding.mesh.explicit_axes),
        check_vma=False,
    )
    return mapped(*arrays)


def _resharded(x: Array, spec: Sequence[tuple[str, ...]]) -> Array:
    sharding = jax.sharding.NamedSharding(_mesh(x), _named(spec))
    return jax.sharding.reshard(x, sharding)  # type: ignore[no-untyped-call]


def _mesh(x: Array) -> Any:
    return x.sharding.mesh if is_concrete(x) else jax.typeof(x).sharding.mesh


def _named(spec: Sequence[tuple[str, ...]]) -> jax.sharding.PartitionSpec:
    found = [names or None for names in spec]
    return jax.sharding.PartitionSpec(*found)  # type: ignore[no-untyped-call]


def _explicit_spec(x: Array) -> list[tuple[str, ...]]:
    """Names of mesh axes of explicit type that each axis is sharded over, by its type."""
    sharding = jax.typeof(x).sharding
    explicit = set(sharding.mesh.explicit_axes)
    spec: list[tuple[str, ...]] = []
    for held in (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))):
        names = held if isinstance(held, tuple) else (held,)
        spec.append(tuple(name for name in names if name in explicit))
    return spec


def _cuts(x: Array, axis: int, names: Sequence[str], units: Mapping[int, int]) -> bool:
    """Whether a shard may begin within a unit."""
    unit, mesh = units.get(axis, 1), jax.typeof(x).sharding.mesh
    count = math.prod(mesh.shape[name] for name in names)
    return unit == 0 or (unit > 1 and x.shape[axis] % (unit * count) != 0)


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


@jax.jit
def stochastic_bfloat16(
    arrays: Sequence[Array], step: int | Array, out: Sequence[Array] | None = None
) -> list[Array]:
    salt = _mixed(jnp.asarray(step).astype(jnp.uint32))

    def rounded(x: Array) -> Array:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        magnitude = bits & 0x7FFFFFFF
        dithered = magnitude + (_mixed(magnitude ^ salt) >> 16)
        signed = jnp.minimum(dithered, jnp.uint32(_LARGEST)) | (bits & jnp.uint32(_SIGN))
        return lax.bitcast_convert_type((signed >> 16).astype(jnp.uint16), jnp.bfloat16)

    return [rounded(x) for x in arrays]


def _mixed(h: Array) -> Array:
    """The finalizer of MurmurHash3; products of uint32 wrap."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


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
    scores: Sequence[Array], counts: tuple[int, ...], stage: int | Array
) -> list[Array]:
    if selects_on_host():
        return _select_on_host(numpy_backend.keep_largest, list(scores), counts, stage)
    return _keep_largest(list(scores), counts, stage)


def keep_largest_per_row(scores: Array, counts: tuple[int, ...], stage: int | Array) -> Array:
    if selects_on_host():
        return _select_on_host(_rows_on_host, [scores], counts, stage)[0]
    return _keep_largest_per_row(scores, counts, stage)


# On the host


def _select_on_host(
    select: Callable[..., list[Any]],
    scores: list[Array],
    counts: tuple[int, ...],
    stage: int | Array,
) -> list[Array]:
    for score in scores:
        _refuse_shards(score)
    bits = [lax.bitcast_convert_type(x, _INTEGER[x.dtype.itemsize]) for x in scores]
    masks = [jax.ShapeDtypeStruct(x.shape, jnp.bool) for x in scores]  # type: ignore[no-untyped-call]

    def run(stage: Any, *bits: Any) -> list[Any]:
        arrays = [np.asarray(x) for x in bits]
        return select(arrays, counts, int(stage))

    found: list[Array] = jax.pure_callback(
        run, masks, jnp.asarray(stage), *bits, vmap_method="sequential"
    )
    return found


def _rows_on_host(scores: Sequence[Any], counts: tuple[int, ...], stage: int) -> list[Any]:
    return [numpy_backend.keep_largest_per_row(x, counts, stage) for x in scores]


def _refuse_shards(x: Array) -> None:
    """Raise for an array on several devices: the host would gather it, and can deadlock."""
    sharding = x.sharding if is_concrete(x) else jax.typeof(x).sharding
    devices = len(sharding.device_set) if is_concrete(x) else sharding.mesh.size
    if devices > 1:
        raise ValueError(
            f"arrays on several devices cannot be selected from on the host, got {sharding}"
        )


# By counting


@partial(jax.jit, static_argnames="counts")
def _keep_largest(scores: list[Array], counts: tuple[int, ...], stage: int | Array) -> list[Array]:
    keys = [_unsigned_key(score) for score in scores]
    pieces = [piece for key in keys for piece in _split(key)]
    sizes = [piece.size for piece in pieces]
    k = _pick(counts, stage)

    def at_least(thresholds: list[Array]) -> list[tuple[Array, Array]]:
        found = [jnp.stack(_reduced([piece >= t for t in thresholds])) for piece in pieces]
        high, low = _sum_of(found, sizes)
        return [(high[i], low[i]) for i in range(len(thresholds))]

    whole = _pick((sum(sizes),), 0)
    zero = jnp.zeros((), keys[0].dtype)
    reaches, same = partial(_at_least, b=k), partial(_same, k)
    bits = _DIGIT_BITS if sum(sizes) > _FEW else 1
    threshold, exact = _search(at_least, zero, whole, reaches, same, bits)

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
def _keep_largest_per_row(scores: Array, counts: tuple[int, ...], stage: int | Array) -> Array:
    keys = _unsigned_key(scores)
    k = jnp.asarray(counts, jnp.uint32)[stage]

    def at_least(thresholds: list[Array]) -> list[Array]:
        return [x[:, None] for x in _reduced([keys >= t for t in thresholds], axes=(1,))]

    zero = jnp.zeros_like(keys, shape=(keys.shape[0], 1))
    whole = jnp.full_like(zero, keys.shape[1], dtype=jnp.uint32)
    bits = _DIGIT_BITS if keys.size > _FEW else 1
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
    """The largest t that enough keys reach, or a t that exactly enough reach.

    ``at_least`` counts the keys at or above each of several thresholds, ``reaches`` and
    ``same`` compare a count with the one wanted. ``bits`` are settled in a pass, and the
    search ends where a count is exact. Returns t and whether its count is exact.
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

    start = jnp.asarray(8 * zero.dtype.itemsize - bits, jnp.int32)
    _, found, count = lax.while_loop(unsettled, settle, (start, zero, whole))
    return found, same(count)


def _reduced(masks: list[Array], axes: tuple[int, ...] | None = None) -> tuple[Array, ...]:
    """Counts of several masks of one shape, in one pass that XLA turns into vector code."""
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
    """`ordering_key`, unsigned: every digit of a candidate is then a larger number."""
    unsigned = _UNSIGNED[x.dtype.itemsize]
    bits: Array = lax.bitcast_convert_type(x, unsigned)
    return bits & jnp.asarray(2 ** (8 * x.dtype.itemsize - 1) - 1, unsigned)


def _row_count(mask: Array) -> Array:
    return jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.uint32)


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


def _cut(tied: list[Array], available: list[Array], quotas: list[Array]) -> list[Array]:
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
    parted = [(quota > 0) & (quota < n) for n, quota in zip(available, quotas, strict=True)]
    return lax.cond(jnp.any(jnp.stack(parted)), cut, whole, tied)


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


def _sum_of(counts: list[Array], sizes: list[int]) -> tuple[Array, Array]:
    """The sum of counts, none of which exceeds its size."""
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
    borrow = (a[1] < b[1]).astype(jnp.uint32)
    return a[0] - b[0] - borrow, a[1] + jnp.left_shift(borrow, 16) - b[1]


def _at_least(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def _same(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] == b[0]) & (a[1] == b[1])


def linalg_errors() -> tuple[type[Exception], ...]:
    # JAX returns NaN instead.
    return ()
