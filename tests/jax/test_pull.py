"""The pull and the radius in steps in JAX: traced once, scanned, mapped, resumed, overridden."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from short_runs import short_run

import safe_core
from safe_core import SAM, FinalizeWarning, Method, Pull, schedules
from safe_core.adapters.jax.evaluation import sparse_weights
from safe_core.adapters.jax.reporting import report
from safe_core.adapters.optax import finalize, sparse_optimizer
from safe_core.motion import MEASURE_INTERVAL

STEPS = 40
UNTUNED = safe_core.safe(0.75, steps=STEPS)
FIXED = Method(0.75, Pull(0.2, 4), perturbation=SAM(0.5, in_steps=True))
BASES = {"sgd": lambda: optax.sgd(0.1, momentum=0.9), "adam": lambda: optax.adam(0.01)}
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(32, n)), jnp.float32) for n in (8, 4))


def make_params(seed: int = 0, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)

    def layer(n: int, m: int) -> Any:
        kernel = jnp.asarray(rng.normal(size=(n, m)) / math.sqrt(n), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(m, dtype)}

    return {"a": layer(8, 16), "b": layer(16, 4)}


def grad_fn(params: Any) -> Any:
    def loss(params: Any) -> Any:
        dtype = params["a"]["bias"].dtype
        h = jnp.tanh(X.astype(dtype) @ params["a"]["kernel"] + params["a"]["bias"][None])
        out = h @ params["b"]["kernel"] + params["b"]["bias"][None]
        return jnp.mean((out - Y.astype(dtype)) ** 2)

    return jax.grad(loss)(params)


def stepper(tx: Any) -> Any:
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def train(tx: Any, steps: int, params: Any = None, state: Any = None) -> Any:
    params = make_params() if params is None else params
    state = tx.init(params) if state is None else state
    step = jax.jit(stepper(tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree[layer]["kernel"]) for layer in ("a", "b")]


def assert_same(got: Any, wanted: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def first_step(params: Any, rate: float = 0.1) -> float:
    """The length of the first step of SGD on the kernels, which is taken without e."""
    return rate * length(kernels(grad_fn(params)))


def perturbation(tx: Any, params: Any, state: Any) -> Any:
    """The perturbation of the next step."""
    points: list[Any] = []

    def spied(moved: Any) -> Any:
        points.append(moved)
        return grad_fn(moved)

    tx.update(grad_fn(params), state, params, grad_fn=spied)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), points[0], params)


def length(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(tree))))


@pytest.mark.every_second
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_a_step_is_traced_once_and_types_stay(base: str, state_dtype: str | None) -> None:
    method = safe_core.safe(0.75, steps=STEPS, state_dtype=state_dtype)
    tx, traces = sparse_optimizer(BASES[base](), method), []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        return stepper(tx)(params, state)

    params = make_params()
    state = tx.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    for _ in range(STEPS):
        params, state = step(params, state)
    assert len(traces) == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state)) == types
    finalize(params, state, method)  # a warning would be an error


@pytest.mark.usefixtures("library_promotes")
def test_scanned_and_eager_steps_are_the_compiled_ones() -> None:
    tx = sparse_optimizer(optax.adam(0.01), UNTUNED)
    wanted, step = train(tx, 9), stepper(tx)
    params = make_params()
    scanned, _ = jax.lax.scan(
        lambda carry, _: (step(*carry), None), (params, tx.init(params)), length=9
    )
    eager = params, tx.init(params)
    for _ in range(9):
        eager = step(*eager)
    assert_same(scanned, wanted, 1e-5)
    assert_same(eager, wanted, 1e-5)


def test_mapped_models_are_those_trained_alone() -> None:
    """Each has its own unit of the radius, its own state and its own support."""
    tx = sparse_optimizer(optax.sgd(0.1, momentum=0.9), UNTUNED)
    alone = [make_params(0), jax.tree.map(lambda x: 3 * x, make_params(1))]
    together = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    state = jax.vmap(tx.init)(together)
    step = jax.jit(jax.vmap(stepper(tx)))
    for _ in range(9):
        together, state = step(together, state)
    for i, params in enumerate(alone):
        wanted = train(tx, 9, params)
        assert_same(jax.tree.map(lambda x, i=i: x[i], (together, state)), wanted, 1e-5)


@pytest.mark.parametrize("base", BASES)
def test_the_pull_is_the_same_for_every_base_and_rate(base: str) -> None:
    tx = sparse_optimizer(BASES[base](), Method(0.75, Pull(schedules.linear(0.3, 5, 0.1), 100)))
    params = first = make_params()
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    supports = [np.asarray(state.support[layer]["kernel"]) for layer in ("a", "b")]
    for old, new, kept in zip(kernels(first), kernels(params), supports, strict=True):
        np.testing.assert_array_equal(new[kept], old[kept])
        np.testing.assert_allclose(new[~kept], math.exp(-0.42) * old[~kept], rtol=1e-5)


def test_e_is_as_long_as_rho_steps() -> None:
    tx, params = sparse_optimizer(optax.sgd(0.1), FIXED), make_params()
    assert length(perturbation(tx, params, tx.init(params))) == 0.0
    after, state = train(tx, 1)
    found = length(perturbation(tx, after, state))
    assert found == pytest.approx(0.5 * first_step(params), rel=1e-4)
    after, state = train(tx, MEASURE_INTERVAL)
    found = length(perturbation(tx, after, state))
    assert found == pytest.approx(0.5 * first_step(params), rel=1e-4)


def test_a_state_without_the_length_of_steps_is_refused() -> None:
    tx, params = sparse_optimizer(optax.sgd(0.1), FIXED), make_params()
    state = tx.init(params)._replace(motion=None)
    with pytest.raises(
        ValueError,
        match=r"state must come from a method that measures the steps of the base optimizer, .*"
        "got a state of one that does not measure them",
    ):
        tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    old = tx.init(params)._replace(motion=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"state.motion must have shape \(3,\), got \(2,\)"):
        tx.update(grad_fn(params), old, params, grad_fn=grad_fn)


def test_arguments_override_the_derived_numbers() -> None:
    plain = train(sparse_optimizer(optax.sgd(0.1), UNTUNED), 5)
    e, pull = UNTUNED.perturbation, UNTUNED.constraint
    same = sparse_optimizer(optax.sgd(0.1), UNTUNED, rho=e.rho, penalty=pull.penalty)
    assert_same(train(same, 5), plain)
    other = sparse_optimizer(optax.sgd(0.1), UNTUNED, rho=0.3, penalty=jnp.asarray(0.7))
    method = Method(
        UNTUNED.sparsity,
        Pull(0.7, pull.dual_update_interval),
        perturbation=replace(e, rho=0.3),
    )
    after, state = train(other, 1)
    found = length(perturbation(other, after, state))
    step, size = np.sqrt(state.motion[:2])
    assert step == pytest.approx(first_step(make_params()), rel=1e-4)
    assert found == pytest.approx(0.3 * step * (step / size / e.full_step) ** 2, rel=1e-4)
    wanted = train(sparse_optimizer(optax.sgd(0.1), method), 5)
    assert_same(train(other, 5)[0], wanted[0], 1e-6)
    with pytest.raises(ValueError, match="learning_rate must be None for a method with decoupled"):
        sparse_optimizer(optax.sgd(0.1), UNTUNED, learning_rate=0.1)


def test_injected_hyperparameters_reach_the_pull() -> None:
    make = optax.inject_hyperparams(
        lambda rho, penalty: sparse_optimizer(optax.sgd(0.1), FIXED, rho=rho, penalty=penalty)
    )
    tx = make(rho=0.5, penalty=0.2)
    params = make_params()
    state = tx.init(params)
    step = jax.jit(stepper(tx))
    plain = train(sparse_optimizer(optax.sgd(0.1), FIXED), 1)[0]
    assert_same(step(params, state)[0], plain, 1e-6)
    state.hyperparams["penalty"] = jnp.asarray(2.0)
    stronger = step(params, state)[0]
    assert length(kernels(stronger)) < length(kernels(plain))


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("at", [1, 17])
def test_a_run_resumes_with_the_same_bits(state_dtype: str | None, at: int) -> None:
    method = safe_core.safe(0.75, steps=STEPS, state_dtype=state_dtype)
    tx = sparse_optimizer(optax.adam(0.01), method)
    params, state = train(tx, at)
    saved = flax.serialization.to_bytes((params, state))
    again = flax.serialization.from_bytes((make_params(), tx.init(make_params())), saved)
    again = jax.tree.map(jnp.asarray, again)
    assert_same(train(tx, 9, *again), train(tx, 9, params, state))


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_16_bit_parameters_end_near_the_constraint(state_dtype: str | None) -> None:
    method = safe_core.safe(0.75, steps=STEPS, state_dtype=state_dtype)
    tx = sparse_optimizer(optax.sgd(0.05), method)
    params, state = train(tx, STEPS, make_params(dtype=jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    anchors = {x.dtype for x in jax.tree.leaves(state.anchor)}
    assert anchors == {jnp.dtype(jnp.bfloat16 if state_dtype else jnp.float32)}
    finalize(params, state, method)  # a warning would be an error


@pytest.mark.every_second
@pytest.mark.parametrize(
    "sparsity",
    [
        0.75,
        0.0,
        "2:4",
        safe_core.Block((2, 2), 0.5),
        {"a/kernel": safe_core.Channel(0.5), "b/kernel": 0.5},
        safe_core.Unstructured(0.75, scope="tensor", distribution="erdos_renyi_kernel"),
    ],
    ids=["fraction", "dense", "2:4", "block", "by name", "erdos-renyi"],
)
def test_a_run_of_the_steps_given_ends_on_the_constraint(sparsity: Any) -> None:
    method = safe_core.safe(sparsity, steps=60)
    params, state = train(sparse_optimizer(optax.adam(3e-3), method), 60)
    assert float(report(params, state, method).scalars()["distance"]) < 0.01
    done = finalize(params, state, method)  # a warning would be an error
    share = {0.75: 0.75, 0.0: 0.0}.get(sparsity if isinstance(sparsity, float) else None)
    if share is not None:
        zeros = sum(int((k == 0).sum()) for k in kernels(done))
        assert zeros == int(share * 192)


@pytest.mark.parametrize("sparsity", [0.75, {"a/kernel": 0.75, "b/kernel": 0.5}], ids=str)
def test_a_sparsity_that_has_not_risen_is_reported(sparsity: Any) -> None:
    method = safe_core.safe(sparsity, steps=60)
    tx = sparse_optimizer(optax.sgd(0.1), method)
    with pytest.warns(FinalizeWarning) as found:
        finalize(*train(tx, 15), method)
    (text,) = [str(w.message) for w in found]
    assert text.count("the sparsity was at") == 1
    assert "after 15 steps" in text


def test_a_schedule_by_name_alone_is_reported() -> None:
    named = {"a/kernel": schedules.linear_sparsity(0.5, steps=20), "b/kernel": 0.5}
    method = Method(named, Pull(30.0, 1))
    state = train(sparse_optimizer(optax.sgd(0.01), method), 10)
    with pytest.warns(FinalizeWarning, match=r"the sparsity was at 0.25 of 0.5 after 10"):
        finalize(*state, method)


@pytest.mark.parametrize("sparsity", [0.75, {"a/kernel": 0.75, "b/kernel": "2:4"}], ids=str)
def test_a_run_continues_with_another_number_of_steps_but_not_another_sparsity(
    sparsity: Any,
) -> None:
    first, longer = (safe_core.safe(sparsity, steps=n) for n in (20, 40))
    params, state = train(sparse_optimizer(optax.sgd(0.1), first), 20)
    params, state = train(sparse_optimizer(optax.sgd(0.1), longer), 1, params, state)
    sparse_weights(params, state, longer)
    named = {"a/kernel": 0.5, "b/kernel": "2:4"}
    other = safe_core.safe(0.5 if sparsity == 0.75 else named, steps=40)
    with pytest.raises(ValueError, match=r"its sparsity is .*, got"):
        train(sparse_optimizer(optax.sgd(0.1), other), 1, params, state)


def test_the_sparse_network_is_shown_during_the_rise() -> None:
    params, state = train(sparse_optimizer(optax.sgd(0.1), UNTUNED), 10)
    shown = sparse_weights(params, state, UNTUNED)
    assert sum(int((k == 0).sum()) for k in kernels(shown)) == 144
    figures = jax.jit(lambda p, s: report(p, s, UNTUNED).scalars())(params, state)
    assert float(figures["achieved"]) == 0.75
    assert float(figures["primal_residual"]) > 0


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_shortest_runs_end_exactly_sparse(steps: int) -> None:
    method = safe_core.safe(0.75, steps=steps)
    params, state = train(sparse_optimizer(optax.sgd(0.1), method), steps)
    assert sum(int((k == 0).sum()) for k in kernels(finalize(params, state, method))) == 144


def test_stacked_layers_are_pulled_as_layers_of_their_own() -> None:
    """Along batch axes each slice is one tensor."""
    layers = [make_params(seed)["a"]["kernel"] for seed in range(3)]
    method = safe_core.admm(safe_core.Unstructured(0.75, scope="tensor"), steps=STEPS)
    layout = safe_core.Layout((1,), (2,), (0,))
    base = optax.sgd(0.1)

    def steps(params: Any, **options: Any) -> Any:
        tx = sparse_optimizer(base, method, where=lambda path, x: True, **options)
        state = tx.init(params)
        for _ in range(12):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state.support

    stacked, support = steps({"w": jnp.stack(layers)}, layout=lambda path, x: layout)
    for i, layer in enumerate(layers):
        alone, kept = steps({"w": layer}, layout=lambda path, x: safe_core.Layout((0,), (1,)))
        np.testing.assert_array_equal(support["w"][i], kept["w"])
        np.testing.assert_allclose(stacked["w"][i], alone["w"], rtol=1e-5, atol=1e-7)
