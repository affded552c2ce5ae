"""The folder of a model to prune, checked before the model is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from .base_model import BaseModel, describe_base
from .checkpoint_files import check_weights, weight_sources
from .model_folder import check_model_folder, quantisation, stored_dtype
from .stored_tensors import FORMATS

__all__ = ["Source", "check_source"]


class Source(NamedTuple):
    """The folder of a model.

    Attributes
    ----------
    folder : pathlib.Path
    gguf : pathlib.Path or None
        The GGUF file with the weights.
    blocks : tuple of str
        The quantised types of its tensors, which loading dequantises.
    nbytes : int
        About the bytes of a saved copy.
    base : BaseModel
        What the files say about the model.
    """

    folder: Path
    gguf: Path | None
    blocks: tuple[str, ...]
    nbytes: int
    base: BaseModel


def check_source(folder: Path, gguf_file: str | None = None) -> Source:
    """Check the files of a model without loading it.

    Raises
    ------
    ModuleNotFoundError
        If the packages for GGUF files are missing.
    ValueError
        If a file is missing or damaged, or the weights are quantised in a way that loading does
        not undo.

    Examples
    --------
    >>> check_source(Path("."))
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    gguf = check_model_folder(folder, gguf_file)
    method = None if gguf is not None else quantisation(folder)
    if method is not None:
        raise ValueError(
            f"model folder must hold weights of 16 bits or more, got {folder} quantised by "
            f"{method}: its files hold scales and packed numbers, which pruned weights do not fit. "
            "Load it dequantised in transformers, save that in a new folder, and prune the folder"
        )
    stored = check_weights(folder, gguf_file)
    for tensor in stored.values():
        form = FORMATS.get(tensor.format or "")
        narrow = form is not None and form.floating and form.width < 2
        if not tensor.blocks and (tensor.packed or narrow):
            raise ValueError(
                f"model folder must hold weights of 16 bits or more, got {tensor.dtype} for "
                f"{tensor.name} in {folder}: save the model dequantised, and prune that"
            )
    blocks = tuple(sorted({tensor.dtype for tensor in stored.values() if tensor.blocks}))
    nbytes = sum(file.stat().st_size for file in weight_sources(folder, gguf_file))
    if blocks:
        width = (stored_dtype(stored) or torch.float32).itemsize
        nbytes = width * sum(math.prod(tensor.shape) for tensor in stored.values())
    return Source(folder, gguf, blocks, nbytes, describe_base(folder, gguf))
