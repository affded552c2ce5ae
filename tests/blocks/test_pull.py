"""Blocks are reconstructed by the pull, in both frameworks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import safe_core
from safe_core.adapters.jax.blocks import reconstruct
from safe_core.adapters.torch.blocks import prune_blocks
from safe_core.reconstruction import Reconstruction

STEPS = 60  # 20 epochs of 3 batches
METHOD = safe_core.safe(0.5, steps=STEPS)
TRAINING = {"learning_rate": 0.1, "epochs": 20, "warmup_epochs": 0, "batch_size": 4}
RNG = np.random.default_rng(0)
INPUTS = (RNG.normal(size=(12, 8)) @ RNG.normal(size=(8, 8)) / 3).astype("f4")
WEIGHT = RNG.normal(size=(8, 8)).astype("f4")


def error(weight: np.ndarray) -> float:
    return float(np.mean((INPUTS @ (weight - WEIGHT).T) ** 2))


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("method", [METHOD, safe_core.admm(0.5, steps=STEPS)], ids=["safe", "admm"])
def test_a_block_ends_on_the_constraint(method: Any, sparsity: Any) -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"]

    recipe, inputs = Reconstruction(method, **TRAINING), jnp.asarray(INPUTS)
    params = {"kernel": jnp.asarray(WEIGHT.T)}
    found = np.asarray(reconstruct(apply, params, inputs, sparsity, recipe=recipe).params["kernel"])
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(WEIGHT))
    prune_blocks(model, torch.tensor(INPUTS), recipe, sparsity, blocks=model)
    magnitude = np.asarray(safe_core.project(WEIGHT, sparsity).values)
    for weight in (found.T, model[0].weight.detach().numpy()):
        assert (weight == 0).sum() == 32
        assert error(weight) < 0.8 * error(magnitude)


def test_the_settings_name_the_unit_of_the_radius() -> None:
    shown = dict(Reconstruction(METHOD).describe(safe_core.Unstructured(0.5, "row")))
    assert shown["constraint"] == "Pull"
    assert "Linear(" in shown["perturbation radius (rho)"]
    assert shown["perturbation radius (rho)"].endswith("mean steps of the optimizer")
    assert shown["dual update interval (K)"] == "1"
    absolute = dict(Reconstruction(safe_core.safe(0.5)).describe(safe_core.Unstructured(0.5)))
    assert absolute["perturbation radius (rho)"] == "0.1"
