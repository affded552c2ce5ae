"""Save a pruned model with the other files of its folder, and read it back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from safe_core.adapters.torch.blocks.fingerprints import fingerprint
from safe_core.adapters.torch.example_inputs import evaluation_mode

from .checkpoint_files import DamagedFileError, read_json
from .model_folder import read_model

__all__ = ["Imprint", "check_saved", "copy_other_files", "refers_to_code"]

# Files with weights in other formats still hold the dense ones.
_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".ggml", ".ot", ".tflite", ".npz", ".npy", ".mlmodel", ".index.json",
)  # fmt: skip
_SAFETENSORS = (".safetensors", ".safetensors.index.json")
_ROUNDING = 1e-2  # of 16-bit products that another kernel sums in another order


def refers_to_code(folder: Path) -> bool:
    """Return whether a configuration in a folder names code of its own.

    It does so by ``auto_map`` or ``custom_pipelines``.

    Examples
    --------
    >>> refers_to_code(Path("/dev"))
    False
    """
    for file in folder.glob("*config.json"):
        try:
            found = read_json(file)
        except DamagedFileError:  # of a part that this library does not use
            continue
        if isinstance(found, dict) and (found.get("auto_map") or found.get("custom_pipelines")):
            return True
    return False


def copy_other_files(
    source: Path, folder: Path, *, model_card: bool = False, code: bool = True
) -> list[str]:
    """Copy what belongs to a model besides its weights, such as a processor or a licence.

    Files that the folder holds already stay, and so do hidden files, subfolders, and by default
    the model card, in the source.

    Parameters
    ----------
    source, folder : pathlib.Path
    model_card : bool
        Whether to copy the model card too.
    code : bool
        Whether to copy files of Python.

    Returns
    -------
    list of str
        The names of weights in other formats than safetensors, hidden files, subfolders and code
        that is not to be copied, which stay in the source.

    Examples
    --------
    >>> import tempfile
    >>> source, folder = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> for name in ("LICENSE", "model.onnx", "README.md", ".git"):
    ...     (source / name).touch()
    >>> copy_other_files(source, folder)
    ['.git', 'model.onnx']
    >>> [file.name for file in folder.iterdir()]
    ['LICENSE']
    """
    left = []
    for file in sorted(source.iterdir()):
        name = file.name.lower()
        if name.endswith(_SAFETENSORS) or (name == "readme.md" and not model_card):
            continue
        unwanted = name.endswith(_WEIGHTS if code else (*_WEIGHTS, ".py"))
        if not file.is_file() or unwanted or name.startswith("."):
            left.append(file.name)
        elif not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return left


class Imprint(NamedTuple):
    """Describe a model in memory, to compare a saved one with it.

    Attributes
    ----------
    digests : dict of str to str
        One of the bits of every parameter.
    zeros : dict of str to int
    sample : mapping
        Arguments of one forward pass.
    outputs : list of tensor
        The floating-point outputs of that pass.
    """

    digests: dict[str, str]
    zeros: dict[str, int]
    sample: Mapping[str | None, Any]
    outputs: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, sample: Mapping[str | None, Any]) -> Imprint:
        """Take the imprint of a model."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        digests = {name: fingerprint([p]) for name, p in parameters.items()}
        zeros = {name: p.numel() - int(p.count_nonzero()) for name, p in parameters.items()}
        return cls(digests, zeros, sample, _outputs(model, sample))


def _outputs(model: nn.Module, sample: Mapping[str | None, Any]) -> list[Tensor]:
    positional = [value for key, value in sample.items() if key is None]
    named = {key: value for key, value in sample.items() if key is not None}
    with evaluation_mode(model), torch.no_grad():
        found = model(*positional, **named)
    leaves = tree_leaves(dict(found) if isinstance(found, Mapping) else found)
    return [x.float() for x in leaves if torch.is_tensor(x) and x.is_floating_point()]


def check_saved(imprint: Imprint, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Load a saved model and compare it with the one that was in memory.

    Raises
    ------
    ValueError
        If it cannot be loaded, a weight differs, or a forward pass gives other outputs.
    """
    model = read_model(folder, trust_remote_code=trust_remote_code).model
    saved = Imprint.of(model, imprint.sample)
    for name, digest in imprint.digests.items():
        if name not in saved.digests:
            raise ValueError(f"the saved model must hold all weights, got no {name} in {folder}")
        if saved.digests[name] != digest:
            raise ValueError(
                f"the saved model must hold the weights that were pruned, got {name} with "
                f"{saved.zeros[name]:,} zeros instead of {imprint.zeros[name]:,} in {folder}"
            )
    pairs = zip(imprint.outputs, saved.outputs, strict=False)
    if len(imprint.outputs) != len(saved.outputs) or not all(_alike(a, b) for a, b in pairs):
        raise ValueError(
            "the saved model must give the outputs of the model in memory, got others from "
            f"{folder}"
        )


def _alike(wanted: Tensor, found: Tensor) -> bool:
    if wanted.shape != found.shape:
        return False
    difference = torch.linalg.vector_norm(wanted.double() - found.double())
    return bool(difference <= _ROUNDING * torch.linalg.vector_norm(wanted.double()))
