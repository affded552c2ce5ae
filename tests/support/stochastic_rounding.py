"""Stochastic rounding to bfloat16 in plain Python."""

from __future__ import annotations

import numpy as np
from array_backends import BFLOAT16

__all__ = ["rounded"]


def mix(h: int) -> int:
    """The finalizer of MurmurHash3, on one number."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return h ^ (h >> 16)


def rounded(x: np.ndarray, step: int) -> np.ndarray:
    """Return float32 in bfloat16, one entry at a time, in Python's integers."""
    bits = []
    for value in x.ravel().view(np.uint32).tolist():
        magnitude, sign = value & 0x7FFFFFFF, value >> 31
        dithered = min(magnitude + (mix(magnitude ^ mix(step)) >> 16), 0x7F7FFFFF)
        bits.append(sign << 15 | dithered >> 16)
    return np.asarray(bits, np.uint16).view(BFLOAT16).reshape(x.shape)
