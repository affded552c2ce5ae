"""State of ADMM with z in float8 and u in bfloat16, the form that ELSA-L publishes.

Both are rounded to nearest, once in each dual update. z has one scale per array::

    scale = max(1.05 max|z| / 448, 1e-8)

z and u have disjoint supports, so the bytes of z also show the support: off it, z is +0. An
entry of the support that rounds to 0 is stored as -0.
"""

from __future__ import annotations

from collections.abc import Sequence

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from .base import SplitState

__all__ = ["FLOAT8", "dequantised", "quantised"]

FLOAT8 = "float8_e4m3fn"

# 448 is the largest float8_e4m3fn. The published margin keeps z away from it.
_PER_MAGNITUDE = 1.05 / 448
_LEAST_SCALE = 1e-8
# Up to here a number rounds to 0: the smallest float8_e4m3fn is 2**-9, and a tie goes to even.
_ROUNDS_TO_ZERO = 2.0**-10
_LARGEST_BFLOAT16 = 3.3895313892515355e38


def quantised(anchor: Sequence[Array], support: Sequence[Array]) -> SplitState:
    """Return the state that holds z in float8 and u in bfloat16.

    Parameters
    ----------
    anchor : sequence of arrays
        ``z - u``, in float32.
    support : sequence of bool arrays
        Where z may be non-zero.

    Returns
    -------
    SplitState
        ``anchor`` is ``z - u`` off the support, in bfloat16, and 0 on it. ``support`` is
        ``z / scale`` in float8_e4m3fn. ``scale`` holds a float32 scalar for each array.
    """
    if not anchor:
        return SplitState([], [])
    z, off, scales = [], [], []
    for a, kept in zip(anchor, support, strict=True):
        xp = array_namespace(a)
        a = xp.astype(a, xp.float32, copy=False)
        zero = xp.zeros_like(a)
        on = xp.where(kept, a, zero)
        peak = backend_of(a).peaks([on])[0]  # over all shards
        scale = xp.clip(peak * _PER_MAGNITUDE, _LEAST_SCALE, None)
        # A product, because a compiler may replace a quotient by one, and round otherwise.
        scaled = on * (1 / scale)
        scaled = xp.where(kept & (xp.abs(scaled) <= _ROUNDS_TO_ZERO), -zero, scaled)
        z.append(xp.astype(xp.where(kept, scaled, zero), getattr(xp, FLOAT8)))
        bounded = xp.clip(xp.where(kept, zero, a), -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)
        off.append(xp.astype(bounded, xp.bfloat16))
        scales.append(scale)
    return SplitState(off, z, scales)


def dequantised(state: SplitState) -> SplitState:
    """Return the state with anchors in float32 and bool supports; any other as it is."""
    if not state.scale:
        return state
    anchor, support = [], []
    for off, z, scale in zip(*state, strict=True):
        xp = array_namespace(off)
        wide = xp.astype(z, xp.float32)
        kept = (wide != 0) | xp.signbit(wide)
        anchor.append(xp.where(kept, wide * scale, xp.astype(off, xp.float32)))
        support.append(kept)
    return SplitState(anchor, support)
