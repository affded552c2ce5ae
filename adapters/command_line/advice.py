"""Load the model that ``safe-core advise`` measures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safe_core import _checks
from safe_core.adapters.export_advice import ExportAdvice
from safe_core.adapters.loading import load_named, names_object

from .output import quiet_transformers

__all__ = ["advice"]

_OPTIONS = {"forms": "--form", "sparsities": "--sparsity", "batch_sizes": "--batch-size"}


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
        A PyTorch device.
    gguf_file : str, optional
    trust_remote_code : bool
        Whether code of the folder may run.
    **settings
        More arguments of `safe_core.adapters.torch.advise`.

    Raises
    ------
    ValueError
        If there is no such function or folder, the function fails or returns something else, or
        an argument is out of range. Messages name the options of the command.
    """
    if sparsities is not None:
        for s in sparsities:
            if not 0 < s < 1:
                raise ValueError(
                    "sparsity must be a fraction above 0 and below 1, such as 0.9, got "
                    f"{s:g}{_checks.percent_meant(f'{s:g}')}"
                )
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
    run = _measurement(source, model, inputs, rest, device)
    try:
        found = run(**settings)
    except (TypeError, ValueError) as error:
        raise type(error)(_by_option(str(error))) from error
    forms = tuple(form._replace(reason=_by_option(form.reason)) for form in found.forms)
    return replace(found, forms=forms, notes=tuple(map(_by_option, found.notes)))


def _measurement(
    source: str, model: Any, inputs: Any, rest: list[Any], device: str | None
) -> Callable[..., ExportAdvice]:
    """Return the function that measures a model, for its framework."""
    # The source may have imported one of them alone, or neither.
    modules = [x.Module for x in map(sys.modules.get, ("flax.nnx", "flax.linen")) if x is not None]
    if isinstance(model, tuple(modules)):
        from safe_core.adapters.jax.flax import advise as of_flax

        if device is not None:
            raise ValueError(f"device must be left out for a Flax model, got {device!r}")
        return partial(of_flax, model, inputs, variables=rest[0] if rest else None)
    from safe_core.adapters.torch import advise

    if rest:
        raise ValueError(f"{source} must return a model and example inputs, got {2 + len(rest)} "
                         "values for a PyTorch model")  # fmt: skip
    return partial(advise, model, inputs, device=device)


def _by_option(text: str) -> str:
    """Return a message with the options of the command instead of the keyword arguments.

    Examples
    --------
    >>> _by_option("forms= leaves it out"), _by_option('pass device="cuda"')
    ('--form leaves it out', 'pass --device cuda')
    """
    text = text.replace('device="cuda"', "--device cuda")
    for name, option in _OPTIONS.items():
        text = re.sub(rf"\b{name}(=|(?= must))", option, text)
    return text


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
    from .perplexity import check_length

    _checks.integer("length", length, low=1)
    model: Any = load_model(folder, gguf_file=gguf_file, trust_remote_code=trust)
    check_length(model, length)
    tokens = torch.arange(length) % int(model.config.get_text_config().vocab_size)
    return model, {"input_ids": tokens[None]}
