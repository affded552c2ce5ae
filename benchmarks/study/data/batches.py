"""Make batches with the same order and augmentation for both frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from safe_core import _checks

from .splits import Images, Labels, Split

__all__ = ["augmented", "batches", "channels_first"]


def augmented(images: Images, rng: np.random.Generator, *, padding: int = 4) -> Images:
    """Return each image padded, cropped at a random position and flipped at random.

    ``padding`` black pixels surround the image. Half of the images, on average, are mirrored
    left to right.

    Parameters
    ----------
    images : (n, height, width, channels) array
    rng : numpy.random.Generator
    padding : int

    Returns
    -------
    (n, height, width, channels) array

    References
    ----------
    He et al. 2016, section 4.2.

    Examples
    --------
    >>> images = np.ones((2, 8, 8, 1), np.uint8)
    >>> augmented(images, np.random.default_rng(0)).shape
    (2, 8, 8, 1)
    """
    count, height, width, _ = images.shape
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    windows = sliding_window_view(np.pad(images, edges), (height, width), axis=(1, 2))
    down, right = rng.integers(2 * padding + 1, size=(2, count))
    cropped = np.moveaxis(windows[np.arange(count), down, right], 1, -1)
    flipped = rng.random((count, 1, 1, 1)) < 0.5
    return np.where(flipped, cropped[:, :, ::-1], cropped)


def batches(
    split: Split, size: int, *, seed: int, epoch: int, augment: bool = False
) -> Iterator[tuple[Images, Labels]]:
    """Yield the batches of one epoch, in an order that ``seed`` and ``epoch`` determine.

    Training can therefore resume with the number of the epoch as its only state. An incomplete
    last batch is dropped.

    Parameters
    ----------
    split : Split
    size : int
        Images per batch, at most the number of images.
    seed, epoch : int
    augment : bool
        Whether to augment the images; see `augmented`.

    Yields
    ------
    images : (size, height, width, channels) array of uint8
    labels : (size,) array of int64

    Raises
    ------
    TypeError, ValueError
        If an integer is too small, or the images do not fill one batch.

    Examples
    --------
    >>> split = Split(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10))
    >>> [labels.tolist() for _, labels in batches(split, 4, seed=0, epoch=0)]
    [[4, 6, 2, 7], [3, 5, 9, 0]]
    """
    count = len(split.labels)
    if _checks.integer("size", size, low=1) > count:
        raise ValueError(f"size must be at most the number of images, {count}, got {size}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        _checks.integer(name, value, low=0)
    order = np.random.default_rng([seed, epoch, 0]).permutation(count)
    rng = np.random.default_rng([seed, epoch, 1])
    return _batches(split, order[: count // size * size].reshape(-1, size), rng, augment)


def _batches(
    split: Split, order: NDArray[np.int64], rng: np.random.Generator, augment: bool
) -> Iterator[tuple[Images, Labels]]:
    for rows in order:
        images = split.images[rows]
        yield augmented(images, rng) if augment else images, split.labels[rows]


def channels_first(images: NDArray[Any]) -> NDArray[Any]:
    """Return images of shape (n, channels, height, width), as PyTorch expects them.

    Examples
    --------
    >>> channels_first(np.zeros((2, 8, 8, 3))).shape
    (2, 3, 8, 8)
    """
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
