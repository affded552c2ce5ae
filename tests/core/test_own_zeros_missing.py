"""Training that should keep the zeros of a network refuses one without zeros."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import safe_core
from safe_core.adapters.optax import fixed_support, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.step_state import start

REFUSED = "needs a weight with zeros before the first step, got none in .* and 1 more: load the pr"


def network(*, sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    if sparse:
        with torch.no_grad():
            model[2].weight[0, 0] = 0
    return model


def optimizer_of(model: nn.Module) -> SparseOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return SparseOptimizer(base, safe_core.keep_zeros(), model=model)


def step(model: nn.Module, optimizer: SparseOptimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_torch_refuses_a_dense_model_at_every_step() -> None:
    model = network(sparse=False)
    before, optimizer = copy.deepcopy(model.state_dict()), optimizer_of(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED):
            step(model, optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_may_be_loaded_before_the_first_step() -> None:
    model = network(sparse=False)
    optimizer = optimizer_of(model)
    model.load_state_dict(network(sparse=True).state_dict())
    step(model, optimizer)
    assert model[2].weight[0, 0] == 0


def test_a_checkpoint_may_be_loaded_into_a_dense_model() -> None:
    model = network(sparse=True)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    other = network(sparse=False)
    resumed = optimizer_of(other)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    step(other, resumed)
    assert other[2].weight[0, 0] == 0


def test_torch_lists_weights_without_zeros_as_dense() -> None:
    found = optimizer_of(network(sparse=True)).coverage()
    assert [w.name for w in found.sparse] == ["2.weight"]
    assert "dense: 0.weight, because it has no zeros to keep" in str(found)
    assert not found.unexpected
    dense = str(optimizer_of(network(sparse=False)))
    assert "sparse: 0 of 2 weights, 0 of 96 entries" in dense


def in_jax(*, sparse: bool) -> dict[str, dict[str, jax.Array]]:
    model = network(sparse=sparse)
    kernels = {f"Dense_{i}": model[i].weight.detach().numpy().T for i in (0, 2)}
    return {name: {"kernel": jnp.asarray(x)} for name, x in kernels.items()}


def test_jax_refuses_dense_params() -> None:
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.keep_zeros())
    with pytest.raises(ValueError, match=REFUSED):
        tx.init(in_jax(sparse=False))
    tx.init(in_jax(sparse=True))


def test_jax_traces_the_state_of_a_checkpoint() -> None:
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.keep_zeros())
    shapes = jax.eval_shape(tx.init, in_jax(sparse=False))
    state = tx.init(in_jax(sparse=True))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)


def test_arrays_without_zeros_are_refused() -> None:
    arrays = [np.ones((2, 2)), np.ones(3)]
    info = safe_core.ArrayInfo(("a", "b"), (None, None))
    with pytest.raises(ValueError, match=REFUSED):
        start(safe_core.keep_zeros(), arrays, [0, 1], info)
    arrays[1][0] = 0
    start(safe_core.keep_zeros(), arrays, [0, 1], info)


def test_weights_of_other_patterns_do_not_count() -> None:
    parts = {"0.weight": safe_core.FixedZeros(), "2.weight": "2:4"}
    model = network(sparse=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    method = safe_core.Method(parts, safe_core.Mask())
    optimizer = SparseOptimizer(base, method, model=model)
    with pytest.raises(ValueError, match=r"got none in 0\.weight: load"):
        step(model, optimizer)


def test_perturbing_methods_warn() -> None:
    method = safe_core.keep_zeros(rho=0.1)
    model = network(sparse=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, method, model=model)
    with pytest.warns(
        safe_core.DenseWeightWarning, match="no zeros in 0.weight and 1 more"
    ) as seen:
        step(model, optimizer)
    assert seen[0].filename == __file__
    step(model, optimizer)  # once
    with pytest.warns(safe_core.DenseWeightWarning, match="found no zeros in"):
        sparse_optimizer(optax.sgd(0.1), method).init(in_jax(sparse=False))


def test_a_fixed_support_of_dense_weights_warns() -> None:
    fine = fixed_support(optax.sgd(0.1))
    with pytest.warns(safe_core.DenseWeightWarning, match="^fixed_support found no zeros") as seen:
        fine.init(in_jax(sparse=False))
    assert seen[0].filename == __file__
    fine.init(in_jax(sparse=True))
    jax.eval_shape(fine.init, in_jax(sparse=False))  # has no values to read
