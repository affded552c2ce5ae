"""A stack of weights, such as scanned layers or experts, is pruned as its slices are."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import safe_core
from safe_core import NM, Block, Channel, Layout, Unstructured, project
from safe_core.adapters.optax import check_sparsity, finalize, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

# A few steps end far from C.
pytestmark = pytest.mark.filterwarnings("ignore::safe_core.finalization.FinalizeWarning")

PATTERNS = [
    Unstructured(0.37, scope="tensor"),
    Unstructured(0.37, scope="row"),
    Unstructured(0.37, scope="global"),
    NM(2, 4),
    NM(2, 5, ragged="dense"),
    Block((3, 4), 0.4),
    Block((3, 4), 0.4, scope="global"),
    Channel(0.3),
    Channel(0.3, scope="global"),
]
LIBRARIES = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


@pytest.mark.every_second
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_stack_is_projected_as_its_slices(pattern: Any, axis: int, library: str) -> None:
    rng = np.random.default_rng(0)
    # Every score differs from the others where slices compete, for ties go by position.
    slices = [rng.normal(size=(9, 8)) for _ in range(5)]
    if not getattr(pattern, "joint", False):
        slices = [np.round(2 * x) for x in slices]
    inputs, outputs = ([a for a in range(3) if a != axis][i] for i in (1, 0))
    layout = Layout((inputs,), (outputs,), (axis,))
    make = LIBRARIES[library]
    apart = project([make(x) for x in slices], pattern).support
    stack = project(make(np.stack(slices, axis=axis)), pattern, layout=layout).support
    np.testing.assert_array_equal(
        np.asarray(stack), np.stack([np.asarray(mask) for mask in apart], axis=axis)
    )


def test_the_erdos_renyi_rule_counts_slices() -> None:
    """Up to rounding, since all slices of a stack get the same count."""
    rng = np.random.default_rng(0)
    slices, other = [rng.normal(size=(9, 8)) for _ in range(5)], rng.normal(size=(40, 8))
    pattern = Unstructured(0.7, "tensor", "erdos_renyi_kernel")
    apart = project([*slices, other], pattern).support
    layouts = [Layout((2,), (1,), (0,)), Layout((1,), (0,))]
    stack, beside = project([np.stack(slices), other], pattern, layout=layouts).support
    for one, mask in zip(stack, apart, strict=False):
        assert 0 <= int(one.sum()) - int(mask.sum()) <= 1
    assert int(beside.sum()) == int(apart[-1].sum())
    assert int((~stack).sum()) < 0.75 * stack.size


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.tanh(nn.Dense(8, name="dense")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return lifted(name="layers")(x, None)[0]


class Apart(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(3):
            x, _ = Layer(name=f"layer{i}")(x, None)
        return x


@pytest.mark.every_second
@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.43, scope="tensor"), Block((2, 2), 0.3), Channel(0.3), NM(2, 4)],
    ids=str,
)
def test_a_scanned_model_trains_as_the_same_model_unscanned(pattern: Any) -> None:
    x = jax.random.normal(jax.random.key(1), (16, 8), jnp.float64)
    y = jax.random.normal(jax.random.key(2), (16, 8), jnp.float64)
    stacked = jax.tree.map(
        lambda a: a.astype(jnp.float64), Scanned().init(jax.random.key(0), x)["params"]
    )
    apart = {f"layer{i}": jax.tree.map(lambda a, i=i: a[i], stacked["layers"]) for i in range(3)}
    method = safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=2)

    def trained(model: Any, params: Any) -> Any:
        tx = sparse_optimizer(optax.sgd(0.1, momentum=0.9), method)
        state = tx.init(params)

        def gradient(params: Any) -> Any:
            return jax.grad(lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2))(params)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
            return optax.apply_updates(params, updates), state

        for _ in range(6):
            params, state = step(params, state)
        final = finalize(params, state, method)
        check_sparsity(final, pattern)
        return final

    wanted, found = trained(Apart(), apart), trained(Scanned(), stacked)
    for i in range(3):
        mask = np.asarray(found["layers"]["dense"]["kernel"][i]) != 0
        one = wanted[f"layer{i}"]["dense"]["kernel"]
        np.testing.assert_array_equal(mask, np.asarray(one) != 0)
        np.testing.assert_allclose(found["layers"]["dense"]["kernel"][i], one, rtol=1e-9)


class Experts(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight)


class Separate(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 6, bias=False) for _ in weight)
        for expert, one in zip(self.experts, weight, strict=True):
            expert.weight.data = one.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(x) for expert in self.experts], 1)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.43, scope="tensor"), Channel(0.3), NM(2, 4)], ids=str
)
def test_stacked_experts_train_as_separate_layers(pattern: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((4, 6, 8), (16, 8), (16, 4, 6))
    )
    method = safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=2)

    def train(net: Any, **options: Any) -> None:
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = SparseOptimizer(base, method, **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((net(x) - y) ** 2).mean()
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
        optimizer.finalize()

    experts = {"weight": Layout((2,), (1,), (0,))}
    stack, separate = Experts(weight), Separate(weight)
    train(stack, model=stack, where=lambda name, p: True, layout=experts)
    train(separate, model=separate)
    for one, expert in zip(stack.weight, separate.experts, strict=True):
        assert torch.equal(one != 0, expert.weight != 0)
        torch.testing.assert_close(one, expert.weight, rtol=1e-9, atol=0)
