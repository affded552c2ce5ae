"""Choose the dtypes to compute in, and check the dtypes of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import backend_of

# The smallest and the largest positive float32.
_LEAST, _LARGEST = 2.0**-149, float(np.finfo(np.float32).max)


def wide_dtype(xp: Any, arrays: Sequence[Any]) -> Any:
    """Return the dtype for scores and sums: float64 if any array is float64, else float32.

    16-bit parameters are never summed in 16 bits: float16 overflows at 65504, and a bfloat16
    sum stops growing after a few hundred terms.
    """
    return xp.float64 if any(_native(a.dtype) == xp.float64 for a in arrays) else xp.float32


def number_like(xp: Any, number: float, x: Any, name: str) -> Any:
    """Return a non-negative number as a scalar array, to compute with ``x``.

    It is float32, or float64 if ``x`` is wider or the number is beyond the range of float32.
    """
    dtype = wide_dtype(xp, [x])
    if dtype == xp.float32 and number and not _LEAST <= number <= _LARGEST:
        dtype = xp.float64
        if "float64" not in xp.__array_namespace_info__().dtypes(kind="real floating"):
            raise ValueError(
                f"{name} must be 0 or between {_LEAST:.1e} and {_LARGEST:.1e} where there is no "
                f"float64, got {number!r}"
            )
    return xp.asarray(number, dtype=dtype)


def _native(dtype: Any) -> Any:
    """Return ``dtype`` in the byte order of the machine; NumPy also has arrays in the other."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def scalar_like(value: Any, x: Any) -> Any:
    """Return ``value`` such that multiplying ``x`` by it keeps the dtype of ``x``.

    A Python number is returned as it is. A scalar array is cast, because the schedule of a
    traced step is float64 where JAX has x64 enabled, and would promote float32 parameters.
    """
    if not is_array_api_obj(value):
        return value
    return array_namespace(value).astype(value, x.dtype, copy=False)


def check_real_floating(xp: Any, x: Any, name: str) -> None:
    """Raise TypeError unless ``x`` is a plain array, real floating with 16, 32 or 64 bits.

    Selection compares the bit patterns of magnitudes as integers, which needs one of these
    widths.
    """
    _check_readable(xp, x, name)
    if not _is_real_floating(xp, x.dtype):
        raise TypeError(f"{name} must be real floating, got dtype {x.dtype}")
    _check_width(xp, x, name)


@lru_cache(maxsize=64)  # asked for every array, and slow in some libraries
def _is_real_floating(xp: Any, dtype: Any) -> bool:
    return bool(xp.isdtype(dtype, "real floating"))


@lru_cache(maxsize=64)
def _bits(xp: Any, dtype: Any) -> int:
    return int(xp.finfo(dtype).bits)


def check_real(xp: Any, x: Any, name: str) -> None:
    """Raise TypeError unless ``x`` is a plain array of real numbers, integers or booleans."""
    _check_readable(xp, x, name)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"{name} must be real, got dtype {x.dtype}")
    if not xp.isdtype(x.dtype, ("bool", "numeric")):
        raise TypeError(f"{name} must hold numbers, got dtype {x.dtype}")
    if xp.isdtype(x.dtype, "real floating"):
        _check_width(xp, x, name)


def _check_readable(xp: Any, x: Any, name: str) -> None:
    # Such arrays do not fail by themselves: a masked array gives the values behind its mask.
    refused = backend_of(x).unreadable(x)
    if refused:
        raise TypeError(f"{name} must be {refused}")


def _check_width(xp: Any, x: Any, name: str) -> None:
    if _bits(xp, x.dtype) not in (16, 32, 64):
        raise TypeError(f"{name} must be of 16, 32 or 64 bits, got dtype {x.dtype}")


def widened(xp: Any, x: Any, dtype: Any) -> Any:
    """Return ``x`` in ``dtype``, with float32 or float64 subnormals set to zero.

    XLA flushes subnormal numbers to zero in arithmetic. Flushing them everywhere gives
    every backend the same scores. float16 subnormals are kept: float32 holds them as normal
    numbers.
    """
    x = xp.astype(x, wide_dtype(xp, [x]), copy=False)
    return xp.astype(flushed(xp, x), dtype, copy=False)


def flushed(xp: Any, x: Any) -> Any:
    """Return ``x`` with subnormal values set to zero."""
    return xp.where(xp.abs(x) < float(xp.finfo(x.dtype).smallest_normal), xp.zeros_like(x), x)
