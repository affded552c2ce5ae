"""Read safetensors files tensor by tensor.

The safetensors library needs torch or JAX for bfloat16. The header is plain JSON. Every number
in it is checked against the length of the file.
"""

from __future__ import annotations

import json
import math
import mmap
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .stored_tensors import FORMATS, LONGEST_NAME, DamagedFileError, Format, StoredTensor, mapped

__all__ = ["read_safetensors"]

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several entries in a byte
_LONGEST_HEADER = 100_000_000  # the limit of the format
_MOST_VALUES = 4_000_000  # in the header of about half a million tensors


def read_safetensors(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a safetensors file in the order of their data.

    Raises
    ------
    DamagedFileError
        If the file is cut off, or its header is wrong or too large.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"w": np.ones((2, 3), "f4")}, file)
    >>> [(x.name, x.shape, x.dtype) for x in read_safetensors(file)]
    [('w', (2, 3), 'F32')]
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise DamagedFileError(f"{file} must be a complete safetensors file, got {size} bytes")
        header = stream.read(length)
        # It is closed with the last array that refers to it.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if sum(header.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise DamagedFileError(f"{file} must have a header of at most {_MOST_VALUES:,} values")
    try:
        plain = json.loads(header)
        entries = {k: v for k, v in plain.items() if k != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{file} must have a safetensors header") from error
    stop = 0
    for entry in sorted(_entry(file, name, value) for name, value in entries.items()):
        if entry.start < stop:
            raise DamagedFileError(
                f"{file} must hold tensors that do not overlap, but {entry.name} does"
            )
        stop = entry.stop
        yield _stored(file, entry, 8 + length, data)


class _Entry(NamedTuple):
    start: int
    stop: int
    name: str
    shape: tuple[int, ...]
    dtype: str


def _entry(file: Path, name: str, value: Any) -> _Entry:
    """Check one entry of a header, which can be any JSON value, and return it."""
    if len(name) > LONGEST_NAME:
        raise DamagedFileError(
            f"{file} must have names of at most {LONGEST_NAME} characters, got {len(name)}"
        )
    try:
        start, stop = value["data_offsets"]
        entry = _Entry(start, stop, name, tuple(value["shape"]), value["dtype"])
    except (ValueError, KeyError, TypeError):
        entry = None
    if (
        entry is None
        or any(type(n) is not int or n < 0 for n in (entry.start, entry.stop, *entry.shape))
        or not isinstance(entry.dtype, str)
    ):
        raise DamagedFileError(
            f"{file} must give two data_offsets, a shape and a dtype for each tensor, got "
            f"{reprlib.repr(value)} for {name}"
        )
    return entry


def _stored(file: Path, entry: _Entry, begin: int, data: mmap.mmap) -> StoredTensor:
    start, stop, name, shape, dtype = entry
    form: Format | None = FORMATS.get(_NAMES.get(dtype, ""))
    nbytes = stop - start
    if not start <= stop <= len(data) - begin:
        raise DamagedFileError(f"{file} must be a complete safetensors file, but {name} is cut off")
    array = None
    if form is not None:
        if nbytes != math.prod(shape) * form.width:
            raise DamagedFileError(
                f"{file} must hold complete tensors, got {nbytes} bytes for {name}, {dtype} of "
                f"shape {shape}"
            )
        try:
            array = mapped(data, form, begin + start, shape)
        except (ValueError, OverflowError) as error:
            raise DamagedFileError(
                f"{file} must give shapes that NumPy supports, got {shape} for {name}"
            ) from error
    return StoredTensor(
        name, shape, dtype, nbytes, array, dtype.startswith(("F", "BF")),
        packed=dtype in _PACKED, format=None if form is None else form.name,
    )  # fmt: skip
