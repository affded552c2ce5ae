"""The plan of every named method, and that both walkers execute every operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import safe_core
from safe_core import ArrayInfo, Method, Operation, Point, schedules
from safe_core.adapters.torch import step as torch_step
from safe_core.functional import FunctionalStep, start

RISING = schedules.cubic(0.5, steps=4)

# Evaluations with "+" are added; of the operations all but what every method has.
PLANS: dict[str, tuple[Method, list[str], list[str]]] = {
    "safe": (safe_core.safe(0.5), ["x", "x + e"], ["ADD_PENALTY", "BASE_STEP"]),
    "safe sg": (
        safe_core.safe(0.5, projected_gradient=True),
        ["x", "x + e", "+C(x)"],
        ["ADD_PENALTY", "BASE_STEP"],
    ),
    "safe rho 0": (safe_core.safe(0.5, rho=0), ["x"], ["ADD_PENALTY", "BASE_STEP"]),
    "admm": (safe_core.admm(0.5), ["x"], ["ADD_PENALTY", "BASE_STEP"]),
    "decoupled": (
        safe_core.admm(0.5, decoupled=True),
        ["x"],
        ["MEASURE_PULL", "BASE_STEP", "APPLY_PULL"],
    ),
    "pull": (Method(0.5, safe_core.Pull()), ["x"], ["BASE_STEP", "PULL"]),
    "safe untuned": (
        safe_core.safe(0.5, steps=9),
        ["x", "x + e"],
        ["BASE_STEP", "MEASURE_STEP", "PULL"],
    ),
    "rescaled": (
        safe_core.admm(0.5, penalty=schedules.linear(1.0, 5, 0.1), rescale_dual=True),
        ["x"],
        ["RESCALE_DUAL", "ADD_PENALTY", "BASE_STEP"],
    ),
    "magnitude": (safe_core.magnitude(0.5), ["x"], ["BASE_STEP"]),
    "iht": (safe_core.iht(0.5), ["x"], ["BASE_STEP", "PROJECT_PARAMETERS"]),
    "gmp": (
        safe_core.gmp(RISING),
        ["x"],
        ["BASE_STEP", "MASK_PARAMETERS", "PROJECT_PARAMETERS"],
    ),
    "imp": (
        safe_core.imp_sam(RISING),
        ["x", "x + e"],
        ["BASE_STEP", "MASK_PARAMETERS", "PROJECT_PARAMETERS"],
    ),
    "adasap": (
        safe_core.adasap(0.5, steps=90),
        ["x", "x + e"],
        ["BASE_STEP", "MASK_PARAMETERS", "PROJECT_PARAMETERS"],
    ),
    "cram": (safe_core.cram(0.5), ["x", "C(x + e)"], ["BASE_STEP"]),
    "cram+": (safe_core.cram(0.5, plus=True), ["x", "+C(x + e)"], ["BASE_STEP"]),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_of_a_method_is_data(name: str) -> None:
    method, points, operations = PLANS[name]
    plan = method.plan()
    shown = ["+" * (e.combine == "add") + e.point for e in plan.evaluations]
    assert shown == points
    common = {Operation.OBSERVE_GRADIENTS, Operation.UPDATE_STATE}
    assert common < set(plan.operations)
    assert [o.name for o in plan.operations if o not in common] == operations
    assert plan.masks_gradients == (name in ("gmp", "imp", "adasap"))


def test_the_base_step_comes_between_what_reads_gradients_and_what_reads_parameters() -> None:
    for method, _, _ in PLANS.values():
        order = method.plan().operations
        base = order.index(Operation.BASE_STEP)
        update = order.index(Operation.UPDATE_STATE)
        assert order.index(Operation.OBSERVE_GRADIENTS) < base < update
        # x is projected onto the new support, and masked by the old one before.
        if Operation.PROJECT_PARAMETERS in order:
            assert update < order.index(Operation.PROJECT_PARAMETERS)
        if Operation.MASK_PARAMETERS in order:
            assert base < order.index(Operation.MASK_PARAMETERS) < update


@pytest.mark.parametrize("walker", [FunctionalStep, torch_step._Step], ids=["functional", "torch"])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.name)
def test_every_walker_has_every_operation(walker: Any, operation: Operation) -> None:
    names = (operation.name.lower(), f"_{operation.name.lower()}")
    assert any(callable(getattr(walker, name, None)) for name in names)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_knows_whether_a_penalty_acts_beside_the_base(name: str) -> None:
    plan = PLANS[name][0].plan()
    assert plan.moves_after_base == (name in ("decoupled", "pull", "safe untuned"))
    assert plan.needs_learning_rate == (name == "decoupled")
    assert not plan.frozen().moves_after_base


def test_a_frozen_plan_trains_under_the_final_mask() -> None:
    plan = safe_core.cram(0.5, plus=True).plan().frozen()
    assert [e.point for e in plan.evaluations] == [Point.X, Point.PERTURBED]
    assert [o.name for o in plan.operations] == ["BASE_STEP", "MASK_PARAMETERS"]
    assert plan.masks_gradients
    assert safe_core.safe(0.5, projected_gradient=True).plan().frozen().projected is None


def test_a_zero_radius_leaves_out_the_perturbed_point_unless_it_is_projected() -> None:
    assert not safe_core.safe(0.5).plan(has_radius=False).perturbs
    assert safe_core.cram(0.5).plan(has_radius=False).perturbs


def one_step(
    method: Method, sparse: tuple[int, ...] = (0,), names: tuple[str, ...] = ("x",), given: int = 2
) -> None:
    """Take a step of two parameters, of which some are sparse."""
    params, info = [np.ones(4), np.ones(2)], ArrayInfo(names, (None,) * len(names))
    state = start(method, params, [0], ArrayInfo(("x",), (None,)))
    step = FunctionalStep(method, params, sparse, info, 0, lambda x: x, lambda g: g)
    step.run([np.ones(4), np.ones(2)][:given], state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_step(safe_core.admm(0.5, decoupled=True)), "learning_rate must be given"),
        (lambda: one_step(safe_core.admm(0.5), sparse=(2,)), r"sparse must hold .*, got \[2\]"),
        (lambda: one_step(safe_core.admm(0.5), names=("x", "y")), "info must name 1 sparse"),
        (lambda: one_step(safe_core.admm(0.5), given=1), "gradients must hold one .* 2, got 1"),
        (
            lambda: start(safe_core.admm(0.5), [np.ones(2)], [1], ArrayInfo(("x",), (None,))),
            r"sparse must hold positions among 1 parameters, got \[1\]",
        ),
    ],
    ids=["rate", "position", "name", "gradient", "start"],
)
def test_a_loop_of_ones_own_gets_errors_with_names(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
