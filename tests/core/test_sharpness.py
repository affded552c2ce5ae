"""Perturbations have the length that was asked for, or are zero, and ignore loss scales."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from array_backends import BFLOAT16, Backend, assert_same
from hypothesis import given
from hypothesis import strategies as st

from safe_core import ASAM, SAM
from safe_core.direction import norm
from safe_core.reuse import flat_direction, reused

KINDS = [SAM(0.05), ASAM(0.5), ASAM(0.5, eta=0.0)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["sam", "asam", "asam-eta-0"])


@functools.cache
def perturb(kind: SAM, rho: float | None = None) -> Any:
    def run(params: Any, gradients: Any, traced_rho: Any = None) -> Any:
        given = traced_rho if rho is None else rho
        return kind.perturbation(params, gradients, rho=given)

    return run


def network(seed: int = 0, dtype: Any = np.float64) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Parameters and gradients: a matrix, a bias and a scalar."""
    rng = np.random.default_rng(seed)
    shapes = ((3, 4), (4,), ())
    draws = [np.asarray(rng.normal(size=shape), dtype) for shape in shapes * 2]
    return draws[:3], draws[3:]


def metric(kind: SAM, params: list[np.ndarray]) -> list[np.ndarray]:
    """T: ``|x| + eta`` on weights, 1 elsewhere."""
    if not isinstance(kind, ASAM):
        return [np.ones_like(x) for x in params]
    return [np.abs(x) + kind.eta if x.ndim >= 2 else np.ones_like(x) for x in params]


def length(arrays: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in arrays)))


@every_kind
@given(seed=st.integers(0, 1000))
def test_the_length_in_its_metric_is_rho(xp: Backend, kind: SAM, seed: int) -> None:
    params, gradients = network(seed)
    e = xp.run(perturb(kind, 0.3), params, gradients)
    scaled = [e / t for e, t in zip(e, metric(kind, params), strict=True)]
    assert length(scaled) == pytest.approx(0.3, rel=1e-14)


@every_kind
def test_perturbations_follow_their_formula(xp: Backend, kind: SAM) -> None:
    params, gradients = network()
    e = xp.run(perturb(kind, 0.3), params, gradients)
    scales = metric(kind, params)
    total = length([t * g for t, g in zip(scales, gradients, strict=True)])
    for got, t, g in zip(e, scales, gradients, strict=True):
        np.testing.assert_allclose(got, 0.3 * t**2 * g / total, rtol=1e-14)


@every_kind
@given(exponent=st.integers(-40, 40))
def test_scaling_the_loss_by_a_power_of_two_changes_no_bit(
    xp: Backend, kind: SAM, exponent: int
) -> None:
    params, gradients = network(dtype=np.float32)
    scaled = [np.ldexp(g, exponent) for g in gradients]
    plain = xp.run(perturb(kind, 0.3), params, gradients)
    assert_same(xp.run(perturb(kind, 0.3), params, scaled), plain)


@every_kind
def test_a_zero_gradient_gives_zero(xp: Backend, kind: SAM) -> None:
    params, gradients = network()
    e = xp.run(perturb(kind, 0.3), params, [0 * g for g in gradients])
    assert_same(e, [np.zeros_like(g) for g in gradients])


@every_kind
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_gives_zero(xp: Backend, kind: SAM, bad: float) -> None:
    params, gradients = network()
    gradients[1][2] = bad
    e = xp.run(perturb(kind, 0.3), params, gradients)
    assert_same(e, [np.zeros_like(g) for g in gradients])


def test_the_norm_is_over_all_parameters(xp: Backend) -> None:
    x, g = [np.zeros(1), np.zeros(1)], [np.asarray([3.0]), np.asarray([4.0])]
    e = xp.run(perturb(SAM(0.05), 0.5), x, g)
    np.testing.assert_allclose(np.concatenate(e), [0.3, 0.4], rtol=1e-14)
    assert float(xp.run(norm, g)) == 5.0


def test_weights_are_arrays_of_two_or_more_axes(xp: Backend) -> None:
    x, g = [np.asarray([3.0]), np.asarray([[3.0]])], [np.asarray([1.0]), np.asarray([[1.0]])]
    e = xp.run(perturb(ASAM(0.5, eta=1.0), 1.0), x, g)
    assert [float(e_i.item()) for e_i in e] == pytest.approx([1 / np.sqrt(17), 16 / np.sqrt(17)])


@every_kind
@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_16_bit_gradients_are_summed_in_float32(xp: Backend, kind: SAM, dtype: np.dtype) -> None:
    if dtype not in xp.dtypes:
        dtype = np.dtype(np.float32)
    # 300^2 overflows float16, and a sum of 1024 squares would stall in bfloat16.
    x, g = [np.ones(1024, dtype)], [np.full(1024, 300, dtype)]
    (e,) = xp.run(perturb(kind, 1.0), x, g)
    assert e.dtype == np.float32
    np.testing.assert_allclose(e, 1 / 32, rtol=1e-6)
    assert float(xp.run(norm, g)) == pytest.approx(32 * 300, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_in_is_dtype_out(xp: Backend, dtype: str) -> None:
    e = xp.run(perturb(SAM(0.1), 0.1), *network(dtype=dtype))
    assert [v.dtype for v in e] == [np.dtype(dtype)] * 3


def test_rho_may_be_an_array(xp: Backend) -> None:
    params, gradients = network()
    got = xp.run(perturb(SAM(0.1)), params, gradients, np.asarray(0.3))
    for a, b in zip(got, xp.run(perturb(SAM(0.1), 0.3), params, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    nothing = xp.run(perturb(SAM(0.1)), params, gradients, np.asarray(0.0))
    assert not any(e.any() for e in nothing)


def test_a_radius_known_to_be_zero_says_so() -> None:
    assert [kind.is_zero for kind in (SAM(0), ASAM(0.0), SAM(0.1))] == [True, True, False]
    assert not SAM(lambda step: 0.0).is_zero  # it may be positive at another step


# Reuse of a direction between perturbations


@functools.cache
def direction() -> Any:
    return lambda first, second: flat_direction(first, second)


def flattened(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])


@given(seed=st.integers(0, 1000), exponent=st.integers(-12, 12))
def test_the_flat_direction_is_the_unit_part_of_the_second_gradient_across_the_first(
    xp: Backend, seed: int, exponent: int
) -> None:
    first, second = network(seed)
    got = flattened(xp.run(direction(), first, [np.ldexp(g, exponent) for g in second]))
    g0, gs = flattened(first), flattened(second)
    h = gs - (gs @ g0) / (g0 @ g0) * g0
    np.testing.assert_allclose(got, h / np.linalg.norm(h), atol=1e-13)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_no_direction_comes_of_a_gradient_that_has_none(
    xp: Backend, bad: float, which: int
) -> None:
    pair = list(network(dtype=np.float32))
    pair[which] = [np.full_like(g, bad) for g in pair[which]]
    for h in xp.run(direction(), *pair):
        np.testing.assert_array_equal(h, np.zeros_like(h))


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-3])
def test_parallel_gradients_have_no_direction_of_rounding_errors(xp: Backend, scale: float) -> None:
    _, gradients = network(dtype=np.float32)
    scaled = [g * np.float32(scale) for g in gradients]
    for h in xp.run(direction(), gradients, scaled):
        np.testing.assert_array_equal(h, np.zeros_like(h))


@functools.cache
def reuse() -> Any:
    return lambda gradients, flat: reused(gradients, flat, 0.5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, BFLOAT16], ids=str)
def test_a_direction_is_added_at_the_length_of_the_gradient(xp: Backend, dtype: Any) -> None:
    if np.dtype(dtype) not in xp.dtypes:
        dtype = np.float32
    flat, gradients = network(1, dtype)
    flat = [h.astype(np.float64 if dtype == np.float64 else np.float32) for h in flat]
    got = xp.run(reuse(), gradients, flat)
    for new, g, h in zip(got, gradients, flat, strict=True):
        assert new.dtype == g.dtype
        want = g.astype(np.float64) + 0.5 * length(gradients) * h
        np.testing.assert_allclose(
            new.astype(np.float64),
            want,
            rtol=0,
            atol=length(flat)
            * (1e-12 if dtype == np.float64 else 1e-5 if dtype == np.float32 else 0.05),
        )


def test_an_infinite_gradient_is_left_as_it_is(xp: Backend) -> None:
    flat, gradients = network(1)
    gradients[0][0, 0] = np.inf
    assert_same(xp.run(reuse(), gradients, flat), gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"interval": 2.0}, "interval must be an integer, got 2.0"),
        ({"interval": 2, "reuse": -0.1}, r"reuse must be a finite number of at least 0"),
        (
            {"reuse": 0.5},
            "reuse must be 0 unless perturbations are more than one step apart",
        ),
    ],
)
def test_a_bad_interval_or_reuse_is_named(options: dict[str, Any], message: str) -> None:
    for kind in (SAM, ASAM):
        with pytest.raises((TypeError, ValueError), match=message):
            kind(0.1, **options)
