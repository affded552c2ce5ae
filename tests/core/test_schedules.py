"""Schedules are their formulas, at integers and at traced steps, and hold past their end."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from array_backends import Backend
from hypothesis import given
from hypothesis import strategies as st

from safe_core import Unstructured
from safe_core.projection import select
from safe_core.schedules import (
    constant,
    cosine,
    cubic,
    exponential_sparsity,
    linear,
    linear_sparsity,
)

VALUES = st.floats(-10, 10)
STEPS = st.integers(1, 1000)


@given(value=VALUES, step=st.integers(0, 10**9))
def test_constant_is_its_value(value: float, step: int) -> None:
    assert constant(value)(step) == value


@given(value=VALUES, initial=VALUES, steps=STEPS, step=st.integers(0, 2000))
def test_linear_is_a_straight_line_that_holds(
    value: float, initial: float, steps: int, step: int
) -> None:
    progress = min(step / steps, 1)
    wanted = (1 - progress) * initial + progress * value
    assert linear(value, steps, initial)(step) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@given(value=VALUES, initial=VALUES, steps=STEPS, step=st.integers(0, 2000))
def test_cosine_is_half_a_wave_that_holds(
    value: float, initial: float, steps: int, step: int
) -> None:
    rise = (1 - math.cos(math.pi * min(step / steps, 1))) / 2
    wanted = initial + (value - initial) * rise
    assert cosine(value, steps, initial)(step) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("make", [linear, cosine])
def test_ramps_start_at_zero_and_end_at_their_value(make: Any) -> None:
    schedule = make(1e-3, 100)
    assert [schedule(0), schedule(100), schedule(10**6)] == [0, 1e-3, 1e-3]
    assert 0 < schedule(1) < schedule(2) < schedule(99) < 1e-3


@given(value=VALUES, initial=VALUES, steps=STEPS, past=st.integers(0, 1000))
def test_ramps_end_at_exactly_their_value(
    value: float, initial: float, steps: int, past: int
) -> None:
    for make in (linear, cosine):
        schedule = make(value, steps, initial)
        assert schedule(steps + past) == value
        assert schedule(0) == initial


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize(("value", "initial"), [(0.1, 0.7), (0.0, 0.3), (1e-3, 0.123), (0.3, 1e6)])
def test_traced_ramps_end_at_exactly_their_value(
    xp: Backend, make: Any, value: float, initial: float
) -> None:
    for steps in (3, 7, 37):
        schedule = make(value, steps, initial)
        for step in (steps, steps + 1, 10**6):
            got = xp.to_numpy(xp.call(schedule, xp.asarray(np.asarray(step))))
            assert got == np.asarray(value, got.dtype)


@pytest.mark.parametrize("make", [cubic, linear_sparsity, exponential_sparsity])
@given(value=st.integers(0, 99), initial=st.integers(0, 99), steps=STEPS)
def test_tables_end_at_exactly_their_value(make: Any, value: int, initial: int, steps: int) -> None:
    schedule = make(value / 100, steps, initial / 100)
    assert schedule(steps) == schedule(10**9) == value / 100
    assert schedule.table[-1] == Fraction(value, 100)
    assert schedule.table[0] == Fraction(initial, 100)


@pytest.mark.parametrize(
    "schedule", [constant(0.3), linear(1e-3, 40, 0.1), cosine(1e-3, 40)], ids=str
)
def test_an_integer_array_gives_what_an_integer_gives(xp: Backend, schedule: Any) -> None:
    for step in (0, 1, 13, 39, 40, 41, 1000):
        got = xp.call(schedule, xp.asarray(np.asarray(step)))
        # torch and a compiled float32 program have the precision of float32.
        assert float(got) == pytest.approx(schedule(step), rel=1e-5)


def test_an_array_of_steps_gives_an_array_of_values(xp: Backend) -> None:
    steps = np.arange(50)
    got = xp.run(cosine(1.0, 40, initial=0.25), steps)
    wanted = [cosine(1.0, 40, initial=0.25)(step) for step in range(50)]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@given(
    value=st.decimals("0", "0.999", places=3).map(float),
    initial=st.decimals("0", "0.999", places=3).map(float),
    stages=st.integers(1, 20),
    every=st.integers(1, 9),
    start=st.integers(0, 30),
    step=st.integers(0, 250),
)
def test_cubic_is_the_formula_of_zhu_and_gupta_in_exact_fractions(
    value: float, initial: float, stages: int, every: int, start: int, step: int
) -> None:
    schedule = cubic(value, stages * every, initial, start, every)
    final, first = Fraction(str(value)), Fraction(str(initial))
    progress = Fraction(min(max((step - start) // every, 0), stages), stages)
    wanted = final + (first - final) * (1 - progress) ** 3
    assert schedule.table[schedule.stage(step)] == wanted
    assert schedule(step) == float(wanted)
    assert len(schedule.table) == stages + 1


def test_cubic_stages_of_an_integer_array(xp: Backend) -> None:
    schedule = cubic(0.9, steps=12, start=5, every=3)

    def stage(step: Any) -> Any:
        return schedule.stage(step)

    got = [int(xp.call(stage, xp.asarray(np.asarray(step)))) for step in range(30)]
    assert got == [0] * 8 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 13


@given(steps=st.integers(1, 5000))
def test_cubic_takes_the_finest_table_of_at_most_100_stages(steps: int) -> None:
    every = cubic(0.5, steps).every
    allowed = [k for k in range(1, steps + 1) if steps % k == 0 and steps // k <= 100]
    assert every == min(allowed)


def test_exponential_sparsity_removes_the_same_fraction_of_what_is_left() -> None:
    schedule = exponential_sparsity(0.9, steps=40, initial=0.2, start=5, every=4)
    kept = [1 - s for s in schedule.table]
    assert (kept[0], kept[-1], len(kept)) == (Fraction(4, 5), Fraction(1, 10), 11)
    for stage, k in enumerate(kept):
        assert float(k) == pytest.approx(0.8 ** (1 - stage / 10) * 0.1 ** (stage / 10), rel=1e-14)
    assert [schedule.stage(t) for t in (0, 8, 9, 44, 45, 99)] == [0, 0, 1, 9, 10, 10]


@pytest.mark.parametrize(
    ("value", "stages", "table"),
    [
        (0.75, 2, ["0", "1/2", "3/4"]),
        (Fraction(26, 27), 3, ["0", "2/3", "8/9", "26/27"]),
        (0.0, 2, ["0", "0", "0"]),
    ],
)
def test_exponential_sparsity_is_exact_where_it_is_rational(
    value: Any, stages: int, table: list[str]
) -> None:
    found = exponential_sparsity(value, stages, every=1).table
    assert list(found) == [Fraction(entry) for entry in table]


def test_bounds_hold_every_value() -> None:
    for schedule in (constant(0.5), linear(0.1, 10, 0.7), cosine(0.1, 10, 0.7)):
        low, high = schedule.bounds
        values = [schedule(step) for step in range(20)]
        assert (min(values), max(values)) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("schedule", "has_zero"),
    [
        (constant(0), True),
        (constant(1e-3), False),
        (linear(1e-3, 4), False),  # zero at step 0 only
        (linear(0, 4, initial=1e-3), True),
        (cosine(1e-3, 4), False),
        (cosine(1.0, 2, initial=-1.0), True),
    ],
    ids=str,
)
def test_a_zero_after_the_start_is_known(schedule: Any, has_zero: bool) -> None:
    assert schedule.has_zero_after_start is has_zero
    assert has_zero or all(schedule(step) != 0 for step in range(1, 10))


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(0.1),
        lambda: linear(0.1, 3),
        lambda: cosine(0.1, 3),
        lambda: cubic(0.1, 3),
    ],
)
def test_schedules_are_values(make: Any) -> None:
    schedule = make()
    schedule(1)  # fills the table of a cubic
    for other in (make(), pickle.loads(pickle.dumps(schedule))):
        assert schedule == other
        assert hash(schedule) == hash(other)
    with pytest.raises(AttributeError):
        schedule.value = 1.0
    assert len({linear(0.1, 3), cosine(0.1, 3), constant(0.1), cubic(0.1, 3)}) == 4


@dataclass(frozen=True)
class Course(Unstructured):
    """A pattern with stages of its own, in a list, which has no hash."""

    table: Any = field(default_factory=lambda: [Fraction(1, 4), Fraction(3, 4)])

    def fractions(self) -> tuple[Fraction, ...]:
        return tuple(self.table)

    def stage(self, step: Any) -> Any:
        return 1 if step is None else min(step // 2, 1)


@pytest.mark.parametrize("array", [np.arange(1.0, 17.0), torch.arange(1.0, 17.0)], ids=type)
def test_a_pattern_may_have_stages_of_its_own_and_no_hash(array: Any) -> None:
    pattern, zeros = Course(0.5), []
    for step in (0, 1, 2, None):
        (mask,) = select(
            [array], pattern, importance=[None], layouts=[None], names=["x"], step=step
        )
        zeros.append(int((~mask).sum()))
    assert zeros == [4, 4, 12, 12]
