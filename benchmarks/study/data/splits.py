"""The contents of a data set."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dataset", "Images", "Labels", "Normalisation", "Split", "checked", "pixels"]

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def pixels(images: Images) -> NDArray[np.float32]:
    """Return bytes as float32 from 0 to 1.

    Examples
    --------
    >>> pixels(np.asarray([0, 255], np.uint8)).tolist()
    [0.0, 1.0]
    """
    return images.astype(np.float32) / np.float32(255)


class Split(NamedTuple):
    """Images and their classes.

    Attributes
    ----------
    images : (n, height, width, channels) array of uint8
    labels : (n,) array of int64
        Classes, counted from 0.

    Examples
    --------
    >>> Split(np.zeros((2, 8, 8, 1), np.uint8), np.asarray([3, 1])).labels.tolist()
    [3, 1]
    """

    images: Images
    labels: Labels


class Normalisation(NamedTuple):
    """Mean and standard deviation of pixels in [0, 1], by channel.

    Examples
    --------
    >>> Normalisation((0.5,), (0.25,))(np.full((1, 1, 1, 1), 255, np.uint8)).ravel().tolist()
    [2.0]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Return ``(images / 255 - mean) / std`` in float32."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.divide(pixels(images) - mean, std, dtype=np.float32)


class Dataset(NamedTuple):
    """Training images and test images.

    Attributes
    ----------
    train, test : Split
    classes : int
    normalisation : Normalisation
        Statistics of the published training images.

    Examples
    --------
    >>> from safe_core.study.data import load
    >>> load("digits").normalisation.mean
    (0.3055,)
    """

    train: Split
    test: Split
    classes: int
    normalisation: Normalisation


def checked(images: Images, labels: NDArray[Any], classes: int, source: object) -> Split:
    """Return a split after checking it; errors name the source file.

    Examples
    --------
    >>> checked(np.zeros((1, 8, 8, 1), np.uint8), np.asarray([10]), 10, "labels.npy")
    Traceback (most recent call last):
        ...
    ValueError: labels of labels.npy must be from 0 to 9, got 10 to 10
    """
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{source} must hold a label for each image, got {len(images)} images and "
            f"{len(labels)} labels"
        )
    labels = np.asarray(labels, np.int64)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels of {source} must be from 0 to {classes - 1}, got {labels.min()} to "
            f"{labels.max()}"
        )
    return Split(np.ascontiguousarray(images), labels)
