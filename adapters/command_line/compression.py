"""Compress the weights of a model folder, and restore them: the work of ``safe-core compress``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from safe_core._readable import readable_bytes
from safe_core.compressed import (
    KEY,
    RawTensor,
    compressed_header,
    map_file,
    read_file,
    write_compressed,
    write_dense,
)
from safe_core.tensor_files import DamagedFileError, check_file, read_header, read_json, shards

from .checkpoint_files import check_index
from .drafts import check_new_folder, written_at_once
from .output import printable
from .saving import copy_other_files

__all__ = ["MARK", "FolderSizes", "compress_folder", "decompress_folder"]

MARK = ".compressed"
"""Marks the names of compressed files, so that transformers does not load them."""

_FILE, _INDEX = ".safetensors", ".safetensors.index.json"


class FolderSizes(NamedTuple):
    """Report the result of `compress_folder` or `decompress_folder`.

    Attributes
    ----------
    out : pathlib.Path
    dense_bytes, compressed_bytes : int
        Bytes of the files with weights in both folders.
    forms : dict of str to int
        Number of tensors that are stored in each form, ``"dense"``, ``"bitmask"`` or ``"2:4"``.
    restored : bool
        Whether ``out`` holds the dense files, so that zeros were restored.
    """

    out: Path
    dense_bytes: int
    compressed_bytes: int
    forms: dict[str, int]
    restored: bool = False

    def summary(self) -> str:
        """Return the figures as lines of text.

        Examples
        --------
        >>> print(FolderSizes(Path("new"), 4000, 1000, {"bitmask": 2, "dense": 1}).summary())
        tensors: 2 bitmask, 1 dense
        weights: 3.9 KiB dense, 1000 B compressed, 4.0 times smaller
        saved in new
        >>> print(FolderSizes(Path("new"), 4000, 3990, {"dense": 3}).summary())
        tensors: 3 dense
        weights: 3.9 KiB dense, 3.9 KiB compressed, 1.0 times smaller
        note: no tensor has enough zeros to take less space; `safe-core inspect` counts them
        saved in new
        """
        forms = ", ".join(f"{count:,} {form}" for form, count in sorted(self.forms.items()))
        sizes = [
            (self.dense_bytes, f"{readable_bytes(self.dense_bytes)} dense"),
            (self.compressed_bytes, f"{readable_bytes(self.compressed_bytes)} compressed"),
        ]
        (before, was), (after, now) = reversed(sizes) if self.restored else sizes
        ratio, change = before / max(1, after), "smaller"
        if after > before:
            ratio, change = after / max(1, before), "larger"
        lines = [f"tensors: {forms}", f"weights: {was}, {now}, {ratio:.1f} times {change}"]
        if set(self.forms) == {"dense"} and not self.restored:
            lines.append(
                "note: no tensor has enough zeros to take less space; `safe-core inspect` counts "
                "them"
            )
        return "\n".join([*lines, f"saved in {self.out}"])


def compress_folder(
    folder: Path, out: Path, *, say: Callable[[str], object] = lambda text: None
) -> FolderSizes:
    """Store the weights of a model folder without their zeros.

    Every safetensors file ``NAME.safetensors`` becomes ``NAME.compressed.safetensors``, and an
    index of shards follows. It is read back and compared with the original. Memory is needed for
    the largest tensor.

    Parameters
    ----------
    folder : pathlib.Path
    out : pathlib.Path
        A new or empty folder, which appears only when complete.
    say : callable
        Called with a line of text about what is not copied.

    Returns
    -------
    FolderSizes

    Raises
    ------
    ValueError, OSError
        If the folder holds no safetensors files, is compressed already, or a file is damaged, if
        ``out`` is not empty or lies in the folder, or if the disk is full.

    Examples
    --------
    >>> compress_folder(Path("missing"), Path("out"))
    Traceback (most recent call last):
    ValueError: folder must be an existing folder, got missing
    """
    forms: Counter[str] = Counter()

    def convert(file: Path, target: Path) -> None:
        tensors = map_file(file)
        saved = write_compressed(target, tensors, metadata=read_header(file).metadata)
        forms.update(saved.forms.values())
        _compare(target, read_file(target), tensors)

    files = _weights(folder, compressed=False)
    sizes = _converted(folder, out, files, _marked, convert, say)
    return FolderSizes(out, *sizes, dict(forms))


def decompress_folder(
    folder: Path, out: Path, *, say: Callable[[str], object] = lambda text: None
) -> FolderSizes:
    """Restore a folder that `compress_folder` wrote.

    Parameters
    ----------
    folder : pathlib.Path
    out : pathlib.Path
        A new or empty folder, which appears only when complete.
    say : callable
        Called with a line of text about what is not copied.

    Returns
    -------
    FolderSizes

    Raises
    ------
    ValueError, OSError
        If the folder holds no compressed files, or a file is damaged, if ``out`` is not empty or
        lies in the folder, or if the disk is full.

    Examples
    --------
    >>> decompress_folder(Path("missing"), Path("out"))
    Traceback (most recent call last):
    ValueError: folder must be an existing folder, got missing
    """
    forms: Counter[str] = Counter()

    def convert(file: Path, target: Path) -> None:
        header = read_header(file)
        told = compressed_header(file, header) or {}
        forms.update(about["form"] for about in told.values())
        tensors = dict(read_file(file))
        kept = {key: value for key, value in header.metadata.items() if key != KEY}
        write_dense(target, tensors, kept)
        _compare(target, map_file(target).items(), tensors)

    files = _weights(folder, compressed=True)
    compressed, dense = _converted(folder, out, files, _unmarked, convert, say)
    return FolderSizes(out, dense, compressed, dict(forms), restored=True)


def _converted(
    folder: Path,
    out: Path,
    files: list[Path],
    renamed: Callable[[str], str],
    convert: Callable[[Path, Path], None],
    say: Callable[[str], object],
) -> tuple[int, int]:
    """Write a folder with converted files, and return the bytes of the files in both."""
    check_new_folder(out, folder)
    with written_at_once(out) as draft:
        for file in files:
            convert(file, draft.path / renamed(file.name))
        _write_indices(folder, draft.path, renamed)
        left = copy_other_files(folder, draft.path, model_card=True)
        if left:
            say(f"not copied: {', '.join(map(printable, left))}")
        return _bytes(files), _bytes(draft.path.glob(f"*{_FILE}"))


def _weights(folder: Path, *, compressed: bool) -> list[Path]:
    """Return the safetensors files of a folder, whose indices must fit them."""
    if not folder.is_dir():
        raise ValueError(f"folder must be an existing folder, got {folder}")
    files = sorted(folder.glob(f"*{_FILE}"))
    if not files:
        raise ValueError(
            f"folder {folder} must hold {_FILE} files, got none: load the model in transformers, "
            "and save it with save_pretrained"
        )
    for file in files:
        check_file(file)
        if (compressed_header(file, read_header(file)) is None) is compressed:
            if compressed:
                raise ValueError(
                    f"folder must be one that `safe-core compress` wrote, got {file}, which is "
                    "not compressed"
                )
            raise ValueError(f"folder must hold weights with their zeros, got {file}, which has "
                             "none: it is compressed already")  # fmt: skip
    for index in folder.glob(f"*{_INDEX}"):
        for file, names in shards(index).items():
            check_index(file, names, _names(file, compressed))
    return files


def _names(file: Path, compressed: bool) -> Collection[str]:
    header = read_header(file)
    told = compressed_header(file, header) if compressed else None
    return {entry.name for entry in header.entries} if told is None else told


def _marked(name: str) -> str:
    end = _INDEX if name.endswith(_INDEX) else _FILE
    return f"{name.removesuffix(end)}{MARK}{end}"


def _unmarked(name: str) -> str:
    end = _INDEX if name.endswith(_INDEX) else _FILE
    return name.removesuffix(end).removesuffix(MARK) + end


def _write_indices(folder: Path, out: Path, renamed: Callable[[str], str]) -> None:
    """Write the indices of a folder with the new names of the files."""
    for index in folder.glob(f"*{_INDEX}"):
        content = read_json(index)
        named = {tensor: renamed(name) for tensor, name in content["weight_map"].items()}
        text = json.dumps({**content, "weight_map": named}, indent=2)
        (out / renamed(index.name)).write_text(f"{text}\n", encoding="utf-8")


def _compare(
    file: Path, found: Iterable[tuple[str, RawTensor]], wanted: Mapping[str, RawTensor]
) -> None:
    """Raise unless a file that was read back holds the tensors that were written."""
    missing = set(wanted)
    for name, tensor in found:
        missing.discard(name)
        same = name in wanted and tensor[:2] == wanted[name][:2]
        if not same or not np.array_equal(tensor.data, wanted[name].data):
            raise DamagedFileError(
                f"{file} must hold the tensors of its source, got another {name}"
            )
    if missing:
        raise DamagedFileError(f"{file} must hold the tensors of its source, got no {min(missing)}")


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
