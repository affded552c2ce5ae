"""Find the weight files of a model, and read them tensor by tensor.

Damage of any kind ends in one error, `DamagedFileError`, whose message names the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from safe_core.tensor_files import DamagedFileError, check_file, read_json, shards

from .gguf_files import read_gguf
from .safetensors_files import read_safetensors
from .stored_tensors import StoredTensor
from .torch_files import read_torch

__all__ = [
    "DamagedFileError",
    "StoredTensor",
    "check_file",
    "check_index",
    "check_weights",
    "gguf_of",
    "read_json",
    "read_tensors",
    "weight_sources",
]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TORCH_INDEX, _TORCH = "pytorch_model.bin.index.json", "pytorch_model.bin"
_READERS = {
    ".safetensors": ("safetensors file", read_safetensors),
    ".gguf": ("GGUF file", read_gguf),
}


def gguf_of(folder: Path, gguf_file: str | None = None) -> Path | None:
    """Return the GGUF file that holds the weights of a folder, or None for other formats.

    Parameters
    ----------
    folder : pathlib.Path
    gguf_file : str, optional
        The name of the file. By default a folder without weights of torch or safetensors must
        hold a single one.

    Raises
    ------
    ValueError
        If the file does not exist, or there are several and none is named.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("q4.gguf", "q8.gguf"):
    ...     (folder / name).touch()
    >>> gguf_of(folder, "q8.gguf").name
    'q8.gguf'
    >>> gguf_of(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: folder ... must hold one GGUF file, got q4.gguf, q8.gguf: choose with ...
    """
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is None and (not found or _other_weights(folder)):
        return None
    if gguf_file is not None and gguf_file not in found:
        raise ValueError(
            f"gguf_file must be one of {', '.join(found) or 'none'} in {folder}, got {gguf_file}"
        )
    part = re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf_file or found[0])
    if part is not None:
        raise ValueError(
            f"GGUF file must be whole, got a part of a model, {gguf_file or found[0]}: merge the "
            "parts with `llama-gguf-split --merge` of llama.cpp"
        )
    if gguf_file is not None:
        return folder / gguf_file
    if len(found) > 1:
        raise ValueError(
            f"folder {folder} must hold one GGUF file, got {', '.join(found)}: choose with "
            "--gguf-file, or inspect the file itself"
        )
    return folder / found[0]


def _other_weights(folder: Path) -> bool:
    """Return whether a folder holds weights that transformers loads without being told a file."""
    usual = (_INDEX, _SINGLE, _TORCH_INDEX, _TORCH)
    return any((folder / name).exists() for name in usual) or any(folder.glob("*.safetensors"))


def weight_sources(path: Path, gguf_file: str | None = None) -> dict[Path, Collection[str] | None]:
    """Return the weight files of a model, given a file or a folder.

    Parameters
    ----------
    path : pathlib.Path
        A weight file, an index of shards, or a folder as ``save_pretrained`` writes it. A folder
        without the usual file names can hold any number of safetensors files, or a GGUF file.
    gguf_file : str, optional
        As for `gguf_of`.

    Returns
    -------
    dict of pathlib.Path to collection of str or None
        Each file with its tensor names in the index, or None without one.

    Raises
    ------
    ValueError
        If ``path`` does not exist, holds no weights, or lacks a shard.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "model.safetensors").touch()
    >>> [file.name for file in weight_sources(folder)]
    ['model.safetensors']
    """
    if not path.exists():
        raise ValueError(f"path must be an existing file or folder of weights, got {path}")
    if not path.is_dir():
        check_file(path)
        return {**shards(path)} if path.name.endswith(".index.json") else {path: None}
    if (gguf := gguf_of(path, gguf_file)) is not None:
        return {gguf: None}
    for index, single in ((_INDEX, _SINGLE), (_TORCH_INDEX, _TORCH)):
        # transformers prefers the single file too
        if (path / single).exists():
            return {path / single: None}
        if (path / index).exists():
            return {**shards(path / index)}
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ValueError(
            f"folder {path} must hold {_SINGLE}, {_TORCH}, an index of shards or a GGUF file, got "
            "none of these"
        )
    return dict.fromkeys(found)


def read_tensors(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file, with one in memory at a time.

    Parameters
    ----------
    file : pathlib.Path
        A safetensors file, a GGUF file, or one of ``torch.save`` that holds only tensors and
        plain containers. Code in the file never runs.

    Raises
    ------
    DamagedFileError
        If the file is damaged, or is a PyTorch file that is not safe to load.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"w": np.ones((2, 3), "f4")}, file)
    >>> [(x.name, x.shape, x.dtype, x.array.dtype.str) for x in read_tensors(file)]
    [('w', (2, 3), 'F32', '<u4')]
    """
    check_file(file)
    kind, read = _READERS.get(file.suffix, ("PyTorch checkpoint", read_torch))
    try:
        yield from read(file)
    except (DamagedFileError, PermissionError):
        raise
    except Exception as error:  # a damaged file can fail anywhere
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedFileError(f"{file} must be a complete {kind}: {reason}") from error


def check_weights(path: Path, gguf_file: str | None = None) -> dict[str, StoredTensor]:
    """Check the weight files of a model without reading their data, and return the tensors.

    The arguments are those of `weight_sources`.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or an index names a tensor that its shard lacks.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"w": np.ones((2, 3), "f4")}, folder / "model.safetensors")
    >>> list(check_weights(folder))
    ['w']
    """
    found: dict[str, StoredTensor] = {}
    for file, index in weight_sources(path, gguf_file).items():
        here = {tensor.name: tensor._replace(array=None) for tensor in read_tensors(file)}
        if index is not None:
            check_index(file, index, here)
        found |= here
    return found


def check_index(file: Path, indexed: Collection[str], names: Collection[str]) -> None:
    """Raise if the index of shards names a tensor that the shard lacks."""
    for name in indexed:
        if name not in names:
            raise DamagedFileError(f"{file} must hold {name}, as its index says, but does not")
