"""The radius of a perturbation in steps of the base optimizer, which are measured."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pulled_runs import BASES, FIXED, STEPS, UNTUNED, Run, assert_same, first_step, size
from torch import Tensor

import safe_core
from safe_core import SAM, Method, Pull, schedules
from safe_core.motion import MEASURE_INTERVAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_e_is_as_long_as_rho_steps(dtype: torch.dtype) -> None:
    run = Run(FIXED, dtype=dtype)
    unit = first_step(run)
    assert size(run.perturbation()) == 0  # no step was measured yet
    run.train(1)
    assert size(run.perturbation()) == pytest.approx(0.5 * unit, rel=1e-4)
    run.train(MEASURE_INTERVAL - 1)
    assert size(run.perturbation()) == pytest.approx(0.5 * unit, rel=1e-4)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.train(1)
    assert size(run.perturbation()) == pytest.approx(0.5 * unit / math.sqrt(2), rel=1e-4)


def test_weights_that_do_not_move_give_no_e() -> None:
    run = Run(FIXED, lambda params: torch.optim.SGD(params, lr=0.0)).train(3)
    assert all(not moved.any() for moved in run.perturbation())


def test_frozen_sparse_weights_are_no_part_of_the_unit() -> None:
    run = Run(FIXED)
    run.closure()
    length = 0.1 * size([run.model[2].weight.grad.clone()])
    run.optimizer.zero_grad()
    run.train(1)
    run.model[0].weight.requires_grad_(False)
    assert size(run.perturbation()) == pytest.approx(0.5 * length, rel=1e-4)
    run.model[2].weight.requires_grad_(False)  # biases are left
    assert size(run.perturbation()) == 0


def test_a_state_without_the_length_of_steps_is_refused() -> None:
    run = Run(UNTUNED).train(2)
    state = run.optimizer.state_dict()
    del state["state"][0]["safe_motion"]
    with pytest.raises(
        ValueError, match=r"must hold three numbers as safe_motion for 0\.weight, got n"
    ):
        run.optimizer.load_state_dict(state)
    state["state"][0]["safe_motion"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"safe_motion for 0\.weight, got shape \(2,\)"):
        run.optimizer.load_state_dict(state)
    other = Run(safe_core.admm(0.75, steps=STEPS))
    state = run.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["safe_method"]
    with pytest.raises(ValueError, match=r"must hold no safe_motion for 0\.weight, got shape"):
        other.optimizer.load_state_dict(state)


@pytest.mark.every_second
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("constraint", "base", "compiled"),
    [
        (Pull(0.2, 4), "sgd", False),
        (Pull(0.2, 4), "adam", False),
        (Pull(0.2, 4), "sgd", True),
        (safe_core.ADMM(0.3, 4), "adam", False),
        pytest.param(safe_core.ADMM(0.3, 4), "adam", True, marks=pytest.mark.long),
        (safe_core.ADMM(0.3, 4, decoupled=True), "sgd", False),
        (safe_core.HardThreshold(4), "sgd", False),
        (safe_core.AtEnd(), "adam", False),
        (safe_core.Mask(), "sgd", False),
        (Pull(0.3, 4), "sgd with C(x)", False),
    ],
)
def test_the_steps_of_the_base_are_measured_alone(
    constraint: Any, base: str, compiled: bool
) -> None:
    sparsity = schedules.linear_sparsity(0.75, 2) if constraint == safe_core.Mask() else 0.75
    base, _, projected = base.partition(" with ")
    points = safe_core.safe(0.5, projected_gradient=bool(projected)).evaluations
    method = Method(sparsity, constraint, perturbation=SAM(0.5, in_steps=True), evaluations=points)
    run = Run(method, BASES[base], compile=compiled)
    before: list[Tensor] = []
    squares: list[float] = []
    sizes: list[float] = []

    def start(*_: Any) -> None:  # where the base starts: at x, not at x + e
        before[:] = [w.clone() for w in run.weights]
        sizes.append(size(before) ** 2)

    def end(*_: Any) -> None:
        moves = [w - old for w, old in zip(run.weights, before, strict=True)]
        squares.append(size(moves) ** 2)

    for t in range(2 * MEASURE_INTERVAL + 1):
        weights = [w.clone() for w in run.weights]
        hooks = [
            run.optimizer.base.register_step_pre_hook(start),
            run.optimizer.base.register_step_post_hook(end),
        ]
        if t % MEASURE_INTERVAL:
            for hook in hooks:
                hook.remove()
        run.train(1)
        for hook in hooks:
            hook.remove()
        if t % MEASURE_INTERVAL == 0 and not compiled:
            assert_same(before, weights)
    assert len(squares) == 3
    found = run.optimizer._run.motion()
    assert found is not None
    assert found.tolist() == pytest.approx([sum(squares) / 3, sum(sizes) / 3, 0], rel=1e-4)


SHRINKING = Method(0.75, Pull(0.2, 4), perturbation=SAM(50.0, in_steps=True, max_growth=1.1))


def shrinkages(run: Run) -> list[float]:
    return [float(held["motion"][2]) for held in run.optimizer._run.state.values()]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_the_growth_is_that_of_the_gradients_before_they_are_clipped(
    clip: bool, scale: float
) -> None:
    run, wanted, b = Run(SHRINKING, dtype=torch.float64), [], 0.0
    for _ in range(6):
        params = list(run.model.parameters())
        norms = []
        run.optimizer.zero_grad()
        (scale * run.loss()).backward()
        norms.append(size([p.grad for p in params if p.grad is not None]))
        with run.optimizer.perturbed(loss_scale=scale):
            (scale * run.loss()).backward()
            norms.append(size([p.grad for p in params if p.grad is not None]))
        for p in params:
            assert p.grad is not None
            p.grad /= scale
        if clip:
            torch.nn.utils.clip_grad_norm_(params, 0.1)
        assert shrinkages(run) == [b, b]  # a step that is skipped changes nothing
        run.optimizer.step()
        b = b + 1 / 4 if norms[1] > 1.1 * norms[0] else max(b - 1 / 50, 0)
        wanted.append(b)
        assert shrinkages(run) == pytest.approx([b, b])
    assert wanted[0] == 0  # no step was measured yet, so there was no e
    assert wanted[-1] > 0.25


def test_a_step_that_does_not_perturb_keeps_the_shrinkage() -> None:
    e = SAM(50.0, in_steps=True, max_growth=1.1, interval=2)
    run = Run(Method(0.75, Pull(0.2, 4), perturbation=e))
    seen = [shrinkages(run.train(1))[0] for _ in range(8)]
    assert seen[1::2] == seen[0::2]
    assert seen[-1] > 0


def test_a_parameter_that_joins_late_takes_the_shrinkage_of_the_others() -> None:
    run = Run(SHRINKING)
    run.model[0].weight.requires_grad_(False)
    run.train(4)
    run.model[0].weight.requires_grad_(True)
    held = max(shrinkages(run))
    assert held > 0
    run.train(1)
    first, second = shrinkages(run)
    assert first == second
    assert abs(first - held) == pytest.approx(1 / 4) or abs(first - held) == pytest.approx(1 / 50)


def test_the_shrinkage_is_saved() -> None:
    run, other = Run(SHRINKING).train(6), Run(SHRINKING)
    assert shrinkages(run)[0] > 0
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert shrinkages(other) == shrinkages(run)
    assert_same(other.train(3).state(), run.train(3).state())
