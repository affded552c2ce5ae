"""Read safetensors files that hold tensors without their zeros."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_core.tensor_files import (
    DamagedFileError,
    Entry,
    Header,
    check_file,
    read_header,
    shards,
)

from .forms import PLACES, WIDTHS, RawTensor, decode, places_size
from .writing import KEY, VERSION

__all__ = ["compressed_header", "map_file", "read_compressed", "read_file"]

_PICKLED = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of checkpoints of PyTorch before 1.6."""


def compressed_header(file: Path, header: Header) -> dict[str, Any] | None:
    """Return what the metadata of a file says of its tensors, or None if it is not compressed.

    Raises
    ------
    DamagedFileError
        If the metadata is damaged, or the file has a later version of this format.
    """
    text = header.metadata.get(KEY)
    if text is None:
        return None
    try:
        content = json.loads(text)
        version, tensors = content["version"], content["tensors"]
        forms = [told["form"] for told in dict(tensors).values()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{file} must say how its tensors are stored: {error}") from error
    if version != VERSION:
        raise DamagedFileError(f"{file} must have version {VERSION}, got {version!r}")
    for form in forms:
        if form not in ("dense", "same", *PLACES):
            raise DamagedFileError(f"{file} must hold forms of version {VERSION}, got {form!r}")
    return dict(tensors)


def read_compressed(path: Path) -> dict[str, RawTensor]:
    """Read all tensors of a file, an index of shards, or a folder with these.

    Aliases are one and the same object. Threads read some tensors while others are decoded.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If it is not compressed.
    DamagedFileError
        If a file is damaged.
    """
    found: dict[str, RawTensor] = {}
    for file, names in _files(path).items():
        here = dict(read_file(file, threads=_threads()))
        for name in [name for name in names or () if name not in here]:
            raise DamagedFileError(f"{file} must hold {name}, as its index says, but does not")
        for name in [name for name in here if name in found]:
            raise DamagedFileError(f"{file} must hold tensors of its own, got {name} again")
        found |= here
    return found


def _files(path: Path) -> Mapping[Path, Sequence[str] | None]:
    if not path.exists():
        raise FileNotFoundError(f"path must be an existing file or folder, got {path}")
    if not path.is_dir():
        return shards(path) if path.name.endswith(".index.json") else {path: None}
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"folder {path} must hold one index of shards, got {len(indices)}")
    if indices:
        return shards(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"folder {path} must hold .safetensors files, got none")
    return dict.fromkeys(files)


def _threads() -> int:
    return min(4, os.cpu_count() or 1)


def read_file(file: Path, *, threads: int = 0) -> Iterator[tuple[str, RawTensor]]:
    """Yield the names and tensors of one file. Aliases come last, as the same object.

    With ``threads``, all tensors are in memory together, otherwise one at a time.

    Raises
    ------
    ValueError
        If the file is not compressed.
    DamagedFileError
        If it is cut off, or its values, places and check sums do not fit together.
    """
    check_file(file)
    if _is_checkpoint(file):
        raise ValueError(
            f"path must be a file that save_compressed wrote, but {file} is a PyTorch checkpoint; "
            "load it with torch.load"
        )
    header = read_header(file)
    tensors = compressed_header(file, header)
    if tensors is None:
        raise ValueError(
            f"path must be a file that save_compressed wrote, got {file}, which is not compressed; "
            "load it with load_file of safetensors.torch or safetensors.flax"
        )
    aliases = {name: told.get("as") for name, told in tensors.items() if told["form"] == "same"}
    own = {name: told for name, told in tensors.items() if name not in aliases}
    reader, held = _Reader(file, header), dict[str, RawTensor]()
    with ThreadPoolExecutor(threads) if threads else nullcontext() as pool:
        tasks = (own, own.values())
        found = pool.map(reader.tensor, *tasks) if pool else map(reader.tensor, *tasks)
        for name, tensor in zip(own, found, strict=True):
            if name in aliases.values():
                held[name] = tensor
            yield name, tensor
    for alias, name in aliases.items():
        if name not in held:
            raise DamagedFileError(f"{file} must hold the tensor that {alias} shares")
        yield alias, held[name]
    if reader.left:
        raise DamagedFileError(f"{file} must describe all its tensors, got {min(reader.left)}")


def _is_checkpoint(file: Path) -> bool:
    """Return whether ``torch.save`` wrote a file: a zip archive with a pickle, or a pickle."""
    with file.open("rb") as stream:
        head = stream.read(len(_PICKLED))
    if head == _PICKLED:
        return True
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def map_file(file: Path) -> dict[str, RawTensor]:
    """Return the tensors of a safetensors file that is not compressed, without reading them.

    Raises
    ------
    DamagedFileError
        If the header is damaged, or a tensor is cut off.
    """
    check_file(file)
    begin, entries, _ = read_header(file)
    data = np.asarray(np.memmap(file, np.uint8, "r"))
    return {
        entry.name: RawTensor(
            entry.dtype, entry.shape, data[begin + entry.start : begin + entry.stop]
        )
        for entry in map(partial(_complete, file), entries)
    }


def _complete(file: Path, entry: Entry) -> Entry:
    """Return an entry if its range has the length that its shape and dtype ask for, or raise."""
    width = WIDTHS.get(entry.dtype)
    if width is not None and entry.stop - entry.start != width * math.prod(entry.shape):
        raise DamagedFileError(
            f"{file} must hold complete tensors, got {entry.stop - entry.start} bytes for "
            f"{entry.name}, {entry.dtype} of shape {entry.shape}"
        )
    return entry


class _Reader:
    """Read the tensors of a file one after the other, or in threads."""

    def __init__(self, file: Path, header: Header) -> None:
        self.file, self.begin = file, header.begin
        self.left = {entry.name: entry for entry in header.entries}
        self.scratch = local()

    def tensor(self, name: str, told: Mapping[str, Any]) -> RawTensor:
        """Return one tensor."""
        form, shape, sums = told["form"], told.get("shape"), told.get("crc32")
        parts = [name] if form == "dense" else [f"{name}.values", f"{name}.{PLACES[form]}"]
        if (
            not isinstance(shape, list)
            or any(type(n) is not int or n < 0 for n in shape)
            or not isinstance(sums, list)
            or len(sums) != len(parts)
        ):
            raise self._damaged(name)
        entries = [self._entry(part) for part in parts]
        dtype, size = entries[0].dtype, tuple(shape)
        if form == "dense":
            if entries[0].shape != size:
                raise self._damaged(name)
            out = np.empty(entries[0].stop - entries[0].start, np.uint8)
            self._read(entries[0], sums[0], out)
            return RawTensor(dtype, size, out)
        count = math.prod(size)
        # Before anything of its size is made: a short file must not ask for much memory.
        if dtype not in WIDTHS or entries[1].shape != (places_size(form, count),):
            raise self._damaged(name)
        stored, where = (
            self._read(entry, told_sum, self._scratch(i, entry.stop - entry.start))
            for i, (entry, told_sum) in enumerate(zip(entries, sums, strict=True))
        )
        out = np.zeros(count * WIDTHS[dtype], np.uint8)
        if not decode(form, WIDTHS[dtype], stored, where, out):
            raise self._damaged(name)
        return RawTensor(dtype, size, out)

    def _scratch(self, i: int, nbytes: int) -> NDArray[np.uint8]:
        """Return memory of this thread that the last tensor used, which is faster than new one."""
        held: NDArray[np.uint8] | None = getattr(self.scratch, f"part{i}", None)
        if held is None or held.size < nbytes:
            held = np.empty(nbytes, np.uint8)
            setattr(self.scratch, f"part{i}", held)
        return held[:nbytes]

    def _entry(self, part: str) -> Entry:
        entry = self.left.pop(part, None)
        if entry is None:
            raise DamagedFileError(f"{self.file} must hold {part}, but does not")
        return _complete(self.file, entry)

    def _read(self, entry: Entry, told: Any, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin + entry.start)
            view, done = out.data, 0
            while done < len(view):  # one read returns at most 2 GB
                got = stream.readinto(view[done:])
                if not got:
                    raise DamagedFileError(f"{self.file} must be complete, got its end too early")
                done += got
        if f"{zlib.crc32(view):08x}" != told:
            raise self._damaged(entry.name)
        return out

    def _damaged(self, name: str) -> DamagedFileError:
        return DamagedFileError(
            f"{self.file} must hold the tensors that were written, but {name} is damaged"
        )
