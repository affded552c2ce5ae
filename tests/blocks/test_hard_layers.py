"""Layers that are hard to solve: nearly dead inputs, extreme units, diagonal Gram matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_backends import Backend

from safe_core import Unstructured
from safe_core.solvers import ALPS, Magnitude, SparseGPT, Wanda, reconstruction_error

EAGER = [Backend.NUMPY, Backend.TORCH, Backend.JAX, Backend.STRICT]
SOLVERS = {"alps": ALPS(), "sparsegpt": SparseGPT(), "wanda": Wanda(), "magnitude": Magnitude()}
PATTERNS = [Unstructured(0.5), Unstructured(0.5, "row"), "2:4", Unstructured(0.8)]
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def layer(seed: int, dead: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return weights, and correlated inputs of which every third is scaled by ``dead``."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=(200, 24)), axis=1) + rng.normal(size=(200, 24))
    x[:, ::3] *= dead
    return rng.normal(size=(16, 24)), x


def error(w: np.ndarray, v: np.ndarray, h: np.ndarray) -> float:
    change = w.astype("f8") - v.astype("f8")
    return float(np.sum((change @ h) * change))


@pytest.mark.parametrize("dead", [1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("name", ["alps", "sparsegpt"])
def test_nearly_dead_inputs_do_not_blow_up_weights(name: str, dtype: str, dead: float) -> None:
    for seed in range(4):
        w, x = layer(seed, dead)
        for pattern in PATTERNS:
            values = SOLVERS[name](w.astype(dtype), (x.T @ x).astype("f4"), pattern).values
            assert np.isfinite(values).all()
            assert np.abs(values).max() < 30 * np.abs(w).max()


@pytest.mark.every_second
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_is_never_worse_than_wanda_nor_than_dense_values_on_its_support(pattern: Any) -> None:
    for seed in range(12):
        for dead in (1.0, 1e-3, 1e-7):
            w, x = layer(seed, dead)
            spread = np.random.default_rng(seed).lognormal(sigma=3, size=24)
            for h in (x.T @ x, np.diag(spread), (x * spread).T @ (x * spread)):
                values, support = ALPS()(w, h, pattern)
                found = error(w, values, h) * (1 - 1e-9)
                assert found <= error(w, Wanda()(w, h, pattern).values, h)
                assert found <= error(w, np.where(support, w, 0), h)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_is_never_worse_than_wanda_on_a_few_inputs(pattern: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        w, x = rng.normal(size=(2, 4)), rng.normal(size=(5, 4)) * rng.lognormal(sigma=2, size=4)
        values = ALPS()(w, x.T @ x, pattern).values
        wanda = Wanda()(w, x.T @ x, pattern).values
        assert error(w, values, x.T @ x) <= error(w, wanda, x.T @ x) * (1 + 1e-9)


@pytest.mark.every_second
@pytest.mark.parametrize("units", [(100, 0), (-100, 0), (0, 120), (0, -100), (110, 110)], ids=str)
@pytest.mark.parametrize("name", ["alps", "sparsegpt"])
@pytest.mark.parametrize("backend", EAGER)
def test_units_of_weights_and_inputs_change_nothing_else(
    backend: Backend, name: str, units: tuple[int, int]
) -> None:
    w, x = (a.astype("f4") for a in layer(0))
    h = (x.T @ x / 2**14).astype("f4")
    factors = [np.float32(2.0**unit) for unit in units]
    run = SOLVERS[name]
    wanted = backend.run(lambda w, h: run(w, h, 0.5), w, h)
    got = backend.run(lambda w, h: run(w, h, 0.5), w * factors[0], h * factors[1])
    np.testing.assert_array_equal(got.support, wanted.support)
    np.testing.assert_array_equal(got.values, wanted.values * factors[0])


@pytest.mark.parametrize("backend", EAGER, ids=lambda backend: backend.value)
def test_the_error_of_huge_weights_is_a_number(backend: Backend) -> None:
    w, h = np.full((2, 2), 1e30, "f4"), np.asarray([[1.0, -0.9], [-0.9, 1.0]], "f4")
    found = backend.run(lambda w, v, h: reconstruction_error(w, v, h), w, 0 * w, h)
    assert found == np.inf
    small = backend.run(
        lambda w, v, h: reconstruction_error(w, v, h), w, 0 * w, h * np.float32(1e-30)
    )
    assert small == pytest.approx(4e29, rel=1e-3)


@every_solver
@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_huge_and_tiny_weights_stay_finite(solver: Any, factor: float) -> None:
    w, x = layer(1)
    values, support = solver((w * factor).astype("f4"), (x.T @ x).astype("f4"), 0.5)
    assert np.isfinite(values).all()
    assert int((~support).sum()) == w.size // 2
    np.testing.assert_array_equal(values != 0, support)


@pytest.mark.parametrize("name", ["alps", "sparsegpt"])
def test_values_that_their_dtype_cannot_hold_are_refused(name: str) -> None:
    # The second input repeats the first, so the one that is kept takes on the other's weight.
    w = np.asarray([[60000.0, 59000.0]], "f2")
    h = np.asarray([[1.0, 1.0], [1.0, 1.0]])
    with pytest.raises(
        ValueError, match=r"^pruned values of weight must be finite .* float16, got"
    ):
        SOLVERS[name](w, h, 0.5)
    assert np.isfinite(SOLVERS[name](w.astype("f4"), h, 0.5).values).all()
