"""Read GGUF files tensor by tensor.

The header is binary. Every number in it is checked against the length of the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .stored_tensors import FORMATS, LONGEST_NAME, DamagedFileError, StoredTensor, mapped

__all__ = ["gguf_metadata", "read_gguf"]

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the data, unless the metadata says otherwise
_MOST_AXES = 8  # the library of the format has four
_DEEPEST = 8  # arrays of arrays
_STRING, _ARRAY = 8, 9
# The struct codes of metadata values by their number in the format.
_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

# Types whose entries are stored one by one, by their numbers in the format.
_PLAIN = {
    0: ("F32", "float32"), 1: ("F16", "float16"), 28: ("F64", "float64"), 30: ("BF16", "bfloat16"),
    24: ("I8", "int8"), 25: ("I16", "int16"), 26: ("I32", "int32"), 27: ("I64", "int64"),
}  # fmt: skip
# Quantised types: name, entries of a block, and bytes of a block.
_BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip


def read_gguf(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a GGUF file in the order of their data, with axes as in torch.

    Raises
    ------
    DamagedFileError
        If the file is cut off, its header is wrong, or it is of another version or byte order.
    """
    data = _opened(file)
    header = _read_header(file, data)
    stop = 0
    for entry in sorted(header.entries, key=lambda entry: entry.offset):
        if entry.offset < stop:
            raise DamagedFileError(
                f"{file} must hold tensors that do not overlap, but {entry.name} does"
            )
        tensor = _stored(file, entry, header.start, data)
        stop = entry.offset + tensor.nbytes
        yield tensor


def gguf_metadata(file: Path) -> dict[str, Any]:
    """Return the numbers and texts in the metadata of a GGUF file, without its arrays.

    Raises
    ------
    DamagedFileError
        As `read_gguf`.
    """
    return _read_header(file, _opened(file)).metadata


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the start of the data


class _Header(NamedTuple):
    metadata: dict[str, Any]
    entries: list[_Entry]
    start: int  # of the data


def _opened(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        if file.stat().st_size < 24 or stream.read(4) != b"GGUF":
            raise DamagedFileError(f"{file} must be a GGUF file, got other contents")
        # It is closed with the last array that refers to it.
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


class _Cursor:
    """Read little-endian values one after the other, within the file."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.at = 0
        self._file, self._data = file, data

    def bytes(self, n: int) -> bytes:
        """Return the next n bytes."""
        self.skip(n)
        return self._data[self.at - n : self.at]

    def skip(self, n: int) -> None:
        """Go on by n bytes."""
        if n > len(self._data) - self.at:
            raise DamagedFileError(f"{self._file} must be a complete GGUF file, but it is cut off")
        self.at += n

    def number(self, code: str) -> Any:
        """Return the next number, of a code of `struct`."""
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """Return the next text, with its length before it."""
        return self.bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return the next value of metadata, or None for an array, which is skipped."""
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _DEEPEST:
            raise DamagedFileError(
                f"{self._file} must hold metadata of types of GGUF, got type {kind} at byte "
                f"{self.at}"
            )
        inner, count = self.number("I"), self.number("Q")
        if inner in _VALUES:
            self.skip(count * struct.calcsize(f"<{_VALUES[inner]}"))
        elif inner == _STRING:
            for _ in range(count):  # a file that is cut off raises, so a wrong count ends
                self.skip(self.number("Q"))
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return None


def _read_header(file: Path, data: mmap.mmap) -> _Header:
    cursor = _Cursor(file, data)
    cursor.skip(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise DamagedFileError(
            f"{file} must be a little-endian GGUF file of version 2 or 3, got version {version}"
        )
    tensors, values = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(values):
        key = cursor.text()
        value = cursor.value(cursor.number("I"))
        if value is not None:
            metadata[key] = value
    entries = [_read_entry(file, cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise DamagedFileError(f"{file} must have a positive alignment, got {alignment!r}")
    return _Header(metadata, entries, -(-cursor.at // alignment) * alignment)


def _read_entry(file: Path, cursor: _Cursor) -> _Entry:
    length = cursor.number("Q")
    if length > LONGEST_NAME:
        raise DamagedFileError(
            f"{file} must have names of at most {LONGEST_NAME} characters, got {length}"
        )
    name = cursor.bytes(length).decode("utf-8")
    axes = cursor.number("I")
    if axes > _MOST_AXES:
        raise DamagedFileError(
            f"{file} must have at most {_MOST_AXES} axes for each tensor, got {axes} for {name}"
        )
    # The first axis of the format is the one whose entries are beside each other.
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    return _Entry(name, shape, cursor.number("I"), cursor.number("Q"))


def _stored(file: Path, entry: _Entry, start: int, data: mmap.mmap) -> StoredTensor:
    name, shape, kind, offset = entry
    begin, count = start + offset, math.prod(shape)
    if kind in _PLAIN:
        dtype, key = _PLAIN[kind]
        nbytes = count * FORMATS[key].width
    elif kind in _BLOCKS:
        dtype, per_block, width = _BLOCKS[kind]
        if shape and shape[-1] % per_block:
            raise DamagedFileError(
                f"{file} must hold whole blocks of {per_block} entries, got {shape} of {dtype} for "
                f"{name}"
            )
        nbytes = count // per_block * width
    else:
        raise DamagedFileError(f"{file} must hold tensors of known types, got {kind} for {name}")
    if begin + nbytes > len(data):
        raise DamagedFileError(f"{file} must be a complete GGUF file, but {name} is cut off")
    if kind in _BLOCKS:
        return StoredTensor(name, shape, dtype, nbytes, None, True, packed=True, blocks=True)
    form = FORMATS[key]
    try:
        array = mapped(data, form, begin, shape)
    except (ValueError, OverflowError) as error:
        raise DamagedFileError(
            f"{file} must give shapes that NumPy supports, got {shape} for {name}"
        ) from error
    return StoredTensor(name, shape, dtype, nbytes, array, floating=form.floating, format=form.name)
