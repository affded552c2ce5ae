"""Selection at the limits of the range of floats: no unit, zero or infinity changes a support."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_backends import Backend, projector
from hypothesis import given
from hypothesis import strategies as st
from short_runs import short_run

import safe_core
from safe_core import NM, Block, Channel, Layout, Unstructured, project
from safe_core.adapters.optax import sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

ENTRIES = [
    Unstructured(0.5),
    Unstructured(0.5, scope="tensor"),
    Unstructured(0.5, scope="row"),
    NM(2, 4),
]
UNITS = [Block((1, 2), 0.5), Channel(0.5), Block((1, 2), 0.5, scope="global")]
STACKED = Layout((2,), (1,), (0,))


def exactly(pattern: Any, x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the support of a matrix by rational arithmetic, for patterns of half the entries."""
    score = [
        [Fraction(float(b)) * Fraction(float(a)) ** 2 for a, b in zip(u, v, strict=True)]
        for u, v in zip(x, np.broadcast_to(p, x.shape), strict=True)
    ]
    flat = [(-s, i, j) for i, row in enumerate(score) for j, s in enumerate(row)]
    if isinstance(pattern, NM):
        pools = [
            [t for t in flat if (t[1], t[2] // 4) == key]
            for key in {(i, j // 4) for _, i, j in flat}
        ]
    elif getattr(pattern, "scope", "") == "row":
        pools = [[t for t in flat if t[1] == i] for i in range(len(x))]
    else:
        pools = [flat]
    mask = np.zeros(x.shape, bool)
    for pool in pools:
        for _, i, j in sorted(pool)[: -(-len(pool) // 2)]:
            mask[i, j] = True
    return mask


def powers(draw_from: range) -> Any:
    return st.lists(st.sampled_from(list(draw_from)), min_size=4, max_size=4)


@pytest.mark.parametrize("pattern", ENTRIES, ids=str)
@given(
    rows=powers(range(-149, 127, 12)), columns=powers(range(-60, 60, 7)), seed=st.integers(0, 99)
)
def test_every_pool_is_ranked_by_the_exact_product(
    xp: Backend, pattern: Any, rows: list[int], columns: list[int], seed: int
) -> None:
    # Mantissas of few bits keep every product exact, so that ties are ties everywhere.
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(1, 4, (4, 8)).astype("f8")
    x = (rng.integers(-3, 4, (4, 8)) * 2.0 ** np.asarray(columns * 2)).astype("f4")
    p = (mantissa**2 * 4.0 ** (np.asarray(rows)[:, None] // 2)).astype("f4")
    if pattern.joint or getattr(pattern, "scope", "") == "tensor":
        p = np.ascontiguousarray(p[:1])  # one range for the whole pool
    got = xp.run(projector(pattern), x, p).support
    np.testing.assert_array_equal(got, exactly(pattern, x, p))


@pytest.mark.every_second
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("pattern", ENTRIES + UNITS, ids=str)
@pytest.mark.parametrize("power", [-149, -140, -126, -60, 100, 125])
def test_scaling_an_importance_or_weights_changes_nothing(
    xp: Backend, pattern: Any, dtype: str, power: int
) -> None:
    rng = np.random.default_rng(0)
    x, p = rng.integers(-8, 9, (4, 8)).astype(dtype), rng.integers(0, 4, (4, 8)).astype(dtype)
    factor = np.asarray(2.0 ** (power if dtype == "f4" or power > 0 else power * 7), dtype)
    assert factor > 0
    wanted = xp.run(projector(pattern), x, p).support
    for v, weight in (
        (x, p * factor),
        (x, p[:1] * factor),
        (x * (factor if power < 120 else 1), p),
    ):
        first = wanted if weight.shape == p.shape else xp.run(projector(pattern), x, p[:1]).support
        np.testing.assert_array_equal(xp.run(projector(pattern), v, weight).support, first)


@pytest.mark.parametrize("pattern", ENTRIES + UNITS, ids=str)
def test_an_infinite_entry_leaves_the_others_in_order(xp: Backend, pattern: Any) -> None:
    x = np.full((1, 8), 1e-25, "f4") * np.asarray([[1, 2, 3, 4, 5, 6, 7, 8]], "f4")
    p = np.full((1, 8), 1e-20, "f4")
    x[0, 0] = np.inf
    if isinstance(pattern, Channel):
        x, p = x.reshape(8, 1), p.reshape(8, 1)
    got = xp.run(projector(pattern), x, p).support.reshape(-1)
    wanted = {
        "NM": [1, 0, 0, 1, 0, 0, 1, 1],
        "Block": [1, 1, 0, 0, 0, 0, 1, 1],
    }.get(type(pattern).__name__, [1, 0, 0, 0, 0, 1, 1, 1])
    assert got.astype(int).tolist() == wanted


def test_an_infinite_entry_without_importance_is_dropped(xp: Backend) -> None:
    x, p = np.asarray([np.inf, 1.0], "f4"), np.asarray([0.0, 1e-30], "f4")
    assert xp.run(projector(Unstructured(0.5)), x, p).support.tolist() == [False, True]


def test_a_tiny_importance_counts_where_a_large_one_belongs_to_a_zero(xp: Backend) -> None:
    x, p = (
        np.asarray([0.0, 1e-15, 2e-15, 3e-15], "f4"),
        np.asarray([1e38, 1e-20, 1e-20, 1e-20], "f4"),
    )
    got = xp.run(projector(Unstructured(0.5)), x, p).support
    assert got.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, scope="row"), NM(2, 4), Channel(0.5)], ids=str
)
def test_stacked_tensors_are_scaled_apart(xp: Backend, pattern: Any) -> None:
    rng = np.random.default_rng(0)
    x, p = rng.integers(1, 9, (3, 4, 8)).astype("f4"), rng.integers(1, 4, (3, 4, 8)).astype("f4")
    scale = np.asarray([1e-38, 1.0, 1e30], "f4").reshape(3, 1, 1)
    scale = 2.0 ** np.round(np.log2(scale)).astype("f4")
    run = projector(pattern, STACKED)
    np.testing.assert_array_equal(xp.run(run, x, p * scale).support, xp.run(run, x, p).support)


def test_a_number_beyond_float32_is_an_importance_like_others() -> None:
    for xp in (np, torch):
        x = [xp.asarray([1.0, 2.0], dtype=xp.float32), xp.asarray([3.0, 4.0], dtype=xp.float32)]
        got = project(x, 0.5, importance=[1e-50, 1e-54])
        assert [mask.tolist() for mask in got.support] == [[True, True], [False, False]]
        got = project(x[0], 0.5, importance=1e50)
        assert got.support.tolist() == [False, True]


def test_a_number_that_jax_cannot_hold_is_refused(single_precision: None) -> None:
    x = jnp.asarray([1.0, 2.0], jnp.float32)
    assert project(x, 0.5, importance=1e-44).support.tolist() == [False, True]
    for number in (1e-50, 1e50):
        with pytest.raises(ValueError, match="importance of arrays must be 0 or") as error:
            project(x, 0.5, importance=number)
        assert str(error.value).endswith(f"got {number!r}")


@short_run
def test_adapters_take_numbers_beyond_float32(single_precision: None) -> None:
    layer, method = torch.nn.Linear(2, 2, bias=False), safe_core.admm(0.5)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = SparseOptimizer(sgd, method, model=layer, importance={"weight": 1e-50})
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
    optimizer.finalize()
    assert layer.weight.tolist() == [[0.0, 0.0], [4.0, 3.0]]
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="got 1e-50"):
        sparse_optimizer(optax.sgd(0.1), method, importance={"kernel": 1e-50}).init(params)


def test_dtypes_that_compete_keep_their_smallest_numbers(xp: Backend) -> None:
    arrays = [np.asarray([1e-40, 3e-40], "f4"), np.asarray([2e-40, 4e-40], "f8")]
    got = xp.run(projector(Unstructured(0.5)), arrays).support
    assert [mask.tolist() for mask in got] == [[False, True], [False, True]]
