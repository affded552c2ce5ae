"""Load CIFAR-10-C: the test images of CIFAR-10 with common corruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from safe_core import _checks

from .files import Release, find
from .splits import Split, checked

__all__ = ["CORRUPTIONS", "load_cifar_10_c"]

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)
_SEVERITIES = 5


def load_cifar_10_c(folder: str | Path, corruption: str, severity: int) -> Split:
    """Return the images of one corruption at one severity.

    Parameters
    ----------
    folder : str or Path
        Folder with ``labels.npy`` and a file for each corruption, or with ``CIFAR-10-C``.
    corruption : str
        One of `CORRUPTIONS`. The last four are meant for choosing hyper-parameters.
    severity : int
        From 1 to 5.

    Raises
    ------
    FileNotFoundError
        If files are missing.
    TypeError, ValueError
        If the corruption or the severity is unknown, or a file has the wrong format.

    References
    ----------
    Hendrycks and Dietterich 2019; https://zenodo.org/records/2535967

    Examples
    --------
    >>> len(CORRUPTIONS)
    19
    >>> load_cifar_10_c("/nowhere", "fog", 3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: folder must hold the extracted files of CIFAR-10-C: fog.npy, labels.npy ...
    """
    _checks.choice("corruption", corruption, CORRUPTIONS)
    if _checks.integer("severity", severity, low=1) > _SEVERITIES:
        raise ValueError(f"severity must be from 1 to {_SEVERITIES}, got {severity}")
    names = ((f"{corruption}.npy",), ("labels.npy",))
    release = Release("CIFAR-10-C", names, "https://zenodo.org/records/2535967")
    _, (path, labels_path) = find("CIFAR-10-C", folder, [release])
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    labels = np.load(labels_path, mmap_mode="r", allow_pickle=False)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % _SEVERITIES:
        raise ValueError(
            f"{path} must hold uint8 of shape (5 n, 32, 32, 3), got {images.dtype} of shape "
            f"{images.shape}"
        )
    count = len(images) // _SEVERITIES
    rows = slice((severity - 1) * count, severity * count)
    return checked(np.array(images[rows]), np.array(labels[rows]), 10, path)
