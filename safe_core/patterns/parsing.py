"""Convert the user's ``sparsity`` argument to a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

from safe_core import _checks
from safe_core.sparsity_tables import SparsityTable

from .base import Pattern
from .by_name import ByName
from .nm import NM
from .unstructured import Unstructured

__all__ = ["as_pattern"]


def as_pattern(value: Any, scope: Literal["global", "tensor", "row"] = "global") -> Pattern:
    """Return a pattern from a pattern, a fraction of zeros, a schedule, ``"N:M"`` or a mapping.

    ``scope`` applies to a fraction and to a schedule. A mapping of names to any of these gives
    each array its own, see `ByName`.

    Examples
    --------
    >>> as_pattern("2:4")
    NM(n=2, m=4, ragged='error')
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        n, colon, m = value.partition(":")
        numbers = colon and n.strip().isdecimal() and m.strip().isdecimal()
        if not (numbers and 1 <= int(n) <= int(m)):
            raise ValueError(
                'sparsity must be a number such as 0.95, or a string "N:M" that keeps N of every M '
                f"with 1 <= N <= M, got {value!r}{_checks.sparsity_meant(value)}"
            )
        return NM(int(n), int(m))
    if isinstance(value, Mapping):
        return ByName(value, scope=scope)
    if isinstance(value, Real | Decimal | SparsityTable) and not isinstance(value, bool):
        return Unstructured(value, scope=scope)  # type: ignore[arg-type]
    raise TypeError(
        "sparsity must be a fraction in [0, 1), a string such as '2:4', a schedule such as "
        "safe_core.schedules.cubic(0.9, steps=1000), a pattern (Unstructured, NM, Block, Channel) "
        f"or a mapping of names to them, got {_checks.shown(value)}{_checks.why_no_array(value)}"
    )
