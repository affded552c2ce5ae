"""Read and write the headers of safetensors files, and find the shards of a model.

The header is plain JSON. Every number in it is checked against the length of the file. Damage of
any kind ends in one error, `DamagedFileError`, whose message names the file.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from safe_core._checks import printable

__all__ = [
    "DTYPES",
    "LONGEST_NAME",
    "DamagedFileError",
    "Entry",
    "Header",
    "check_file",
    "read_header",
    "read_json",
    "shards",
    "write_file",
]

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Names of dtypes in NumPy, ml_dtypes and PyTorch, by their names in the file format."""

LONGEST_NAME = 4096  # characters; longer names only serve to fill memory
_LARGEST_JSON = 100_000_000
_LONGEST_HEADER = 100_000_000  # the limit of the format
_MOST_VALUES = 4_000_000  # in the header of about half a million tensors
_POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get"}


class DamagedFileError(ValueError):
    """A file is not what it should be; the message names the file and the fault.

    Names come from the file, so control characters in the message are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Entry(NamedTuple):
    """One tensor in a header: the range of its bytes after the header, and what they are.

    Attributes
    ----------
    start, stop : int
    name : str
    shape : tuple of int
    dtype : str
        Its name in the file format, such as ``"BF16"``.
    """

    start: int
    stop: int
    name: str
    shape: tuple[int, ...]
    dtype: str


class Header(NamedTuple):
    """The header of a file.

    Attributes
    ----------
    begin : int
        The length of the header, after which the data begins.
    entries : list of Entry
        In the order of their data.
    metadata : dict
    """

    begin: int
    entries: list[Entry]
    metadata: dict[str, Any]


def check_file(file: Path) -> None:
    """Raise unless a file can be read: FIFOs and devices could wait or go on for ever.

    Raises
    ------
    DamagedFileError
        If it is no regular file, or a pointer of git-lfs or git-annex in the place of one.

    Examples
    --------
    >>> check_file(Path("/dev/null"))
    Traceback (most recent call last):
    safe_core.tensor_files.DamagedFileError: /dev/null must be a regular file
    """
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        raise DamagedFileError(f"{file} must be a regular file")
    with file.open("rb") as stream:
        head = stream.read(32)
    for start, command in _POINTERS.items():
        if head.startswith(start):
            tool = "-".join(command.split()[:2])
            raise DamagedFileError(
                f"{file} must hold the data itself, got a pointer of {tool}: run `{command}` in "
                "its folder, or download the file again"
            )


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    DamagedFileError
        If it is none, or is a pointer to a file that was not downloaded.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "config.json"
    >>> _ = file.write_text("{")
    >>> read_json(file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    safe_core...DamagedFileError: .../config.json must be a JSON file: Expecting property name ...
    """
    check_file(file)
    if file.stat().st_size > _LARGEST_JSON:
        raise DamagedFileError(f"{file} must be a JSON file of at most {_LARGEST_JSON:,} bytes")
    try:
        return json.loads(file.read_bytes())
    except RecursionError:
        raise DamagedFileError(f"{file} must be a JSON file: it is nested too deep") from None
    except ValueError as error:
        raise DamagedFileError(f"{file} must be a JSON file: {error}") from error


def shards(index: Path) -> dict[Path, list[str]]:
    """Return the files that an index of shards names, each with the names of its tensors.

    Raises
    ------
    DamagedFileError
        If it is no index, or names a file outside of its folder or one that is missing.
    """
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DamagedFileError(f"{index} must be an index of shards with a weight_map")
    paths = {}
    for name in sorted(set(names.values())):
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
        if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
            raise DamagedFileError(f"{index} must name shards inside its folder, got {name}")
        paths[name] = index.parent / name  # "a" and "./a" are the same path
        if not paths[name].exists():
            raise DamagedFileError(f"{index} must name existing shards, but {name} is missing")
    found: dict[Path, list[str]] = {path: [] for path in paths.values()}
    for tensor, name in names.items():
        found[paths[name]].append(tensor)
    return found


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises
    ------
    DamagedFileError
        If the file is cut off, its header is wrong or too large, or its tensors overlap.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> _ = file.write_bytes(b"short")
    >>> read_header(file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    safe_core...DamagedFileError: ... must be a complete safetensors file, got 5 bytes
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise DamagedFileError(f"{file} must be a complete safetensors file, got {size} bytes")
        header = stream.read(length)
    if sum(header.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise DamagedFileError(f"{file} must have a header of at most {_MOST_VALUES:,} values")
    try:
        plain = json.loads(header)
        entries = {k: v for k, v in plain.items() if k != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{file} must have a safetensors header") from error
    found, stop = sorted(_entry(file, name, value) for name, value in entries.items()), 0
    for entry in found:
        if entry.start < stop:
            raise DamagedFileError(
                f"{file} must hold tensors that do not overlap, but {entry.name} does"
            )
        if not entry.start <= entry.stop <= size - 8 - length:
            raise DamagedFileError(
                f"{file} must be a complete safetensors file, but {entry.name} is cut off"
            )
        stop = entry.stop
    metadata = plain.get("__metadata__")
    return Header(8 + length, found, metadata if isinstance(metadata, dict) else {})


def _entry(file: Path, name: str, value: Any) -> Entry:
    """Check one entry of a header, which can be any JSON value, and return it."""
    if len(name) > LONGEST_NAME:
        raise DamagedFileError(
            f"{file} must have names of at most {LONGEST_NAME} characters, got {len(name)}"
        )
    try:
        start, stop = value["data_offsets"]
        entry = Entry(start, stop, name, tuple(value["shape"]), value["dtype"])
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


def write_file(
    file: Path,
    entries: Sequence[Entry],
    pieces: Iterable[Any],
    metadata: Callable[[], Mapping[str, str]],
) -> None:
    """Write a safetensors file, which appears only when complete.

    Parameters
    ----------
    file : pathlib.Path
    entries : sequence of Entry
        In the order of their data.
    pieces : iterable of buffers
        The bytes of all entries, in any number of pieces.
    metadata : callable
        Called before and after the data is written. It must return strings of the same length,
        so that they may depend on the data.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    draft = file.with_name(f".{file.name}.partial")
    try:
        with draft.open("wb") as stream:
            before = _header(entries, metadata())
            stream.write(before)
            for piece in pieces:
                stream.write(piece)
            after = _header(entries, metadata())
            if len(after) != len(before):
                raise ValueError(f"metadata must keep its length, got {len(after)} bytes")
            stream.seek(0)
            stream.write(after)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    plain: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        span = [entry.start, entry.stop]
        plain[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
    text = json.dumps(plain, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text
