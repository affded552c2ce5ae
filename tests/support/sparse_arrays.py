"""Arrays with known patterns of zeros."""

from __future__ import annotations

import numpy as np


def grouped(rng: np.random.Generator, shape: tuple[int, ...], n: int, m: int) -> np.ndarray:
    """Random numbers of which n in every m along the last axis are kept."""
    x = rng.standard_normal(shape)
    score = rng.random((*shape[:-1], shape[-1] // m, m))
    kept = score.argsort(axis=-1).argsort(axis=-1) < n
    return np.where(kept.reshape(shape), x, 0.0)
