"""Which dtypes are taken, and in which one sums are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, is_array_api_obj


def wide_dtype(xp: Any, arrays: Sequence[Any]) -> Any:
    """float64 if any array is float64, else float32: what scores and norms are summed in."""
    return xp.float64 if any(a.dtype == xp.float64 for a in arrays) else xp.float32


def scalar_like(value: Any, x: Any) -> Any:
    """A number as it is, and a scalar array in the dtype of ``x``, so that neither promotes it.

    Schedules of a traced step are float64 where JAX has it, though the parameters are not.
    """
    if not is_array_api_obj(value):
        return value
    return array_namespace(value).astype(value, x.dtype, copy=False)


def check_real_floating(xp: Any, x: Any, name: str) -> None:
    """Refuse what has no bit pattern of 16, 32 or 64 bits that orders as its magnitude."""
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(f"{name} must be real floating, got dtype {x.dtype}")
    if xp.finfo(x.dtype).bits not in (16, 32, 64):
        raise TypeError(f"{name} must be of 16, 32 or 64 bits, got dtype {x.dtype}")


def widened(xp: Any, x: Any, dtype: Any) -> Any:
    """``x`` in a wide dtype, with subnormal float32 or float64 values as zero.

    XLA flushes subnormal numbers to zero in arithmetic. Flushing them everywhere gives
    every backend the same scores.
    """
    x = xp.astype(x, wide_dtype(xp, [x]), copy=False)
    return xp.astype(flushed(xp, x), dtype, copy=False)


def flushed(xp: Any, x: Any) -> Any:
    """``x`` with subnormal values as zero."""
    return xp.where(xp.abs(x) < float(xp.finfo(x.dtype).smallest_normal), xp.zeros_like(x), x)
