"""Read calibration inputs that are not text: named arrays in a safetensors or NumPy file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint_files import DamagedFileError, check_file, read_tensors

__all__ = ["InputFile", "read_input_file"]


class InputFile(NamedTuple):
    """Calibration inputs, and what identifies their file.

    Attributes
    ----------
    name : str
    nbytes : int
    sha256 : str
    tensors : dict of str to tensor
        Keyword arguments of the model, with a sample in each row.
    """

    name: str
    nbytes: int
    sha256: str
    tensors: dict[str, Tensor]

    def samples(self, most: int, seed: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """Return at most so many samples, drawn at random, with floating tensors in a dtype."""
        rows = len(next(iter(self.tensors.values())))
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(rows, generator=generator)[:most].sort().values.tolist()
        cast = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()
        }
        return [{name: x[i : i + 1] for name, x in cast.items()} for i in chosen]


def read_input_file(file: Path) -> InputFile:
    """Read a file of calibration inputs.

    Parameters
    ----------
    file : pathlib.Path
        A ``.safetensors`` file, or a ``.npz`` file of `numpy.savez`. Each array is an argument
        of the model, such as ``pixel_values``, and has a sample in each row.

    Raises
    ------
    ValueError
        If the file is damaged or of another kind, the arrays differ in their rows, or a number is
        not finite.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "images.npz"
    >>> np.savez(file, pixel_values=np.zeros((2, 3, 4, 4), "f4"))
    >>> found = read_input_file(file)
    >>> [tuple(sample["pixel_values"].shape) for sample in found.samples(8, 0, torch.bfloat16)]
    [(1, 3, 4, 4), (1, 3, 4, 4)]
    """
    if not file.exists():
        raise ValueError(f"inputs must be an existing file, got {file}")
    check_file(file)
    if file.suffix == ".safetensors":
        tensors = _of_safetensors(file)
    elif file.suffix == ".npz":
        tensors = _of_numpy(file)
    else:
        raise ValueError(f"inputs must be a .safetensors or .npz file, got {file}")
    rows = {name: len(x) if x.ndim else None for name, x in tensors.items()}
    if not rows or len(set(rows.values())) > 1 or not all(rows.values()):
        raise ValueError(
            f"inputs must hold arrays with a sample in each row, as many rows each, got "
            f"{', '.join(f'{name} with {n}' for name, n in rows.items()) or 'none'} in {file}"
        )
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError(f"inputs must be finite, got NaN or infinity in {name} of {file}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return InputFile(file.name, file.stat().st_size, digest, tensors)


def _of_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    for _ in read_tensors(file):  # checks the whole header
        pass
    return load_file(file)


def _of_numpy(file: Path) -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    try:
        with np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                found[name] = torch.from_numpy(archive[name])
    except Exception as error:  # damage can end in any error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedFileError(
            f"{file} must be a complete .npz file of numbers: {reason}"
        ) from error
    return found
