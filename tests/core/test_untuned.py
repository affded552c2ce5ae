"""`safe(sparsity, steps=T)` derives what is not given, and changes nothing that is."""

from __future__ import annotations

import inspect
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import safe_core
from safe_core import ADMM, ASAM, NM, SAM, Method, Pull, Unstructured, schedules, untuned
from safe_core.patterns import as_pattern

LENGTHS = [1, 2, 3, 5, 12, 139, 140, 141, 500, 4479, 4481, 10**6]
lengths = pytest.mark.parametrize("steps", LENGTHS)
MAKERS = {"safe": safe_core.safe, "admm": safe_core.admm}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def changed(method: Method, other: Method) -> set[str]:
    """The fields in which two methods differ."""
    fields = ("sparsity", "constraint", "perturbation", "importance", "evaluations")
    return {name for name in fields if getattr(method, name) != getattr(other, name)}


# The derivation


@makers
def test_a_numpy_integer_is_the_integer(make: Any) -> None:
    for options in ({}, {"dual_update_interval": np.int32(4)}):
        found = make(0.8, steps=np.int64(100), **options)
        wanted = make(0.8, steps=100, **{name: int(value) for name, value in options.items()})
        assert found == wanted
        assert repr(found) == repr(wanted)


@lengths
def test_a_run_has_enough_dual_updates_and_ends_at_the_full_sparsity(steps: int) -> None:
    method = safe_core.safe(0.95, steps=steps)
    interval, table = method.constraint.dual_update_interval, method.sparsity.schedule
    assert 1 <= interval <= untuned.LONGEST_INTERVAL
    assert steps // interval >= min(steps, untuned.UPDATES * 2 / 3)
    # The rise changes at dual updates only, and leaves updates at the full sparsity.
    assert table.every % interval == 0
    assert len(table.table) <= 102
    assert table(0) == 0
    assert table(table.steps) == 0.95
    assert table.steps <= max(math.ceil((untuned.rise(steps) + 0.1) * steps), interval)
    last = steps // interval * interval
    assert method.sparsity.stage(last) == method.sparsity.stage(None)


def test_the_sparsity_rises_over_a_smaller_part_of_longer_runs() -> None:
    assert untuned.rise(1) == untuned.rise(1200) == 0.5
    assert untuned.rise(4800) == 0.25
    assert untuned.rise(7500) == untuned.rise(10**6) == 0.2
    ends = [safe_core.safe(0.9, steps=n).sparsity.schedule.steps for n in (1200, 4800, 10**6)]
    assert ends == pytest.approx([600, 1200, 2 * 10**5], rel=0.05)


@lengths
def test_the_rates_sum_to_the_contraction(steps: int) -> None:
    penalty = safe_core.safe(0.95, steps=steps).constraint.penalty
    if steps > 10**5:
        every = steps // 1000
        total = every * sum(penalty(t) for t in range(0, steps, every))
    else:
        total = sum(penalty(t) for t in range(steps))
    # The first rate is 0, so a step is missing.
    assert total == pytest.approx(untuned.CONTRACTION * (1 - 1 / steps), rel=2e-3, abs=1e-9)
    rates = [penalty(round(part * steps)) for part in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == sorted(rates)


@lengths
def test_the_radius_warms_up_and_stays(steps: int) -> None:
    e = safe_core.safe(0.95, steps=steps).perturbation
    assert isinstance(e, SAM)
    assert e.in_steps
    assert e.full_step * steps == pytest.approx(untuned.TRAVEL)
    assert e.max_growth == untuned.MAX_GROWTH
    assert e.rho(0) == 0
    assert e.rho(max(math.ceil(untuned.WARM_UP * steps), 1)) == e.rho(steps) == untuned.RADIUS


@lengths
@makers
def test_a_method_is_a_value(make: Any, steps: int) -> None:
    method = make(0.95, steps=steps)
    assert method == make(0.95, steps=steps)
    assert hash(method) == hash(make(0.95, steps=steps))
    assert pickle.loads(pickle.dumps(method)) == method


@lengths
def test_admm_is_safe_without_the_perturbation(steps: int) -> None:
    one, two = safe_core.safe("2:4", steps=steps), safe_core.admm("2:4", steps=steps)
    assert changed(one, two) == {"perturbation"}
    assert two.perturbation is None
    assert not two.plan().perturbs


@pytest.mark.parametrize(
    ("sparsity", "rises"),
    [
        (0.8, True),
        (0.0, False),
        ("2:4", False),
        (NM(1, 4), False),
        (safe_core.Block((2, 2), 0.5), True),
        (safe_core.Channel(0.5), True),
        (Unstructured(0.8, scope="tensor", distribution="erdos_renyi_kernel"), True),
        ({"a": "2:4", "b": 0.5}, True),
        ({"a": "2:4", "b": 0.0}, False),
        (schedules.linear_sparsity(0.5, 10), None),
        (schedules.random_sparsity((0.5, 0.7)), None),
    ],
)
def test_a_constant_sparsity_rises(sparsity: Any, rises: bool | None) -> None:
    given = as_pattern(sparsity)
    found = safe_core.safe(sparsity, steps=100).sparsity
    if rises:
        assert found.changes
        assert type(found) is type(given)
        assert found.fractions()[-1] == given.fractions()[-1]
    else:
        assert found == given


# What is given

OVERRIDES: dict[str, tuple[dict[str, Any], set[str]]] = {
    # Dual updates are rarer under a penalty, and the sparsity rises at them.
    "penalty": ({"penalty": 0.3}, {"constraint", "sparsity"}),
    "penalty schedule": ({"penalty": schedules.cosine(0.1, 9)}, {"constraint", "sparsity"}),
    "penalty, interval": ({"penalty": 0.3, "dual_update_interval": 7}, {"constraint"}),
    "rho": ({"rho": 0.2}, {"perturbation"}),
    "rho schedule": ({"rho": schedules.linear(0.2, 9)}, {"perturbation"}),
    "adaptive": ({"rho": 0.2, "adaptive": True}, {"perturbation"}),
    "perturbation interval": ({"perturbation_interval": 2, "reuse": 0.5}, {"perturbation"}),
    "state": ({"state_dtype": "bfloat16"}, {"constraint"}),
    "importance": ({"importance": safe_core.SquaredGradient()}, {"importance"}),
    "projected gradient": ({"projected_gradient": True}, {"evaluations"}),
    "plain options": ({"relaxation": 1.0, "rescale_dual": False, "decoupled": False}, set()),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_is_given_changes_its_part_alone(name: str) -> None:
    options, wanted = OVERRIDES[name]
    method, plain = safe_core.safe(0.8, steps=1000, **options), safe_core.safe(0.8, steps=1000)
    assert changed(method, plain) == wanted
    if "penalty" in options:
        assert method.constraint == ADMM(options["penalty"], 7 if "interval" in name else 32)
    if "rho" in options:
        kind = ASAM if options.get("adaptive") else SAM
        assert method.perturbation == kind(options["rho"])  # in the unit of the parameters
    if "perturbation_interval" in options:
        assert method.perturbation == replace(plain.perturbation, interval=2, reuse=0.5)
    if "state_dtype" in options:
        held = plain.constraint
        assert method.constraint == Pull(held.penalty, held.dual_update_interval, "bfloat16")


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (20, 1), (380, 19), (640, 32), (9000, 32)])
def test_a_penalty_has_time_between_dual_updates(steps: int, every: int) -> None:
    method = safe_core.admm(0.8, steps=steps, penalty=0.1)
    assert method.constraint.dual_update_interval == every
    given = safe_core.admm(0.8, steps=max(steps, 3), penalty=0.1, dual_update_interval=3)
    assert given.constraint.dual_update_interval == 3


def test_an_interval_that_is_given_sets_the_stages_of_the_rise_and_nothing_else() -> None:
    plain = safe_core.safe(0.8, steps=1000)
    method = safe_core.safe(0.8, steps=1000, dual_update_interval=50)
    assert method.constraint == Pull(plain.constraint.penalty, 50)
    assert method.perturbation == plain.perturbation
    table, other = method.sparsity.schedule, plain.sparsity.schedule
    assert table.every == 50
    assert abs(table.steps - other.steps) <= 50


def test_all_numbers_together_leave_only_the_rise() -> None:
    given = {"rho": 0.1, "penalty": 1e-3, "dual_update_interval": 32}
    method = safe_core.safe(0.8, steps=1000, **given)
    assert changed(method, safe_core.safe(0.8, **given)) == {"sparsity"}
    table = schedules.cubic(0.8, steps=100)
    assert safe_core.safe(table, steps=1000, **given) == safe_core.safe(table, **given)


@pytest.mark.parametrize("sparsity", [0.8, "2:4", safe_core.Channel(0.5), {"a": 0.5}])
def test_without_steps_the_method_is_that_of_the_paper(sparsity: Any) -> None:
    pattern = as_pattern(sparsity)
    assert safe_core.safe(sparsity) == Method(pattern, ADMM(1e-3, 32), perturbation=SAM(0.1))
    assert safe_core.admm(sparsity) == Method(pattern, ADMM(1e-3, 32))
    options = {"relaxation": 1.5, "state_dtype": "bfloat16", "decoupled": True}
    assert safe_core.admm(sparsity, penalty=0.2, **options) == Method(
        pattern, ADMM(0.2, 32, **options)
    )
    assert safe_core.safe(sparsity, dual_update_interval=4, adaptive=True, rho=0.5) == Method(
        pattern, ADMM(1e-3, 4), perturbation=ASAM(0.5)
    )
    assert safe_core.safe(sparsity).plan() == Method(pattern, perturbation=SAM()).plan()


# Refusals


@makers
@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        (0, ValueError, "steps must be at least 1, got 0"),
        (-3, ValueError, "steps must be at least 1, got -3"),
        (True, TypeError, "steps must be an integer, got True"),
        (1.5, TypeError, "steps must be an integer, got 1.5"),
        ("100", TypeError, "steps must be an integer, got '100'"),
    ],
)
@pytest.mark.parametrize("given", [{}, {"penalty": 0.1, "dual_update_interval": 4}], ids=str)
def test_steps_must_be_a_positive_integer(
    make: Any, steps: Any, kind: Any, message: str, given: Any
) -> None:
    with pytest.raises(kind, match=message):
        make(0.5, steps=steps, **given)


def test_every_number_given_still_checks_the_steps() -> None:
    table = schedules.cubic(0.5, 4)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        safe_core.safe(table, steps=0, rho=0.1, penalty=0.1, dual_update_interval=4)


@makers
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": 1.5}, r"relaxation must be left out unless penalty is given.*got 1\.5"),
        ({"rescale_dual": True}, "rescale_dual must be left out unless penalty is given.*got True"),
        ({"decoupled": True}, "decoupled must be left out unless penalty is given.*got True"),
        ({"dual_update_interval": 0}, "dual_update_interval must be at least 1, got 0"),
        ({"penalty": -1.0}, "penalty must be a finite number of at least 0, got -1.0"),
    ],
)
def test_options_that_do_not_fit_are_named(make: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(0.5, steps=10, **options)


@makers
@pytest.mark.parametrize("by_name", [False, True])
def test_a_schedule_that_ends_after_the_run_is_refused(make: Any, by_name: bool) -> None:
    late = schedules.cubic(0.5, steps=8, start=3)
    text = (
        "schedule of sparsity must end by step 10, the end of the run, got one that ends at step 11"
    )
    with pytest.raises(ValueError, match=text):
        make({"a": late} if by_name else late, steps=10)
    assert make(late, steps=11).sparsity.schedule == late


@makers
@pytest.mark.parametrize("name", ["rescale_dual", "decoupled"])
def test_flags_are_flags_with_a_pull_too(make: Any, name: str) -> None:
    for value in (0, None, "no"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            make(0.5, steps=10, **{name: value})
    with pytest.raises(TypeError, match="relaxation must be a Python number, got True"):
        make(0.5, steps=10, relaxation=True)


def test_an_adaptive_perturbation_needs_its_radius() -> None:
    with pytest.raises(ValueError, match="rho must be given with adaptive=True, got None"):
        safe_core.safe(0.5, steps=10, adaptive=True)
    with pytest.raises(TypeError, match="adaptive must be True or False, got 1"):
        safe_core.safe(0.5, steps=10, adaptive=1)  # type: ignore[arg-type]


@makers
def test_the_defaults_are_documented(make: Any) -> None:
    parameters = inspect.signature(make).parameters
    given = ("steps", "penalty", "dual_update_interval")
    assert all(parameters[name].default is None for name in given)
    assert "steps" in (make.__doc__ or "")


def test_the_docstring_quotes_the_constants() -> None:
    text = " ".join((safe_core.safe.__doc__ or "").split())
    for number in (
        f"T / {untuned.UPDATES}",
        f"at most {untuned.LONGEST_INTERVAL}",
        f"{untuned.CONTRACTION:g} / T * (1 - cos(pi t / T))",
        f"sqrt({untuned.RISE**2 * untuned.RISE_STEPS:g} T) steps of more than {untuned.RISE_STEPS}",
        f"up to {untuned.RADIUS:g} mean steps of the base optimizer",
        f"min(1, (T l / ({untuned.TRAVEL:g} |x|))^2)",
        f"over {untuned.MAX_GROWTH:g} times that at x",
    ):
        assert number in text, number
