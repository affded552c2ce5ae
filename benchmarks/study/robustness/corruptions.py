"""Apply nine common corruptions, with the severities of CIFAR-10-C, to images of any size."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from safe_core import _checks

__all__ = ["CORRUPTIONS", "corrupt"]

Pixels = NDArray[np.float64]
Bytes = NDArray[np.uint8]
# Largest angle between the motion and the horizontal, in degrees.
_ANGLE = 45


def corrupt(images: Bytes, name: str, severity: int, *, seed: int = 0) -> Bytes:
    """Return the images with a common corruption.

    The corruptions are those of CIFAR-10-C. Random noise differs from its files, and motion blur
    follows ImageMagick. The severities suit images of about 32 pixels; those of ImageNet-C would
    be too strong.

    Parameters
    ----------
    images : (n, height, width, channels) array of uint8
        Images with one or three channels.
    name : str
        One of `CORRUPTIONS`.
    severity : int
        From 1 to 5.
    seed : int
        Seed of the noise and of the direction of motion.

    Returns
    -------
    (n, height, width, channels) array of uint8

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or value.

    References
    ----------
    Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common
    corruptions and perturbations", and its code for CIFAR-10-C.

    Examples
    --------
    >>> images = np.full((1, 2, 2, 1), 100, np.uint8)
    >>> corrupt(images, "brightness", 3).ravel().tolist()
    [138, 138, 138, 138]
    """
    _checks.choice("name", name, CORRUPTIONS)
    if _checks.integer("severity", severity, low=1) > 5:
        raise ValueError(f"severity must be from 1 to 5, got {severity}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            "images must be uint8 of shape (n, height, width, 1 or 3), got "
            f"{images.dtype} of shape {images.shape}"
        )
    if name in _BY_PILLOW:
        change, settings = _BY_PILLOW[name]
        return np.stack([change(image, settings[severity - 1]) for image in images])
    corrupted, amounts = _BY_NUMPY[name]
    rng = np.random.default_rng(_checks.integer("seed", seed, low=0))
    found = corrupted(images / 255, amounts[severity - 1], rng)
    return (np.clip(found, 0, 1) * 255).astype(np.uint8)  # truncated, as published


def _gaussian_noise(x: Pixels, deviation: float, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(scale=deviation, size=x.shape)


def _shot_noise(x: Pixels, photons: float, rng: np.random.Generator) -> Pixels:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    hit, white = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, white, x)


def _defocus_blur(x: Pixels, disk: tuple[float, float], rng: np.random.Generator) -> Pixels:
    return ndimage.correlate(x, disk_kernel(*disk)[None, :, :, None], mode="mirror")


def disk_kernel(radius: float, alias: float) -> Pixels:
    """Return a disk of sum 1, smoothed by a Gaussian over three by three pixels.

    Examples
    --------
    >>> disk_kernel(0.3, 0.4).round(3).tolist()
    [[0.002, 0.037, 0.002], [0.037, 0.845, 0.037], [0.002, 0.037, 0.002]]
    """
    reach = int(radius) + 1
    row = np.arange(-reach, reach + 1)
    disk = (row**2 + row[:, None] ** 2 <= radius**2).astype(np.float64)
    smooth = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    smooth /= smooth.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk / disk.sum(), smooth, axis, mode="constant")
    return disk


def _motion_blur(x: Pixels, shape: tuple[int, float], rng: np.random.Generator) -> Pixels:
    angles = rng.uniform(-_ANGLE, _ANGLE, len(x))
    return motion_blur(x, *shape, angles)


def motion_blur(x: Pixels, radius: int, sigma: float, angles: Pixels) -> Pixels:
    """Return each image averaged along a line with Gaussian weights.

    Parameters
    ----------
    x : (n, height, width, channels) array
    radius : int
        The line starts at the pixel and has ``2 * radius + 1`` pixels.
    sigma : float
        Standard deviation of the Gaussian, in pixels.
    angles : (n,) array
        Angle to the horizontal, in degrees.

    Examples
    --------
    >>> x = np.zeros((1, 1, 4, 1))
    >>> x[0, 0, 3] = 1
    >>> motion_blur(x, 1, 1.0, np.zeros(1)).ravel().round(3).tolist()
    [0.0, 0.078, 0.426, 1.0]
    """
    reach = 2 * radius
    taps = np.arange(reach + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    _, height, width, _ = x.shape
    rows, columns = (np.clip(np.arange(-reach, n + reach), 0, n - 1) for n in (height, width))
    found = np.zeros_like(x)
    for image, blurred, turn in zip(x, found, np.deg2rad(angles), strict=True):
        wide = image[np.ix_(rows, columns)]  # its edges repeated
        down, right = (reach + np.ceil(taps * f(turn) - 0.5).astype(int) for f in (np.sin, np.cos))
        for weight, top, left in zip(weights, down, right, strict=True):
            blurred += weight * wide[top : top + height, left : left + width]
    return found


def _brightness(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    """Increase the value in the HSV colour space."""
    value = x.max(axis=-1, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def _contrast(x: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * factor + mean


def _pixelate(image: Bytes, share: float) -> Bytes:
    picture = _picture(image)
    small = [max(1, int(size * share)) for size in picture.size]
    shrunk = picture.resize((small[0], small[1]), Image.Resampling.BOX)
    return _pixels(shrunk.resize(picture.size, Image.Resampling.BOX), image)


def _jpeg_compression(image: Bytes, quality: int) -> Bytes:
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    return _pixels(Image.open(file), image)


def _picture(image: Bytes) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _pixels(picture: Image.Image, like: Bytes) -> Bytes:
    return np.asarray(picture).reshape(like.shape)


# By severity, from 1 to 5.
_BY_NUMPY: dict[str, tuple[Callable[..., Pixels], tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
}
_BY_PILLOW: dict[str, tuple[Callable[..., Bytes], tuple[Any, ...]]] = {
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
}
CORRUPTIONS = (*_BY_NUMPY, *_BY_PILLOW)
