"""A sparse network is trained under the zeros that it has, in every framework."""

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
from safe_core import FixedZeros
from safe_core.adapters.optax import finalize, fixed_support, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 8)), RNG.normal(size=(32, 4))
# No pattern of the library has this support, and the second weight is dense.
FIRST = RNG.normal(size=(6, 8)) * (RNG.random((6, 8)) < 0.3)
SECOND = RNG.normal(size=(4, 6))
METHODS = {"plain": safe_core.keep_zeros(), "perturbed": safe_core.keep_zeros(rho=0.1)}
every_method = pytest.mark.parametrize("name", METHODS)


def in_torch(name: str, *, lr: float = 0.05) -> tuple[nn.Module, SparseOptimizer]:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), (FIRST, 0, SECOND, 0), strict=True):
            p.copy_(torch.as_tensor(value))
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, SparseOptimizer(base, METHODS[name], model=model)


def train(model: nn.Module, optimizer: SparseOptimizer, steps: int) -> list[float]:
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(torch.as_tensor(X)) - torch.as_tensor(Y)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


@every_method
def test_zeros_stay_and_other_weights_learn(name: str) -> None:
    model, optimizer = in_torch(name)
    losses = train(model, optimizer, 30)
    optimizer.finalize(freeze=True)
    losses += train(model, optimizer, 10)
    optimizer.check_sparsity()
    weight = model[0].weight.detach().numpy()
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(weight != 0, FIRST != 0)
    assert (model[2].weight != 0).all()
    assert not np.isclose(weight, FIRST)[FIRST != 0].any()


@every_method
def test_jax_trains_the_same_network(name: str) -> None:
    model, optimizer = in_torch(name)
    train(model, optimizer, 10)
    optimizer.finalize()
    params = {"0": {"kernel": jnp.asarray(FIRST.T), "bias": jnp.zeros(6)}}
    params["1"] = {"kernel": jnp.asarray(SECOND.T), "bias": jnp.zeros(4)}

    def loss(params):
        hidden = jnp.tanh(X @ params["0"]["kernel"] + params["0"]["bias"])
        return ((hidden @ params["1"]["kernel"] + params["1"]["bias"] - Y) ** 2).mean()

    tx = sparse_optimizer(optax.sgd(0.05, momentum=0.9), METHODS[name])
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    params = finalize(params, state, METHODS[name])
    for i, layer in (("0", model[0]), ("1", model[2])):
        np.testing.assert_allclose(params[i]["kernel"].T, layer.weight.detach(), atol=1e-10)
    np.testing.assert_array_equal(params["0"]["kernel"].T != 0, FIRST != 0)


def test_tiny_weights_are_kept() -> None:
    tiny = np.asarray([0.0, -0.0, 1e-300, -5e-324], dtype=np.float64)
    assert safe_core.project(tiny, FixedZeros()).support.tolist() == [False, False, True, True]
    half = torch.tensor([0.0, 6e-8], dtype=torch.float16)
    assert safe_core.project(half, FixedZeros()).support.tolist() == [False, True]


@pytest.mark.parametrize(
    "make",
    [
        safe_core.admm,
        safe_core.magnitude,
        safe_core.iht,
        lambda sparsity: safe_core.safe(sparsity, steps=100),
        lambda sparsity: safe_core.admm({"a": 0.5, "b": sparsity}),
    ],
)
def test_methods_that_let_weights_come_back_refuse_it(make) -> None:
    with pytest.raises(ValueError, match=r"sparsity must ask for zeros .* got FixedZeros\(\)"):
        make(FixedZeros())


def test_it_mixes_with_other_patterns_by_name() -> None:
    method = safe_core.Method({"0.weight": FixedZeros(), "2.weight": "2:4"}, safe_core.Mask())
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.as_tensor(FIRST))
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (model[2].weight.reshape(4, 2, 4) != 0).sum(dim=-1).eq(2).all()
    np.testing.assert_array_equal(model[0].weight.detach() != 0, FIRST != 0)


def test_a_param_group_is_checked_too() -> None:
    layer = nn.Linear(4, 4)
    groups = [{"params": [layer.weight], "sparsify": True, "sparsity": FixedZeros()}]
    with pytest.raises(ValueError, match="sparsity of a param group must ask for zeros"):
        SparseOptimizer(torch.optim.SGD(groups, lr=0.1), safe_core.admm(0.5, penalty=1.0))
    SparseOptimizer(torch.optim.SGD(groups, lr=0.1), safe_core.keep_zeros())


class Experts(nn.Module):
    """A module of a type that the library does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(np.stack([FIRST, FIRST[::-1].copy()])))
        self.offset = nn.Parameter(torch.zeros(2, 6).double())  # starts at zero, and trains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("bi,eoi->beo", x, self.weight) + self.offset).flatten(1)


@every_method
def test_zeros_in_modules_of_unknown_types_stay(name: str) -> None:
    model = nn.Sequential(Experts(), nn.Tanh(), nn.Linear(12, 4).double())
    before = model[0].weight.detach().clone()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, METHODS[name], model=model)
    train(model, optimizer, 3)
    optimizer.finalize()
    assert torch.equal(model[0].weight == 0, before == 0)
    assert not torch.equal(model[0].weight, before)
    assert (model[0].offset != 0).all()
    with torch.no_grad():
        model[0].weight[0, 0] = 1.0
    with pytest.raises(ValueError, match=r"got non-zeros in 0\.weight"):
        optimizer.check_sparsity()


def test_zeros_in_modules_of_unknown_types_resume() -> None:
    model = nn.Sequential(Experts(), nn.Tanh(), nn.Linear(12, 4).double())
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, METHODS["plain"], model=model)
    train(model, optimizer, 2)
    resumed = nn.Sequential(Experts(), nn.Tanh(), nn.Linear(12, 4).double())
    resumed.load_state_dict(model.state_dict())  # in which the offset is not zero any more
    base = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    again = SparseOptimizer(base, METHODS["plain"], model=resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares its buffers
    for net, tool in ((model, optimizer), (resumed, again)):
        train(net, tool, 2)
        tool.finalize(freeze=True)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_may_be_loaded_after_the_optimizer_is_made() -> None:
    model = nn.Sequential(Experts(), nn.Tanh(), nn.Linear(12, 4).double())
    pruned = copy.deepcopy(model.state_dict())
    nn.init.zeros_(model[0].weight)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = SparseOptimizer(base, METHODS["plain"], model=model)
    model.load_state_dict(pruned)
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight == 0, pruned["0.weight"] == 0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3).double())]})
    train(model, optimizer, 1)
    assert torch.equal(model[0].weight == 0, pruned["0.weight"] == 0)


def test_a_model_that_only_starts_at_zero_is_no_sparse_one() -> None:
    model = nn.Sequential(Experts(), nn.Tanh(), nn.Linear(12, 4).double())
    nn.init.ones_(model[0].weight)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = SparseOptimizer(base, METHODS["plain"], model=model)
    dense = {w.name: w.reason for w in optimizer.coverage().dense}
    assert dense["0.offset"] == "it is zero everywhere, so it was not pruned"
    with pytest.raises(ValueError, match=r"needs a weight with zeros before the first step"):
        train(model, optimizer, 1)


def test_jax_names_zeros_that_it_does_not_keep() -> None:
    pruned = jnp.asarray(FIRST)
    params = {
        "fc": {"kernel": pruned, "bias": jnp.zeros(8)},
        "experts": {"wi": jnp.stack([pruned, pruned]), "start": jnp.zeros((2, 3))},
        "norm": {"scale": jnp.asarray([[0.0, 1.0]])},
    }
    text = r"does not keep the zeros of experts/wi, because .* \(select it with where=\)\. To sil"
    for tx in (sparse_optimizer(optax.sgd(0.1), METHODS["plain"]), fixed_support(optax.sgd(0.1))):
        with pytest.warns(safe_core.DenseWeightWarning, match=text):
            tx.init(params)
        jax.jit(tx.init)(params)  # a compiled program cannot read the values
    where = ["fc/kernel", "experts/wi"]
    sparse_optimizer(optax.sgd(0.1), METHODS["plain"], where=where).init(params)


def test_zeros_of_a_kernel_of_unknown_layout_are_kept_in_jax() -> None:
    """Nothing is counted in tensors, so it does not matter whether the kernel is a stack."""
    kernel = jnp.ones((3, 3, 4, 6)).at[:, :, 1].set(0)
    params = {"block": {"a": {"kernel": kernel, "bias": jnp.ones(6)}}}
    state = sparse_optimizer(optax.sgd(0.1), safe_core.keep_zeros()).init(params)
    assert (state.support["block"]["a"]["kernel"] == (kernel != 0)).all()
