"""Read weight files tensor by tensor: safetensors, sharded or not, and PyTorch checkpoints."""

from __future__ import annotations

import json
import math
import pickle
import re
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PACKED", "StoredTensor", "read_tensors", "weight_files"]

# Floating-point numbers are read as unsigned integers of the same width.
_SAFETENSORS = {
    "F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several entries in a byte
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TORCH_INDEX, _TORCH = "pytorch_model.bin.index.json", "pytorch_model.bin"
_LONGEST_HEADER = 100_000_000  # the limit of the format


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
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    array: NDArray[Any] | None
    floating: bool
    same_as: str | None = None


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of a model, given a file or a folder.

    Parameters
    ----------
    path : pathlib.Path
        A weight file, an index of shards, or a folder as ``save_pretrained`` writes it. A folder
        without the usual file names can hold any number of safetensors files.

    Raises
    ------
    ValueError
        If ``path`` does not exist, holds no weights, or lacks a shard.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "model.safetensors").touch()
    >>> [file.name for file in weight_files(folder)]
    ['model.safetensors']
    """
    if not path.exists():
        raise ValueError(f"path must be an existing file or folder of weights, got {path}")
    if path.is_file():
        return _shards(path) if path.name.endswith(".index.json") else [path]
    for index, single in ((_INDEX, _SINGLE), (_TORCH_INDEX, _TORCH)):
        if (path / index).is_file():
            return _shards(path / index)
        if (path / single).is_file():
            return [path / single]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ValueError(
            f"folder {path} must hold {_SINGLE}, {_TORCH} or an index of shards, got none of these"
        )
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must be an index of shards with a weight_map") from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{index} must name existing shards, but {missing[0]} is missing")
    return files


def read_tensors(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file, with one in memory at a time.

    Parameters
    ----------
    file : pathlib.Path
        A safetensors file, or one of ``torch.save`` that holds only tensors and plain
        containers. Code in the file never runs.

    Raises
    ------
    ValueError
        If the file is damaged, or is a PyTorch file that is not safe to read.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"w": np.ones((2, 3), "f4")}, file)
    >>> [(x.name, x.shape, x.dtype, x.array.dtype.str) for x in read_tensors(file)]
    [('w', (2, 3), 'F32', '<u4')]
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_torch(file)


def _read_safetensors(file: Path) -> Iterator[StoredTensor]:
    # The safetensors library needs torch or JAX for bfloat16. The header is plain JSON.
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{file} must be a complete safetensors file, got {size} bytes")
        try:
            header = json.loads(stream.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} must have a safetensors header") from error
    for entry in sorted(_entry(file, name, value) for name, value in entries.items()):
        yield _stored(file, entry, 8 + length, size)


class _Entry(NamedTuple):
    start: int
    stop: int
    name: str
    shape: tuple[int, ...]
    dtype: str


def _entry(file: Path, name: str, value: Any) -> _Entry:
    """Check one entry of a header, which can be any JSON value, and return it."""
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
        raise ValueError(
            f"{file} must give two data_offsets, a shape and a dtype for each tensor, got "
            f"{reprlib.repr(value)} for {name}"
        )
    return entry


def _stored(file: Path, entry: _Entry, begin: int, size: int) -> StoredTensor:
    start, stop, name, shape, dtype = entry
    kind, nbytes = _SAFETENSORS.get(dtype), stop - start
    if not start <= stop <= size - begin:
        raise ValueError(f"{file} must be a complete safetensors file, but {name} is cut off")
    array = None
    if kind is not None:
        if nbytes != math.prod(shape) * np.dtype(kind).itemsize:
            raise ValueError(
                f"{file} must hold complete tensors, got {nbytes} bytes for {name}, {dtype} of "
                f"shape {shape}"
            )
        try:
            array = (
                np.memmap(file, kind, "r", begin + start, shape)
                if nbytes
                else np.zeros(shape, kind)  # there is nothing to map
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{file} must give shapes that NumPy supports, got {shape} for {name}"
            ) from error
    return StoredTensor(name, shape, dtype, nbytes, array, dtype.startswith(("F", "BF")))


def _read_torch(file: Path) -> Iterator[StoredTensor]:
    import torch

    mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 cannot be mapped
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file} must hold only tensors and plain containers, because anything else could run "
            f"code, got {found[1] if found else 'another object'}"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} must be a safetensors file or a PyTorch checkpoint") from error
    places: dict[Any, str] = {}
    for name, tensor in _flat(content, ""):
        if tensor.layout is not torch.strided:
            raise ValueError(f"{file} must hold strided tensors, got {tensor.layout} for {name}")
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        first = places.setdefault(place, name) if tensor.numel() else name
        yield _of_torch(name, tensor, None if first == name else first)


def _flat(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in nested mappings and lists, each with its path."""
    import torch

    if torch.is_tensor(content):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, (list, tuple)):
        for i, value in enumerate(content):
            yield from _flat(value, f"{prefix}.{i}" if prefix else str(i))


def _of_torch(name: str, tensor: Any, same_as: str | None) -> StoredTensor:
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = tensor.detach()
    floating, width = tensor.is_floating_point(), tensor.element_size()
    array = None
    dtype = str(tensor.dtype).removeprefix("torch.")
    if floating:
        array = tensor.view(integers[width]).numpy().view(f"u{width}")
    elif tensor.dtype in (torch.bool, *integers.values(), torch.int8):
        array = tensor.numpy()
    return StoredTensor(
        name, tuple(tensor.shape), dtype, tensor.numel() * width, array, floating, same_as
    )
