"""The radius of a perturbation in steps of the base optimizer, which are measured."""

from __future__ import annotations

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
        ValueError, match=r"must hold two numbers as safe_motion for 0\.weight, got n"
    ):
        run.optimizer.load_state_dict(state)
    state["state"][0]["safe_motion"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"safe_motion for 0\.weight, got shape \(3,\)"):
        run.optimizer.load_state_dict(state)
    other = Run(safe_core.admm(0.75, steps=STEPS))
    state = run.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["safe_method"]
    with pytest.raises(ValueError, match=r"must hold no safe_motion for 0\.weight, got shape"):
        other.optimizer.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("constraint", "base", "compiled"),
    [
        (Pull(0.2, 4), "sgd", False),
        (Pull(0.2, 4), "adam", False),
        (Pull(0.2, 4), "sgd", True),
        (safe_core.ADMM(0.3, 4), "adam", False),
        (safe_core.ADMM(0.3, 4), "adam", True),
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
    assert found.tolist() == pytest.approx([sum(squares) / 3, sum(sizes) / 3], rel=1e-4)
