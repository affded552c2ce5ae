"""`sparse_weights` gives what `finalize` would during training, traced or not, and never warns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import safe_core
from safe_core.adapters.optax import finalize, sparse_optimizer, sparse_weights

METHODS = {
    "safe": safe_core.safe(0.75, rho=0.1, penalty=0.1, dual_update_interval=2),
    "importance": safe_core.safe(
        0.75, rho=0.1, penalty=0.1, dual_update_interval=2, importance=safe_core.SquaredGradient()
    ),
    "a rising sparsity": safe_core.gmp(safe_core.schedules.cubic(0.75, steps=99)),
}


def start(seed: Any = 0) -> Any:
    return {"kernel": jax.random.normal(jax.random.key(seed), (8, 4)), "bias": jnp.zeros(4)}


def loss(params: Any) -> Any:
    x = jnp.linspace(-1, 1, 48).reshape(6, 8)
    return jnp.mean((jnp.tanh(x @ params["kernel"]) + params["bias"] - jnp.eye(6, 4)) ** 2)


def trained(tx: Any, params: Any, steps: int) -> Any:
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(got: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("steps", [0, 3])
def test_it_gives_what_finalize_would(method: Any, steps: int) -> None:
    params, state = trained(sparse_optimizer(optax.sgd(0.1), method), start(), steps)
    shown = sparse_weights(params, state, method)
    assert int((shown["kernel"] == 0).sum()) == 24
    assert_same(jax.jit(lambda p, s: sparse_weights(p, s, method))(params, state), shown)
    if not steps:
        return
    with pytest.warns(safe_core.FinalizeWarning):
        assert_same(finalize(params, state, method), shown)


def test_the_last_importance_decides() -> None:
    method = METHODS["importance"]
    params, state = trained(sparse_optimizer(optax.sgd(0.1), method), start(), 4)
    shown = sparse_weights(params, state, method)
    by_magnitude = sparse_weights(params, state, method, importance=None)
    assert (shown["kernel"] != by_magnitude["kernel"]).any()
    given = {"kernel": jnp.ones((8, 4)).at[:2].set(1e6)}
    kept = sparse_weights(params, state, method, importance=given)["kernel"]
    assert (kept[:2] != 0).all()


def test_members_of_an_ensemble_are_shown_one_by_one() -> None:
    method = METHODS["safe"]
    tx = sparse_optimizer(optax.sgd(0.1), method)
    params, state = jax.vmap(lambda seed: trained(tx, start(seed), 3))(jnp.arange(3))
    shown = jax.vmap(lambda p, s: sparse_weights(p, s, method))(params, state)
    assert (shown["kernel"] == 0).sum(axis=(1, 2)).tolist() == [24] * 3
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        sparse_weights(params, state, method)


def test_a_step_can_evaluate_it_inside_the_compiled_loop() -> None:
    method = METHODS["safe"]
    tx = sparse_optimizer(optax.sgd(0.1), method)

    @jax.jit
    def run(params: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params)
            updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss))
            params = optax.apply_updates(params, updates)
            return (params, state), loss(sparse_weights(params, state, method))

        return jax.lax.scan(body, (params, tx.init(params)), length=4)

    (params, state), losses = run(start())
    np.testing.assert_allclose(losses[-1], loss(sparse_weights(params, state, method)), rtol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    method = METHODS["safe"]
    params, state = trained(sparse_optimizer(optax.sgd(0.1), method), start(), 1)
    params["kernel"] = params["kernel"].at[0, 0].set(value)
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in kernel"):
        sparse_weights(params, state, method)
