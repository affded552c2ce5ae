"""The formulas of Sassha, and the random signs that every library draws alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from array_backends import Backend

from safe_core.random_numbers import rademacher
from safe_core.sassha import SasshaRule, estimates

SHAPES = ((), (0,), (1,), (3, 5), (40, 7, 2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_draws_the_same_signs(xp: Backend, dtype: str) -> None:
    zeros = [np.zeros(shape, dtype) for shape in SHAPES]
    found = xp.run(_second_draw, zeros, np.asarray(2, np.int32))
    for z, wanted in zip(found, rademacher(zeros, 2**32 - 1, 2), strict=True):
        assert (z.dtype, z.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(z, wanted)
        assert set(np.unique(z)) <= {-1, 1}


def _second_draw(zeros: Any, index: Any) -> Any:
    return rademacher(zeros, 2**32 - 1, index)


def test_signs_are_balanced_and_independent() -> None:
    n = 100_000
    like = [np.zeros(n)] * 2
    draws = [z for s in (0, 1) for c in (0, 1) for z in rademacher(like, s, c)]
    bound = 4.5 / math.sqrt(n)
    for i, a in enumerate(draws):
        assert abs(a.mean()) < bound
        assert abs((a[1:] * a[:-1]).mean()) < bound
        for b in draws[:i]:
            assert abs((a * b).mean()) < bound


def test_places_choose_the_arrays_of_a_longer_list() -> None:
    like = [np.zeros(8)] * 3
    picked = rademacher([like[2], like[0]], 7, 1, places=[2, 0])
    for a, b in zip(picked, (rademacher(like, 7, 1)[i] for i in (2, 0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_estimates_are_the_diagonal_on_average() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    hessian = root + root.T
    z = rademacher([np.zeros((20_000, 6))], 0, 0)
    (found,) = estimates(z, [z[0] @ hessian])
    np.testing.assert_allclose(found.mean(axis=0), np.diag(hessian), atol=0.15)


@pytest.mark.parametrize("correction", ["corrected", "published", "none"])
def test_every_library_takes_the_same_step(xp: Backend, correction: str) -> None:
    rng = np.random.default_rng(1)
    arrays = [[rng.normal(size=shape) for shape in ((4, 3), (3,))] for _ in range(5)]
    x, m, d, g, h = arrays
    d = [np.abs(a) for a in d]
    rule = SasshaRule((0.8, 0.99), 0.1, 0.3, eps=0.01, power=0.7, bias_correction=correction)
    run = {"corrected": _corrected, "published": _published, "none": _uncorrected}[correction]
    counts = np.asarray(11, np.int32), np.asarray(2, np.int32)
    found = xp.run(run, x, m, d, g, h, *counts)
    first, second = 1 - 0.8**11, 1 - 0.99 ** (2 if correction == "corrected" else 11)
    if correction == "none":
        first = second = 1.0
    for i in range(2):
        m_i = 0.8 * m[i] + (1 - 0.8) * g[i]
        d_i = 0.99 * d[i] + (1 - 0.99) * np.abs(h[i])
        wanted = (1 - 0.05 * 0.3) * x[i] - 0.05 * (m_i / first) / ((d_i / second) ** 0.7 + 0.01)
        for moved in (found[0][i], x[i] + found[1][i]):
            np.testing.assert_allclose(moved, wanted, rtol=1e-12)
    e = rule.direction(g).perturbation()
    np.testing.assert_allclose(e[0], 0.1 * g[0] / math.hypot(*map(np.linalg.norm, g)), rtol=1e-12)


def _step(rule: SasshaRule, *lists: Any) -> Any:
    x, m, d, g, h, step, updates = lists
    m, d = rule.average_gradients(m, g), rule.average_curvatures(d, h)
    counts = {"learning_rate": 0.05, "step": step, "hessian_count": updates}
    return rule.moved(x, m, d, **counts), rule.updates(x, m, d, **counts)


def _rule(correction: str) -> SasshaRule:
    return SasshaRule((0.8, 0.99), 0.1, 0.3, eps=0.01, power=0.7, bias_correction=correction)


def _corrected(*lists: Any) -> Any:
    return _step(_rule("corrected"), *lists)


def _published(*lists: Any) -> Any:
    return _step(_rule("published"), *lists)


def _uncorrected(*lists: Any) -> Any:
    return _step(_rule("none"), *lists)


def test_the_published_correction_makes_longer_steps() -> None:
    # At t = 11 there were two products. The ratio is that of the square roots.
    counts = {"learning_rate": 1.0, "step": 11, "hessian_count": 2}
    one = [np.ones(1)]
    lengths = [
        float(SasshaRule(eps=0.0, bias_correction=c).updates(one, one, one, **counts)[0][0])
        for c in ("published", "corrected")
    ]
    assert lengths[0] / lengths[1] == pytest.approx(math.sqrt(11 / 2), rel=0.01)


def test_corrections_keep_their_digits_in_float32() -> None:
    one = [np.ones(1, np.float32)]
    rule = SasshaRule((0.0, 0.9999999), eps=0.0, power=1.0)
    found = rule.updates(one, one, one, learning_rate=1.0, step=1, hessian_count=1)
    assert float(found[0][0]) == pytest.approx(-1e-7, rel=1e-6)


def test_momentum_is_followed_downhill_and_nowhere_before_the_first_step() -> None:
    rule = SasshaRule(rho=0.5, ascent="momentum")
    (e,) = rule.direction([np.asarray([3.0, 4.0])]).perturbation()
    np.testing.assert_allclose(e, [-0.3, -0.4])
    (e,) = rule.direction([np.zeros(2)]).perturbation()
    np.testing.assert_array_equal(e, [0, 0])
    assert rule.follows_momentum
    assert not SasshaRule(rho=0.0, ascent="momentum").follows_momentum


def test_an_average_skips_entries_that_are_not_finite() -> None:
    rule = SasshaRule(betas=(0.9, 0.5))
    (found,) = rule.average_curvatures(
        [np.ones(4)], [np.asarray([math.inf, math.nan, -3.0, -math.inf])]
    )
    np.testing.assert_array_equal(found, [1, 1, 2, 1])
