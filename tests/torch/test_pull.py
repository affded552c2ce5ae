"""The pull in PyTorch: kernels, param groups, and steps compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pulled_runs import BASES, FIXED, STEPS, UNTUNED, Run, assert_same, first_step, size
from torch import Tensor, nn

import safe_core
from safe_core import Method, Pull, SplitState, schedules
from safe_core.adapters.torch import kernels

SHAPES = [(3,), (5, 7), (40, 11), (2, 3, 4), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


# The kernel


@pytest.fixture(params=[1, 30, 2**17], ids=lambda size: f"group-{size}")
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kernels, "_GROUP", request.param)
    return request.param


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pull_in_pieces_is_that_of_the_formula(
    group: int, dtype: torch.dtype, narrow: bool, transposed: bool
) -> None:
    def placed(found: list[Tensor]) -> list[Tensor]:
        return [t.mT.clone().mT if transposed and t.ndim > 1 else t for t in found]

    x = placed(tensors(0, dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    anchors = placed(tensors(1, torch.bfloat16 if narrow else wide))
    supports = placed([t > 0 for t in tensors(2)])
    before = [t.clone() for t in x]
    storages = [t.data_ptr() for t in x]
    kernels.pull_(x, SplitState(anchors, supports), 0.3)
    assert [t.data_ptr() for t in x] == storages
    for got, old, anchor, kept in zip(x, before, anchors, supports, strict=True):
        gap = old.double() - anchor.double()
        wanted = torch.where(kept, old.double(), old.double() + math.expm1(-0.3) * gap)
        torch.testing.assert_close(got, wanted.to(dtype))
        assert torch.equal(got[kept], old[kept])
        assert torch.equal(got == old, kept)


def test_the_support_keeps_what_is_not_finite_and_the_sign_of_zero(group: int) -> None:
    x = [torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0])]
    support = [torch.tensor([True] * 5 + [False])]
    bits = x[0].view(torch.int32).clone()
    kernels.pull_(x, SplitState([torch.full((6,), 3.0)], support), 0.5)
    assert torch.equal(x[0].view(torch.int32)[:5], bits[:5])


def test_many_tensors_are_pulled_in_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GROUP", 100)
    largest: list[int] = []
    subtract = torch._foreach_sub

    def counted(tensors: Any, *args: Any) -> Any:
        largest.append(max(t.numel() for t in tensors))
        return subtract(tensors, *args)

    monkeypatch.setattr(torch, "_foreach_sub", counted)
    x = [torch.ones(1000)] + [torch.ones(10) for _ in range(30)]
    anchors, supports = [torch.zeros_like(t) for t in x], [t < 0 for t in x]
    kernels.pull_(x, SplitState(anchors, supports), 0.5)
    assert len(largest) == 13  # 10 pieces of the first, 3 groups of the others
    assert max(largest) == 100
    assert all(torch.allclose(t, torch.tensor(math.exp(-0.5))) for t in x)


# Runs


@pytest.mark.parametrize("base", BASES)
def test_the_pull_is_the_same_for_every_base_and_rate(base: str) -> None:
    method = Method(0.75, Pull(schedules.linear(0.3, 5, 0.1), 100))
    bases = {**BASES, "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0)}
    run = Run(method, bases[base])
    run.loss = lambda: 0 * sum(p.sum() for p in run.model.parameters())  # type: ignore[method-assign]
    before = [w.clone() for w in run.weights]
    run.train(3)
    factor = math.exp(-(0.1 + 0.14 + 0.18))
    for old, new, kept in zip(before, run.weights, run.optimizer.split().support, strict=True):
        assert torch.equal(new[kept], old[kept])
        torch.testing.assert_close(new[~kept], factor * old[~kept])


def test_a_parameter_without_a_gradient_is_pulled_too() -> None:
    run = Run(Method(0.75, Pull(0.2, 4)))
    before = run.weights[1].clone()
    nn.functional.mse_loss(run.model[0](run.data[0]), torch.zeros(32, 16)).backward()
    run.optimizer.step()
    assert run.model[2].weight.grad is None or not run.model[2].weight.grad.any()
    kept = run.optimizer.split().support[1]
    assert torch.equal(run.weights[1][kept], before[kept])
    torch.testing.assert_close(run.weights[1][~kept], math.exp(-0.2) * before[~kept])


def test_groups_have_penalties_radii_and_sparsities_of_their_own() -> None:
    def grouped(params: Any) -> torch.optim.Optimizer:
        first, bias, *rest = params
        own = {"penalty": schedules.linear(0.7, 1, 0.7), "rho": 2.0, "sparsity": 0.5}
        return torch.optim.SGD([{"params": [first], **own}, {"params": [bias, *rest]}], lr=0.1)

    run = Run(FIXED, grouped)
    unit = first_step(run)
    run.train(1)
    gradients = [p.grad.clone() for p in run.model.parameters() if run.closure() is not None]
    e, length = run.perturbation(), size(gradients)
    for moved, g, rho in zip(e, gradients, (2.0, 0.5, 0.5, 0.5), strict=True):
        torch.testing.assert_close(moved, rho * unit * g / length, rtol=1e-3, atol=1e-6)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = [w.clone() for w in run.weights]
    run.train(1)
    support = run.optimizer.split().support
    assert [int((~s).sum()) for s in support] == [64, 48]
    for old, new, kept, rate in zip(before, run.weights, support, (0.7, 0.2), strict=True):
        torch.testing.assert_close(new[~kept], math.exp(-rate) * old[~kept])
        assert torch.equal(new[kept], old[kept])


def test_maximizing_is_minimizing_the_negative() -> None:
    low = Run(UNTUNED, lambda params: torch.optim.SGD(params, lr=0.05))
    high = Run(UNTUNED, lambda params: torch.optim.SGD(params, lr=0.05, maximize=True), sign=-1)
    assert_same(high.train(9).state(), low.train(9).state())
    mixed = Run(
        Method(0.75, Pull(0.2, 4)),
        lambda params: torch.optim.SGD([{"params": list(params), "maximize": True}], lr=0.0),
    )
    before = [w.clone() for w in mixed.weights]
    mixed.train(1)
    for old, new, kept in zip(before, mixed.weights, mixed.optimizer.split().support, strict=True):
        torch.testing.assert_close(new[~kept], math.exp(-0.2) * old[~kept])


def test_the_sparsity_of_a_group_rises_with_the_method_unless_it_is_a_schedule() -> None:
    def grouped(given: Any) -> Any:
        def make(params: Any) -> torch.optim.Optimizer:
            first, *rest = params
            return torch.optim.SGD([{"params": [first], "sparsity": given}, {"params": rest}], lr=0)

        return make

    zeros = []
    for given in (schedules.cubic(0.5, 1, initial=0.5), 0.5, schedules.cubic(0.5, 10, every=1)):
        run = Run(UNTUNED, grouped(given)).train(1)
        zeros.append([int((~s).sum()) for s in run.optimizer.split().support])
        run.train(STEPS)
        assert [int((~s).sum()) for s in run.optimizer.split().support] == [64, 48]
    assert zeros[0][0] == 64
    assert 0 < zeros[1][0] < zeros[2][0] < 64  # over 10 steps it rises faster than with the method
    assert 0 < zeros[0][1] == zeros[1][1] == zeros[2][1] < 48
    # A method without a sparsity in between, such as 2:4, was made for a number of steps, too.
    run = Run(safe_core.safe("2:4", steps=STEPS), grouped(0.5)).train(1)
    assert int((~run.optimizer.split().support[0]).sum()) == zeros[1][0]


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_compiled_steps_are_the_eager_ones(base: str) -> None:
    eager, compiled = Run(UNTUNED, BASES[base]), Run(UNTUNED, BASES[base], compile=True)
    compiled.train(3)
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert programs > 0
    for got, want in zip(compiled.train(9).state(), eager.train(12).state(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs
