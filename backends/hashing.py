"""The hash that replaces random numbers wherever every library must draw the same ones.

Both functions are the finalizer of MurmurHash3, a bijection of 32-bit words in which
each bit of the input flips about half the bits of the output. It needs only shifts,
exclusive or and products modulo 2**32, which every library computes alike.
"""

from __future__ import annotations

from . import Array

__all__ = ["mix", "mix_int"]

_FIRST = 0x85EBCA6B
_SECOND = 0xC2B2AE35


def mix(h: Array) -> Array:
    """Return the hash of each word of an int32 array.

    The words are signed, for PyTorch computes little in uint32 and multiplies int32
    with the wrap-around that the hash needs.
    """
    # `>>` copies the sign of a signed integer into the bits that it frees. The masks clear
    # them, as a shift of an unsigned integer would. Both factors are above 2**31, so they
    # are written as the negative int32 of the same bits.
    h = (h ^ ((h >> 16) & 0xFFFF)) * (_FIRST - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (_SECOND - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)


def mix_int(h: int) -> int:
    """Return the same hash of one Python integer in ``[0, 2**32)``, unsigned."""
    # Python's integers never wrap, so each product is cut to 32 bits.
    h = (h ^ (h >> 16)) * _FIRST & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * _SECOND & 0xFFFFFFFF
    return h ^ (h >> 16)
