"""Read files of ``torch.save`` tensor by tensor, without torch and without running their pickle.

The pickle of such a file describes tensors as views of storages, which lie in the file as they
are. Every view is checked against its storage, and every storage against the file, before an
array is made. So memory and time are bounded by the size of the file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pickles import Pairs, PickleError, Reference, UnknownReferenceError, read_pickle
from .stored_tensors import FORMATS, LONGEST_NAME, DamagedFileError, Format, StoredTensor, mapped

__all__ = ["read_torch"]

_MAGIC = 0x1950A86A20F9469CFC6C  # of files from before torch 1.6
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}  # fmt: skip
_DEEPEST = 100  # levels of containers
# Views may overlap, so their sizes can add up to more than the file.
_SPARE, _TIMES = 2**26, 16


class _Storage(NamedTuple):
    key: str
    form: Format | None
    nbytes: int


class _View(NamedTuple):
    """A tensor, as a pickle describes it."""

    storage: _Storage
    form: Format
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Sparse(NamedTuple):
    layout: str


class _Empty(NamedTuple):
    """A tensor without data, of the meta device."""

    shape: tuple[int, ...]
    form: Format


class _Content(NamedTuple):
    """Hold the contents of a file, and the position of each of its storages."""

    root: Any
    places: dict[str, int]


def read_torch(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file of ``torch.save`` that holds tensors and plain containers.

    Raises
    ------
    DamagedFileError
        If the file is damaged, names anything else, which could run code when it is loaded, or
        describes more than it holds.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> file = Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"w": torch.ones(2, 3), "step": 4}, file)
    >>> [(x.name, x.shape, x.dtype) for x in read_torch(file)]
    [('w', (2, 3), 'float32')]
    """
    size = file.stat().st_size
    if not size:
        raise _wrong(file, "an empty file")
    with file.open("rb") as stream:
        # It is closed with the last array that refers to it.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Reader(file, data)
        content = reader.of_archive(stream) if data[:2] == b"PK" else reader.of_pickles()
    first: dict[_View, str] = {}
    budget = _SPARE + _TIMES * size
    for name, tensor, optimizer in _named(file, content.root):
        stored = _described(file, name, tensor)._replace(optimizer=optimizer)
        if isinstance(tensor, _View):
            earlier = first.setdefault(tensor, name) if stored.nbytes else name
            budget -= stored.nbytes
            if earlier != name:
                stored = stored._replace(same_as=earlier)
            elif budget < 0:
                raise _wrong(file, f"views of more than {_TIMES} times its size, with {name}")
            elif tensor.form.kind is not None:
                stored = stored._replace(array=_array(data, tensor, content.places))
        yield stored


def _wrong(file: Path, got: str) -> DamagedFileError:
    return DamagedFileError(f"{file} must be a safetensors file or a PyTorch checkpoint, got {got}")


# Containers


class _Reader:
    """Read the pickle of a file, and find the storages that it uses."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data = file, data
        self.needed: dict[str, int] = {}  # bytes of each storage
        self.widths: dict[str, int] = {}  # bytes of an entry

    def of_archive(self, stream: IO[bytes]) -> _Content:
        """Read a zip archive, the format since torch 1.6."""
        with zipfile.ZipFile(stream) as archive:
            members = {member.filename: member for member in archive.infolist()}
        found = [name for name in members if re.fullmatch(r"[^/]*/data\.pkl", name)]
        if len(found) != 1:
            raise _wrong(self.file, "an archive without one data.pkl")
        prefix = found[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:
            raise _wrong(self.file, "a TorchScript program, which holds code")
        order = members.get(f"{prefix}byteorder")
        if order is not None and self.data[slice(*self._bounds(order))] != b"little":
            raise _wrong(self.file, "one that is not little-endian")
        root, _ = self._unpickled(self.data[slice(*self._bounds(members[found[0]]))], 0)
        places, claimed = {}, 0
        for key, nbytes in self.needed.items():
            member = members.get(f"{prefix}data/{key}")
            start, stop = (0, -1) if member is None else self._bounds(member)
            claimed += stop - start
            if stop - start < nbytes or claimed > len(self.data):
                raise _wrong(self.file, f"too little data of storage {key}")
            places[key] = start
        return _Content(root, places)

    def _bounds(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        """Return where the bytes of a member lie; torch does not compress them."""
        start = member.header_offset
        head = self.data[start : start + 30]
        if len(head) < 30 or head[:4] != b"PK\x03\x04" or member.flag_bits & 1:
            raise _wrong(self.file, f"a damaged archive at {member.filename}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise _wrong(self.file, f"a compressed archive, with {member.filename}")
        start += 30 + sum(struct.unpack("<HH", head[26:30]))
        if start + member.file_size > len(self.data):
            raise _wrong(self.file, f"an archive that is cut off in {member.filename}")
        return start, start + member.file_size

    def of_pickles(self) -> _Content:
        """Read a sequence of pickles with the data behind them, the format before torch 1.6."""
        parts: list[Any] = []
        at = 0
        for place in range(5):
            part, at = self._unpickled(self.data, at)
            parts.append(part)
            if place == 0 and (type(part) is not int or part != _MAGIC):
                raise _wrong(self.file, "another kind of pickle")
        _, _, system, root, keys = parts
        if type(system) is not Pairs or ("little_endian", True) not in system:
            raise _wrong(self.file, "one that is not little-endian")
        places = {}
        for key in keys if type(keys) is list else []:
            count = int.from_bytes(self.data[at : at + 8], "little")
            nbytes = self.needed.get(str(key), -1)
            width = self.widths.get(str(key), 0)
            if nbytes != count * width or at + 8 + nbytes > len(self.data):
                raise _wrong(self.file, f"too little data of storage {key}")
            places[str(key)] = at + 8
            at += 8 + nbytes
        return _Content(root, places)

    def _unpickled(self, data: Any, at: int) -> tuple[Any, int]:
        try:
            return read_pickle(data, at, _construct, self._storage, _is_known)
        except UnknownReferenceError as error:
            raise DamagedFileError(
                f"{self.file} must hold only tensors and plain containers, because anything else "
                f"could run code, got {error}"
            ) from None
        except PickleError as error:
            raise _wrong(self.file, str(error)) from error

    def _storage(self, found: Any) -> _Storage:
        """Return the storage that a persistent id names."""
        kind, cls, key, _, count, *view = found
        if kind != "storage" or any(part is not None for part in view):
            raise PickleError("storages of an unknown kind")
        form = _storage_form(cls)
        width = 1 if form is None else form.width
        if type(count) is not int or count < 0:
            raise PickleError("a storage without a size")
        key, nbytes = str(key), count * width
        if self.needed.setdefault(key, nbytes) != nbytes:
            raise PickleError(f"two sizes of storage {key}")
        self.widths[key] = width
        return _Storage(key, form, nbytes)


# Objects


def _is_known(named: Reference) -> bool:
    return str(named) in _KNOWN or (
        named.module == "torch" and (named.name in FORMATS or _is_storage(named.name))
    )


def _is_storage(name: str) -> bool:
    return name.endswith("Storage") and name.removesuffix("Storage") in _STORAGES


def _storage_form(cls: Any) -> Format | None:
    """Return the format of a class of storages, None if its entries have no type."""
    if cls in (Reference("torch.storage", "UntypedStorage"), Reference("torch", "UntypedStorage")):
        return None
    if isinstance(cls, Reference) and cls.module == "torch" and _is_storage(cls.name):
        return FORMATS[_STORAGES[cls.name.removesuffix("Storage")]]
    raise PickleError("a storage of an unknown class")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _View:
    if not isinstance(storage, _Storage) or storage.form is None:
        raise PickleError("a tensor without a storage")
    return _View(storage, storage.form, offset, tuple(shape), tuple(stride))


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise PickleError("a tensor without a storage")
    return _View(storage, _dtype(more[2]), offset, tuple(shape), tuple(stride))


def _dtype(named: Any) -> Format:
    if not isinstance(named, Reference) or named.name not in FORMATS:
        raise PickleError("a tensor of an unknown dtype")
    return FORMATS[named.name]


def _from_type(function: Any, cls: Any, arguments: Any, state: Any) -> Any:
    return _construct(function, arguments)


_KNOWN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_qtensor": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *more: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *more: data,
    "torch._utils._rebuild_sparse_tensor": lambda layout, *more: _Sparse(str(layout)),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, shape, *more: _Empty(
        tuple(shape), _dtype(dtype)
    ),
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.serialization._get_layout": lambda name: str(name),
    "torch.storage.UntypedStorage": lambda *more: None,
    "torch.UntypedStorage": lambda *more: None,
    "torch.Tensor": lambda *more: None,
    "torch.nn.parameter.Parameter": lambda *more: None,
    "torch.Size": tuple,
    "torch.device": lambda *more: None,
    "torch.per_tensor_affine": lambda *more: None,
    "torch.per_channel_affine": lambda *more: None,
    "collections.OrderedDict": lambda items=(): Pairs(tuple(item) for item in items),
    "collections.defaultdict": lambda *more: Pairs(),
    "collections.Counter": lambda items=(): Pairs(items if type(items) is Pairs else ()),
    "builtins.set": list,
    "__builtin__.set": list,
    "builtins.bytearray": lambda *more: None,
    "__builtin__.bytearray": lambda *more: None,
    "_codecs.encode": lambda *more: None,
}


def _construct(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Reference) or type(arguments) is not tuple:
        raise PickleError("a call of something that is not a function")
    known = _KNOWN.get(str(function))
    if known is None:
        raise PickleError(f"a call of {function}")
    return known(*arguments)


# Tensors


def _named(file: Path, root: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield the tensors in nested containers, each with its path, visiting each container once.

    The flag says whether a tensor belongs to an optimizer. Its state is a mapping with the keys
    "state" and "param_groups", wherever it lies.
    """
    seen: set[int] = set()
    pending: list[tuple[str, Any, bool, int]] = [("", root, False, 0)]
    while pending:
        name, value, optimizer, depth = pending.pop()
        if isinstance(value, (_View, _Empty)):
            yield name or "tensor", value, optimizer
        elif isinstance(value, _Sparse):
            raise DamagedFileError(
                f"{file} must hold strided tensors, got {value.layout} for {name}"
            )
        elif type(value) in (Pairs, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            if depth == _DEEPEST:
                raise _wrong(file, f"containers that are more than {_DEEPEST} levels deep")
            if type(value) is Pairs:
                keys = [key for key, _ in value if isinstance(key, str)]
                optimizer = optimizer or ("state" in keys and "param_groups" in keys)
                items: Any = value
            else:
                items = enumerate(value)
            inner = [
                (_path(file, name, key), each, optimizer, depth + 1)
                for key, each in items
                if isinstance(each, (_View, _Empty, _Sparse, Pairs, list, tuple))
            ]
            pending += reversed(inner)


def _path(file: Path, prefix: str, key: Any) -> str:
    name = str(key) if isinstance(key, (str, int, float)) else "?"
    whole = f"{prefix}.{name}" if prefix else name
    if len(whole) > LONGEST_NAME:
        raise DamagedFileError(
            f"{file} must have names of at most {LONGEST_NAME} characters, got {len(whole)}"
        )
    return whole


def _described(file: Path, name: str, tensor: Any) -> StoredTensor:
    """Return a tensor without its entries, after a check of its numbers."""
    form: Format = tensor.form
    numbers = (*tensor.shape, *getattr(tensor, "stride", ()), getattr(tensor, "offset", 0))
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise _wrong(file, f"sizes that are not numbers for {name}")
    entries = math.prod(tensor.shape)
    nbytes = 0
    if isinstance(tensor, _View):
        nbytes = entries * form.width
        steps = zip(tensor.shape, tensor.stride, strict=True)
        stop = tensor.offset + 1 + sum((n - 1) * step for n, step in steps)
        if entries and stop * form.width > tensor.storage.nbytes:
            raise _wrong(file, f"too little data for {name} of shape {tensor.shape}")
    if len(tensor.shape) > 64 or (not entries and math.prod(n or 1 for n in tensor.shape) >= 2**60):
        raise DamagedFileError(
            f"{file} must give shapes that NumPy supports, got {tensor.shape} for {name}"
        )
    return StoredTensor(
        name, tensor.shape, form.name, nbytes, None, form.floating,
        packed=form.packed, format=form.name,
    )  # fmt: skip


def _array(data: mmap.mmap, tensor: _View, places: dict[str, int]) -> NDArray[Any]:
    """Return the entries of a tensor, whose numbers are checked, without reading them."""
    if 0 in tensor.shape:
        return mapped(None, tensor.form, 0, tensor.shape)
    width = tensor.form.width
    count = tensor.storage.nbytes // width
    whole = mapped(data, tensor.form, places[tensor.storage.key], (count,))
    return np.lib.stride_tricks.as_strided(
        whole[tensor.offset :],
        tensor.shape,
        [step * width for step in tensor.stride],
        writeable=False,
    )
