"""Write safetensors files that hold tensors without their zeros.

A compressed tensor ``w`` is two tensors of the file: ``w.values``, its entries that are not zero,
and ``w.bitmask``, a bit for each entry, or ``w.groups``, a byte for twelve entries of a 2:4 tensor.
The metadata holds JSON under the key ``"safe_core"``: what the file is, the version of this
format, and the form, the shape and a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safe_core import _checks
from safe_core._readable import readable_bytes
from safe_core.tensor_files import Entry, write_file

from .forms import PLACES, WIDTHS, Form, RawTensor, chosen_form, places, values

__all__ = ["KEY", "VERSION", "CompressedFiles", "write_compressed", "write_dense"]

VERSION = 1
KEY = "safe_core"
_ABOUT = "tensors without their zeros; `safe-core decompress` or load_compressed reads them"


class CompressedFiles(NamedTuple):
    """Report the files that `save_compressed` wrote. ``str(files)`` is a short text.

    Attributes
    ----------
    files : list of pathlib.Path
        The files, and the index of several shards as the last.
    forms : dict of str to str
        How each tensor is stored: ``"dense"``, ``"bitmask"``, ``"2:4"``, or ``"same as NAME"``.
    dense_bytes, stored_bytes : int
        Bytes of all tensors, as they are and as they are stored.
    """

    files: list[Path]
    forms: dict[str, str]
    dense_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        """Return how many times smaller the stored tensors are."""
        return self.dense_bytes / max(1, self.stored_bytes)

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""
        forms = Counter(form.partition(" ")[0] for form in self.forms.values())
        forms["same as another"] = forms.pop("same", 0)
        counts = ", ".join(f"{count} {form}" for form, count in forms.items() if count)
        return (
            f"{self.files[0].name}{more}: {readable_bytes(self.stored_bytes)} instead of "
            f"{readable_bytes(self.dense_bytes)}, {self.ratio:.2f} times smaller\n"
            f"tensors: {counts or 'none'}"
        )


class _Plan(NamedTuple):
    tensors: Mapping[str, RawTensor]
    forms: dict[str, Form]
    aliases: Mapping[str, str]


def write_compressed(
    path: Path,
    tensors: Mapping[str, RawTensor],
    *,
    aliases: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CompressedFiles:
    """Write tensors to a file, or to shards and an index beside it.

    Parameters
    ----------
    path : pathlib.Path
        The file, whose name ends in ``.safetensors``. Shards are named after it.
    tensors : mapping of str to RawTensor
        Read twice, in their order.
    aliases : mapping of str to str, optional
        Further names, each with that of the tensor that it shares.
    max_shard_size : int, optional
        Bytes of the stored tensors in a file. A larger tensor has a file of its own.
    metadata : mapping of str to str, optional
        More entries for the metadata of each file.

    Returns
    -------
    CompressedFiles

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind, or two tensors of the file would have one name.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> import numpy as np
    >>> x = np.asarray([[0, 0, 0, 2, 0, 0, 0, 0, 0, 1]], "f4")
    >>> write_compressed(path, {"w": RawTensor("F32", x.shape, x.view("u1").ravel())}).forms
    {'w': 'bitmask'}
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    if max_shard_size is not None:
        _checks.integer("max_shard_size", max_shard_size, low=1)
    metadata, aliases = dict(metadata or {}), dict(aliases or {})
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)) or key == KEY:
            raise ValueError(
                f"metadata must map strings other than {KEY!r} to strings, got {key!r}: {value!r}"
            )
    forms = {name: chosen_form(tensor) for name, tensor in tensors.items()}
    _check_names(tensors, forms, aliases)
    groups = _in_files(forms, max_shard_size)
    files = _names(path, len(groups))
    held: dict[str, str] = {}
    for file, names in zip(files, groups, strict=True):
        own = {alias: name for alias, name in aliases.items() if name in set(names)}
        plan = _Plan(tensors, {name: forms[name] for name in names}, own)
        _write(file, plan, metadata)
        held |= dict.fromkeys((*names, *own), file.name)
    dense = sum(tensor.data.size for tensor in tensors.values())
    if len(files) > 1:
        index = path.with_name(f"{path.name}.index.json")
        content = {"metadata": {"total_size": dense, "format": _ABOUT}, "weight_map": held}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")
        files = [*files, index]
    shown = {name: form.name for name, form in forms.items()}
    shown |= {alias: f"same as {name}" for alias, name in aliases.items()}
    return CompressedFiles(files, shown, dense, sum(form.nbytes for form in forms.values()))


def _check_names(
    tensors: Mapping[str, RawTensor], forms: Mapping[str, Form], aliases: Mapping[str, str]
) -> None:
    """Raise if a tensor has the name of a part of another."""
    parts = {
        part.name: name
        for name, form in forms.items()
        for part in _parts(name, tensors[name], form)
    }
    for name in (*tensors, *aliases):
        if parts.get(name, name) != name:
            raise ValueError(
                f"names must differ from those of the parts of compressed tensors, got {name!r} "
                f"beside {parts[name]!r}"
            )


def _in_files(forms: Mapping[str, Form], largest: int | None) -> list[list[str]]:
    """Return the names of the tensors of each file."""
    found: list[list[str]] = [[]]
    size = 0
    for name, form in forms.items():
        if largest is not None and found[-1] and size + form.nbytes > largest:
            found.append([])
            size = 0
        found[-1].append(name)
        size += form.nbytes
    return found


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i:05}-of-{count:05}") for i in range(1, count + 1)]


class _Part(NamedTuple):
    """A tensor of the file: the entry in the header without its range, and what it belongs to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    owner: str
    read: Callable[[RawTensor, Form], Iterator[Any]]


def _parts(name: str, tensor: RawTensor, form: Form) -> list[_Part]:
    """Return the tensors of a file that hold one tensor."""
    if form.name == "dense":
        return [_Part(name, tensor.dtype, tensor.shape, form.nbytes, name, values)]
    size, what = form.nbytes - form.places, PLACES[form.name]
    return [
        _Part(f"{name}.values", tensor.dtype, (form.kept,), size, name, values),
        _Part(f"{name}.{what}", "U8", (form.places,), form.places, name, places),
    ]


def _width(part: _Part) -> int:
    """Return the key by which tensors are sorted in a file, as safetensors does, to align all."""
    return WIDTHS.get(part.dtype, 1)


def _entries(parts: Sequence[_Part]) -> list[Entry]:
    found, stop = [], 0
    for part in parts:
        found.append(Entry(stop, stop + part.nbytes, part.name, part.shape, part.dtype))
        stop += part.nbytes
    return found


def _write(file: Path, plan: _Plan, metadata: Mapping[str, str]) -> None:
    parts = [
        part for name, form in plan.forms.items() for part in _parts(name, plan.tensors[name], form)
    ]
    parts.sort(key=_width, reverse=True)
    sums = {part.name: 0 for part in parts}

    def pieces() -> Iterator[Any]:
        for part in parts:
            tensor = plan.tensors[part.owner]
            for piece in part.read(tensor, plan.forms[part.owner]):
                sums[part.name] = zlib.crc32(piece, sums[part.name])
                yield piece

    def described() -> dict[str, str]:
        found: dict[str, dict[str, Any]] = {}
        for name, form in plan.forms.items():
            tensor = plan.tensors[name]
            own = [f"{sums[part.name]:08x}" for part in _parts(name, tensor, form)]
            found[name] = {"form": form.name, "shape": tensor.shape, "crc32": own}
        found |= {alias: {"form": "same", "as": name} for alias, name in plan.aliases.items()}
        content = {"about": _ABOUT, "version": VERSION, "tensors": found}
        return {**metadata, KEY: json.dumps(content, separators=(",", ":"))}

    write_file(file, _entries(parts), pieces(), described)


def write_dense(file: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as they are to a safetensors file."""
    parts = [
        _Part(name, tensor.dtype, tensor.shape, tensor.data.size, name, values)
        for name, tensor in tensors.items()
    ]
    parts.sort(key=_width, reverse=True)
    data = (tensors[part.name].data for part in parts)
    write_file(file, _entries(parts), data, lambda: metadata)
