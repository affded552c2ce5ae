"""One stored array obeys the equations of two, and ADMM comes to rest where it should."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
from array_backends import BFLOAT16, Backend, assert_same
from hypothesis import given
from hypothesis import strategies as st

from safe_core import (
    NM,
    ArrayInfo,
    SplitState,
    Unstructured,
    admm,
    project,
    schedules,
    stationarity_gap,
)
from safe_core.constraints.base import select_support
from safe_core.constraints.splitting import (
    dual_residual,
    dual_update,
    init,
    penalty_gradient,
    primal_residual,
    recover,
    rescale_dual,
)

SHAPES = ((4, 8), (8,))
TARGETS = ArrayInfo(("a", "b"), tuple(reference.default_layout(len(shape)) for shape in SHAPES))


def walk(dtype: Any) -> Iterator[list[np.ndarray]]:
    """Weights of float32 precision that wander, as those in training do."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=shape) for shape in SHAPES]
    while True:
        yield [v.astype(np.float32).astype(dtype) for v in x]
        x = [v + 0.3 * rng.normal(size=v.shape) for v in x]


@functools.cache
def initial(pattern: Any) -> Any:
    def run(x: Any, importance: Any = None) -> SplitState:
        return init(x, pattern, TARGETS, importance=importance)

    return run


@functools.cache
def updater(pattern: Any, relaxation: float = 1.0) -> Any:
    def run(x: Any, state: SplitState, importance: Any = None, step: Any = None) -> SplitState:
        return dual_update(
            x, state, pattern, TARGETS, importance=importance, relaxation=relaxation, step=step
        )

    return run


def assert_split(xp: Backend, state: SplitState, two: reference.TwoArrayADMM) -> None:
    """z and u are those of the textbook, to the last bit (but for the sign of a zero)."""
    z, u = xp.run(recover, state)
    for got, wanted in zip(z + u, two.z + two.u, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.6), Unstructured(0.6, "row"), NM(2, 4)], ids=str
)
def test_one_array_holds_both_variables(xp: Backend, pattern: Any) -> None:
    points = walk(np.float32)
    x = next(points)

    def support(v: Any) -> Any:
        return reference.select(v, pattern)

    two, state = reference.TwoArrayADMM(x, support), xp.run(initial(pattern), x)
    for x, _ in zip(points, range(100), strict=False):
        two.dual_update(x, support)
        state = xp.run(updater(pattern), x, state)
        assert_split(xp, state, two)
        for v, anchor, wanted in zip(x, state.anchor, two.penalty_gradient(x, 0.1), strict=True):
            assert_same([xp.run(penalty_gradient, v, anchor, 0.1)], [wanted])


def test_one_array_follows_relaxation_rescaling_and_changes_of_sparsity_and_importance(
    xp: Backend,
) -> None:
    rng, points = np.random.default_rng(1), walk(np.float64)
    sparsity = schedules.cubic(0.9, steps=200, initial=0.2, every=20)
    pattern = Unstructured(sparsity)

    def support_at(step: int, importance: Any) -> reference.Select:
        # The cubic by its formula, held at its end.
        rest = 1 - Fraction(min(step // 20, 10), 10)
        now = Unstructured(Fraction(9, 10) + (Fraction(2, 10) - Fraction(9, 10)) * rest**3)
        return lambda v: reference.select(v, now, importance)

    x, importance = next(points), [rng.gamma(1, size=shape) for shape in SHAPES]
    two = reference.TwoArrayADMM(x, support_at(0, importance))
    state = xp.run(initial(pattern), x, importance)
    assert_split(xp, state, two)
    for step in range(1, 250):
        # 1.5 x and 0.5 z are exact here, so that a compiler which contracts a product
        # and a sum into one rounding has nothing to change.
        x, relaxation = next(points), (1.0, 1.5)[step % 2]
        importance = [rng.gamma(1, size=shape) for shape in SHAPES]
        at = np.asarray(step) if xp.traces else step
        two.dual_update(x, support_at(step, importance), relaxation)
        state = xp.run(updater(pattern, relaxation), x, state, importance, at)
        if step % 3 == 0:
            ratio = rng.uniform(0.5, 2)
            two.rescale(ratio)
            state = xp.run(rescale_dual, state, ratio)
        assert_split(xp, state, two)


def test_starts_at_the_projection_without_a_dual(xp: Backend) -> None:
    x = next(walk(np.float32))
    state = xp.run(initial(Unstructured(0.6)), x)
    wanted = xp.run(functools.partial(project, sparsity=0.6), x)
    z, u = xp.run(recover, state)
    assert_same(z, wanted.values)
    assert_same(state.support, wanted.support)
    assert not any(v.any() for v in u)


def test_a_sparsity_that_rises_starts_at_its_start_and_ends_at_its_end(xp: Backend) -> None:
    x = next(walk(np.float64))
    pattern = Unstructured(schedules.cubic(0.9, steps=8, initial=0.1, start=3))

    def zeros(support: Any) -> int:
        return sum(np.count_nonzero(~mask) for mask in support)

    def final(x: Any) -> Any:
        return select_support(x, pattern, TARGETS, None, step=None)

    state = xp.run(initial(pattern), x)
    assert zeros(state.support) == 4
    assert zeros(xp.run(updater(pattern), x, state).support) == zeros(xp.run(final, x)) == 36


def test_rescaling_by_one_leaves_every_bit(xp: Backend) -> None:
    points = walk(np.float32)
    state = xp.run(initial(Unstructured(0.6)), next(points))
    state = xp.run(updater(Unstructured(0.6)), next(points), state)
    assert_same(xp.run(rescale_dual, state, 1.0).anchor, state.anchor)


def test_residuals_are_the_norms_of_their_definitions(xp: Backend) -> None:
    points = walk(np.float64)
    before = xp.run(initial(Unstructured(0.6)), next(points))
    x = next(points)
    after = xp.run(updater(Unstructured(0.6)), x, before)
    z, old = (np.concatenate([v.ravel() for v in recover(s)[0]]) for s in (after, before))
    flat = np.concatenate([v.ravel() for v in x])
    assert xp.run(primal_residual, x, after) == pytest.approx(np.linalg.norm(flat - z), rel=1e-14)
    dual = xp.run(dual_residual, after, before, 0.25)
    assert dual == pytest.approx(0.25 * np.linalg.norm(z - old), rel=1e-14)


@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_16_bit_parameters_have_float32_anchors(xp: Backend, dtype: np.dtype) -> None:
    if dtype not in xp.dtypes:
        with pytest.raises(TypeError):
            xp.run(functools.partial(project, sparsity=0.5), np.ones(2, dtype))
        return
    x = [np.full((4, 8), 2.0**-9, dtype), np.ones(8, dtype)]
    state = xp.run(initial(Unstructured(0.8)), x)
    for _ in range(300):
        state = xp.run(updater(Unstructured(0.8)), x, state)
    assert [a.dtype for a in state.anchor] == [np.float32] * 2
    # In 16 bits the dual would stop growing where its spacing exceeds the increment.
    _, u = xp.run(recover, state)
    assert_same(u, [np.full((4, 8), 300 * 2.0**-9, np.float32), np.zeros(8, np.float32)])
    gradient = xp.run(penalty_gradient, x[0], state.anchor[0], 0.5)
    assert gradient.dtype == np.float32


# Convergence


class LeastSquares(NamedTuple):
    """``|A x - b|^2 / 2`` of a few variables."""

    hessian: np.ndarray
    linear: np.ndarray

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.hessian @ x - self.linear

    @property
    def smoothness(self) -> float:
        """beta, the largest eigenvalue of the Hessian."""
        return float(np.linalg.eigvalsh(self.hessian)[-1])


def least_squares(seed: int) -> LeastSquares:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(20, 12)), rng.normal(size=20)
    return LeastSquares(a.T @ a, a.T @ b)


def train(problem: LeastSquares, penalty: float, importance: Any) -> tuple[np.ndarray, int]:
    """z after some thousand steps of gradient descent, and the last change of its support."""
    method = admm(0.5, penalty=penalty, dual_update_interval=10)
    targets = ArrayInfo(("x",), (None,))
    x = np.linspace(-1, 1, 12)
    split, changed = method.init([x], targets, importance), 0
    for step in range(4000):
        total = problem.gradient(x) + penalty_gradient(x, split.anchor[0], penalty)
        x = x - total / (problem.smoothness + penalty)
        if method.is_due(step):
            before, split = split, method.update([x], split, step, targets, importance)
            if not np.array_equal(before.support[0], split.support[0]):
                changed = step
    return recover(split)[0][0], changed


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("seed", range(3))
def test_a_penalty_above_the_smoothness_settles_at_a_stationary_point(
    seed: int, weighted: bool
) -> None:
    problem = least_squares(seed)
    importance = [np.diag(problem.hessian) ** 2] if weighted else None
    penalty = 1.5 * problem.smoothness
    z, changed = train(problem, penalty, importance)
    assert changed < 3000
    assert np.count_nonzero(z) == 6
    p = None if importance is None else importance[0]
    scale = np.sum((1 if p is None else p) * z**2)
    assert 0 <= stationarity_gap(z, problem.gradient(z), penalty, 0.5, p) < 1e-12 * scale


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("seed", range(3))
def test_a_penalty_below_the_smoothness_does_not_settle(seed: int, weighted: bool) -> None:
    problem = least_squares(seed)
    importance = [np.diag(problem.hessian) ** 2] if weighted else None
    penalty = 0.1 * problem.smoothness
    z, changed = train(problem, penalty, importance)
    assert changed > 3800
    p = None if importance is None else importance[0]
    scale = np.sum((1 if p is None else p) * z**2)
    assert stationarity_gap(z, problem.gradient(z), penalty, 0.5, p) > 1e-3 * scale


# Certificate

HALVES = st.sampled_from([k / 2 for k in range(-6, 7)])
WEIGHTS = st.sampled_from([0.25, 1.0, 3.0])


@functools.cache
def gap(delta: float, pattern: Any) -> Any:
    def run(x: Any, gradient: Any, importance: Any = None) -> Any:
        return stationarity_gap(x, gradient, delta, pattern, importance)

    return run


def vectors(elements: Any) -> Any:
    return hnp.arrays(np.float64, (2, 4), elements=elements)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(1, 2)], ids=str)
@given(x=vectors(HALVES), gradient=vectors(HALVES), importance=st.none() | vectors(WEIGHTS))
def test_the_certificate_is_the_excess_over_the_nearest_point(
    xp: Backend, pattern: Any, x: np.ndarray, gradient: np.ndarray, importance: Any
) -> None:
    p = None if importance is None else [importance]
    x = project(x, pattern).values
    y = x - gradient / 0.5
    excess = reference.distance([x], [y], p) - reference.nearest_distance([y], pattern, p)
    assert float(xp.run(gap(0.5, pattern), x, gradient, importance)) == excess >= 0


@given(
    b=st.permutations([1.0, -2.0, 3.0, -4.0]),
    chosen=st.sets(st.integers(0, 3), min_size=2, max_size=2),
)
def test_the_certificate_is_zero_at_stationary_points_only(
    xp: Backend, b: list[float], chosen: set[int]
) -> None:
    # Of |x - b|^2 / 2, whose only stationary point for delta = 1 keeps the two largest.
    target = np.asarray(b)
    x = np.where([i in chosen for i in range(4)], target, 0.0)
    got = float(xp.run(gap(1.0, Unstructured(0.5)), x, x - target))
    if {abs(target[i]) for i in chosen} == {3.0, 4.0}:
        assert got == 0
    else:
        assert got > 0


def test_the_certificate_of_several_arrays_is_their_sum(xp: Backend) -> None:
    x = {"a": np.asarray([2.0, 0.0]), "b": np.asarray([[0.0, 1.0]])}
    gradient = {"a": np.asarray([0.0, 3.0]), "b": np.asarray([[2.0, 0.0]])}
    got = xp.run(gap(1.0, Unstructured(0.5, "tensor")), x, gradient)
    assert float(got) == (9 - 4) + (4 - 1)


def test_the_certificate_of_16_bit_weights_is_computed_in_32(xp: Backend) -> None:
    # In float16, 2 - 2^-13 rounds to 2.
    dtype = np.float16 if np.dtype(np.float16) in xp.dtypes else np.float32
    x, gradient = np.asarray([2.0, 0.0], dtype), np.asarray([2.0**-13, 1.0], dtype)
    got = xp.run(gap(1.0, Unstructured(0.5)), x, gradient)
    assert (got.dtype, float(got)) == (np.float32, 2.0**-26)


def test_no_nan_reaches_the_split(xp: Backend) -> None:
    start = np.asarray([3.0, 1.0, 2.0, 4.0])
    targets = ArrayInfo(("x",), (None,))

    def run(x: Any, broken: Any) -> Any:
        state = init([x], Unstructured(0.5), targets)
        return dual_update([broken], state, Unstructured(0.5), targets)

    state = xp.run(run, start, np.asarray([np.nan, 1.0, np.inf, 4.0]))
    # z stands in where x is broken: v = (3, 1, 0, 4).
    assert state.anchor[0].tolist() == [3.0, -1.0, 0.0, 4.0]
    assert state.support[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("relaxation", [1.0, 1.9])
def test_the_anchor_of_finite_weights_is_finite(xp: Backend, relaxation: float) -> None:
    info = ArrayInfo(("x",), (None,))

    def run(x: Any, anchor: Any, support: Any) -> SplitState:
        held = SplitState([anchor], [support])
        return dual_update([x], held, Unstructured(0.5), info, relaxation=relaxation, step=0)

    largest = np.finfo(np.float32).max
    x = np.asarray([largest, -largest, 1.0, 2.0], np.float32)
    anchor = np.asarray([-largest, largest, 1.0, 0.0], np.float32)
    state = xp.run(run, x, anchor, np.asarray([False, False, True, True]))
    assert np.isfinite(state.anchor[0]).all()
    assert state.support[0].tolist() == [True, True, False, False]
    assert state.anchor[0][:2].tolist() == [largest, -largest]


def test_a_rescaled_dual_is_finite(xp: Backend) -> None:
    def run(anchor: Any, support: Any) -> SplitState:
        return rescale_dual(SplitState([anchor], [support]), 1e30)

    anchor = np.asarray([1e20, -1e20, 1e20, 1e-20], np.float32)
    found = xp.run(run, anchor, np.asarray([True, False, False, False])).anchor[0]
    assert np.isfinite(found).all()
    assert found[0] == anchor[0]
    assert found[3] == pytest.approx(1e10)
