"""Train the demo's network in PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safe_core import FinalizeWarning
from safe_core.adapters.torch import SparseOptimizer

from .data import Dataset, Layer
from .recipe import Recipe, Run

__all__ = ["hessian_product", "train"]


def train(
    recipe: Recipe, run: Run, data: Dataset, layers: list[Layer], device: str
) -> tuple[list[Layer], list[Layer]]:
    """Train a network; return its layers before and after the final projection."""
    model = build_model(layers).to(device)
    inputs = torch.from_numpy(data.inputs).to(device)
    labels = torch.from_numpy(data.labels).to(device)
    steps = len(data.order)

    base = torch.optim.SGD(
        model.parameters(),
        lr=1.0,  # the schedule multiplies it
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    optimizer: torch.optim.Optimizer = base
    if run.sparsity is not None:
        optimizer = SparseOptimizer(base, recipe.method(run, steps), model=model)
    per_epoch = steps // recipe.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.learning_rate_at(min(step, steps - 1), per_epoch)
    )

    def closure(rows: Tensor) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()  # type: ignore[return-value]

    for batch in torch.from_numpy(data.order).to(device):
        if recipe.ascent_share < 1 and isinstance(optimizer, SparseOptimizer):
            closure(batch[: round(recipe.ascent_share * len(batch))])
            with optimizer.perturbed():
                closure(batch)
            optimizer.step()
        else:
            optimizer.step(partial(closure, batch))
        scheduler.step()

    trained = read_layers(model)
    if isinstance(optimizer, SparseOptimizer):
        with warnings.catch_warnings():
            # The demo shows methods that end far from C, and what that costs.
            warnings.simplefilter("ignore", FinalizeWarning)
            optimizer.finalize()
    return trained, read_layers(model)


def build_model(layers: list[Layer]) -> nn.Sequential:
    """Return a network with the given layers; PyTorch stores weights as (output, input)."""
    model = nn.Sequential()
    for i, (weight, bias) in enumerate(layers):
        if i:
            model.append(nn.ReLU())
        linear = nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight.T.copy()))
            linear.bias.copy_(torch.from_numpy(bias))
        model.append(linear)
    return model


def read_layers(model: nn.Sequential) -> list[Layer]:
    """Return the layers of the network as copies in NumPy."""
    return [
        Layer(m.weight.detach().cpu().numpy().T.copy(), m.bias.detach().cpu().numpy().copy())
        for m in model
        if isinstance(m, nn.Linear)
    ]


def hessian_product(
    layers: list[Layer], data: Dataset, device: str
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return ``v -> H v``, where H is the Hessian of the training loss."""
    model = build_model(layers).to(device)
    params = list(model.parameters())
    inputs = torch.from_numpy(data.inputs).to(device)
    loss = nn.functional.cross_entropy(model(inputs), torch.from_numpy(data.labels).to(device))
    first = torch.autograd.grad(loss, params, create_graph=True)
    gradient = torch.cat([g.flatten() for g in first])

    def product(v: NDArray[np.float32]) -> NDArray[np.float32]:
        along = torch.from_numpy(np.asarray(v, np.float32).reshape(-1)).to(device)
        second = torch.autograd.grad(gradient @ along, params, retain_graph=True)
        return torch.cat([s.flatten() for s in second]).cpu().numpy()

    return product
