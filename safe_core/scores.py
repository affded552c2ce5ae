"""Scores whose magnitudes rank the units of a pattern, alike on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safe_core.backends import Array, backend_of

from ._dtypes import flushed, wide_dtype, widened

__all__ = ["common", "entry_scores", "positive", "unit_squares"]


def common(scores: Sequence[Array], *, joint: bool, xp: Any) -> list[Array]:
    """The scores, in one dtype where they compete jointly."""
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
    """Scores that rank entries by ``sqrt(P) |v|``: squares would underflow."""
    given = [p is not None for p in importance]
    if joint and any(given) and not all(given):
        raise ValueError(
            "importance must be given for all arrays or none where they compete globally; "
            f"it lacks {names[given.index(False)]}"
        )
    scores = list(arrays)
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
    """``P v^2`` of every entry, up to one factor for all that compete."""
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
    """P up to one factor, and where it is zero or nearly a number that is not zero.

    An entry of P = 0 that a mask has kept then still ranks above those that are gone.
    """
    least = 2.0**-60  # of which root and product with squares are far from underflow
    scaled = _scaled(xp, importance, wide_dtype(xp, importance))
    return [xp.clip(p, least, None) for p in scaled]


def _pools(arrays: Sequence[Array], *, joint: bool) -> list[list[int]]:
    """Positions of the arrays that are scored on one scale."""
    return [list(range(len(arrays)))] if joint else [[i] for i in range(len(arrays))]


def _scaled(xp: Any, arrays: Sequence[Array], dtype: Any) -> list[Array]:
    """Arrays over the power of two that brings their largest magnitude to between 1 and 2.

    The division is exact, no product of what remains overflows, and scaling all arrays
    by a power of two changes nothing: sqrt(2 P) would round otherwise than sqrt(P).
    """
    wide = [widened(xp, a, dtype) for a in arrays]
    if not wide:
        return wide
    peak = xp.max(backend_of(wide[0]).peaks(wide))
    mantissa, exponent = backend_of(peak).frexp(peak)
    one = xp.ones_like(peak)
    usable = (peak > 0) & xp.isfinite(peak)
    power = xp.where(usable, peak / (2 * xp.where(usable, mantissa, one)), one)
    # XLA divides by multiplying with the reciprocal, which must not be subnormal.
    half = xp.where(exponent > 64, one / 2, one)
    return [flushed(xp, (a * half) / (power * half)) for a in wide]


def _bounded(xp: Any, v: Array) -> Array:
    """``|v|`` with infinity as a number of finite square: times P = 0 it must be 0."""
    return xp.clip(xp.abs(v), 0.0, float(xp.finfo(v.dtype).max) ** 0.5 / 2)
