"""Example inputs of a model, and its evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "example_arguments"]


def example_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional arguments and those by name: one argument, all in order, or a mapping."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if torch.is_tensor(example_inputs):
        return (example_inputs,), {}
    if not isinstance(example_inputs, (tuple, list)):
        raise TypeError(
            "example_inputs must be a tensor, a tuple or a mapping of arguments, got "
            f"{type(example_inputs)!r}"
        )
    return tuple(example_inputs), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
