"""Parameters whose requires_grad is off, at construction or later."""

from __future__ import annotations

import copy

import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def trained(steps=3, method=None, frozen=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    if frozen is not None:
        model[frozen].requires_grad_(False)
    method = method or safe_core.safe(0.5, rho=0.05, penalty=0.1, dual_update_interval=2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, method, model=model)
    inputs = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer, closure


def zeros(model):
    return sum(int((model[i].weight == 0).sum()) for i in (0, 2))


@short_run
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_finalize_projects_what_was_frozen_for_export(pattern, steps):
    method = safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=2)
    model, optimizer, _ = trained(steps, method)
    model.requires_grad_(False)
    optimizer.finalize()
    assert zeros(model) == 32


@short_run
@pytest.mark.parametrize("steps", [0, 3])
def test_check_sparsity_checks_what_is_frozen(steps):
    model, optimizer, _ = trained(steps)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="non-zeros in"):
        optimizer.check_sparsity()
    optimizer.finalize()
    optimizer.check_sparsity()
    model[0].weight.fill_(1.0)
    with pytest.raises(ValueError, match="non-zeros in"):
        optimizer.check_sparsity()


@short_run
def test_a_layer_frozen_midway_is_still_projected():
    model, optimizer, closure = trained()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer.step(closure)
    assert torch.equal(model[0].weight, before)
    assert list(optimizer.sparse_parameters()) == ["0.weight", "2.weight"]
    assert [row.name for row in optimizer.report().tensors] == ["0.weight", "2.weight"]
    optimizer.finalize()
    assert zeros(model) == 32


@short_run
def test_a_frozen_support_also_masks_a_layer_that_does_not_train():
    model, optimizer, closure = trained()
    model[0].requires_grad_(False)
    optimizer.finalize(freeze=True)
    optimizer.step(closure)
    optimizer.check_sparsity()
    assert zeros(model) == 32
    saved = copy.deepcopy(optimizer.state_dict())
    model[0].weight.fill_(1.0)
    optimizer.load_state_dict(saved)
    optimizer.check_sparsity()


@short_run
def test_a_copy_remembers_what_was_trainable():
    model, optimizer, _ = trained(steps=0)
    model.requires_grad_(False)
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.finalize()
    assert zeros(model) == 32


@short_run
def test_new_group_options_do_not_forget_what_was_trainable():
    model, optimizer, _ = trained(steps=0)
    model.requires_grad_(False)
    optimizer.param_groups[0]["sparsity"] = 0.25
    optimizer.finalize()
    assert zeros(model) == 16


def test_a_model_without_trainable_sparse_weights_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for layer in model:
        layer.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight.*requires_grad"):
        SparseOptimizer(base, safe_core.safe(0.5), model=model)


@pytest.mark.parametrize("how", ["layer", "parameter", "weight norm"])
def test_a_layer_that_lost_its_sparse_weight_is_named(how: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.magnitude(0.5), model=model)
    if how == "layer":
        model[0] = torch.nn.Linear(4, 4)
    elif how == "parameter":
        model[0].weight = torch.nn.Parameter(model[0].weight.detach() * 2)
    else:
        torch.nn.utils.parametrizations.weight_norm(model[0])
    for call in (optimizer.finalize, optimizer.check_sparsity):
        with pytest.raises(ValueError, match=r"model must hold .* it lost 0\.weight"):
            call()
