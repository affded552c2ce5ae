"""`finalize` of JAX warns and refuses as that of PyTorch does, where values can be read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import safe_core
from safe_core import FinalizeWarning, Unstructured
from safe_core.adapters.optax import finalize, sparse_optimizer


def trained(method: Any, steps: int, **options: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(32, n)), jnp.float32) for n in (8, 4))
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(8, 16)) / 3, jnp.float32)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(16, 4)) / 4, jnp.float32)},
    }
    tx = sparse_optimizer(optax.sgd(0.1, momentum=0.9), method, **options)
    state = tx.init(params)

    def grad_fn(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean((jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"] - y) ** 2)

        return jax.grad(loss)(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_a_run_that_ends_near_the_constraint_is_silent() -> None:
    method = safe_core.safe(0.5, rho=0.05, penalty=1.0, dual_update_interval=32)
    finalize(*trained(method, 120), method)


def test_a_state_that_a_program_closes_over_is_not_read() -> None:
    method = safe_core.safe("2:4", steps=10)  # whose support could be compared if it were read
    params, state = trained(method, 10)
    inside = jax.jit(lambda params: finalize(params, state, method))(params)
    for a, b in zip(*map(jax.tree.leaves, (inside, finalize(params, state, method))), strict=True):
        np.testing.assert_array_equal(a, b)
    x = params["a"]["kernel"]
    kept = jax.jit(lambda: safe_core.project(x, 0.5).support)()
    np.testing.assert_array_equal(kept, safe_core.project(x, 0.5).support)
    jax.jit(lambda: sparse_optimizer(optax.sgd(0.1), safe_core.keep_zeros()).init(inside))()


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_arrays_of_numpy_are_trained_as_those_of_jax(state_dtype: str | None) -> None:
    method = safe_core.safe(0.5, steps=4, state_dtype=state_dtype)
    tx = sparse_optimizer(optax.sgd(0.1), method)
    params = {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.ones(4)}
    held = jax.tree.map(np.asarray, params)
    found = []
    for given in (params, held):
        state = tx.init(given)
        if given is held:
            state = jax.tree.map(np.asarray, state)
        out, state = tx.update(given, state, given, grad_fn=lambda params: params)
        found.append(jax.tree.leaves((out, state)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("steps", [0, 5])
def test_a_run_shorter_than_the_interval_is_named_at_the_callers_line(steps: int) -> None:
    method = safe_core.safe(0.5, penalty=0.1)
    params, state = trained(method, steps)
    with pytest.warns(FinalizeWarning, match=f"no dual update happened in {steps} steps") as found:
        params = finalize(params, state, method)
    assert [w.filename for w in found] == [__file__]
    finalize(params, state, method)  # on the constraint already


def test_a_weak_penalty_is_named_with_its_distance() -> None:
    method = safe_core.admm(0.9, penalty=0.0, dual_update_interval=1)
    with pytest.warns(FinalizeWarning, match=r"removes .* = 0\.\d\d of the weights \(a/kernel 0"):
        finalize(*trained(method, 3), method)


def test_a_leaf_that_becomes_zero_is_named() -> None:
    method = safe_core.magnitude(Unstructured(0.5, scope="global"))
    params, state = trained(method, 1)
    params["b"]["kernel"] = params["b"]["kernel"] * 1e-3
    with pytest.warns(FinalizeWarning, match="sets all entries to zero in b/kernel$"):
        finalize(params, state, method)


def test_an_importance_that_saw_nothing_is_named() -> None:
    source = safe_core.SquaredGradient()
    method = safe_core.magnitude(0.5, importance=source, importance_interval=4)
    params, state = trained(method, 3)
    with pytest.warns(FinalizeWarning, match="importance was never refreshed in 3 steps"):
        finalize(params, state, method)
    finalize(params, state, method, importance=None)  # P = 1 by request


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_leaves_that_are_not_finite_are_refused(bad: float) -> None:
    method = safe_core.magnitude(0.5)
    params, state = trained(method, 1)
    params["b"]["kernel"] = params["b"]["kernel"].at[1, 2].set(bad)
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity in b/kernel \(1 of 64"):
        finalize(params, state, method)


def test_a_traced_finalize_is_silent() -> None:
    method = safe_core.safe(0.5, penalty=0.1)
    params, state = trained(method, 1)
    jax.jit(lambda params, state: finalize(params, state, method))(params, state)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (params, state))
    jax.vmap(lambda params, state: finalize(params, state, method))(*stacked)


def test_a_run_over_its_steps_is_named() -> None:
    method = safe_core.admm(0.5, steps=4)
    with pytest.warns(FinalizeWarning, match="takes 8 steps, and the method was made for 4"):
        finalize(*trained(method, 8), method)
