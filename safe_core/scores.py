"""Scores that rank the units of a pattern, as keys that every backend orders alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from safe_core.backends import Array, backend_of

from ._dtypes import flushed, wide_dtype, widened

__all__ = ["entry_keys", "ordering_keys", "unit_squares"]


def ordering_keys(xp: Any, scores: Sequence[Array], *, joint: bool) -> list[Array]:
    """Keys that order as the scores do; of one dtype where they compete jointly."""
    if joint and len({score.dtype for score in scores}) > 1:
        dtype = wide_dtype(xp, scores)
        scores = [widened(xp, score, dtype) for score in scores]
    return [backend_of(score).ordering_key(score) for score in scores]


def entry_keys(
    xp: Any,
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    names: Sequence[str],
    *,
    joint: bool,
) -> list[Array]:
    """Keys that rank entries by ``sqrt(P) |v|``: squares would underflow."""
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
            # Where P is 0 the score is 0, even that of an infinite entry.
            magnitude = xp.where(p > 0, xp.abs(v), xp.zeros_like(v))
            scores[i] = flushed(xp, xp.sqrt(p) * magnitude)
    return ordering_keys(xp, scores, joint=joint)


def unit_squares(
    xp: Any, arrays: Sequence[Array], importance: Sequence[Array | None], *, joint: bool
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
            square = flushed(xp, v * v)
            if given:
                square = flushed(xp, p * xp.where(p > 0, square, xp.zeros_like(v)))
            squares.append(square)
    return squares


def _pools(arrays: Sequence[Array], *, joint: bool) -> list[list[int]]:
    """Positions of the arrays that are scored on one scale."""
    return [list(range(len(arrays)))] if joint else [[i] for i in range(len(arrays))]


def _scaled(xp: Any, arrays: Sequence[Array], dtype: Any) -> list[Array]:
    """Arrays over the power of four that brings their largest magnitude to between 1/2 and 4.

    Division by a power of two is exact, and no product of what remains overflows. With
    an even exponent, scaling P by any power of two scales its square roots exactly too.
    """
    wide = [widened(xp, a, dtype) for a in arrays]
    peaks = [xp.max(xp.abs(a)) for a in wide if math.prod(a.shape)]
    if not peaks:
        return wide
    peak = xp.max(xp.stack(peaks))
    mantissa, exponent = backend_of(peak).frexp(peak)
    one = xp.ones_like(peak)
    usable = (peak > 0) & xp.isfinite(peak)
    power = xp.where(usable, peak / (2 * xp.where(usable, mantissa, one)), one)
    # power is 2^(exponent - 1). Where that is odd, go on towards 2^0, which is in range.
    even = xp.where(exponent > 0, power / 2, power * 2)
    power = xp.where(usable & (exponent % 2 == 0), even, power)
    return [flushed(xp, a / power) for a in wide]
