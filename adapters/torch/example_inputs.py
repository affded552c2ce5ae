"""Call a model on example inputs in evaluation mode, and compare outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safe_core.adapters.model_calls import read_arguments

__all__ = ["arguments", "compare", "evaluation_mode", "tensors"]


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments that example inputs stand for, or raise."""
    return read_arguments(example_inputs, torch.is_tensor, "a tensor")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without a key-value cache, and restore it afterwards."""
    training = [(m, m.training) for m in model.modules()]
    configs = {id(c): c for m in model.modules() for c in [getattr(m, "config", None)] if c}
    for config in list(configs.values()):
        parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
        configs |= {id(c): c for c in parts if c is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False)]
    model.eval()
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for module, mode in training:
            module.training = mode


def compare(wanted: Any, got: Any, message: str) -> None:
    """Raise a ValueError with a message unless the outputs of two networks agree up to rounding."""
    for a, b in zip(tensors(wanted), tensors(got), strict=True):
        if a.is_floating_point() and bool(a.isnan().any()):
            raise ValueError("model must give numbers for example_inputs, got outputs that are NaN")
        if a.shape == b.shape and not a.is_floating_point():
            same = torch.equal(a, b)
        else:
            largest = a.abs().amax() if a.numel() else 0
            same = a.shape == b.shape and bool(
                ((a - b).abs() <= torch.finfo(a.dtype).eps ** 0.5 * largest).all()
            )
        if not same:
            raise ValueError(message)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among nested values."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors(entry)
