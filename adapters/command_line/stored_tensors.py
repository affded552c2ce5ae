"""A tensor in a weight file, and its numeric formats."""

from __future__ import annotations

import math
import mmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_core.tensor_files import LONGEST_NAME, DamagedFileError

__all__ = ["FORMATS", "LONGEST_NAME", "DamagedFileError", "Format", "StoredTensor", "mapped"]


class Format(NamedTuple):
    """Describe how the entries of a tensor are stored.

    Attributes
    ----------
    name : str
        In the file format.
    width : int
        Bytes of an entry.
    kind : str or None
        NumPy type code without the byte order. Floating-point numbers are read as unsigned
        integers of the same width. None for types that are not counted.
    floating : bool
    packed : bool
        Whether a byte holds several entries.
    """

    name: str
    width: int
    kind: str | None
    floating: bool = False
    packed: bool = False


def _formats() -> dict[str, Format]:
    """Return the formats by their names in torch."""
    floats = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2} | dict.fromkeys(
        ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1
    )
    found = [Format(name, width, f"u{width}", floating=True) for name, width in floats.items()]
    for width in (1, 2, 4, 8):
        found.append(Format(f"int{8 * width}", width, f"i{width}"))
        found.append(Format(f"uint{8 * width}", width, f"u{width}"))
    found.append(Format("bool", 1, "u1"))  # a damaged byte may be neither 0 nor 1
    complexes = {"complex32": 4, "complex64": 8, "complex128": 16}
    quantised = {"qint8": 1, "quint8": 1, "qint32": 4}  # zero is not stored as zero
    found += [Format(name, width, None) for name, width in (complexes | quantised).items()]
    packed = ("float4_e2m1fn_x2", "quint4x2", "quint2x4")
    found += [Format(name, 1, None, packed=True) for name in packed]
    return {each.name: each for each in found}


FORMATS = _formats()


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
        Its name in the file format.
    nbytes : int
    array : array or None
        The entries, mapped to memory without reading them. Floating-point numbers appear as
        unsigned integers with the same bits. None for unknown dtypes, and for dtypes that pack
        several entries in a byte.
    floating : bool
    same_as : str or None
        The name of an earlier tensor in the same memory.
    packed : bool
        Whether a byte holds several entries.
    optimizer : bool
        Whether the tensor is part of the state of an optimizer.
    format : str or None
        The name of the dtype in torch, if it is known.
    blocks : bool
        Whether the entries are quantised in blocks with scales of their own, as in GGUF files.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    array: NDArray[Any] | None
    floating: bool
    same_as: str | None = None
    packed: bool = False
    optimizer: bool = False
    format: str | None = None
    blocks: bool = False


def mapped(
    data: mmap.mmap | None, form: Format, offset: int, shape: tuple[int, ...]
) -> NDArray[Any]:
    """Return entries of a memory-mapped file as an array without reading them.

    Raises
    ------
    ValueError, OverflowError
        If NumPy does not support the shape.
    """
    kind = np.dtype(f"<{form.kind}")
    if data is None or 0 in shape:
        return np.zeros(shape, kind)  # there is nothing to map
    return np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape)
