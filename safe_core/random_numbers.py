"""Draw random numbers that are the same in every library, from a hash of their position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of, hashing

from . import _checks
from ._dtypes import wide_dtype

__all__ = ["check_seed", "fractions", "mixed", "rademacher", "signed", "uniform"]

_OFFSET = 0x9E3779B9


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an integer in ``[0, 2**32)``, the range of the hash."""
    if _checks.integer("seed", seed, low=0) >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed!r}")


def rademacher(
    arrays: Sequence[Array],
    seed: int | Array,
    index: int | Array,
    *,
    places: Sequence[int] | None = None,
) -> list[Array]:
    """Return arrays of -1 and +1, each with probability 1/2, like ``arrays``.

    An entry depends only on the seed, the index, the place of its array and its row-major
    position there. So every library and every process draws the same, and nothing is
    stored between draws.

    Parameters
    ----------
    arrays : sequence of arrays
        Real floating arrays, whose shapes and dtypes the result has.
    seed : int or int32 array
        In ``[0, 2**32)``.
    index : int or int32 array
        Number of the draw, not negative. Both may be traced.
    places : sequence of int, optional
        A number for each array, not negative. The default is its position in ``arrays``.

    Returns
    -------
    list of arrays

    Examples
    --------
    >>> import numpy
    >>> rademacher([numpy.zeros(6)], seed=0, index=0)
    [array([ 1., -1.,  1., -1., -1.,  1.])]
    """
    base, number = mixed(_read(seed)), _read(index)
    numbered = zip(range(len(arrays)) if places is None else places, arrays, strict=True)
    return [_signs(x, mixed(_xor(mixed(_xor(base, i)), number))) for i, x in numbered]


def uniform(arrays: Sequence[Array], seed: int) -> list[Array]:
    """Return arrays of numbers in (0, 1) of the shapes of ``arrays``, in float32 or wider.

    An entry depends only on the seed, the position of its array in the list, and its row-major
    position there, as in `rademacher`.

    Examples
    --------
    >>> import numpy
    >>> uniform([numpy.zeros(3)], seed=0)[0].round(3)
    array([0.768, 0.884, 0.046])
    """
    base, found = mixed(seed), []
    for i, x in enumerate(arrays):
        xp = array_namespace(x)
        found.append(fractions(_bits(x, mixed(_xor(base, i))), wide_dtype(xp, [x]), xp=xp))
    return found


def fractions(bits: Array, dtype: Any, *, xp: Any) -> Array:
    """Return 32 random bits as numbers in (0, 1), odd multiples of ``2**-24``.

    Examples
    --------
    >>> import numpy
    >>> float(fractions(numpy.asarray([-1], numpy.int32), numpy.float64, xp=numpy)[0]) < 1
    True
    """
    # 23 bits and the half are exact in float32, and never 0, whose logarithm is infinite.
    return (xp.astype((bits >> 9) & 0x7FFFFF, dtype) + 0.5) * 2.0**-23


def mixed(h: int | Array) -> int | Array:
    """Return the hash of ``h`` plus a constant, because the hash of 0 itself would be 0.

    ``h`` is a Python integer in ``[0, 2**32)`` or an int32 array of the same bits.

    Examples
    --------
    >>> mixed(0) == hashing.mix_int(0x9E3779B9)
    True
    """
    if is_array_api_obj(h):
        return hashing.mix(h + signed(_OFFSET))  # type: ignore[operator]
    return hashing.mix_int((h + _OFFSET) & 0xFFFFFFFF)


def signed(h: int) -> int:
    """Return the signed integer with the same 32 bits.

    Examples
    --------
    >>> signed(2**32 - 1)
    -1
    """
    return h - 2**32 if h >= 2**31 else h


def _read(number: int | Array) -> int | Array:
    """Return a Python integer, or an int32 array if the value is traced."""
    if not is_array_api_obj(number):
        return number
    if backend_of(number).is_concrete(number):  # integers of NumPy would warn of overflow
        return int(number)  # type: ignore[arg-type]
    xp = array_namespace(number)
    return xp.astype(number, xp.int32, copy=False)


def _xor(a: int | Array, b: int | Array) -> int | Array:
    if is_array_api_obj(a) or is_array_api_obj(b):
        a, b = (x if is_array_api_obj(x) else signed(x) for x in (a, b))
    return a ^ b


def _signs(x: Array, salt: int | Array) -> Array:
    xp = array_namespace(x)
    ones = xp.ones_like(backend_of(x).detached(x))
    return xp.where(_bits(x, salt) < 0, -ones, ones)


def _bits(x: Array, salt: int | Array) -> Array:
    """Return a hash of the salt and the position, as an int32 array shaped as x."""
    xp, backend = array_namespace(x), backend_of(x)
    salt = salt if is_array_api_obj(salt) else signed(salt)
    bits = xp.reshape(hashing.mix(hashing.mix(backend.positions(x)) ^ salt), x.shape)
    return backend.resharded_as(x, bits)
