"""The backend of NumPy, which selects by partition in linear time.

Magnitudes are compared by their bit patterns. A sample of them brackets the threshold,
so that only the few entries inside the bracket are partitioned.

Two measures save memory traffic, which limits the speed here. Large arrays are
processed in pieces that stay in a core's cache from one pass to the next. The results
for a list of arrays share one allocation, for the kernel backs a large allocation with
large pages, and page faults would cost more than the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from . import Array, threshold
from .standard import (
    as_program,
    cond,
    detached,
    has_bfloat16,
    is_concrete,
    joins,
    norms,
    on_several_devices,
    peaks,
    regrouped,
    resharded_as,
    shardwise,
    stochastic_bfloat16,
)

__all__ = [
    "allocate",
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

# Entries of a piece. Its keys take half a megabyte in float32 and stay in a core's cache.
_PIECE = 2**17
# Entries of the sample that brackets the threshold. Sorting it takes little of the time,
# and the bracket holds a few percent of all entries.
_SAMPLE = 2**16


def unreadable(x: Array) -> str:
    if isinstance(x, np.ma.MaskedArray):
        return "an array without a mask, such as numpy.ma.filled(x, 0), got a masked array"
    if isinstance(x, np.matrix):  # which keeps two axes when it is flattened
        return "an array, such as numpy.asarray(x), got a numpy.matrix"
    if x.dtype.type.__module__ != "numpy":
        # Such as bfloat16 and float8 of ml_dtypes, which NumPy's own functions do not know.
        return f"of a dtype of NumPy itself, such as float32, got dtype {x.dtype}"
    return ""


def ordering_key(x: Array, *, out: Array | None = None) -> Array:
    # IEEE 754 places the exponent above the mantissa, so non-negative floats order as their
    # bits do. Clearing the sign bit takes the magnitude.
    bits = x.view(_integer(x))
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out, dtype=_native_integer(x))


def exponents(arrays: Sequence[Array]) -> Array:
    return np.concatenate([exponents_along(x.reshape(-1), axes=(0,)) for x in arrays])


def exponents_along(x: Array, *, axes: tuple[int, ...]) -> Array:
    peaks = np.max(np.abs(x), axis=axes, keepdims=True, initial=0)
    if np.isinf(peaks).any():  # which is rare, and takes another pass
        peaks = np.max(np.where(np.isinf(x), 0, np.abs(x)), axis=axes, keepdims=True)
    return np.where(peaks > 0, np.frexp(peaks)[1], threshold.NO_EXPONENT)


def scaled(x: Array, exponents: Array, *, dtype: Any) -> Array:
    x = np.abs(x).astype(dtype, copy=False)
    with np.errstate(over="ignore", under="ignore"):
        for part in threshold.parts(exponents, wide=x.dtype == np.float64, xp=np):
            x = x * np.ldexp(np.ones((), dtype), -part).astype(dtype, copy=False)
    return np.where(x < np.finfo(x.dtype).smallest_normal, np.zeros((), dtype), x)


def has_nan(arrays: Sequence[Array]) -> bool:
    # A sum is NaN if an entry is. It needs one pass and no array. It is also NaN where
    # infinities cancel, so only then are the entries themselves looked at.
    with np.errstate(all="ignore"):
        return any(np.isnan(np.sum(x)) and bool(np.isnan(x).any()) for x in arrays)


def where_kept(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    kept = allocate([x.shape for x in arrays], [x.dtype for x in arrays])
    for x, mask, out in zip(arrays, masks, kept, strict=True):
        # Multiply the bits by 0 or 1. As integers, they leave no NaN and no -0 behind where
        # the mask is false, and the product is faster than `where`.
        np.multiply(x.view(_integer(x)), mask.view(np.int8), out=out.view(_integer(x)))
    return kept


def known_finite(arrays: Sequence[Array]) -> bool:
    # A sum is finite only if every entry is. The reverse fails where finite entries
    # overflow, and then the caller takes the slower path that is always right.
    with np.errstate(all="ignore"):
        return all(np.isfinite(np.sum(x)) for x in arrays)


def blockwise(
    fn: Callable[..., Array],
    *lists: Sequence[Array],
    static: tuple[Any, ...] | None = None,
    out: Sequence[Array] | None = None,
) -> list[Array]:
    fn = partial(fn, *static or ())
    if out is None:
        out = allocate([x.shape for x in lists[0]], [x.dtype for x in lists[0]])
    # Results that overflow are the caller's to find, as in the other libraries.
    with np.errstate(over="ignore"):
        for arrays in zip(*lists, out, strict=True):
            for *pieces, result in _pieces(*arrays):
                result[...] = fn(*pieces)
    return list(out)


def widened(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    # By size, because the byte order of an array need not be that of the machine.
    return [x.astype("f8" if x.dtype.itemsize > 4 else "f4", copy=False) for x in arrays]


def positions(x: Array) -> Array:
    return np.arange(x.size, dtype=np.int32)


def keep_largest(scores: Sequence[Array], *, counts: tuple[int, ...], stage: int) -> list[Array]:
    k, n = counts[stage], sum(x.size for x in scores)
    masks = allocate([x.shape for x in scores], [np.dtype(bool)] * len(scores))
    if k in (0, n):
        for mask in masks:
            mask[...] = k == n
    elif not _keep_by_sample(scores, k, masks):
        _keep_by_partition(scores, k, masks)
    return masks


def keep_largest_per_row(scores: Array, *, counts: tuple[int, ...], stage: int) -> Array:
    return threshold.keep_largest_per_row(
        ordering_key(scores), k=counts[stage], kth_largest=_kth_largest_per_row, xp=xp
    )


def allocate(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> list[Array]:
    """Return uninitialised arrays that share one allocation.

    Each begins at a multiple of 64 bytes, a cache line and the widest vector register.
    """
    # Negating twice rounds the division up, so that the next array is aligned too.
    sizes = [
        -(-math.prod(shape) * dtype.itemsize // 64) * 64
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    memory = np.empty(sum(sizes), np.uint8)
    starts = itertools.accumulate(sizes, initial=0)
    return [
        memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for start, shape, dtype in zip(starts, shapes, dtypes, strict=False)
    ]


def _integer(x: Array) -> Any:
    """Return the integer dtype that views the bits of ``x``.

    Files of some formats hold numbers in the other byte order. Viewed in the order of the
    machine, their bytes would be other numbers.
    """
    return _native_integer(x).newbyteorder(x.dtype.byteorder)


def _native_integer(x: Array) -> Any:
    return np.dtype(f"i{x.dtype.itemsize}")


def _keep_by_sample(scores: Sequence[Array], k: int, masks: Sequence[Array]) -> bool:
    """Fill the masks by a bracket of the threshold, and select within the bracket.

    This takes one pass over the scores and allocates no array of their size, where a
    partition of all keys would copy them. Return whether it succeeded. It fails where the
    sample misses the threshold, or where ties leave too many entries in the bracket.
    """
    n = sum(x.size for x in scores)
    low, high = _bracket(scores, k, n)
    pieces = [piece for x, mask in zip(scores, masks, strict=True) for piece in _pieces(x, mask)]
    size = max(a.size for a, _ in pieces)
    some_keys, some_flags = np.empty(size, _native_integer(scores[0])), np.empty(size, bool)
    places, candidates, kept, left = [], [], 0, n // 8 + _SAMPLE
    for a, above in pieces:
        keys = ordering_key(a, out=some_keys[: a.size].reshape(a.shape))
        np.greater_equal(keys, high, out=above)
        flags = np.greater_equal(keys, low, out=some_flags[: a.size].reshape(a.shape))
        flags ^= above  # in the bracket: at least `low`, and not at least `high`
        place = np.flatnonzero(flags)
        places.append((above.reshape(-1), place))
        candidates.append(keys.reshape(-1)[place])
        kept += int(np.count_nonzero(above))
        left -= place.size
        if left < 0:  # a partition of all keys would now be faster
            return False
    inside = np.concatenate(candidates)
    missing = k - kept
    if not 0 <= missing <= inside.size:
        return False
    flags = np.zeros(inside.size, bool)
    if missing:
        kth = np.partition(inside, inside.size - missing)[inside.size - missing]
        flags = inside > kth
        # Candidates are in the order of the arrays, so the first ties have the lowest index.
        flags[np.flatnonzero(inside == kth)[: missing - int(np.count_nonzero(flags))]] = True
    start = 0
    for above, place in places:
        above[place] = flags[start : start + place.size]
        start += place.size
    return True


def _bracket(scores: Sequence[Array], k: int, n: int) -> tuple[int, int]:
    """Return keys with ``low <= kth < high``, almost certainly, for the k-th largest key."""
    # Row lengths are mostly powers of two. An odd stride shares no factor with them, and so
    # visits every column, not the same few in each row.
    stride = n // _SAMPLE | 1
    sample = np.concatenate([ordering_key(x.reshape(-1)[::stride]) for x in scores])
    sample.sort()
    rank = sample.size - k * sample.size // n
    # The rank of the threshold in a random sample is binomial. Four standard deviations
    # contain it almost always. The 16 more cover small samples and rounding.
    deviation = math.sqrt(sample.size * (k / n) * (1 - k / n))
    spread = 16 + int(4 * deviation)
    low = int(sample[rank - spread]) if rank >= spread else 0
    top = rank + spread
    return low, int(sample[top] if top < sample.size else np.iinfo(sample.dtype).max)


def _keep_by_partition(scores: Sequence[Array], k: int, masks: Sequence[Array]) -> None:
    """Fill the masks by a partition of all keys, which works for any scores."""
    keys = np.concatenate([ordering_key(x).reshape(-1) for x in scores])
    keys.partition(keys.size - k)
    kth, kept = keys[keys.size - k], 0
    del keys  # free a copy of all scores before the passes below
    for x, mask in zip(scores, masks, strict=True):
        for a, at_least in _pieces(x, mask):
            np.greater_equal(ordering_key(a), kth, out=at_least)
        kept += int(np.count_nonzero(mask))
    for x, mask in zip(reversed(scores), reversed(masks), strict=True):
        # Too many entries are kept if some are tied with the k-th. Walk backwards and drop
        # the last of them, so that ties are cut by index as in every other backend.
        tied = np.flatnonzero(ordering_key(x) == kth)
        lost = tied[max(0, tied.size - (kept - k)) :] if kept > k else tied[:0]
        mask.reshape(-1)[lost] = False
        kept -= lost.size


def _pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield matching pieces of arrays of one shape.

    Small arrays come whole, and so do arrays that are not contiguous: to flatten one would
    copy it, and results written to the copy would be lost.
    """
    size = arrays[0].size
    if size <= _PIECE or not all(x.flags.c_contiguous for x in arrays):
        yield arrays
        return
    flat = [x.reshape(-1) for x in arrays]
    for start in range(0, size, _PIECE):
        yield tuple(x[start : start + _PIECE] for x in flat)


def _kth_largest_per_row(keys: Array, k: int) -> Array:
    n = keys.shape[1]
    return np.partition(keys, n - k, axis=1)[:, n - k : n - k + 1]


def linalg_errors() -> tuple[type[Exception], ...]:
    return (np.linalg.LinAlgError,)
