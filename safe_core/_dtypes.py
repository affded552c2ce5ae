"""Which dtype sums are taken in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def wide_dtype(xp: Any, arrays: Sequence[Any]) -> Any:
    """float64 if any array is float64, else float32: what scores and norms are summed in."""
    return xp.float64 if any(a.dtype == xp.float64 for a in arrays) else xp.float32
