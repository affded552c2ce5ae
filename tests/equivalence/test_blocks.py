"""Blocks pruned after training in PyTorch and in JAX are the same, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core.adapters.jax.blocks import prune_blocks as prune_jax
from safe_core.adapters.jax.flax.blocks import linen_block
from safe_core.adapters.transformers import SafeReconstruction
from safe_core.adapters.transformers import prune_blocks as prune_torch
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Wanda

pytestmark = pytest.mark.equivalence

WIDTH, TOKENS, SAMPLES = 8, 3, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TorchBlock(nn.Module):
    """Two layers behind a norm, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class JaxBlock(linen.Module):
    """The same."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        y = jnp.tanh(linen.Dense(2 * WIDTH, precision="highest", name="up")(y))
        return x + linen.Dense(WIDTH, precision="highest", name="down")(y)


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([TorchBlock(), TorchBlock()])
        for p in self.parameters():  # norms and biases too
            p.data += 0.3 * torch.randn_like(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def as_numpy(model: Model) -> list[dict[str, np.ndarray]]:
    """The parameters of each block, weights as (input, output)."""
    return [
        {name: p.detach().cpu().numpy().T.copy() for name, p in block.named_parameters()}
        for block in model.blocks
    ]


def for_linen(params: dict[str, np.ndarray]) -> dict[str, dict[str, jax.Array]]:
    tree: dict[str, dict[str, jax.Array]] = {}
    for name, array in params.items():
        module, leaf = name.split(".")
        kind = ("scale" if array.ndim == 1 else "kernel") if leaf == "weight" else leaf
        tree.setdefault(module, {})[kind] = jnp.asarray(array)
    return tree


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


@short_run
@pytest.mark.parametrize(
    ("solver", "sparsity"),
    [("safe", 0.5), ("safe", "2:4"), ("safe+", 0.5), ("safe+", "2:4"), (Wanda(), 0.5)],
)
def test_frameworks_agree(solver: Any, sparsity: Any) -> None:
    model = Model().double().to(DEVICE)
    dense = as_numpy(model)
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
    blocks = [linen_block(JaxBlock(), {"params": for_linen(params)}) for params in dense]
    got = prune_jax(blocks, jnp.asarray(inputs), solvers[1], sparsity, **rules)
    for found, report, params, before in zip(
        got, wanted.blocks, as_numpy(model), dense, strict=True
    ):
        assert found.relative_error == pytest.approx(report.relative_error, rel=1e-9)
        for (path, b), (_, a) in zip(
            *map(jax.tree.leaves_with_path, (found.params, for_linen(params))), strict=True
        ):
            np.testing.assert_array_equal(a != 0, b != 0, err_msg=str(path))
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-9, err_msg=str(path))
        if isinstance(solver, str):  # else agreement would mean little
            moved = params["up.weight"] != 0
            start = safe_core.project(before["up.weight"].T, sparsity).support.T
            assert (moved != start).any()
            assert np.abs(params["up.bias"] - before["up.bias"]).max() > 1e-2
