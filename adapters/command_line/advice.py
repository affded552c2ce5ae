"""Load the model that ``safe-core advise`` measures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safe_core import _checks
from safe_core.adapters.export_advice import ExportAdvice
from safe_core.adapters.loading import load_named, names_object

from .output import quiet_transformers

__all__ = ["advice"]


def advice(
    source: str,
    *,
    sparsities: list[float] | None = None,
    length: int = 128,
    device: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> ExportAdvice:
    """Measure the model of a function or a folder.

    Parameters
    ----------
    source : str
        ``"file.py:function"`` or ``"package.module:function"``, whose function returns a model
        and example inputs, and for Linen the variables; or a folder.
    sparsities : list of float, optional
    length : int
        Tokens of a sample, for a folder.
    device : str, optional
        Of PyTorch.
    gguf_file : str, optional
    trust_remote_code : bool
        Whether code of the folder may run.
    **settings
        More arguments of `safe_core.adapters.torch.advise`.

    Raises
    ------
    ValueError
        If there is no such function or folder, or the function fails or returns something else.
    """
    if sparsities is not None:
        settings["sparsities"] = sparsities
    if Path(source).is_dir():
        model, inputs, *rest = _folder(Path(source), length, gguf_file, trust_remote_code)
    elif names_object(source):
        model, inputs, *rest = _made(source)
    else:
        raise ValueError(
            'source must be a model folder or name a function, as "file.py:function" does, got '
            f"{source!r}"
        )
    flax = sys.modules.get("flax")
    if flax is not None and isinstance(model, (flax.nnx.Module, flax.linen.Module)):
        from safe_core.adapters.jax.flax import advise as of_flax

        if device is not None:
            raise ValueError(f"device must be left out for a Flax model, got {device!r}")
        return of_flax(model, inputs, variables=rest[0] if rest else None, **settings)
    from safe_core.adapters.torch import advise

    if rest:
        raise ValueError(f"{source} must return a model and example inputs, got {2 + len(rest)} "
                         "values for a PyTorch model")  # fmt: skip
    return advise(model, inputs, device=device, **settings)


def _made(source: str) -> tuple[Any, ...]:
    """Return the values of a function."""
    function = load_named("source", source)
    if not callable(function):
        raise ValueError(f"source must name a function, got {source!r}: {_checks.shown(function)}")
    try:
        values = function()
    except Exception as error:
        raise ValueError(
            f"{source} must be a function without arguments that runs, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(values, tuple) or len(values) not in (2, 3):
        raise ValueError(
            f"{source} must return a model and example inputs, and for Linen the variables, got "
            f"{_checks.shown(values)}"
        )
    return values


def _folder(folder: Path, length: int, gguf_file: str | None, trust: bool) -> tuple[Any, ...]:
    """Return the causal language model of a folder, and tokens."""
    quiet_transformers()
    import torch

    from .model_folder import load_model

    _checks.integer("length", length, low=1)
    model: Any = load_model(folder, gguf_file=gguf_file, trust_remote_code=trust)
    tokens = torch.arange(length) % int(model.config.get_text_config().vocab_size)
    return model, {"input_ids": tokens[None]}
