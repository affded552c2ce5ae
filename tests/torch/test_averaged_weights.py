"""Averaged weights, by EMA or a schedule-free optimizer, become exactly sparse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from short_runs import short_run
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import safe_core
from safe_core.adapters.torch import SparseOptimizer, recalibrate

generator = torch.Generator().manual_seed(1)
X = torch.randn(64, 8, generator=generator)
Y = (X @ torch.randn(8, 4, generator=generator)).argmax(1)
ZEROS = (8 * 12 + 12 * 4) * 3 // 4
METHOD = safe_core.safe(0.75, rho=0.05, penalty=0.5, dual_update_interval=4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def step(model: nn.Module, optimizer: SparseOptimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def zeros_of(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2)


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# An exponential moving average


@pytest.fixture(scope="module")
def averaged() -> Any:
    """A model with its optimizer and average after 200 steps."""
    model = network()
    method = safe_core.safe(0.75, rho=0.05, penalty=0.1, dual_update_interval=4)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(200):
        step(model, optimizer)
        scheduler.step()
        average.update_parameters(model)
    return model, optimizer, average


def test_the_average_of_what_becomes_sparse_is_dense(averaged: Any) -> None:
    _, _, average = copy.deepcopy(averaged)
    assert zeros_of(average.module) == 0


def test_the_average_is_finalized_in_place_of_the_model(averaged: Any) -> None:
    model, optimizer, average = copy.deepcopy(averaged)
    x = copies(model)
    model.load_state_dict(average.module.state_dict())
    optimizer.finalize()  # a warning would be an error
    recalibrate(model, [X])
    optimizer.check_sparsity()
    assert zeros_of(model) == ZEROS
    for p, mean, own in zip(model.parameters(), average.module.parameters(), x, strict=True):
        assert torch.equal(p, torch.where(p == 0, p, mean))
        assert not torch.equal(mean, own)
    hidden = model[0](X)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    assert float((model.eval()(X).argmax(1) == Y).float().mean()) > 0.8


def test_the_support_masks_the_average_during_training(averaged: Any) -> None:
    model, optimizer, average = copy.deepcopy(averaged)
    x, shown = copies(model), copy.deepcopy(average.module)
    names = optimizer.sparse_parameters()
    with torch.no_grad():
        for name, mask in zip(names, optimizer.split().support, strict=True):
            shown.get_parameter(name).masked_fill_(~mask, 0)
    assert zeros_of(shown) == ZEROS
    for p, before in zip(model.parameters(), x, strict=True):
        assert torch.equal(p, before)


# Schedule-free optimizers


BASES = {
    "SGD": lambda params: SGDScheduleFree(params, lr=0.3),
    "AdamW": lambda params: AdamWScheduleFree(params, lr=0.05),
}


def scheduled_free(name: str, method: Any = METHOD, steps: int = 120) -> Any:
    model = network()
    optimizer = SparseOptimizer(BASES[name](model.parameters()), method, model=model)
    optimizer.train()
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def test_only_a_base_with_modes_has_them() -> None:
    model = network()
    plain = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), METHOD, model=model)
    assert not hasattr(plain, "train")
    assert not hasattr(plain, "eval")
    with pytest.raises(AttributeError, match="'SGD' object has no attribute 'train'"):
        plain.train()
    modes = SparseOptimizer(BASES["SGD"](model.parameters()), METHOD, model=model)
    assert callable(modes.train)
    modes.train()
    assert modes.base.param_groups[0]["train_mode"]
    modes.eval()
    assert not modes.base.param_groups[0]["train_mode"]


@pytest.mark.parametrize("name", BASES)
@short_run
def test_the_weights_that_it_evaluates_become_exactly_sparse(name: str) -> None:
    model, optimizer = scheduled_free(name)
    trained = copies(model)
    optimizer.eval()
    x = copies(model)
    assert any(not torch.equal(a, b) for a, b in zip(trained, x, strict=True))
    with optimizer.sparse_weights():
        shown = copies(model)
        optimizer.eval()  # trainers call it once more
        assert zeros_of(model) == ZEROS
    optimizer.finalize()
    optimizer.eval()
    assert zeros_of(model) == ZEROS
    for p, own, before in zip(model.parameters(), x, shown, strict=True):
        assert torch.equal(p, torch.where(p == 0, p, own))
        assert torch.equal(p, before)


def test_sgd_comes_near_to_the_constraint() -> None:
    model, optimizer = scheduled_free("SGD", steps=300)
    optimizer.eval()
    optimizer.finalize()  # a warning would be an error
    assert optimizer.finalized.distance < 0.1
    recalibrate(model, [X])
    assert float((model.eval()(X).argmax(1) == Y).float().mean()) > 0.8


def test_projecting_in_training_mode_would_fill_in_the_zeros_again() -> None:
    model, optimizer = scheduled_free("SGD")
    twin = copy.deepcopy((model, optimizer))
    support = optimizer.split().support
    for p, mask in zip((w for w in model.parameters() if w.ndim == 2), support, strict=True):
        p.data.masked_fill_(~mask, 0)
    optimizer.base.eval()
    assert zeros_of(model) < ZEROS
    model, optimizer = twin
    for call in (optimizer.finalize, lambda: optimizer.sparse_weights().__enter__()):
        with pytest.raises(ValueError, match=r"must come after eval\(\) .*SGDScheduleFree trains"):
            call()


def test_a_step_needs_another_eval() -> None:
    model, optimizer = scheduled_free("SGD", steps=4)
    optimizer.eval()
    optimizer.train()
    step(model, optimizer)
    with pytest.raises(ValueError, match=r"must come after eval\(\)"):
        optimizer.finalize()
    optimizer.eval()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"must come after eval\(\)"):
        optimizer.finalize()


def test_modes_do_not_change_within_a_block() -> None:
    model, optimizer = scheduled_free("SGD", steps=4)
    optimizer.zero_grad()
    loss_of(model).backward()
    with optimizer.perturbed():
        with pytest.raises(ValueError, match=r"eval\(\) must come after the perturbed\(\) block"):
            optimizer.eval()
        loss_of(model).backward()
    optimizer.step()
    optimizer.eval()
    with optimizer.sparse_weights(), pytest.raises(ValueError, match=r"train\(\) must come after"):
        optimizer.train()


@short_run
def test_fine_tuning_keeps_the_zeros_in_both_modes() -> None:
    model, optimizer = scheduled_free("AdamW")
    optimizer.eval()
    optimizer.finalize(freeze=True)
    optimizer.train()
    for _ in range(3):
        step(model, optimizer)
    optimizer.check_sparsity()
    optimizer.eval()
    optimizer.check_sparsity()
    assert zeros_of(model) == ZEROS


@pytest.mark.parametrize(
    "method",
    [
        safe_core.safe(0.75, rho=0.05, penalty=0.5, decoupled=True),
        safe_core.safe(0.75, steps=100),
        safe_core.Method(0.75, safe_core.Pull(0.5)),
    ],
    ids=["decoupled", "untuned", "pull"],
)
def test_a_penalty_beside_the_base_step_is_refused(method: safe_core.Method) -> None:
    text = r"must add its penalty to the gradient with SGDScheduleFree.*give penalty= and leave dec"
    with pytest.raises(ValueError, match=text):
        scheduled_free("SGD", method)


@short_run
def test_a_derived_radius_and_rise_work_in_both_modes() -> None:
    method = safe_core.safe(0.75, steps=100, penalty=0.5)
    model, optimizer = scheduled_free("SGD", method)
    optimizer.eval()
    optimizer.finalize()
    optimizer.check_sparsity()
    assert zeros_of(model) == ZEROS


def test_the_mode_that_it_has_may_be_set_again_within_a_block() -> None:
    """The Hugging Face Trainer sets it at every pass."""
    runs = scheduled_free("SGD", steps=4), scheduled_free("SGD", steps=4)
    for repeats, (model, optimizer) in enumerate(runs):
        optimizer.zero_grad()
        loss_of(model).backward()
        with optimizer.perturbed():
            if repeats:
                optimizer.train()
            loss_of(model).backward()
        optimizer.step()
    for a, b in zip(copies(runs[0][0]), copies(runs[1][0]), strict=True):
        assert torch.equal(a, b)
