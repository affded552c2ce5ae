"""Weights with zeros at random places, for measurements before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["synthetic_2_of_4", "synthetic_weight"]

Array = np.ndarray[Any, Any]


def synthetic_weight(
    shape: Sequence[int], block: Sequence[int], sparsity: float, seed: int = 0
) -> Array:
    """Return random weights of which whole blocks are zero.

    The numbers have the variance 1 / inputs, so that outputs stay of the size of inputs.

    Parameters
    ----------
    shape : (outputs, inputs)
    block : (outputs, inputs)
        It must divide the shape.
    sparsity : float
        The fraction of blocks that are zero, rounded down to whole blocks.
    seed : int

    Returns
    -------
    array of float32

    Examples
    --------
    >>> found = synthetic_weight((4, 8), (1, 4), 0.75)
    >>> int((found == 0).sum()), found.shape
    (24, (4, 8))
    """
    (outputs, inputs), (high, wide) = shape, block
    draw = np.random.default_rng(seed)
    grid = outputs // high, inputs // wide
    kept = np.ones(math.prod(grid), bool)
    kept[: math.floor(sparsity * kept.size)] = False
    draw.shuffle(kept)
    mask = kept.reshape(grid)[:, None, :, None]
    values = _numbers(draw, shape).reshape(grid[0], high, grid[1], wide)
    return np.asarray(np.where(mask, values, np.float32(0)).reshape(outputs, inputs))


def synthetic_2_of_4(shape: Sequence[int]) -> Array:
    """Return random weights with two zeros in every four inputs.

    Examples
    --------
    >>> (synthetic_2_of_4((2, 8)) == 0).reshape(-1, 4).sum(1).tolist()
    [2, 2, 2, 2]
    """
    draw = np.random.default_rng(0)
    values = _numbers(draw, shape).reshape(-1, 4)
    places = draw.random(values.shape).argsort(axis=1)[:, :2]
    np.put_along_axis(values, places, np.float32(0), axis=1)
    return values.reshape(tuple(shape))


def _numbers(draw: np.random.Generator, shape: Sequence[int]) -> Array:
    return draw.standard_normal(tuple(shape), np.float32) / np.float32(math.sqrt(shape[1]))
