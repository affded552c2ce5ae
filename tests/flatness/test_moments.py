"""Moments of Hessians that are known: those of quadratic losses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_backends import Backend

from safe_core.adapters.jax import loss_surface as jax_surface
from safe_core.adapters.torch import loss_surface as torch_surface
from safe_core.flatness import hessian_moment

SIZE = 6


def symmetric(seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
    return (a + a.T) / 2


HESSIANS = [symmetric(seed) for seed in range(3)]


def moment(order: int) -> float:
    """The moment by dense matrices."""
    power = np.linalg.matrix_power
    spread = np.mean([power(h, order) for h in HESSIANS], axis=0)
    value = np.linalg.eigvalsh(spread - power(np.mean(HESSIANS, axis=0), order))[-1]
    return float(np.sign(value) * abs(value) ** (1 / order))


@pytest.mark.parametrize("library", [b for b in Backend if not b.traces], ids=lambda b: b.value)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_moments_are_those_of_the_matrices(library: Backend, order: int) -> None:
    matrices = [library.asarray(h) for h in HESSIANS]
    products = [lambda h=h: lambda v: [h @ v[0]] for h in matrices]
    arrays = [library.asarray(np.zeros(SIZE))]
    found = hessian_moment(products, arrays, order, tolerance=1e-12)
    assert found.value == pytest.approx(moment(order), rel=1e-8)
    assert found.error < 1e-6
    equal = hessian_moment(products[:1] * 2, arrays, order)
    assert abs(equal.value) < 1e-2


def surfaces() -> dict[str, Any]:
    """``f_i(x) = x' H_i x / 2``, whose Hessian is the batch."""
    start = np.ones(SIZE)
    named = {"x": torch.from_numpy(start)}
    module = torch.nn.Linear(SIZE, 1, bias=False, dtype=torch.float64)
    batches = [torch.from_numpy(h) for h in HESSIANS]
    return {
        "module": torch_surface(
            lambda h: (module.weight @ h @ module.weight.T).sum() / 2, module, batches
        ),
        "mapping": torch_surface(lambda p, h: p["x"] @ h @ p["x"] / 2, named, batches),
        "jax": jax_surface(
            lambda p, h: p["x"] @ h @ p["x"] / 2, {"x": jnp.asarray(start)}, HESSIANS
        ),
    }


@pytest.mark.parametrize("kind", ["module", "mapping", "jax"])
def test_a_surface_takes_the_hessians_of_its_batches(kind: str) -> None:
    surface = surfaces()[kind]
    (x,) = surface.loss.arrays()
    for i, hessian in enumerate(HESSIANS):
        (found,) = surface.loss.hessian_product(i)([x])
        wanted = hessian @ np.asarray(x).ravel()
        np.testing.assert_allclose(np.asarray(found).ravel(), wanted, atol=1e-12)
    for order in (2, 4):
        found = surface.moment(order, tolerance=1e-10)
        assert found.value == pytest.approx(moment(order), rel=1e-7)


def test_a_moment_may_be_negative() -> None:
    products = [lambda d=d: lambda v: [d * v[0]] for d in (-3.0, 1.0)]
    found = hessian_moment(products, [np.zeros(1)], 3)  # (-27 + 1) / 2 - (-1)^3 = -12
    assert found.value == pytest.approx(-(12 ** (1 / 3)))


def test_moments_refuse_wrong_orders() -> None:
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        hessian_moment([lambda: lambda v: v], [np.zeros(1)], 1)
    with pytest.raises(ValueError, match="products must hold one for each batch, got none"):
        hessian_moment([], [np.zeros(1)])
