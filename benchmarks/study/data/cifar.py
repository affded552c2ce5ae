"""Read the files of CIFAR-10 and CIFAR-100, as Python pickles or binary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import Release, find
from .pickles import read_pickle
from .splits import Images, Split, checked

__all__ = ["read_cifar"]

_URL = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32
_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))


def _releases(classes: int) -> tuple[Release, Release]:
    """Return the pickles and the binary files. The last file of each is the test set."""
    pickles = (*_TEN, "test_batch") if classes == 10 else ("train", "test")
    folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
    binary = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
    archive = f"{_URL}cifar-{classes}"
    return (
        Release(folder, tuple((name,) for name in pickles), f"{archive}-python.tar.gz"),
        Release(binary, tuple((f"{name}.bin",) for name in pickles), f"{archive}-binary.tar.gz"),
    )


def read_cifar(folder: str | Path, classes: int) -> tuple[Split, Split]:
    """Return the training and the test images of CIFAR-10 or CIFAR-100 (fine labels).

    Parameters
    ----------
    folder : str or Path
        Folder with the files of either format, or with the folder of the extracted archive.
    classes : {10, 100}

    Raises
    ------
    FileNotFoundError
        If files are missing.
    ValueError
        If a file has the wrong format.

    References
    ----------
    Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html

    Examples
    --------
    >>> read_cifar("/nowhere", 10)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: folder must hold the extracted files of CIFAR-10: data_batch_1, ...
    """
    releases = _releases(classes)
    release, paths = find(f"CIFAR-{classes}", folder, releases)
    read = _read_pickle if release == releases[0] else _read_binary
    *train, test = (read(path, classes) for path in paths)
    whole = Split(*(np.concatenate(parts) for parts in zip(*train, strict=True)))
    return whole, test


def _read_pickle(path: Path, classes: int) -> Split:
    content = read_pickle(path)
    key = b"labels" if classes == 10 else b"fine_labels"
    if not isinstance(content, Mapping) or not {b"data", key} <= set(content):
        given = sorted(map(repr, content)) if isinstance(content, Mapping) else type(content)
        raise ValueError(f"{path} must hold b'data' and {key!r}, got {given}")
    return checked(_images(path, content[b"data"]), np.asarray(content[key]), classes, path)


def _read_binary(path: Path, classes: int) -> Split:
    labels = 1 if classes == 10 else 2  # CIFAR-100 stores the coarse label first
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if len(content) % (labels + _PIXELS):
        raise ValueError(
            f"{path} must hold records of {labels + _PIXELS} bytes, got {len(content)} bytes"
        )
    records = content.reshape(-1, labels + _PIXELS)
    return checked(_images(path, records[:, labels:]), records[:, labels - 1], classes, path)


def _images(path: Path, rows: Any) -> Images:
    """Convert rows of red, green and blue planes to images."""
    rows = np.asarray(rows)
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != _PIXELS:
        raise ValueError(
            f"{path} must hold rows of {_PIXELS} bytes, got {rows.dtype} of shape {rows.shape}"
        )
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
