"""The pull moves x off the support by a fraction of its gap; a radius in steps scales e."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from array_backends import BFLOAT16, Backend

import safe_core
from safe_core import ADMM, SAM, ArrayInfo, Layout, Method, Pull, schedules
from safe_core.constraints.pull import pulled
from safe_core.functional import FunctionalStep, StepState, start
from safe_core.motion import MEASURE_INTERVAL, is_measured, mean_squares, next_shrinkage

INFO = ArrayInfo(("w",), (Layout((1,), (0,)),))
SUPPORT = np.asarray([[True, False, True], [False, False, True]])


def parameters(seed: int, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    x, anchor = np.random.default_rng(seed).normal(size=(2, 2, 3))
    wide = np.float64 if dtype == np.float64 else np.float32
    return x.astype(dtype), anchor.astype(wide)


# The formula


@pytest.mark.parametrize("penalty", [0.0, 1e-6, 0.3, 40.0])
def test_the_pull_is_that_of_the_formula(xp: Backend, penalty: float) -> None:
    for dtype in xp.dtypes:
        x, anchor = parameters(0, dtype)
        found = xp.run(pulled, x, anchor, SUPPORT, np.asarray(penalty))
        gap = x.astype(np.float64) - anchor
        wanted = np.where(SUPPORT, x, x.astype(np.float64) + math.expm1(-penalty) * gap)
        assert found.dtype == anchor.dtype
        np.testing.assert_allclose(found, wanted, rtol=4 * np.finfo(found.dtype).eps, atol=1e-7)


def test_the_support_keeps_every_bit(xp: Backend) -> None:
    x = np.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1 / 3, 2.0], np.float32)
    kept = np.asarray([True] * 7 + [False])
    found = xp.run(pulled, x, np.ones_like(x), kept, np.asarray(0.5, np.float32))
    same = x[:7].view(np.int32) == found[:7].view(np.int32)
    assert same[[1, 2, 3, 4, 6]].all()
    assert np.isnan(found[0])


def step_of(method: Method, x: Any, split: Any, update: Any, t: int = 0) -> tuple[Any, Any]:
    step = FunctionalStep(method, [x], [0], INFO, t, lambda x: x, lambda g: [update])
    params, state = step.run([update], StepState(split))
    return params[0], state.split


def updates_of(method: Method, x: Any, split: Any, update: Any) -> Any:
    step = FunctionalStep(method, [x], [0], INFO, 0, lambda x: x, lambda g: [update])
    return step.updates([update], StepState(split))[0][0]


@pytest.mark.parametrize("dtype", ["float32", "float64", BFLOAT16], ids=str)
def test_a_step_on_the_support_is_that_of_the_base_alone(xp: Backend, dtype: Any) -> None:
    if np.dtype(dtype) not in xp.dtypes:
        dtype = "float32"
    x, anchor = parameters(1, dtype)
    update = parameters(2, dtype)[0]
    arrays = [xp.asarray(a) for a in (x, anchor, SUPPORT, update)]
    split = safe_core.SplitState([arrays[1]], [arrays[2]])
    found, _ = step_of(Method(0.5, Pull(0.7, 9)), arrays[0], split, arrays[3])
    alone, _ = step_of(safe_core.magnitude(0.5), arrays[0], split, arrays[3])
    found, alone = xp.to_numpy(found), xp.to_numpy(alone)
    assert found.dtype == x.dtype
    assert (found[SUPPORT] == alone[SUPPORT]).all()
    assert (found[~SUPPORT] != alone[~SUPPORT]).any()
    given = xp.to_numpy(updates_of(Method(0.5, Pull(0.7, 9)), arrays[0], split, arrays[3]))
    assert (given[SUPPORT] == update[SUPPORT]).all()
    assert given.dtype == update.dtype
    wanted = anchor + math.exp(-0.7) * (alone.astype("f8") - anchor)
    tolerance = {"float64": 1e-15, "float32": 1e-6}.get(np.dtype(dtype).name, 0.02)
    np.testing.assert_allclose(
        found.astype("f8")[~SUPPORT], wanted[~SUPPORT], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("penalty", [0.25, schedules.cosine(0.4, 20), schedules.linear(0.0, 9, 1)])
def test_the_gap_shrinks_by_the_sum_of_the_rates(penalty: Any) -> None:
    method = Method(0.5, Pull(penalty, dual_update_interval=1000))
    x = parameters(3)[0]
    split = method.init([x], INFO)
    first = x - split.anchor[0]
    for t in range(20):
        x, split = step_of(method, x, split, np.zeros_like(x), t)
    sums = sum(method.constraint.penalty(t) for t in range(20))
    np.testing.assert_allclose(x - split.anchor[0], first * math.exp(-sums), atol=1e-14)


def test_a_dual_update_is_that_of_admm(xp: Backend) -> None:
    def update(constraint: Any) -> Any:
        def run(x: Any, anchor: Any, support: Any) -> Any:
            split = safe_core.SplitState([anchor], [support])
            pattern = safe_core.Unstructured(0.5)
            return constraint.update([x], split, pattern, INFO, 0)

        return xp.run(run, *parameters(4), SUPPORT)

    pairs = zip(update(Pull())[:2], update(ADMM())[:2], strict=True)
    assert all((a[0] == b[0]).all() for a, b in pairs)


def test_a_pull_is_refused_with_the_argument_and_its_value() -> None:
    with pytest.raises(ValueError, match=r"penalty must be a finite number of at least 0, got -1"):
        Pull(-1)
    with pytest.raises(TypeError, match="penalty must be a non-negative Python number or a sch"):
        Pull(schedules.cubic(0.5, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dual_update_interval must be at least 1, got 0"):
        Pull(dual_update_interval=0)
    with pytest.raises(ValueError, match="state_dtype must be one of None, 'bfloat16', got 'f"):
        Pull(state_dtype="float16")
    with pytest.raises(TypeError, match=r"Pull\(\)"):
        Method(0.5, None)  # type: ignore[arg-type]


# The radius in steps


IN_STEPS = Method(0.5, perturbation=SAM(0.5, in_steps=True))


def perturb(
    square: float, of_x: float = 100.0, method: Method = IN_STEPS, shrinkage: float = 0.0
) -> Any:
    def run(params: list[Any], gradients: list[Any]) -> Any:
        xp = array_namespace(*params)
        return method.perturb(params, gradients, 0, motion=xp.asarray([square, of_x, shrinkage]))

    return run


def size(arrays: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.square(a, dtype="f8"))) for a in arrays))


def lists(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("f4") for shape in [(3, 4), (5,), (7,)]]


def test_e_is_as_long_as_rho_steps(xp: Backend) -> None:
    e = xp.run(perturb(9.0), lists(0), lists(1))
    assert size(e) == pytest.approx(0.5 * 3.0, rel=1e-5)
    for a, g in zip(e, lists(1), strict=True):
        np.testing.assert_allclose(a, g * size(e) / size(lists(1)), rtol=1e-5)


def test_e_does_not_scale_with_the_loss(xp: Backend) -> None:
    found = xp.run(perturb(9.0), lists(0), lists(1))
    scaled = xp.run(perturb(9.0), lists(0), [2.0**-12 * g for g in lists(1)])
    for e, same in zip(found, scaled, strict=True):
        assert (same == e).all()


@pytest.mark.parametrize("square", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("gradient", [1.0, np.nan, np.inf, 0.0])
def test_without_a_length_there_is_no_e(xp: Backend, square: float, gradient: float) -> None:
    e = xp.run(perturb(square), lists(0), [np.full_like(g, gradient) for g in lists(1)])
    assert all((x == 0).all() for x in e)


@pytest.mark.parametrize(
    ("of_x", "share"), [(36.0, 1.0), (900.0, 1.0), (3600.0, 0.25), (360_000.0, 0.0025)]
)
def test_short_steps_shrink_the_radius(xp: Backend, of_x: float, share: float) -> None:
    """Steps of length 3 are full where the parameters are up to 10 times as long."""
    method = Method(0.5, perturbation=SAM(0.5, in_steps=True, full_step=0.1))
    e = xp.run(perturb(9.0, of_x, method), lists(0), lists(1))
    assert size(e) == pytest.approx(0.5 * 3.0 * share, rel=1e-5)


def test_parameters_that_are_zero_have_a_full_radius(xp: Backend) -> None:
    method = Method(0.5, perturbation=SAM(0.5, in_steps=True, full_step=0.1))
    assert size(xp.run(perturb(9.0, 0.0, method), lists(0), lists(1))) == pytest.approx(1.5)
    for bad in (np.nan, np.inf):
        assert size(xp.run(perturb(9.0, bad, method), lists(0), lists(1))) == 0


def test_the_shrinkage_acts_on_the_radius(xp: Backend) -> None:
    plain, shrunk = (
        size(xp.run(perturb(9.0, shrinkage=b), lists(0), lists(1))) for b in (0.0, 0.7)
    )
    assert shrunk == pytest.approx(plain * math.exp(-0.7), rel=1e-5)


@pytest.mark.parametrize(
    ("shrinkage", "first", "second", "wanted"),
    [
        (0.0, 2.0, 3.0, 0.0),  # at the limit
        (0.0, 2.0, 3.1, 0.25),
        (0.5, 2.0, 3.1, 0.75),
        (0.5, 2.0, 0.0, 0.48),
        (3.9, 2.0, 9.0, 4.0),  # at most
        (4.0, 2.0, 1.0, 3.98),
        (0.01, 2.0, 1.0, 0.0),
        (0.5, 1e-30, 2e-30, 0.75),
        (0.5, 2.0, math.nan, 0.75),
        (0.5, 2.0, math.inf, 0.75),
        (0.5, 0.0, 1.0, 0.5),  # there was no e
        (0.5, math.nan, 1.0, 0.5),
        (0.5, math.inf, 1.0, 0.5),
        (0.5, math.inf, math.inf, 0.5),
    ],
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_shrinkage_follows_the_growth_of_the_gradient(
    xp: Backend, shrinkage: float, first: float, second: float, wanted: float, dtype: str
) -> None:
    def run(values: list[Any]) -> Any:
        return [next_shrinkage(*values, 1.5)]

    arrays = [np.asarray(value, dtype) for value in (shrinkage, first, second)]
    (found,) = xp.run(run, arrays)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(wanted, abs=1e-7)


def test_a_radius_within_which_the_loss_bends_shrinks_until_it_does_not() -> None:
    """Keep x at 1 with f(x) = x^4 / 4, whose gradient at 1 + e is (1 + e)^3."""
    e = SAM(0.2, in_steps=True, max_growth=1.331)  # up to e = 0.1
    method = Method(0.5, safe_core.Mask(), perturbation=e)
    params = [np.asarray([[1.0, 0.0]])]
    state, points = start(method, params, [0], INFO), []

    def gradient(x: list[Any]) -> list[Any]:
        points.append(float(x[0][0, 0]) - 1)
        return [x[0] ** 3]

    def base(gradients: list[Any]) -> list[Any]:
        sign = 1 - 2 * (t % 2)
        return [np.asarray([[sign, 0.0]])]  # there and back: every step has length 1

    for t in range(200):
        step = FunctionalStep(method, params, [0], INFO, t, gradient, base)
        _, state = step.run(gradient(params), state)
    reached = [point for point in points if point > 0]
    assert reached[0] == pytest.approx(0.2)
    assert max(reached[20:]) < 0.1 * math.exp(1 / 50) + 1e-6
    assert min(reached[20:]) > 0.1 * math.exp(-1 / 4) - 1e-6


def test_the_mean_runs_over_the_measured_steps() -> None:
    s, lengths = np.asarray(0.0), [3.0, 1.0, 0.0, 2.0]
    for i, length in enumerate(lengths):
        assert is_measured(MEASURE_INTERVAL * i)
        s = mean_squares(s, np.asarray(length), MEASURE_INTERVAL * i)
        assert float(s) == pytest.approx(np.mean(np.square(lengths[: i + 1])))
    for bad in (np.nan, np.inf):
        assert float(mean_squares(s, np.asarray(bad), 32)) == float(s)
        assert float(mean_squares(np.asarray(0.0), np.asarray(bad), 32)) == 0


def test_a_parameter_that_joins_late_is_measured_at_once() -> None:
    s = mean_squares(np.asarray(0.0), np.asarray(3.0), 100 * MEASURE_INTERVAL)
    assert float(s) == 9
    s = mean_squares(s, np.asarray(0.0), 101 * MEASURE_INTERVAL)
    assert float(s) == pytest.approx(9 * (1 - 1 / 102))


def test_only_every_eighth_step_is_measured() -> None:
    assert not any(is_measured(t) for t in range(1, MEASURE_INTERVAL))


def test_a_radius_in_steps_is_part_of_the_value() -> None:
    assert SAM(0.5) != SAM(0.5, in_steps=True)
    assert Method(0.5, perturbation=SAM(0.5, in_steps=True)) == IN_STEPS
    assert IN_STEPS.measures_steps
    assert not Method(0.5, perturbation=SAM(0.5)).measures_steps
    with pytest.raises(ValueError, match="full_step must be 0 unless the radius is in steps, got"):
        SAM(0.5, full_step=0.1)
    with pytest.raises(ValueError, match="full_step must be a finite number of at least 0, got -1"):
        SAM(0.5, in_steps=True, full_step=-1)
    with pytest.raises(ValueError, match=r"max_growth must be 0 unless the radius is in steps, go"):
        SAM(0.5, max_growth=1.5)
    for bad in (0.5, -1.0, math.inf):
        with pytest.raises(ValueError, match="max_growth must be"):
            SAM(0.5, in_steps=True, max_growth=bad)
    with pytest.raises(TypeError, match="in_steps must be True or False, got 1"):
        SAM(0.5, in_steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="motion must be given for a radius in steps"):
        IN_STEPS.perturb([np.ones(2)], [np.ones(2)], 0)
    with pytest.raises(ValueError, match=r"motion must have shape \(3,\), got \(2,\)"):
        IN_STEPS.perturb([np.ones(2)], [np.ones(2)], 0, motion=np.ones(2))
    points = safe_core.cram(0.5).evaluations
    assert Method(0.5, perturbation=SAM(0.5, in_steps=True), evaluations=points).measures_steps
    with pytest.raises(ValueError, match=r"max_growth must be 0 for a gradient at C\(x \+ e\), wh"):
        Method(0.5, perturbation=SAM(0.5, in_steps=True, max_growth=1.5), evaluations=points)


def test_perturbed_steps_reach_as_far_as_the_steps_before() -> None:
    e = SAM(0.5, in_steps=True, interval=2, reuse=0.3)
    method = Method(0.5, Pull(0.1, 2), perturbation=e)
    params = [np.asarray([[1.0, 2.0, -3.0]])]
    state, points, wanted, lengths = start(method, params, [0], INFO), [], [], []
    for t in range(10):
        before = params[0]

        def gradient(x: list[Any]) -> list[Any]:
            points.append(size([x[0] - before]))  # noqa: B023 - called at once
            return [x[0] - 1]

        def base(g: list[Any]) -> list[Any]:
            if t % MEASURE_INTERVAL == 0:  # noqa: B023
                lengths.append(0.1 * size(g))
            return [-0.1 * g[0]]

        if t % 2 == 0:
            wanted.append(0.5 * math.sqrt(np.mean(np.square(lengths))) if lengths else 0.0)
        step = FunctionalStep(method, params, [0], INFO, t, gradient, base)
        params, state = step.run([params[0] - 1], state)
    assert points == pytest.approx(wanted)
    assert wanted[1] > 0


# Patterns whose sparsity rises

PATTERNS = {
    "fraction": safe_core.Unstructured(0.29),
    "row": safe_core.Unstructured(0.5, scope="row"),
    "erdos-renyi": safe_core.Unstructured(0.8, scope="tensor", distribution="erdos_renyi_kernel"),
    "block": safe_core.Block((2, 2), 0.5),
    "channel": safe_core.Channel(0.5),
    "by name": safe_core.ByName({"a": "2:4", "b": 0.75}, default=safe_core.Channel(0.5)),
}
ARRAYS = {"a": (4, 8), "b": (8, 4), "c": (16, 8)}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_rising_pattern_ends_as_the_constant_one_and_never_falls(name: str) -> None:
    pattern = PATTERNS[name]
    rising = pattern.rising(12, 3)
    assert rising.changes
    assert not pattern.changes
    layout = (Layout((1,), (0,)),) * 3
    method, info = safe_core.magnitude(rising), ArrayInfo(tuple(ARRAYS), layout)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ARRAYS.values()]
    zeros = [
        [int(np.sum(~s)) for s in method.support_at(arrays, info, t)] for t in (*range(14), None)
    ]
    for before, after in itertools.pairwise(zeros):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert [sum(z) for z in zeros[:3]] == [16 if name == "by name" else 0] * 3
    final = safe_core.magnitude(pattern).support_at(arrays, info, None)
    for t in (12, 13, None):
        for got, wanted in zip(method.support_at(arrays, info, t), final, strict=True):
            assert (got == wanted).all()
    assert [rising.sparsity_of(a) for a in ARRAYS] == [pattern.sparsity_of(a) for a in ARRAYS]


def test_a_rise_ends_at_the_exact_fraction_given() -> None:
    for value in (Fraction(1, 3), Fraction(2, 7), np.float32(0.9), 0.29):
        pattern = safe_core.Unstructured(value)  # type: ignore[arg-type]
        assert pattern.rising(8, 2).fractions()[-1] == pattern.fractions()[0], value


def test_patterns_without_a_sparsity_in_between_stay() -> None:
    drawn = schedules.random_sparsity((0.5, 0.7))
    for given in (
        safe_core.NM(2, 4),
        safe_core.Unstructured(0.0),
        safe_core.Unstructured(drawn),
        safe_core.Channel(schedules.linear_sparsity(0.5, 4)),
        safe_core.ByName({"a": "2:4"}, default=0.0),
    ):
        assert given.rising(8, 2) == given


def test_a_mask_refuses_a_sparsity_that_changes_by_name() -> None:
    named = {"a": schedules.linear_sparsity(0.5, 4), "b": 0.5}
    with pytest.raises(ValueError, match="sparsity must not change by name for a mask, got ByN"):
        safe_core.gmp(named)
