"""Load folders of Hugging Face models, and write new ones completely or not at all."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safe_core.adapters.readable import readable_bytes

from .checkpoint_files import weight_files

__all__ = [
    "Draft",
    "check_new_folder",
    "chosen_device",
    "load_model",
    "load_tokenizer",
    "written_at_once",
]


def chosen_device(device: str) -> torch.device:
    """Return the named device; "auto" is a GPU that supports float64 if there is one, else the CPU.

    Raises
    ------
    ValueError
        If this machine has no such device.

    Examples
    --------
    >>> chosen_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        # Sums need float64, which other accelerators, such as Apple's, do not have.
        return found if found is not None and found.type in ("cuda", "xpu") else torch.device("cpu")
    rule = (
        'device must be "auto", "cpu" or the PyTorch name of a GPU of this machine, such as '
        f'"cuda", "cuda:1" or "xpu", got {device!r}'
    )
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(rule) from None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{rule}: {str(error).strip().splitlines()[0]}") from None
    return found


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder, without downloads.

    Code in the folder runs only with ``trust_remote_code``.

    Raises
    ------
    ValueError
        If the folder has no tokenizer.

    Examples
    --------
    >>> load_tokenizer(Path("."))
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    from transformers import AutoTokenizer

    _check_model_folder(folder)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    )
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"model folder must hold a tokenizer, such as tokenizer.json, got {folder}"
        )
    return _loaded(AutoTokenizer, folder, "tokenizer", trust_remote_code)


def load_model(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Load the causal language model of a folder on the CPU, in the dtype of its files.

    Raises
    ------
    ValueError
        If the folder holds no such model, weights are missing, or the model needs code of the
        folder without ``trust_remote_code``.

    Examples
    --------
    >>> load_model(Path("."))
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    from transformers import AutoModelForCausalLM

    _check_model_folder(folder)
    weight_files(folder)
    if not trust_remote_code:
        _check_causal(folder)
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    model, info = _loaded(AutoModelForCausalLM, folder, "model", trust_remote_code, **options)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers draws these at random, such as the head of an encoder
        raise ValueError(
            f"model folder must hold all weights of a causal language model, got no {missing[0]} "
            f"({len(missing)} missing) in {folder}"
        )
    return model


def _check_causal(folder: Path) -> None:
    """Refuse encoders: they would be loaded, pruned and saved with a random output layer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = json.loads((folder / "config.json").read_text())
    names = config.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if names and not config.get("auto_map") and not known.intersection(names):
        raise ValueError(
            f"model folder must hold a causal language model, got {', '.join(names)}; for other "
            "models, call safe_core.adapters.transformers.prune_blocks from Python"
        )


def _check_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder))
        hub = str(folder) if named else "ORGANISATION/NAME"
        raise ValueError(
            f"model must be an existing local folder, got {folder}. To download a model from the "
            f"Hugging Face Hub, run `hf download {hub} --local-dir model` or, in Python, "
            f"huggingface_hub.snapshot_download({hub!r}, local_dir='model')"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder must hold a config.json, got {folder}")


def _loaded(auto: Any, folder: Path, what: str, trust_remote_code: bool, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the {what} in {folder} needs to run its own code: read that code, then pass "
                "--trust-remote-code"
            ) from error
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the {what} in {folder} could not be loaded: {reason}") from error


def check_new_folder(folder: Path, source: Path) -> None:
    """Check that a folder is new or empty, outside of the model, with disk space for a copy.

    Raises
    ------
    ValueError
        If the folder is the model's or inside it, is not empty, or is a file.
    OSError
        If the disk has too little free space.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "model.safetensors").touch()
    >>> check_new_folder(folder.with_name("pruned"), folder)
    """
    whole, model = folder.resolve(), source.resolve()
    if whole == model or model in whole.parents:
        raise ValueError(
            f"out must be outside of the model folder, such as {source.absolute()}-sparse, got "
            f"{folder}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {folder}")
    parent = next(path for path in folder.absolute().parents if path.is_dir())
    needed = sum(file.stat().st_size for file in weight_files(source))
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"out needs {readable_bytes(needed)} of free disk space, got {readable_bytes(free)} in "
            f"{parent}"
        )


@dataclass
class Draft:
    """A folder under construction.

    Attributes
    ----------
    path : pathlib.Path
    keep : bool
        Whether to keep the folder if a later step fails, because its contents are valuable.
    """

    path: Path
    keep: bool = False


@contextmanager
def written_at_once(folder: Path) -> Iterator[Draft]:
    """Yield a draft to write to, and rename it to ``folder`` at the end.

    After an error the draft is removed. If `Draft.keep` is set, it stays and a note on the error
    names it.

    Raises
    ------
    OSError
        If the folder cannot be created, or ``folder`` is not empty at the end.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "new"
    >>> with written_at_once(folder) as draft:
    ...     _ = (draft.path / "a").write_text("")
    ...     folder.exists()
    False
    >>> [file.name for file in folder.iterdir()]
    ['a']
    """
    whole = folder.absolute()
    draft = Draft(whole.with_name(f".{whole.name}.partial-{secrets.token_hex(4)}"))
    try:
        draft.path.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"out must be a folder that can be created, got {folder}: {error.strerror}"
        ) from error
    try:
        yield draft
        if whole.exists():
            whole.rmdir()
        draft.path.rename(whole)
    except BaseException as error:
        if draft.keep:
            error.add_note(f"The finished model is kept in {draft.path}")
        else:
            shutil.rmtree(draft.path, ignore_errors=True)
        raise
