"""Layer-wise solvers, on every backend, against least squares in plain NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import optax
import pytest
import reference
import torch
from array_backends import BFLOAT16, Backend, assert_same
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from safe_core import (
    NM,
    Block,
    Channel,
    Layout,
    Projection,
    Unstructured,
    admm,
    project,
    safe,
    schedules,
    solvers,
)
from safe_core.adapters.optax import sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import (
    ALPS,
    Gram,
    Magnitude,
    SparseGPT,
    Wanda,
    as_solver,
    named_solver,
    named_solvers,
    reconstruction_error,
)

FLAX = Layout(input_axes=(0,), output_axes=(1,))
SOLVERS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(block_size=4),
    "alps": ALPS(refinements=24),  # to the end: on the way rounding is amplified
}
ELEMENTWISE = [
    Unstructured(0.6, "row"),
    Unstructured(0.55, "tensor"),
    Unstructured(0.7),
    NM(2, 4),
    NM(1, 3, ragged="dense"),
]
UNITS = [Block((2, 4), 0.5), Channel(0.5)]
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@functools.cache
def pruner(solver: Any, sparsity: Any, layout: Layout | None = None) -> Callable[..., Projection]:
    """A solver with its static arguments: the same function for the same arguments."""

    def run(weight: Any, gram: Any) -> Projection:
        return solver(weight, gram, sparsity, layout=layout)

    return run


def layer(
    outputs: int, inputs: int, *, tokens: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Gram matrix of inputs that are correlated and of several scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens or 4 * inputs, inputs))
    x = 0.5 * x + np.cumsum(x, axis=1) * np.exp(0.5 * rng.normal(size=inputs))
    return rng.normal(size=(outputs, inputs)), x.T @ x


def error(w: np.ndarray, v: np.ndarray, h: np.ndarray) -> float:
    """``tr((W - V) H (W - V)^T)``, as written."""
    return float(np.trace((w - v) @ h @ (w - v).T))


def refit(w: np.ndarray, h: np.ndarray, support: np.ndarray) -> np.ndarray:
    """The weights of least error on a support, row by row."""
    best = np.zeros_like(w)
    for row, dense, kept in zip(best, w, support, strict=True):
        row[kept] = np.linalg.lstsq(h[np.ix_(kept, kept)], h[kept] @ dense, rcond=None)[0]
    return best


# The recipe of a block


def test_the_rate_rises_in_two_epochs_or_in_half_of_fewer() -> None:
    assert [Reconstruction(epochs=n).warmup for n in (1, 2, 3, 4, 30)] == [0, 1, 1, 2, 2]
    one = replace(Reconstruction(), epochs=1)
    assert [one.share(t, 2) for t in range(3)] == [1.0, 0.5, 0.0]
    assert Reconstruction(epochs=1, warmup_epochs=1).warmup == 1
    with pytest.raises(ValueError, match="warmup_epochs must be at most epochs=1, got 2"):
        Reconstruction(epochs=1, warmup_epochs=2)


# Messages


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda g: Reconstruction(importance=g), "one of None, 'wanda', got Gram(matrix=numpy.nd"),
        (lambda g: Reconstruction(importance=g.matrix), "'wanda', got numpy.ndarray of shape (4, "),
        (lambda g: Reconstruction(method=g), "or None, got Gram(matrix=numpy.ndarray of shape"),
        (lambda g: Reconstruction(epochs=[g] * 9), "be an integer, got [Gram(matrix=numpy.nda"),
        (lambda g: safe(0.5, importance=g), "got Gram(matrix=numpy.ndarray of shape (4, 4), count"),
        (lambda g: safe(g.matrix), "got numpy.ndarray of shape (4, 4)"),
        (lambda g: safe(0.5, rho=g.matrix), "got numpy.ndarray of shape (4, 4)"),
        (lambda g: project([g.matrix], 0.5, importance=g), "structure of arrays, got <class"),
        (lambda g: project([g.matrix] * 2, 0.5, importance=g), "structure of arrays, got <class"),
        (lambda g: Wanda()(g.matrix, g, 0.5, layout=g), "must be a Layout, got Gram(matrix=numpy"),
    ],
)
def test_messages_do_not_print_arrays(make: Callable[[Gram], Any], wanted: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make(Gram.of(np.full((2, 4), 0.123)))
    assert wanted in str(error.value)
    assert "0.0302" not in str(error.value)  # 2 * 0.123**2


def test_adapters_do_not_print_arrays() -> None:
    layer, given = torch.nn.Linear(4, 4), {"weight": Gram.of(torch.full((2, 4), 0.123))}

    def step(importance: Any) -> None:
        base = torch.optim.SGD(layer.parameters(), lr=0.1)
        method = admm(0.5, dual_update_interval=1)
        optimizer = SparseOptimizer(base, method, model=layer, importance=importance)
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    for importance in (given, lambda *_: given["weight"]):
        with pytest.raises(TypeError, match=r"got Gram\(matrix=torch\.Tensor of shape \(4, 4\)"):
            step(importance)
    jax_gram = Gram.of(jax.numpy.full((2, 4), 0.123))
    tx = sparse_optimizer(optax.sgd(0.1), admm(0.5), importance={"kernel": jax_gram})
    with pytest.raises(
        TypeError, match=r"kernel .*, got Gram\(matrix=.* of shape \(4, 4\), count=2"
    ):
        tx.init({"kernel": jax.numpy.ones((4, 4))})


# SparseGPT against brain surgery by exact least squares


def remaining(w: np.ndarray, h: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """The columns after ``fixed``, at their least error given those."""
    j = fixed.shape[1]
    return w[:, j:] - (fixed - w[:, :j]) @ h[:j, j:] @ np.linalg.inv(h[j:, j:])


def surgery(
    w: np.ndarray, h: np.ndarray, pattern: Any, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fix one column after another, and solve anew for all columns after it."""
    outputs, n = w.shape
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(n)
    values, support = np.zeros_like(w), np.ones(w.shape, bool)
    for start in range(0, n, block):
        stop = min(start + block, n)
        free = remaining(w, h, values[:, :start])[:, : stop - start]
        # What losing entry j costs, the columns after it being free: w_j^2 / inv(H_jj..)_jj.
        price = [np.linalg.inv(h[j:, j:])[0, 0] for j in range(start, stop)]
        support[:, start:stop] = chosen(free**2 / np.asarray(price), pattern, start, outputs)
        for j in range(start, stop):
            column = remaining(w, h, values[:, :j])[:, 0]
            values[:, j] = np.where(support[:, j], column, 0)
    return values, support


def chosen(scores: np.ndarray, pattern: Any, start: int, outputs: int) -> np.ndarray:
    """The support of a block of columns."""
    width = scores.shape[1]
    if isinstance(pattern, NM):
        kept = pattern.n if width == pattern.m else width
        return np.argsort(np.argsort(-scores, axis=1), axis=1) < kept
    pools = scores if pattern.scope == "row" else scores.reshape(1, -1)
    height = 1 if pattern.scope == "row" else outputs
    kept = reference.kept(pattern, height * (start + width)) - reference.kept(
        pattern, height * start
    )
    return (np.argsort(np.argsort(-pools, axis=1), axis=1) < kept).reshape(scores.shape)


@pytest.mark.parametrize(
    ("pattern", "block"),
    [
        (Unstructured(0.5, "row"), 1),
        (Unstructured(0.55, "tensor"), 2),
        (NM(2, 3, ragged="dense"), 3),
    ],
    ids=str,
)
def test_sparsegpt_is_brain_surgery_along_the_columns(
    xp: Backend, pattern: Any, block: int
) -> None:
    w, h = layer(3, 5)
    values, support = xp.run(pruner(SparseGPT(block_size=block), pattern), w, h)
    wanted, kept = surgery(w, h, pattern, block)
    assert_same([support], [kept])
    np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 5, 16, 128])
@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), Unstructured(0.55)], ids=str)
def test_blocks_of_any_length_cut_the_columns(pattern: Any, block: int) -> None:
    w, h = layer(4, 17)
    values, support = SparseGPT(block_size=block)(w, h, pattern)
    wanted, kept = surgery(w, h, pattern, block)
    assert_same([support], [kept])
    np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch", "jax"])
def test_sparsegpt_asks_for_damping_where_inputs_say_too_little(name: str) -> None:
    w, h = layer(3, 8, tokens=4)
    backend = Backend(name)
    with pytest.raises(ValueError, match=r"damping must be larger .* damping=0.0: raise damping"):
        # Of rank 4, less a little for its rounding.
        backend.run(pruner(SparseGPT(damping=0.0), 0.5), w, h - 1e-9 * np.diag(np.diag(h)))
    assert np.all(np.isfinite(backend.run(pruner(SparseGPT(), 0.5), w, h).values))


# ALPS


@pytest.mark.parametrize("pattern", ELEMENTWISE + UNITS, ids=str)
def test_alps_leaves_little_to_a_refit_of_its_values(pattern: Any) -> None:
    w, h = layer(16, 32)
    damped, _ = ALPS()(w, h, pattern)
    values, support = ALPS(damping=0.0, refinements=40)(w, h, pattern)
    least = error(w, refit(w, h, support), h)
    assert error(w, values, h) <= (1 + 1e-6) * least
    assert error(w, damped, h) <= 1.1 * error(w, refit(w, h, damped != 0), h)


@pytest.mark.every_second
@pytest.mark.every_backend
@pytest.mark.parametrize(
    ("solver", "outputs", "seed"),
    [
        (ALPS(iterations=1, refinements=0), 4, 0),
        (ALPS(iterations=2, refinements=3), 4, 0),
        (ALPS(refinements=3), 4, 0),
        # A layer in which every rate of growth matters to the support.
        (ALPS(damping=0.1, rho=0.5, interval=2, refinements=2), 80, 2),
    ],
    ids=["one", "two", "all", "settings"],
)
def test_alps_takes_the_iterations_of_the_formula(
    xp: Backend, solver: ALPS, outputs: int, seed: int
) -> None:
    w, h = layer(outputs, 12, seed=seed)
    run = pruner(solver, Unstructured(0.5, "row"))
    if xp.traces:
        with pytest.raises(TypeError, match="weight and gram must not be traced for ALPS"):
            xp.run(run, w, h)
        return
    values, support = xp.run(run, w, h)
    # In units of inputs of norm 1.
    damped = h + solver.damping * np.mean(np.diag(h)) * np.eye(12)
    s = np.sqrt(np.diag(damped))
    a, c = w * s, damped / np.outer(s, s)
    d = iterated(a, c, solver)
    assert_same([support], [d != 0])
    wanted = descended(a, c, d, solver.refinements) / s
    for row, dense, kept in zip(wanted, w, support, strict=True):
        plain = np.where(kept, dense, 0)
        if (dense - plain) @ h @ (dense - plain) < (dense - row) @ h @ (dense - row):
            row[:] = plain
    np.testing.assert_allclose(values, wanted, rtol=1e-8, atol=1e-12)


def iterated(a: np.ndarray, c: np.ndarray, solver: ALPS) -> np.ndarray:
    """ADMM for ``min (W - A) C (W - A)^T / 2`` over sparse W: ``(C + rho) W = C A - V + rho D``."""
    v, rho, history = np.zeros_like(a), solver.rho, [half(a)]
    for t in range(1, solver.iterations + 1):
        right = a @ c - v + rho * history[-1]
        x = np.linalg.solve(c + rho * np.eye(len(c)), right.T).T
        history.append(half(x + v / rho))
        v = v + rho * (x - history[-1])
        if t % solver.interval == 0:
            now, then = history[-1] != 0, history[-1 - solver.interval] != 0
            share = np.sum(now != then) / np.sum(now)
            if share == 0:
                break
            rho *= 1.3 if share >= 0.1 else 1.2 if share >= 0.005 else 1.1
    return history[-1]


def half(v: np.ndarray) -> np.ndarray:
    """The larger half of each row."""
    (support,) = reference.select([v], Unstructured(0.5, "row"))
    return np.where(support, v, 0.0)


def descended(a: np.ndarray, c: np.ndarray, d: np.ndarray, steps: int) -> np.ndarray:
    """The least error within the Krylov space of each row: what conjugate gradients reach."""
    out = d.copy()
    for row, dense, kept in zip(out, a, d != 0, strict=True):
        m, r = c[np.ix_(kept, kept)], c[kept] @ (dense - row)
        if steps:
            space = np.stack([np.linalg.matrix_power(m, k) @ r for k in range(steps)], axis=1)
            row[kept] += space @ np.linalg.solve(space.T @ m @ space, space.T @ r)
    return out


# How they compare


@functools.cache
def trained_layers() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The two layers of a network that reads digits, with their inputs."""
    rng = np.random.default_rng(0)
    x, label = load_digits(return_X_y=True)
    x, target = x / 16, np.eye(10)[label]
    first, last = rng.normal(size=(32, 64)) / 8, rng.normal(size=(10, 32)) / 6
    for _ in range(200):
        hidden = np.maximum(x @ first.T, 0)
        odds = np.exp(hidden @ last.T)
        slope = (odds / odds.sum(axis=1, keepdims=True) - target) / len(x)
        gradients = ((slope @ last) * (hidden > 0)).T @ x, slope.T @ hidden
        first, last = first - 0.5 * gradients[0], last - 0.5 * gradients[1]
    hidden = np.maximum(x @ first.T, 0)
    assert np.mean((hidden @ last.T).argmax(axis=1) == label) > 0.95
    return {"first": (first, x.T @ x), "last": (last, hidden.T @ hidden)}


@pytest.mark.parametrize("name", ["first", "last", "synthetic", "few-tokens"])
@pytest.mark.parametrize(
    "sparsity", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.7), Unstructured(0.9)], ids=str
)
def test_alps_errs_less_than_sparsegpt_and_that_less_than_magnitude(
    name: str, sparsity: Any
) -> None:
    w, h = {
        **trained_layers(),
        "synthetic": layer(24, 48),
        "few-tokens": layer(24, 48, tokens=24),
    }[name]
    errors = [
        float(reconstruction_error(w, solver(w, h, sparsity).values, h))
        for solver in (ALPS(), SparseGPT(block_size=16), Magnitude())
    ]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


# What holds for all of them


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps"])
def test_results_are_the_same_on_every_backend(xp: Backend, name: str) -> None:
    w, h = layer(6, 8)
    solver = SOLVERS[name]
    for pattern in (Unstructured(0.55), NM(2, 4)):
        if xp.traces and isinstance(solver, ALPS):
            with pytest.raises(TypeError, match="must not be traced"):
                xp.run(pruner(solver, pattern), w, h)
            continue
        got = xp.run(pruner(solver, pattern), w, h)
        wanted = solver(w, h, pattern)
        assert_same([got.support], [wanted.support])
        np.testing.assert_allclose(got.values, wanted.values, rtol=1e-9, atol=1e-12)


@every_solver
@pytest.mark.parametrize("name", ["numpy", "torch"])
@given(data=st.data())
def test_counts_are_exact(name: str, solver: Any, data: st.DataObject) -> None:
    # Few different weights, so that there are ties, and inputs that are dead or repeated.
    w = data.draw(hnp.arrays(np.float64, (4, 8), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])))
    x = data.draw(hnp.arrays(np.float64, (5, 8), elements=st.integers(-1, 1)))
    x[0, 0] = 1.0
    patterns = ELEMENTWISE + ([] if isinstance(solver, SparseGPT) else UNITS)
    for pattern in patterns:
        values, support = Backend(name).run(pruner(solver, pattern), w, x.T @ x)
        for pool in reference.pools([w.shape], pattern):
            kept = [{bool(support.flat[i]) for _, i in unit} for unit in pool.units]
            assert kept.count({True}) == pool.kept
            assert kept.count({False}) == len(kept) - pool.kept
        assert np.all(np.isfinite(values))
        assert not np.any(values[~support])


def test_counts_are_the_floors_of_decimals() -> None:
    w, h = layer(10, 100)
    for solver in (Wanda(), SparseGPT(block_size=7), ALPS(iterations=3)):
        rows = solver(w, h, Unstructured(0.29, "row")).support
        assert np.count_nonzero(~rows, axis=1).tolist() == [29] * 10
        assert np.count_nonzero(~solver(w, h, 0.999).support) == 999


@every_solver
def test_a_schedule_of_sparsities_stands_for_its_end(solver: Any) -> None:
    w, h = layer(4, 8)
    pattern = Unstructured(schedules.cubic(0.75, steps=10))
    assert_same(solver(w, h, pattern), solver(w, h, 0.75))


@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch"])
@every_solver
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_ties_keep_the_first(name: str, solver: Any, scope: str) -> None:
    w = np.ones((2, 4))
    support = Backend(name).run(pruner(solver, Unstructured(0.5, scope)), w, np.eye(4)).support
    # SparseGPT has one block of 4 columns here.
    half = [[True, True, False, False]] * 2
    assert support.tolist() == (half if scope == "row" else [[True] * 4, [False] * 4])


@every_solver
def test_ties_of_a_stored_array_are_broken_in_its_order(solver: Any) -> None:
    w, h = np.ones((4, 2)), np.eye(4)
    support = solver(w, h, 0.5, layout=FLAX).support
    assert support.tolist() == [[True, True], [True, True], [False, False], [False, False]]


@every_solver
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_order_of_storage_changes_nothing_else(name: str, solver: Any) -> None:
    xp = Backend(name)
    w, h = layer(6, 8)
    stored = [
        (np.ascontiguousarray(w.T), FLAX, lambda v: v.T),
        (w.reshape(2, 3, 2, 4), Layout((2, 3), (0, 1)), lambda v: v.reshape(6, 8)),
        (
            np.ascontiguousarray(w.reshape(2, 3, 8).transpose(0, 2, 1)),
            Layout((1,), (0, 2)),
            lambda v: v.transpose(0, 2, 1).reshape(6, 8),
        ),
    ]
    for pattern in (NM(2, 4), Unstructured(0.6, "row"), Unstructured(0.55, "tensor")):
        wanted = solver(w, h, pattern)
        for array, layout, matrix in stored:
            values, support = xp.run(pruner(solver, pattern, layout), array, h)
            assert (values.shape, support.shape) == (array.shape, array.shape)
            assert_same([matrix(support)], [wanted.support])
            np.testing.assert_allclose(matrix(values), wanted.values, rtol=1e-9, atol=1e-12)


@every_solver
def test_a_vector_is_one_output(solver: Any) -> None:
    w, h = layer(1, 8)
    got, wanted = solver(w[0], h, "2:4"), solver(w, h, "2:4")
    assert_same(got, [x[0] for x in wanted])


@every_solver
def test_the_scale_of_the_gram_matrix_changes_nothing(solver: Any) -> None:
    w, h = layer(4, 8)
    wanted = solver(w, h, 0.5)
    for scale in (2.0**-60, 2.0**60):
        got = solver(w, scale * h, 0.5)
        assert_same([got.support], [wanted.support])
        np.testing.assert_allclose(got.values, wanted.values, rtol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps"])
def test_inputs_that_are_always_zero_go_first(library: str, name: str) -> None:
    xp, solver = Backend(library), SOLVERS[name]
    w, h = layer(4, 8)
    dead = [1, 2]
    w[:, dead], h[:, dead], h[dead] = 100.0, 0.0, 0.0
    values, support = xp.run(pruner(solver, NM(2, 4)), w, h)
    assert not support[:, dead].any()
    live = [j for j in range(8) if j not in dead]
    assert np.all(np.isfinite(values))
    assert np.count_nonzero(values[:, live]) == 16
    values = xp.run(pruner(solver, Unstructured(0.125, "row")), w, h).values
    if name != "wanda":  # which leaves what it keeps
        assert not values[:, dead].any()


@pytest.mark.parametrize(
    ("name", "solver"),
    [("torch", Wanda()), ("torch", SparseGPT()), ("torch", ALPS()), ("jax", SparseGPT())],
    ids=str,
)
def test_bfloat16_weights_are_solved_in_float32(name: str, solver: Any) -> None:
    w, h = layer(8, 8)
    narrow, h = w.astype(BFLOAT16), h.astype(np.float32)
    xp = Backend(name)
    values, support = xp.run(pruner(solver, Unstructured(0.6, "row")), narrow, h)
    wanted = xp.run(pruner(solver, Unstructured(0.6, "row")), narrow.astype(np.float32), h)
    assert_same([support], [wanted.support])
    assert_same([values], [wanted.values.astype(BFLOAT16)])


@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch"])
@every_solver
def test_dtypes_are_those_of_the_weights(name: str, solver: Any) -> None:
    w, h = layer(4, 8)
    for dtype in (np.float32, np.float64):
        given = w.astype(dtype), h.astype(np.float32)
        values, support = Backend(name).run(pruner(solver, "2:4"), *given)
        assert (values.dtype, support.dtype) == (dtype, bool)


@every_solver
def test_nothing_to_prune_and_nothing_there(solver: Any) -> None:
    w, h = layer(4, 8)
    values, support = solver(w, h, 0.0)
    assert support.all()
    np.testing.assert_allclose(values, w, rtol=1e-12)
    assert solver(w[:0], h, "2:4").values.shape == (0, 8)


@every_solver
def test_results_keep_no_graph_of_derivatives(solver: Any) -> None:
    w, h = layer(4, 8)
    weight = torch.nn.Parameter(torch.from_numpy(w))
    values, _ = solver(weight, torch.from_numpy(h), "2:4")
    assert not values.requires_grad
    assert weight.requires_grad


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT(block_size=4)], ids=repr)
def test_results_live_on_the_device_of_the_weights(solver: Any) -> None:
    w, h = torch.ones(4, 8, device="meta"), torch.ones(8, 8, device="meta")
    for sparsity in (0.5, Unstructured(0.5, "row"), "2:4"):
        values, support = solver(w, h, sparsity)
        assert (values.device.type, support.device.type) == ("meta", "meta")


def test_wanda_is_the_projection_with_the_diagonal_as_importance() -> None:
    w, h = layer(4, 8)
    for pattern in (*ELEMENTWISE, *UNITS):
        assert_same(Wanda()(w, h, pattern), project(w, pattern, importance=np.diag(h)))
        assert_same(Magnitude()(w, None, pattern), project(w, pattern))


# The Gram matrix


def test_batches_add_up_to_the_gram_matrix(xp: Backend) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 3))
    gram = xp.run(lambda a, b: Gram.of(a).add(b), x[:2], x[2:])
    flat = x.reshape(-1, 3)
    np.testing.assert_allclose(gram.matrix, flat.T @ flat, rtol=1e-13)
    assert int(gram.count) == 30
    narrow = xp.run(Gram.of, np.full((4, 2), 300, xp.dtypes[0]))
    assert_same([narrow.matrix], [np.full((2, 2), 360_000, np.float32)])


def test_a_gram_serves_as_its_matrix() -> None:
    w, h = layer(4, 8)
    assert_same(Wanda()(w, Gram(h, 32), 0.5), Wanda()(w, h, 0.5))
    assert reconstruction_error(w, 0 * w, Gram(h, 32)) == reconstruction_error(w, 0 * w, h)


def test_a_gram_keeps_no_graph_of_derivatives() -> None:
    inputs = torch.ones(3, 2, requires_grad=True)
    assert not Gram.of(inputs).add(inputs).matrix.requires_grad


def test_the_error_is_that_of_the_outputs(xp: Backend) -> None:
    rng = np.random.default_rng(0)
    x, w, v = rng.normal(size=(20, 6)), rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    wanted = np.linalg.norm(x @ w.T - x @ v.T) ** 2
    got = xp.run(reconstruction_error, w, v, x.T @ x)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    got = reconstruction_error(w.T, v.T, x.T @ x, layout=FLAX)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:4, :4], r"gram must have shape \(inputs, inputs\) = \(8, 8\).*got.*\(4, 4\)"),
        (lambda h: h[0, :4], "gram must have shape"),
        (lambda h: np.where(np.eye(8) == 1, np.nan, h), "gram must be finite, got nan"),
        (lambda h: h - 2 * np.diag(np.diag(h)), "gram must have no negative diagonal entry, got -"),
        (lambda h: 0 * h, "gram must have a positive diagonal entry.*got 0.0"),
        (np.triu, "gram must be symmetric"),
    ],
    ids=["small", "vector", "nan", "negative", "zero", "triangle"],
)
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps"])
def test_what_is_no_gram_matrix_is_refused(name: str, change: Any, message: str) -> None:
    w, h = layer(4, 8)
    for backend in (Backend.NUMPY, Backend.STRICT, Backend.TORCH, Backend.JAX):
        with pytest.raises(ValueError, match=message):
            backend.run(pruner(SOLVERS[name], 0.5), w, change(h))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d[:4],
            r"gram must have shape \(inputs,\) = \(8,\) or be a Gram matrix.* \(4,\)",
        ),
        (lambda d: np.where(np.arange(8) == 1, np.nan, d), "gram must be finite, got nan"),
        (lambda d: 0 * d, "gram must have a positive entry.*got 0.0"),
        (lambda d: -d, "gram must have no negative entry, got -"),
    ],
    ids=["short", "nan", "zero", "negative"],
)
def test_wanda_takes_the_diagonal_alone(change: Any, message: str) -> None:
    w, h = layer(4, 8)
    for backend in (Backend.NUMPY, Backend.STRICT, Backend.TORCH, Backend.JAX):
        values, support = backend.run(pruner(Wanda(), 0.5), w, np.diag(h).copy())
        wanted = backend.run(pruner(Wanda(), 0.5), w, h)
        np.testing.assert_array_equal(values, wanted[0])
        np.testing.assert_array_equal(support, wanted[1])
        with pytest.raises(ValueError, match=message):
            backend.run(pruner(Wanda(), 0.5), w, change(np.diag(h).copy()))


def test_solvers_are_known_by_their_names() -> None:
    wanted = [
        "alps", "magnitude", "safe", "safe+", "safe+-published", "safe-published", "sparsegpt",
        "wanda",
    ]  # fmt: skip
    assert list(named_solvers()) == wanted
    assert [named_solver(name).name for name in wanted] == wanted
    assert as_solver("wanda") == as_solver(Wanda) == Wanda()


def test_an_exported_solver_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Wanda):
        name = "mine"

    monkeypatch.setattr(solvers, "Mine", Mine, raising=False)
    monkeypatch.setattr(solvers, "__all__", [*solvers.__all__, "Mine"])
    assert named_solver("mine") == Mine()
    assert "mine" in named_solvers()


def test_the_settings_of_training_are_those_of_solvers_that_train() -> None:
    given: Any = {"batch_size": 3, "penalty": 0.1, "rho": 1e-3}
    recipe = named_solver("safe+-published").configured(epochs=None, **given)
    assert recipe == Reconstruction(importance="wanda", published=True, **given)
    method = recipe.bound(Unstructured(0.5, scope="tensor"), 9)
    plain = safe(Unstructured(0.5, scope="tensor"), rho=1e-3, penalty=0.1)
    assert method == plain
    with pytest.raises(ValueError, match="rho must be left out for alps, which does not train"):
        named_solver("alps").configured(batch_size=3, rho=1e-3)
    with pytest.raises(ValueError, match=r"rho must be left out if a method is given.* got 0\.1"):
        Reconstruction(admm(0.5), rho=0.1)
    with pytest.raises(ValueError, match="dual_update_interval must be at least 1"):
        Reconstruction(dual_update_interval=0)


def test_a_gram_matrix_of_rounded_sums_is_taken() -> None:
    w, h = layer(4, 8)
    h = h.astype(np.float32)
    h[0, 1] *= 1 + 1e-6
    assert not np.array_equal(h, h.T)
    for solver in SOLVERS.values():
        assert np.all(np.isfinite(solver(w.astype(np.float32), h, 0.5).values))


@every_solver
def test_weights_that_are_no_layer_are_refused(solver: Any) -> None:
    w, h = layer(4, 8)
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        solver(np.where(w > 0, w, np.nan), h, 0.5)
    with pytest.raises(TypeError, match="weight must be real floating"):
        solver(w.astype(int), h, 0.5)
    with pytest.raises(TypeError, match="weight must be an array"):
        solver(w.tolist(), h, 0.5)
    with pytest.raises(ValueError, match="weight must have an input axis, got a scalar"):
        solver(w[0, 0], h, 0.5)
    with pytest.raises(TypeError, match="layout must be a Layout"):
        solver(w, h, 0.5, layout=(1, 0))
    for layout in (Layout((1,)), Layout((), (0, 1)), Layout((2,), (1,), batch_axes=(0,))):
        with pytest.raises(ValueError, match=r"layout of weight must name input_axes, and each"):
            solver(w.reshape(1, 4, 8) if layout.batch_axes else w, h, 0.5, layout=layout)


@every_solver
def test_sparsities_that_do_not_fit_are_refused(solver: Any) -> None:
    w, h = layer(4, 8)
    with pytest.raises(ValueError, match="the input axis of weight has 8 entries, which 3 does"):
        solver(w, h, "2:3")
    with pytest.raises(ValueError, match=r"sparsity must be a fraction in \[0, 1\)"):
        solver(w, h, 1.0)
    with pytest.raises(TypeError, match="sparsity must be a fraction"):
        solver(w, h, np.asarray(0.5))


@pytest.mark.parametrize("pattern", UNITS, ids=str)
def test_sparsegpt_names_the_patterns_it_is_defined_for(pattern: Any) -> None:
    w, h = layer(4, 8)
    with pytest.raises(
        TypeError, match=r"sparsity must be .* single entries for SparseGPT.* got (Block|Channel)"
    ):
        SparseGPT()(w, h, pattern)


def test_other_arguments_are_refused() -> None:
    w, h = layer(4, 8)
    with pytest.raises(TypeError, match="gram must be a Gram or an array, of the library of"):
        Wanda()(w, torch.from_numpy(h), 0.5)
    with pytest.raises(TypeError, match="gram must be real floating"):
        Wanda()(w, h.astype(int), 0.5)
    with pytest.raises(ValueError, match=r"values must have the shape of weight \(4, 8\)"):
        reconstruction_error(w, w[:2], h)
    with pytest.raises(TypeError, match="inputs must be an array"):
        Gram.of([1.0])
    with pytest.raises(ValueError, match="inputs must have shape"):
        Gram.of(np.asarray(1.0))
    with pytest.raises(ValueError, match="inputs must have 8 features, as before"):
        Gram(h, 1).add(np.ones((2, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPT(damping=-1.0), "damping must be a finite number of at least 0"),
        (lambda: SparseGPT(block_size=0), "block_size must be at least 1"),
        (lambda: ALPS(damping=np.inf), "damping must be a finite number"),
        (lambda: ALPS(rho=0.0), "rho must be positive"),
        (lambda: ALPS(interval=0), "interval must be at least 1"),
        (lambda: ALPS(iterations=0), "iterations must be at least 1"),
        (lambda: ALPS(refinements=-1), "refinements must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_error_is_taken_in_the_widest_dtype(xp: Backend) -> None:
    w, h = layer(4, 8)
    mixed = (w.astype(np.float32), w / 2, h.astype(np.float32))
    wanted = reconstruction_error(w.astype(np.float32).astype(float), w / 2, mixed[2].astype(float))
    np.testing.assert_allclose(xp.run(reconstruction_error, *mixed), wanted, rtol=1e-12)


def test_no_mean_square_of_no_token() -> None:
    with pytest.raises(ValueError, match="count must be positive"):
        Gram.of(np.ones((0, 3))).mean_squares()


def test_solvers_are_static_arguments_of_jit() -> None:
    w, h = layer(4, 8)
    run = jax.jit(lambda solver, a, b: solver(a, b, "2:4"), static_argnums=0)
    assert_same([np.asarray(run(Wanda(), w, h).values)], [Wanda()(w, h, "2:4").values])
