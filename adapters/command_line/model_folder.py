"""Load models and tokenizers from folders of Hugging Face, without downloads."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from safe_core._installed import require
from safe_core.adapters.memory_errors import lacks_memory

from .checkpoint_files import StoredTensor, check_file, check_weights, gguf_of, read_json
from .stored_tensors import FORMATS, DamagedFileError

__all__ = [
    "LoadedModel",
    "check_model_folder",
    "chosen_device",
    "load_model",
    "load_tokenizer",
    "quantisation",
    "read_model",
    "stored_dtype",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


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


def load_tokenizer(
    folder: Path,
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    otherwise: str = "",
) -> Any:
    """Load the tokenizer of a folder, without downloads.

    Code in the folder runs only with ``trust_remote_code``. A GGUF file holds a tokenizer too,
    which counts where the folder has no tokenizer.json. ``otherwise`` is what else can be done
    without a tokenizer, for the message of the error.

    Raises
    ------
    ModuleNotFoundError
        If the packages for GGUF files are missing.
    ValueError
        If the folder has no tokenizer.

    Examples
    --------
    >>> load_tokenizer(Path("."))
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    from transformers import AutoTokenizer

    gguf = check_model_folder(folder, gguf_file)
    if gguf is not None:
        return _loaded(AutoTokenizer, folder, "tokenizer", trust_remote_code, gguf_file=gguf.name)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"model folder must hold a tokenizer, such as tokenizer.json, got {folder}: copy the "
            "tokenizer's files from the folder of the original model, or call "
            f"tokenizer.save_pretrained({str(folder)!r}) in Python{otherwise}"
        )
    return _loaded(AutoTokenizer, folder, "tokenizer", trust_remote_code)


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and what a user should know about its files.

    Attributes
    ----------
    model : torch.nn.Module
    notes : tuple of str
        Tensors of the files that the model does not use, or holds in another dtype, and whether
        weights were dequantised.
    """

    model: nn.Module
    notes: tuple[str, ...]


def load_model(
    folder: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Load the causal language model of a folder on the CPU, in the dtype of its files.

    Raises
    ------
    ValueError
        If the folder holds no such model, weights are missing, damaged or not finite, or the
        model needs code of the folder without ``trust_remote_code``.

    Examples
    --------
    >>> load_model(Path("."))
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    if check_model_folder(folder, gguf_file) is None and not trust_remote_code:
        _check_causal(folder)
    return read_model(folder, gguf_file=gguf_file, trust_remote_code=trust_remote_code).model


def read_model(
    folder: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load the model of a folder, of any kind, on the CPU, in the dtype of its files.

    The class is the one that ``config.json`` names. Attention and experts use the standard
    implementations of transformers: a configuration can name others, which transformers would
    fetch from the hub.

    The weights of a GGUF file are dequantised, to float32 if most of them are in blocks. Then
    the model is an ordinary one, which can be saved.

    Raises
    ------
    ModuleNotFoundError
        If the packages for GGUF files are missing.
    ValueError
        If weights are missing, damaged or not finite, or the model needs code of the folder
        without ``trust_remote_code``.
    """
    gguf = check_model_folder(folder, gguf_file)
    stored = check_weights(folder, gguf_file)
    model, info = _loaded(
        _model_class(folder) if gguf is None else _causal_class(),
        folder,
        "model",
        trust_remote_code,
        **({} if gguf is None else _dequantised(gguf)),
        dtype=stored_dtype(stored) or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to name them all, below
        attn_implementation=None,
        experts_implementation=None,
    )
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"model folder must hold weights of the shapes that its config.json asks for, got "
            f"{tuple(theirs)} for {name} instead of {tuple(ours)} in {folder}"
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers draws these at random, such as the head of an encoder
        raise ValueError(
            f"model folder must hold all weights of a {type(model).__name__}, got no {missing[0]} "
            f"({len(missing)} missing) in {folder}"
        )
    if gguf is not None or quantisation(folder) is None:
        _check_finite(model, folder)
    notes = _notes(model, stored, info["unexpected_keys"])
    return LoadedModel(model.eval(), tuple(notes))


def _causal_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _dequantised(file: Path) -> dict[str, Any]:
    """Return the arguments by which transformers loads a GGUF file as an ordinary model.

    Without the configuration it stays marked as quantised, though its weights no longer are, and
    cannot be saved. Where kernels are installed, the weights would stay in blocks.
    """
    import transformers

    found: dict[str, Any] = {"gguf_file": file.name}
    if hasattr(transformers, "GgufConfig"):  # earlier versions always dequantise
        found["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return found


def _model_class(folder: Path) -> Any:
    """Return the class that the configuration names, or one that chooses it."""
    import transformers

    config = read_json(folder / "config.json")
    own = [key for key in config.get("auto_map") or {} if key.startswith("AutoModel")]
    if own:
        known = "AutoModelForCausalLM" if "AutoModelForCausalLM" in own else own[0]
        return getattr(transformers, known, transformers.AutoModelForCausalLM)
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"the model in {folder} could not be loaded: transformers "
            f"{transformers.__version__} has no {names[0]}; load the model yourself and call "
            "safe_core.adapters.transformers.prune_blocks from Python"
        )
    return found


def _check_causal(folder: Path) -> None:
    """Refuse encoders, which predict no next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if names and not config.get("auto_map") and not known.intersection(names):
        raise ValueError(
            f"model folder must hold a causal language model, got {', '.join(map(str, names))}, "
            "which predicts no next token; prune and inspect take it"
        )


def quantisation(folder: Path) -> str | None:
    """Return how the weights of a folder are quantised, or None if they are not.

    Examples
    --------
    >>> import json, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> config = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    >>> _ = (folder / "config.json").write_text(json.dumps(config))
    >>> quantisation(folder)
    'fp8'
    """
    config = read_json(folder / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "?"
    return None


def stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """Return the dtype of most floating-point entries of files, None if they are quantised.

    The configuration may name another one, to which transformers would round the weights. The
    blocks of GGUF files are dequantised to float32, which holds their values exactly.

    Examples
    --------
    >>> tensor = StoredTensor("w", (2, 32), "Q8_0", 68, None, True, blocks=True)
    >>> stored_dtype({"w": tensor})
    torch.float32
    """
    entries: dict[str, int] = {}
    for tensor in stored.values():
        form = FORMATS.get("float32" if tensor.blocks else tensor.format or "")
        if form is not None and form.floating:
            entries[form.name] = entries.get(form.name, 0) + math.prod(tensor.shape)
    most = max(entries, key=lambda name: entries[name], default=None)
    if most is None or FORMATS[most].width < 2:
        return None
    found: torch.dtype = getattr(torch, most)
    return found


def _notes(model: nn.Module, stored: Mapping[str, StoredTensor], unexpected: Any) -> Iterator[str]:
    blocks = sorted({tensor.dtype for tensor in stored.values() if tensor.blocks})
    if blocks:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        yield f"note: the weights were quantised ({', '.join(blocks)}), and are {dtype} now"
    unused = sorted(unexpected)
    if unused:
        yield (
            f"note: {len(unused)} tensors of the files are no part of a {type(model).__name__}, "
            f"such as {unused[0]}; a new folder will not hold them"
        )
    changed = [
        (name, stored[name].format, str(p.dtype).removeprefix("torch."))
        for name, p in model.named_parameters()
        if name in stored and stored[name].floating
    ]
    changed = [(name, was, now) for name, was, now in changed if was != now]
    if changed:
        name, was, now = changed[0]
        yield (
            f"note: {len(changed)} tensors are loaded in another dtype than that of the files, "
            f"such as {name} in {now} instead of {was}"
        )


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype.itemsize > 1 and not bool(p.isfinite().all()):
            raise ValueError(
                f"model folder must hold finite weights, got NaN or infinity in {name} of {folder}"
            )


def check_model_folder(folder: Path, gguf_file: str | None = None) -> Path | None:
    """Check that a folder has a model, and only files that can be read.

    A model has a configuration, config.json, or is a GGUF file, which holds its own.

    Parameters
    ----------
    folder : pathlib.Path
    gguf_file : str, optional
        The GGUF file to load; by default the only one, if there are no other weights.

    Returns
    -------
    pathlib.Path or None
        The GGUF file.

    Raises
    ------
    ModuleNotFoundError
        If the packages for GGUF files are missing.
    ValueError
        If the folder has no model, or there are several GGUF files and none is named.

    Examples
    --------
    >>> check_model_folder(Path("."))
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    if not folder.is_dir():
        if folder.suffix == ".gguf" and folder.is_file():
            raise ValueError(
                f"model must be a folder, got {folder}: name its folder, with --gguf-file "
                f"{folder.name}"
            )
        if folder.exists():
            raise ValueError(
                f"model must be a folder, got the file {folder}: pass the folder that holds it"
            )
        named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder))
        hub = str(folder) if named else "ORGANISATION/NAME"
        raise ValueError(
            f"model must be an existing local folder, got {folder}. To download a model from the "
            f"Hugging Face Hub, run `hf download {hub} --local-dir model` or, in Python, "
            f"huggingface_hub.snapshot_download({hub!r}, local_dir='model')"
        )
    packed = sorted(folder.glob("*.compressed.safetensors"))
    if packed:
        raise ValueError(
            f"model folder must hold weights that transformers loads, got {packed[0]}: restore "
            f"them with `safe-core decompress {folder} --out NEW_FOLDER`"
        )
    gguf = gguf_of(folder, gguf_file)
    config = folder / "config.json"
    if gguf is None and not config.is_file():
        raise ValueError(f"model folder must hold a config.json, got {folder}")
    for file in folder.iterdir():
        try:
            mode = file.stat().st_mode
        except OSError:  # a link to nothing
            continue
        if not stat.S_ISDIR(mode) and file.suffix not in (".safetensors", ".bin", ".gguf"):
            check_file(file)
    if gguf is not None:
        require("a GGUF file", "gguf", "accelerate", extra="gguf")
        check_weights(folder, gguf_file)  # before transformers reads its configuration
    elif not isinstance(read_json(config), dict):
        raise DamagedFileError(f"{config} must be a JSON object")
    return gguf


def _loaded(auto: Any, folder: Path, what: str, trust_remote_code: bool, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # wrong files fail anywhere in transformers
        if lacks_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the {what} in {folder} needs to run its own code: read that code, then pass "
                "--trust-remote-code"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the {what} in {folder} could not be loaded: {lines[0]}") from error
