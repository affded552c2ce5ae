"""Compute the scores that rank the units of a pattern, with the same bits on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safe_core.backends import Array, backend_of

from ._dtypes import flushed, wide_dtype, widened

__all__ = ["common", "entry_scores", "positive", "unit_squares"]


def common(scores: Sequence[Array], *, joint: bool, xp: Any) -> list[Array]:
    """Return the scores, cast to one dtype if they compete in one pool."""
    if joint and len({score.dtype for score in scores}) > 1:
        dtype = wide_dtype(xp, scores)
        return [widened(xp, score, dtype) for score in scores]
    return list(scores)


def entry_scores(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    names: Sequence[str],
    *,
    joint: bool,
    xp: Any,
) -> list[Array]:
    """Return scores that rank entries by ``sqrt(P) |v|``.

    The order is that of ``P v^2``. Squares are avoided because they underflow: in float32 the
    square of an entry below 1e-19 is zero, and such entries would tie. Arrays without
    importance are returned as they are, since selection compares magnitudes.
    """
    given = [p is not None for p in importance]
    if joint and any(given) and not all(given):
        raise ValueError(
            "importance must be given for all arrays or none where they compete globally; "
            f"it lacks {names[given.index(False)]}"
        )
    scores = list(arrays)
    # Arrays of one pool are scaled by one factor, or their scores could not be compared.
    for pool in _pools(arrays, joint=joint):
        members = [i for i in pool if given[i]]
        dtype = wide_dtype(xp, [a[i] for a in (arrays, importance) for i in members])
        values = _scaled(xp, [arrays[i] for i in members], dtype)
        weights = _scaled(xp, [importance[i] for i in members], dtype)
        for i, v, p in zip(members, values, weights, strict=True):
            scores[i] = flushed(xp, xp.sqrt(p) * _bounded(xp, v))
    return common(scores, joint=joint, xp=xp)


def unit_squares(
    arrays: Sequence[Array], importance: Sequence[Array | None], *, joint: bool, xp: Any
) -> list[Array]:
    """Return ``P v^2`` of every entry, up to a common factor of all entries that compete.

    The scores of blocks and channels are sums of these, so roots would give another order.
    """
    squares: list[Array] = []
    for pool in _pools(arrays, joint=joint):
        given = [importance[i] for i in pool if importance[i] is not None]
        dtype = wide_dtype(xp, [*(arrays[i] for i in pool), *given])
        ones = xp.ones((), dtype=dtype)
        weights: list[Array] = [ones if importance[i] is None else importance[i] for i in pool]
        if given:
            weights = _scaled(xp, weights, dtype)
        for v, p in zip(_scaled(xp, [arrays[i] for i in pool], dtype), weights, strict=True):
            square = flushed(xp, _bounded(xp, v) ** 2)
            if given:
                square = flushed(xp, p * square)
            squares.append(square)
    return squares


def positive(importance: Sequence[Array], *, xp: Any) -> list[Array]:
    """Return P up to a common factor, with zeros and tiny values raised to a positive number.

    Masked weights are zero and score 0. A kept weight with P = 0 would score 0 too, and the
    tie rule might bring a masked weight back in its place.
    """
    # Small enough to rank last, and its root and products with squares do not underflow.
    least = 2.0**-60
    scaled = _scaled(xp, importance, wide_dtype(xp, importance))
    return [xp.clip(p, least, None) for p in scaled]


def _pools(arrays: Sequence[Array], *, joint: bool) -> list[list[int]]:
    """Return, for each pool, the positions of the arrays that are scored on one scale."""
    return [list(range(len(arrays)))] if joint else [[i] for i in range(len(arrays))]


def _scaled(xp: Any, arrays: Sequence[Array], dtype: Any) -> list[Array]:
    """Divide the arrays by the power of two that brings their largest magnitude into [1, 2).

    Afterwards no product or square overflows. The divisor is a power of two because dividing
    by it is exact, so the order of the scores does not change. It also makes the selection
    independent of units: arrays that differ by a power of two get the same scaled bits, where
    sqrt(2 P) would round differently from sqrt(P).
    """
    wide = [widened(xp, a, dtype) for a in arrays]
    if not wide:
        return wide
    peak = xp.max(backend_of(wide[0]).peaks(wide))
    # frexp reads the exponent exactly; log2 and exp2 round, differently in each library.
    mantissa, exponent = backend_of(peak).frexp(peak)
    one = xp.ones_like(peak)
    usable = (peak > 0) & xp.isfinite(peak)
    power = xp.where(usable, peak / (2 * xp.where(usable, mantissa, one)), one)
    # XLA may divide by multiplying with the reciprocal. That of a very large power is
    # subnormal and would be flushed to zero, so halve both sides first.
    half = xp.where(exponent > 64, one / 2, one)
    return [flushed(xp, (a * half) / (power * half)) for a in wide]


def _bounded(xp: Any, v: Array) -> Array:
    """Return ``|v|`` clipped to a number whose square is finite.

    An infinite weight with P = 0 must score 0, but infinity times 0 is NaN.
    """
    return xp.clip(xp.abs(v), 0.0, float(xp.finfo(v.dtype).max) ** 0.5 / 2)
