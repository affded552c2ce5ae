"""Digits, and initial layers that train like those of the demo, but are a third as wide."""

from __future__ import annotations

from typing import Any, NamedTuple

from safe_core.demo.data import initial_layers, load
from safe_core.demo.recipe import Recipe, Run

__all__ = ["Digits", "digits"]


class Digits(NamedTuple):
    """Inputs, labels, the rows of every batch, and layers of shape (input, output)."""

    inputs: Any
    labels: Any
    order: Any
    layers: list[Any]


def digits(epochs: int) -> Digits:
    """Return the training set with 19 batches of an epoch."""
    recipe, run = Recipe(epochs=epochs, hidden=(100, 30)), Run("dense", 0.0, 0)
    data = load(recipe, run)
    return Digits(
        data.inputs, data.labels, data.order, initial_layers(recipe, run, data.inputs.shape[1])
    )
