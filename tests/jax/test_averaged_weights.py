"""Averaged parameters, by EMA or schedule-free, become exactly sparse in JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import schedule_free, schedule_free_eval_params, schedule_free_sgd
from short_runs import short_run

import safe_core
from safe_core.adapters.optax import finalize, find_state, sparse_optimizer, sparse_weights

METHOD = safe_core.safe(0.75, rho=0.05, penalty=0.1, dual_update_interval=4)
X = jax.random.normal(jax.random.key(1), (64, 8))
Y = (X @ jax.random.normal(jax.random.key(2), (8, 4))).argmax(1)


def loss(params: Any) -> Any:
    scores = X @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, Y).mean()


def start() -> Any:
    return {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.zeros(4)}


def run(tx: Any, steps: int, decay: float = 0.9) -> Any:
    """Train; return parameters, their moving average and the state."""

    @jax.jit
    def whole(params: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            params, average, state = carry
            gradients = jax.grad(loss)
            updates, state = tx.update(gradients(params), state, params, grad_fn=gradients)
            params = optax.apply_updates(params, updates)
            average = optax.incremental_update(params, average, 1 - decay)
            return (params, average, state), None

        return jax.lax.scan(body, (params, params, tx.init(params)), length=steps)[0]

    return whole(start())


def zeros_of(params: Any) -> int:
    return int((params["kernel"] == 0).sum())


def assert_kept(sparse: Any, mean: Any) -> None:
    kernel = sparse["kernel"]
    assert zeros_of(sparse) == 24
    np.testing.assert_array_equal(kernel, jnp.where(kernel == 0, 0, mean["kernel"]))
    np.testing.assert_array_equal(sparse["bias"], mean["bias"])


@short_run
def test_a_moving_average_is_finalized_in_place_of_the_parameters() -> None:
    rate = optax.cosine_decay_schedule(0.1, 200)
    params, average, state = run(sparse_optimizer(optax.sgd(rate, momentum=0.9), METHOD), 200)
    assert zeros_of(average) == 0
    assert (average["kernel"] != params["kernel"]).any()
    assert_kept(finalize(average, state, METHOD), average)


@short_run
def test_the_parameters_that_schedule_free_evaluates_are_finalized() -> None:
    params, _, state = run(sparse_optimizer(schedule_free_sgd(0.3), METHOD), 600)
    mean = schedule_free_eval_params(find_state(state).base, params)
    assert (mean["kernel"] != params["kernel"]).any()
    shown = sparse_weights(mean, state, METHOD)
    assert_kept(shown, mean)
    final = finalize(mean, state, METHOD)
    np.testing.assert_array_equal(final["kernel"], shown["kernel"])
    assert float(loss(final)) < 1.0
    # The other order projects what is then averaged with dense weights.
    late = schedule_free_eval_params(find_state(state).base, sparse_weights(params, state, METHOD))
    assert zeros_of(late) < 24


def test_sparse_optimizer_inside_schedule_free_updates_z_and_u_from_other_weights() -> None:
    """The docs say so: the anchor of the wrong order is not that of the trained parameters."""
    tx = schedule_free(sparse_optimizer(optax.sgd(0.3), METHOD), 0.3)
    params, _, state = run(tx, 5)
    right, _, state_of_right = run(sparse_optimizer(schedule_free_sgd(0.3), METHOD), 5)
    anchors = [find_state(s).anchor["kernel"] for s in (state, state_of_right)]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(*anchors, rtol=1e-3)
    assert jnp.isfinite(params["kernel"]).all()
    assert right["kernel"].shape == (8, 4)


@pytest.mark.parametrize(
    "method",
    [
        safe_core.safe(0.75, steps=100),
        safe_core.admm(0.75, penalty=0.1, decoupled=True),
        safe_core.Method(0.75, safe_core.Pull(0.1, 4)),
    ],
    ids=["untuned", "decoupled", "pull"],
)
def test_a_move_after_the_base_step_is_refused_where_the_base_averages(method: Any) -> None:
    params = {"kernel": jnp.ones((8, 4))}
    rate = 0.1 if method.plan().needs_learning_rate else None
    tx = sparse_optimizer(optax.chain(schedule_free_sgd(0.3)), method, learning_rate=rate)
    with pytest.raises(ValueError, match=r"to the gradient .* ScheduleFreeState, which"):
        tx.init(params)
