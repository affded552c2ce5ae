"""Read safetensors files tensor by tensor.

The safetensors library needs torch or JAX for bfloat16.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safe_core.compressed import compressed_header, read_file
from safe_core.tensor_files import DTYPES, DamagedFileError, Entry, read_header

from .stored_tensors import FORMATS, Format, StoredTensor, mapped

__all__ = ["read_safetensors"]

_PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # several entries in a byte


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
    header = read_header(file)
    told = compressed_header(file, header)
    if told is not None:
        yield from _compressed(file, told)
        return
    with file.open("rb") as stream:
        # It is closed with the last array that refers to it.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    for entry in header.entries:
        yield _stored(file, entry, header.begin, data)


def _counted(dtype: str) -> Format | None:
    """Return the format of a dtype whose zeros are counted, which those of complex are not."""
    form = FORMATS.get(DTYPES.get(dtype, ""))
    return None if form is None or form.kind is None else form


def _compressed(file: Path, told: Mapping[str, Any]) -> Iterator[StoredTensor]:
    """Yield the tensors of a compressed file with their zeros."""
    for name, raw in read_file(file):
        form = _counted(raw.dtype)
        array = None
        if form is not None:
            array = raw.data.view(f"<{form.kind}").reshape(raw.shape)
        yield StoredTensor(
            name, raw.shape, raw.dtype, raw.data.size, array, raw.dtype.startswith(("F", "BF")),
            same_as=told[name].get("as"), packed=raw.dtype in _PACKED,
            format=None if form is None else form.name,
        )  # fmt: skip


def _stored(file: Path, entry: Entry, begin: int, data: mmap.mmap) -> StoredTensor:
    start, stop, name, shape, dtype = entry
    form = _counted(dtype)
    nbytes = stop - start
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
