"""Train with a pattern for each parameter, by name."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import ByName, Unstructured
from safe_core.adapters.torch import SparseOptimizer

pytestmark = short_run


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def trained(model: nn.Sequential, groups, method, *, frozen: str = "") -> SparseOptimizer:
    optimizer = SparseOptimizer(torch.optim.SGD(groups, lr=0.1), method, model=model)
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for step in range(6):
        if frozen and step == 3:
            model.get_parameter(frozen).requires_grad_(False)
        optimizer.step(closure)
    return optimizer


def method_for(sparsity, **options):
    return safe_core.safe(sparsity, rho=0.05, penalty=0.1, dual_update_interval=2, **options)


def rising_method(sparsity, **options):
    return safe_core.safe(sparsity, steps=6, **options)


@pytest.mark.parametrize("importance", [None, safe_core.SquaredGradient(decay=0.9)])
@pytest.mark.parametrize("make", [method_for, rising_method])
def test_names_do_what_param_groups_do(make, importance) -> None:
    one, other = network(), network()
    pattern = ByName({"0.weight": "2:4", "4.weight": 0.75}, default=0.5)
    by_name = trained(one, one.parameters(), make(pattern, importance=importance))
    groups = [
        {"params": [*other[0].parameters()], "sparsity": "2:4"},
        {"params": [*other[2].parameters()]},
        {"params": [*other[4].parameters()], "sparsity": 0.75},
    ]
    by_group = trained(other, groups, make(0.5, importance=importance))
    for optimizer in (by_name, by_group):
        optimizer.finalize()
        optimizer.check_sparsity()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_named_parameter_can_be_frozen_during_training() -> None:
    model = network()
    method = method_for({"0.weight": "2:4", "2.weight": 0.5, "4.weight": 0.5})
    optimizer = trained(model, model.parameters(), method, frozen="0.weight")
    optimizer.finalize()
    kept = (model[0].weight != 0).reshape(8, 2, 4).sum(-1)
    assert kept.unique().tolist() == [2]


def test_the_importance_of_one_pattern_says_nothing_about_another() -> None:
    """P of a layer without gradients is 1, although layers that compete have seen theirs."""
    model = network()
    unused = nn.Linear(8, 8)
    whole = nn.ModuleDict({"used": model, "unused": unused})
    pattern = ByName({"unused.weight": Unstructured(0.5, scope="tensor")}, default=0.5)
    base = torch.optim.SGD(whole.parameters(), lr=0.1)
    method = method_for(pattern, importance=safe_core.SquaredGradient(decay=0.9))
    optimizer = SparseOptimizer(base, method, model=whole)
    for _ in range(4):
        optimizer.zero_grad()
        for block in (nullcontext(), optimizer.perturbed()):
            with block:
                model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    smallest = unused.weight.detach().abs().flatten().argsort()[:32]
    optimizer.finalize()
    assert not unused.weight.flatten()[smallest].any()
    assert int((unused.weight == 0).sum()) == 32


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"0.weight": "2:4"}, "got none for 2.weight: ByName takes default="),
        (ByName({"head": "2:4"}, default=0.5), "sparsity must name sparse arrays, 0.weight"),
    ],
)
def test_names_that_do_not_fit_are_refused_at_construction(sparsity, message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        SparseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), method_for(sparsity), model=model
        )
