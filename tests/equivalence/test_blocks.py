"""Blocks pruned after training in PyTorch and in JAX are the same, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from short_runs import short_run
from twin_blocks import JaxBlock, for_linen, torch_model

import safe_core
from safe_core.adapters.jax.blocks import prune_blocks as prune_jax
from safe_core.adapters.jax.flax.blocks import linen_block
from safe_core.adapters.transformers import SafeReconstruction
from safe_core.adapters.transformers import prune_blocks as prune_torch
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Wanda

WIDTH, TOKENS, SAMPLES = 8, 3, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of_blocks() -> Any:
    """Return two blocks with random norms and biases too."""
    model = torch_model(WIDTH)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


# From the dense block's own targets the first gradient is rounding alone, whose direction no two
# frameworks share: the radius begins at zero.
RADIUS = safe_core.schedules.linear(0.05, steps=6)
RECIPE: dict[str, Any] = {
    "method": safe_core.safe(0.5, rho=RADIUS, penalty=0.1, dual_update_interval=2),
    "learning_rate": 5e-2,
    "epochs": 8,
    "warmup_epochs": 1,
    "batch_size": 4,
}


@pytest.fixture(autouse=True)
def quick_to_compile() -> Iterator[None]:
    """Most of the time is XLA compiling programs that run for milliseconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize(
    ("solver", "sparsity"),
    [("safe", 0.5), ("safe", "2:4"), ("safe+", "2:4"), ("safe+", 0.5), (Wanda(), 0.5)],
)
def test_frameworks_agree(solver: Any, sparsity: Any) -> None:
    model = model_of_blocks().to(DEVICE)
    dense = [for_linen(block) for block in model.blocks]
    inputs = np.random.default_rng(0).normal(size=(SAMPLES, TOKENS, WIDTH))
    inputs *= np.linspace(0.2, 2.0, WIDTH)
    solvers = [solver, solver]
    if isinstance(solver, str):
        importance = "wanda" if solver == "safe+" else None
        solvers = [
            kind(importance=importance, **RECIPE) for kind in (SafeReconstruction, Reconstruction)
        ]
    rules: Any = {"target_inputs": "dense", "batch_size": 4, "seed": 3}
    wanted = prune_torch(model, torch.tensor(inputs, device=DEVICE), solvers[0], sparsity, **rules)
    blocks = [linen_block(JaxBlock(), {"params": params}) for params in dense]
    got = prune_jax(blocks, jnp.asarray(inputs), solvers[1], sparsity, **rules)
    after = [for_linen(block) for block in model.blocks]
    for found, report, params, before in zip(got, wanted.blocks, after, dense, strict=True):
        assert found.relative_error == pytest.approx(report.relative_error, rel=1e-9)
        for (path, b), (_, a) in zip(
            *map(jax.tree.leaves_with_path, (found.params, params)), strict=True
        ):
            np.testing.assert_array_equal(a != 0, b != 0, err_msg=str(path))
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-9, err_msg=str(path))
        if isinstance(solver, str):  # else agreement would mean little
            up, first = params["up"], before["up"]
            start = safe_core.project(first["kernel"].T, sparsity).support.T
            assert ((up["kernel"] != 0) != start).any()
            assert np.abs(up["bias"] - first["bias"]).max() > 1e-2
