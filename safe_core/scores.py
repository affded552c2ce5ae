"""Compute the scores that rank the units of a pattern, with the same bits on every backend.

Scores are products of P and v, and the range of such products is wider than that of floats.
So P and v are first multiplied by powers of two, which is exact: one power for each pool, as
only entries of one pool are compared. The scores then depend neither on the unit of P nor on
that of v, nor on entries of other pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safe_core.backends import Array, backend_of

from ._dtypes import flushed, wide_dtype
from .layout import Layout
from .patterns import Pattern

__all__ = ["common", "entry_scores", "positive", "unit_squares"]

# The largest P and the largest |v| of a pool are scaled to lie just below 2 to these powers.
# Far above 1 they leave room for small entries, and products still fit float32:
# sqrt(2**126) * 2**63 of entries, and a sum of up to 2**34 terms of 2**31 * (2**31)**2.
_P_OF_ENTRIES, _V_OF_ENTRIES = 126, 63
_P_OF_UNITS, _V_OF_UNITS = 31, 31


def common(scores: Sequence[Array], *, joint: bool, xp: Any) -> list[Array]:
    """Return the scores, in one dtype and scaled together if they compete in one pool."""
    if not joint or len({score.dtype for score in scores}) == 1:
        return list(scores)
    return _scaled_jointly(xp, scores, _P_OF_ENTRIES, wide_dtype(xp, scores))


def entry_scores(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    pattern: Pattern,
    layouts: Sequence[Layout | None],
    names: Sequence[str],
    *,
    xp: Any,
) -> list[Array]:
    """Return scores that rank entries by ``sqrt(P) |v|``.

    The order is that of ``P v^2``. Squares are avoided because they underflow: in float32 the
    square of an entry below 1e-19 is zero, and such entries would tie. Arrays without
    importance are returned as they are, since selection compares magnitudes.
    """
    given = [p is not None for p in importance]
    if pattern.joint and any(given) and not all(given):
        raise ValueError(
            "importance must be given for all arrays or none where they compete globally; "
            f"it lacks {names[given.index(False)]}"
        )
    scores = list(arrays)
    if pattern.joint and all(given):
        dtype = wide_dtype(xp, [*arrays, *importance])
        values = _scaled_jointly(xp, arrays, _V_OF_ENTRIES, dtype)
        weights = _scaled_jointly(xp, importance, _P_OF_ENTRIES, dtype)
        return [_times(xp, xp.sqrt(p), v) for v, p in zip(values, weights, strict=True)]
    for i, (v, p) in enumerate(zip(arrays, importance, strict=True)):
        if p is not None:
            pools = _Pools(pattern, layouts[i], names[i], xp, wide_dtype(xp, [v, p]))
            weight = pools.scaled(p, _P_OF_ENTRIES, like=v)
            scores[i] = _times(xp, xp.sqrt(weight), pools.scaled(v, _V_OF_ENTRIES, like=v))
    return common(scores, joint=pattern.joint, xp=xp)


def unit_squares(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    pattern: Pattern,
    layouts: Sequence[Layout | None],
    names: Sequence[str],
    *,
    xp: Any,
) -> list[Array]:
    """Return ``P v^2`` of every entry, up to a common factor of all entries that compete.

    The scores of blocks and channels are sums of these, so roots would give another order.
    """
    given = [p for p in importance if p is not None]
    if pattern.joint:
        dtype = wide_dtype(xp, [*arrays, *given])
        values = _scaled_jointly(xp, arrays, _V_OF_UNITS, dtype)
        if not given:
            return [flushed(xp, v * v) for v in values]
        ones = [xp.ones((), dtype=dtype) if p is None else p for p in importance]
        weights = _scaled_jointly(xp, ones, _P_OF_UNITS, dtype)
        return [_times(xp, p, v * v) for v, p in zip(values, weights, strict=True)]
    squares = []
    for v, p, layout, name in zip(arrays, importance, layouts, names, strict=True):
        dtype = wide_dtype(xp, [v] if p is None else [v, p])
        pools = _Pools(pattern, layout, name, xp, dtype)
        scaled = pools.scaled(v, _V_OF_UNITS, like=v)
        square = flushed(xp, scaled * scaled)
        if p is not None:
            square = _times(xp, pools.scaled(p, _P_OF_UNITS, like=v), square)
        squares.append(square)
    return squares


def positive(importance: Sequence[Array], pattern: Pattern, *, xp: Any) -> list[Array]:
    """Return P up to a factor, with zeros and the tiniest values raised to a positive number.

    Masked weights are zero and score 0. A kept weight with P = 0 would score 0 too, and the
    tie rule might bring a masked weight back in its place.
    """
    # Small enough to rank last. Roots and, where units rank, products with squares of weights
    # must not underflow in float32.
    least = 2.0 ** (-74 if pattern.ranks == "entries" else 66)
    groups = [list(importance)] if pattern.joint else [[p] for p in importance]
    dtype = wide_dtype(xp, importance)
    scaled = [p for group in groups for p in _scaled_jointly(xp, group, 126, dtype)]
    return [xp.clip(p, least, None) for p in scaled]


class _Pools:
    """The pools of one array, each of which is scaled by a power of two of its own."""

    def __init__(
        self, pattern: Pattern, layout: Layout | None, name: str, xp: Any, dtype: Any
    ) -> None:
        self._pattern, self._layout, self._name = pattern, layout, name
        self._xp, self._dtype = xp, dtype

    def scaled(self, x: Array, top: int, *, like: Array) -> Array:
        """Return ``|x|`` times a power of two that brings the largest of a pool to ``2**top``.

        x broadcasts to ``like``, which has the axes of the layout.
        """
        xp = self._xp
        if 0 in like.shape:
            return xp.astype(xp.abs(x), self._dtype)
        if x.ndim == 0:  # the same in every pool
            return _scaled_jointly(xp, [x], top, self._dtype)[0]
        if self._pattern.group is not None and x.shape != like.shape:
            x = xp.broadcast_to(x, like.shape)

        def scale(part: Array, axes: tuple[int, ...] | None) -> Array:
            backend = backend_of(part)
            if axes is None:
                return backend.scaled(part, backend.exponents([part])[0] - top, dtype=self._dtype)
            exponents = backend.exponents_along(part, axes=axes)
            return backend.scaled(part, exponents - top, dtype=self._dtype)

        wide = xp.astype(x, wide_dtype(xp, [x]), copy=False)
        return self._pattern.in_pools(scale, wide, self._layout, self._name, xp=xp)


def _scaled_jointly(xp: Any, arrays: Sequence[Array], top: int, dtype: Any) -> list[Array]:
    """Return ``|x|`` times one power of two that brings the largest of all to ``2**top``."""
    wide = [xp.astype(a, wide_dtype(xp, [a]), copy=False) for a in arrays]
    backend = backend_of(wide[0])
    exponent = xp.max(backend.exponents(wide)) - top
    return [backend.scaled(a, exponent, dtype=dtype) for a in wide]


def _times(xp: Any, p: Array, v: Array) -> Array:
    """Return ``p * v``. Where v is infinite, it is 0 if p is 0 and infinite otherwise."""
    infinite = xp.isinf(v)
    product = flushed(xp, p * xp.where(infinite, xp.zeros_like(v), v))
    return xp.where(infinite & (p > 0), v, product)
