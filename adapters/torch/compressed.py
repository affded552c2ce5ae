"""Save tensors of PyTorch without their zeros, and load them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_core.compressed import CompressedFiles, RawTensor, read_compressed, write_compressed
from safe_core.tensor_files import DTYPES

__all__ = ["load_compressed", "raw_tensor", "save_compressed"]

_DTYPES = {code: getattr(torch, name) for code, name in DTYPES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def save_compressed(
    state_dict: Mapping[str, Tensor] | nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CompressedFiles:
    """Save tensors as a safetensors file without their zeros, bit for bit.

    Each tensor is stored in the smallest of three forms: as it is, as its non-zero entries with a
    bit for each entry, or as two of every four entries along its last axis. Any pattern and dtype
    will do. Only entries whose bits are all zero are dropped, so -0 and every NaN come back.

    Parameters
    ----------
    state_dict : mapping of str to tensor, or torch.nn.Module
        Such as ``model.state_dict()``, which is taken of a module. Names that share one tensor
        still do when it is loaded.
    path : path
        The file, whose name ends in ``.safetensors``.
    max_shard_size : int, optional
        Bytes in a file. What does not fit is written to ``...-00002-of-00003.safetensors`` and so
        on, with an index, ``...safetensors.index.json``. By default there is one file.
    metadata : mapping of str to str, optional
        More entries for the metadata of the file.

    Returns
    -------
    CompressedFiles

    Raises
    ------
    TypeError
        If ``state_dict`` is neither a mapping nor a module, or a value is no dense tensor, or has
        a dtype that safetensors files do not hold.
    ValueError
        If ``path`` has another ending, or a name is that of a part of another tensor, such as
        ``w.bitmask`` beside ``w``.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> weight = torch.eye(64)
    >>> saved = save_compressed({"weight": weight, "bias": torch.ones(64)}, path)
    >>> saved.forms, saved.dense_bytes, saved.stored_bytes
    ({'weight': 'bitmask', 'bias': 'dense'}, 16640, 1024)
    >>> bool((load_compressed(path)["weight"] == weight).all())
    True
    """
    if isinstance(state_dict, nn.Module):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be a mapping of names to tensors, or a torch.nn.Module, got "
            f"{type(state_dict)!r}"
        )
    raw: dict[str, RawTensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in state_dict.items():
        _check(name, tensor)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        raw[name] = raw_tensor(tensor)
    return write_compressed(
        Path(path), raw, aliases=aliases, max_shard_size=max_shard_size, metadata=metadata
    )


def load_compressed(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Load the dense tensors of `save_compressed`, or of ``safe-core compress``.

    Parameters
    ----------
    path : path
        The file, the index of its shards, or a folder that holds one of these.
    device : torch.device or str
        Where to put the tensors.

    Returns
    -------
    dict of str to tensor
        Such as ``model.load_state_dict`` takes.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If the file is damaged or cut off, or is not compressed.

    Examples
    --------
    >>> import tempfile
    >>> from torch import nn
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> _ = save_compressed(nn.Linear(2, 2).state_dict(), path)
    >>> nn.Linear(2, 2).load_state_dict(load_compressed(path))
    <All keys matched successfully>
    """
    made: dict[int, Tensor] = {}
    found = {}
    for name, raw in read_compressed(Path(path)).items():
        if id(raw) not in made:  # names that share a tensor share the raw one, which lives on
            made[id(raw)] = _tensor(name, raw).to(device)
        found[name] = made[id(raw)]
    return found


def _tensor(name: str, raw: RawTensor) -> Tensor:
    if raw.dtype not in _DTYPES:
        raise ValueError(f"dtype of {name} must be one of PyTorch, got {raw.dtype}")
    if not raw.data.size:  # it has a stride of 0, of which torch makes no view
        return torch.empty(raw.shape, dtype=_DTYPES[raw.dtype])
    return torch.from_numpy(raw.data).view(_DTYPES[raw.dtype]).reshape(raw.shape)


def _check(name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"state_dict must have names as keys, got {name!r}")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"state_dict must hold dense tensors, got {type(tensor)!r} for {name}")
    if tensor.dtype not in _CODES:
        raise TypeError(f"dtype of {name} must be one of safetensors files, got {tensor.dtype}")


def raw_tensor(tensor: Tensor) -> RawTensor:
    """Return a dense tensor as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawTensor(_CODES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy())
