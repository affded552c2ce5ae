"""Advice names the cause that the figures of a run point to, and is silent otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest

import safe_core
from safe_core import Method, Pull, Unstructured, schedules
from safe_core.advice import Course, Figures, advise
from safe_core.patterns import ByName
from safe_core.report import Report, TensorReport

STEPS = 1000
NEAR = {"distance": 0.01, "off_support": 0.01, "replaced": 0.01}
FAR = {"distance": 0.6, "off_support": 0.7, "replaced": 0.9}


def course(method: Method, steps: int | None = None, **options: Any) -> Course:
    return Course(
        method.constraint, (method.sparsity,), method.constraint.penalty, steps, **options
    )


def causes(
    method: Method, step: int, figures: Any, steps: int | None = None, **options: Any
) -> Any:
    found = Figures(step, **{**NEAR, **figures})
    return [item.cause for item in advise(found, course(method, steps, **options))]


def text(method: Method, step: int, figures: Any, steps: int | None = None) -> str:
    (item,) = advise(Figures(step, **{**NEAR, **figures}), course(method, steps))
    return item.text


UNTUNED = safe_core.safe(0.9, steps=STEPS)
CONSTANT = safe_core.safe(0.9, penalty=1e-3)
COSINE = safe_core.safe(0.9, penalty=schedules.cosine(0.1, STEPS))
MASKED = safe_core.gmp(schedules.cubic(0.9, steps=500, every=10))
ONCE = safe_core.magnitude(0.9)


@pytest.mark.parametrize("method", [UNTUNED, CONSTANT, COSINE, MASKED, ONCE])
@pytest.mark.parametrize("step", [0, 1, 100, 500, 900, 1000])
def test_a_run_near_the_constraint_is_on_course(method: Method, step: int) -> None:
    assert causes(method, step, {}) == []
    assert causes(method, step, {}, steps=STEPS) == []


@pytest.mark.parametrize("method", [UNTUNED, CONSTANT, COSINE, ONCE])
def test_it_is_too_early_to_tell_in_the_first_steps(method: Method) -> None:
    assert causes(method, 0, {**FAR, "emptied": ["a"]}, steps=STEPS) == []
    assert causes(method, 100, {**FAR, "emptied": ["a"]}, steps=STEPS) == []


def test_a_constant_penalty_is_judged_by_where_it_would_end() -> None:
    # From 1 to d in half of the steps, so to d^2 at the end.
    assert causes(CONSTANT, 500, {"distance": 0.3, "off_support": 0.4}, STEPS) == []
    assert causes(CONSTANT, 500, {"distance": 0.33, "off_support": 0.4}, STEPS) == ["penalty"]
    found = text(CONSTANT, 500, {"distance": 0.5, "off_support": 0.6}, STEPS)
    assert "is 0.5 of" in found
    assert "end at 0.25" in found
    assert "raise the penalty" in found


def test_a_schedule_is_judged_by_the_part_of_its_sum() -> None:
    # A cosine has applied 1/2 - 1/pi = 0.18 of its sum at half of the run: too early.
    assert causes(COSINE, 500, FAR) == []
    assert causes(COSINE, 750, FAR) == ["penalty"]
    share = course(COSINE).share(750)
    assert share == pytest.approx(0.75 - math.sin(0.75 * math.pi) / math.pi, abs=1e-3)
    assert causes(COSINE, 750, {**FAR, "distance": 0.1**share - 0.01}) == []


def test_a_rising_sparsity_is_judged_at_the_sparsity_of_the_step() -> None:
    # The final sparsity is far, but the weights off the mask of this step are small.
    assert causes(UNTUNED, 600, {"distance": 0.6}) == []
    assert causes(UNTUNED, 600, FAR) == ["penalty"]
    assert "rate of the pull" in text(UNTUNED, 600, FAR)


def test_a_penalty_of_zero_is_too_small() -> None:
    assert causes(safe_core.admm(0.9, penalty=0.0), 500, FAR, STEPS) == ["penalty"]


def test_a_penalty_in_an_array_is_judged_as_constant() -> None:
    unread = Course(CONSTANT.constraint, (CONSTANT.sparsity,), None, STEPS)
    assert [item.cause for item in advise(Figures(500, 0.6, 0.7, 0.9), unread)] == ["penalty"]


def test_a_constant_penalty_without_steps_is_not_judged() -> None:
    assert causes(CONSTANT, 500, FAR) == ["unknown"]
    assert "steps=" in text(CONSTANT, 500, FAR)


def test_a_method_without_a_penalty_is_judged_at_the_end() -> None:
    hard = safe_core.iht(0.9, interval=32)
    assert causes(hard, 500, FAR, STEPS) == []
    assert causes(hard, 950, FAR, STEPS) == ["penalty"]
    assert "shorter intervals" in text(hard, 950, FAR, STEPS)
    assert causes(hard, 950, FAR) == []  # of unknown length
    assert causes(ONCE, 1000, FAR, STEPS) == []  # it is pruned at the end


def test_a_run_shorter_than_its_schedules_says_so_and_nothing_that_follows() -> None:
    assert causes(UNTUNED, 200, {}, steps=250) == ["length"]
    assert causes(UNTUNED, 250, FAR, steps=250, narrow=("a",)) == ["length"]
    found = text(UNTUNED, 250, FAR, steps=250)
    assert "the run takes 250 steps, and the method was made for 1000 (give the method" in found
    assert causes(COSINE, 200, {}, steps=250) == ["length", "interval"]
    assert causes(MASKED, 100, {}, steps=250) == ["length"]
    assert causes(MASKED, 100, {}, steps=500) == []


@pytest.mark.parametrize(
    ("steps", "said"), [(950, False), (800, True), (1050, False), (1200, True)]
)
def test_other_lengths_than_planned_are_named_with_both_numbers(steps: int, said: bool) -> None:
    assert causes(UNTUNED, 500, {}, steps=steps) == ["length"] * said
    if said:
        assert str(steps) in text(UNTUNED, 500, {}, steps)
        assert "1000" in text(UNTUNED, 500, {}, steps)


def test_a_run_that_goes_on_longer_than_planned_is_found() -> None:
    assert causes(UNTUNED, 1099, {}) == []
    assert causes(UNTUNED, 1101, {}) == ["length"]
    # A warm-up of the penalty is shorter than the run on purpose.
    warm_up = safe_core.safe(0.9, penalty=schedules.linear(0.1, 100), dual_update_interval=5)
    assert causes(warm_up, 1101, {}) == []


def test_few_dual_updates_are_named_with_their_number() -> None:
    rare = safe_core.safe(0.9, steps=STEPS, dual_update_interval=67)
    assert causes(rare, 100, {}) == ["interval"]
    assert "14 dual updates in 1000 steps" in text(rare, 100, {})
    assert causes(safe_core.safe(0.9, steps=STEPS, dual_update_interval=66), 100, {}) == []


def test_a_run_of_few_steps_is_named() -> None:
    """The dual updates cannot be more frequent than every step."""
    for steps, said in ((139, True), (140, False), (200, False)):
        method = safe_core.safe(0.9, steps=steps)
        assert causes(method, 50, {}, steps=steps) == ["interval"] * said
    assert "the run has 139 steps, and a network" in text(
        safe_core.safe(0.9, steps=139), 50, {}, 139
    )
    # A run that has gone on is not short; nor is one whose updates come every step by choice.
    assert causes(safe_core.safe(0.9, steps=100), 150, {}) == ["length"]
    chosen = safe_core.safe(0.9, penalty=0.1, dual_update_interval=1)
    assert causes(chosen, 50, {"distance": 0.01}, steps=100) == []


def test_a_mask_that_still_changes_at_the_end_is_named() -> None:
    assert causes(COSINE, 899, {"replaced": 0.3}) == []
    assert causes(COSINE, 900, {"replaced": 0.3}) == ["mask"]
    assert "30% of the kept" in text(COSINE, 900, {"replaced": 0.3})
    assert causes(COSINE, 900, {"replaced": 0.2}) == []
    drawn = safe_core.safe(
        schedules.random_sparsity((0.8, 0.9)), penalty=schedules.cosine(0.1, STEPS)
    )
    assert causes(drawn, 900, {"replaced": 0.3}) == []  # every update draws a sparsity
    named = safe_core.safe(
        ByName({"a": Unstructured(0.9), "b": Unstructured(schedules.random_sparsity((0.8, 0.9)))}),
        penalty=schedules.cosine(0.1, STEPS),
    )
    assert causes(named, 900, {"replaced": 0.3}) == []
    assert causes(ONCE, 900, {"replaced": 0.3}, STEPS) == []  # its mask acts at the end only


def test_16_bits_are_named_where_the_distance_stays_large() -> None:
    assert causes(COSINE, 900, FAR, narrow=("a", "b")) == ["penalty", "rounding"]
    assert causes(COSINE, 900, {}, narrow=("a", "b")) == []


def test_an_emptied_parameter_is_named_from_half_of_the_run() -> None:
    assert causes(COSINE, 499, {"emptied": ["layer.weight"]}) == []
    assert causes(COSINE, 500, {"emptied": ["layer.weight"]}) == ["tensor"]
    found = text(COSINE, 500, {"emptied": ["layer.weight"]})
    assert "layer.weight" in found
    assert 'scope="tensor"' in found
    assert "floor=0.25" in found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_is_named_and_nothing_else(value: float) -> None:
    assert causes(COSINE, 900, {**FAR, "distance": value}, narrow=("a",)) == ["diverged"]


def test_patterns_by_name_are_read() -> None:
    pattern = ByName({"a": Unstructured(0.9), "b": schedules.cubic(0.9, steps=500, every=50)})
    method = Method(pattern, Pull(schedules.cosine(0.4, STEPS), 8))
    assert causes(method, 100, {}, steps=920) == []
    assert causes(method, 100, {}, steps=400) == ["length"]


# Reports


def row(name: str, *, entries: int = 8, achieved: float = 0.5, **figures: float) -> TensorReport:
    found = {**dict.fromkeys(TensorReport._fields[4:], 0.0), **figures}
    return TensorReport(name, entries, 0.5, achieved, **found)


def test_totals_are_those_of_the_concatenated_parameters() -> None:
    report = Report(
        3,
        [
            row("a", distance=3.0, norm=5.0, off_support=4.0, mask_change=0.5, masked=0.25),
            row("b", distance=4.0, norm=12.0, entries=24, achieved=0.9, masked=0.75),
        ],
    )
    assert report.relative_distance == pytest.approx(5 / 13)
    assert report.relative_off_support == pytest.approx(4 / 13)
    assert report.replaced == pytest.approx(4 / 2 / (6 + 6))
    scalars = report.scalars()
    assert scalars["relative_distance"] == report.relative_distance
    assert (scalars["replaced"], scalars["norm/b"]) == (report.replaced, 12.0)
    assert "dense_value" not in scalars
    assert report._replace(dense_value=0.5, sparse_value=0.25).scalars()["sparse_value"] == 0.25


def test_a_report_of_nothing_or_of_zeros_has_ratios() -> None:
    for rows in ([], [row("a", achieved=1.0)]):
        report = Report(0, rows)
        assert (report.relative_distance, report.replaced) == (0, 0)


def test_the_text_holds_the_figures_and_the_advice() -> None:
    rows = [row("a", distance=3.0, norm=5.0, off_support=4.0, achieved=1.0)]
    lines = Report(500, rows, 0.98, 0.52, course(COSINE)).summary().splitlines()
    assert lines[0].startswith("step 500 of 1000: distance 0.6 of |x|, 0.8 off the mask")
    assert "0.98 at x, 0.52 at proj(x)" in lines[0]
    assert lines[1].startswith("tensor: ")
    assert "zero in a (" in lines[1]
    near = Report(500, [row("a", distance=0.1, norm=5.0)], course=course(COSINE))
    assert (near.advice, near.summary().splitlines()[1]) == ([], "on course to the constraint")
    assert Report(500, rows).advice == []  # nothing is known of the run
