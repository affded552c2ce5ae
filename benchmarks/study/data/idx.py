"""Read the IDX format of MNIST."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx"]

_UNSIGNED_BYTES = 0x08


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an IDX file, which can be compressed with gzip.

    The file begins with two zero bytes, the type (8 for unsigned bytes), the number of axes,
    and their sizes as big-endian 32-bit integers.

    Raises
    ------
    ValueError
        If the file has another format, or not the size that its header gives.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    >>> read_idx(path).tolist()
    [7, 2, 1]
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    axes = content[3] if len(content) >= 4 else 0
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or len(content) < 4 + 4 * axes:
        raise ValueError(
            f"{path} must be an IDX file of unsigned bytes, got one that begins with "
            f"{content[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(np.frombuffer(content, ">u4", axes, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if len(values) != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} values for its shape {shape}, got {len(values)}"
        )
    return values.reshape(shape)
