"""`report` shows what the projected network would lose, and what to change, traced or not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digits import Digits, digits

import safe_core
from safe_core.adapters.optax import finalize, report, sparse_optimizer, sparse_weights
from safe_core.report import Report
from safe_core.schedules import cosine

METHOD = safe_core.safe(0.75, rho=0.1, penalty=0.1, dual_update_interval=2)


def start(dtype: Any = jnp.float32) -> Any:
    key = jax.random.key(0)
    return {"kernel": jax.random.normal(key, (8, 4), dtype), "bias": jnp.zeros(4, dtype)}


def loss(params: Any) -> Any:
    x = jnp.linspace(-1, 1, 48).reshape(6, 8)
    return jnp.mean((jnp.tanh(x @ params["kernel"]) + params["bias"] - jnp.eye(6, 4)) ** 2)


def trained(steps: int = 3, method: Any = METHOD) -> Any:
    tx, params = sparse_optimizer(optax.sgd(0.1), method), start()
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        params = optax.apply_updates(params, updates)
    return params, state


def test_norms_are_those_of_the_leaves() -> None:
    params, state = trained()
    found, x = report(params, state, METHOD), params["kernel"]
    off = jnp.where(state.support["kernel"], 0, x)
    (row,) = found.tensors
    assert float(row.norm) == pytest.approx(float(jnp.linalg.norm(x)), rel=1e-5)
    assert float(row.off_support) == pytest.approx(float(jnp.linalg.norm(off)), rel=1e-5)
    removed = jnp.linalg.norm(x - sparse_weights(params, state, METHOD)["kernel"])
    wanted = float(removed / jnp.linalg.norm(x))
    assert float(found.relative_distance) == pytest.approx(wanted, rel=1e-5)
    zeros = {"kernel": jnp.zeros_like(x), "bias": params["bias"]}
    assert float(report(zeros, state, METHOD).relative_distance) == 0


@pytest.mark.parametrize(
    "method", [METHOD, safe_core.safe(0.75, steps=20)], ids=["fixed", "a rising sparsity"]
)
def test_a_function_is_evaluated_at_x_and_at_the_projection(method: Any) -> None:
    params, state = trained(3, method)
    found = report(params, state, method, evaluate=loss)
    assert float(found.dense_value) == float(loss(params))
    assert float(found.sparse_value) == float(loss(sparse_weights(params, state, method)))
    assert float(found.dense_value) < float(found.sparse_value)
    assert float(report(params, state, method, evaluate=lambda _: 3).sparse_value) == 3
    assert report(params, state, method).dense_value is None


def test_a_compiled_function_returns_a_report() -> None:
    method = safe_core.safe(0.75, penalty=1e-3, dual_update_interval=2)
    params, state = trained(3, method)

    def make(params: Any, state: Any) -> Report:
        return report(params, state, method, evaluate=loss, steps=4)

    eager, compiled = make(params, state), jax.jit(make)(params, state)
    assert isinstance(compiled, Report)
    assert compiled.course == eager.course
    for key, value in eager.scalars().items():
        assert float(compiled.scalars()[key]) == pytest.approx(float(value), rel=1e-5), key
    assert [row.name for row in compiled.tensors] == ["kernel"]
    assert [item.cause for item in compiled.advice] == ["interval", "penalty"]
    assert str(compiled).startswith("step 3 of 4: distance 0.")
    stacked = jax.vmap(make)(*jax.tree.map(lambda a: jnp.stack([a, a]), (params, state)))
    assert stacked.tensors[0].distance.shape == (2,)
    assert str(stacked) == repr(stacked)
    assert jax.tree.map(lambda a: a[1], stacked).advice == compiled.advice


def test_a_traced_penalty_is_judged_as_constant() -> None:
    method = safe_core.safe(0.75, penalty=cosine(0.1, 100), dual_update_interval=2)
    params, state = trained(3, method)

    @jax.jit
    def make(params: Any, state: Any, penalty: Any) -> Report:
        return report(params, state, method, penalty=penalty, steps=4)

    found = make(params, state, 0.5)
    assert found.course.penalty is None
    assert found.course.share(3) == 0.75
    assert report(params, state, method, penalty=0.5).course.length is None
    assert report(params, state, method).course.length == 100


@pytest.mark.parametrize("value", [None, jnp.ones(2), "0.5", (1.0, 2.0)])
def test_a_function_that_returns_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="evaluate must return one number, got"):
        report(*trained(), METHOD, evaluate=lambda _: value)


def test_wrong_arguments_are_refused() -> None:
    params, state = trained()
    with pytest.raises(TypeError, match=r"evaluate must be a function of the parameters, got 0\.5"):
        report(params, state, METHOD, evaluate=0.5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        report(params, state, METHOD, steps=0)


# Runs on digits


def reports(task: Digits, method: Any, steps: int | None, dtype: Any = jnp.float32) -> list[Report]:
    """Train LeNet-300-100 on digits, and return a report after each tenth of the run."""
    params = [
        {"kernel": jnp.asarray(weight, dtype), "bias": jnp.asarray(bias, dtype)}
        for weight, bias in task.layers
    ]
    inputs, labels = jnp.asarray(task.inputs, dtype), jnp.asarray(task.labels, jnp.int32)
    rate = optax.cosine_decay_schedule(0.1, len(task.order))
    tx = sparse_optimizer(optax.sgd(rate, momentum=0.9), method)

    def logits(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    def step(carried: Any, batch: Any) -> Any:
        params, state = carried

        def batch_loss(params: Any) -> Any:
            scores = logits(params, inputs[batch])
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels[batch]).mean()

        updates, state = tx.update(
            jax.grad(batch_loss)(params), state, params, grad_fn=jax.grad(batch_loss)
        )
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def tenth(carried: Any, batches: Any) -> Any:
        carried, _ = jax.lax.scan(step, carried, batches)
        return carried, report(*carried, method, evaluate=accuracy, steps=steps)

    def accuracy(params: Any) -> Any:
        return jnp.mean(logits(params, inputs).argmax(axis=1) == labels)

    carried, found = (params, tx.init(params)), []
    for batches in jnp.asarray(task.order, jnp.int32).reshape(10, -1, task.order.shape[1]):
        carried, made = tenth(carried, batches)
        found.append(made)
    return found


def causes(found: list[Report]) -> list[list[str]]:
    return [[item.cause for item in made.advice] for made in found]


@pytest.mark.long  # PyTorch makes the same run, and the advice reads the same figures.
def test_a_good_run_is_on_course_at_every_tenth() -> None:
    task = digits(epochs=30)
    found = reports(task, safe_core.safe(0.95, steps=len(task.order)), None)
    assert causes(found) == [[]] * 10
    assert float(found[0].relative_distance) > 0.5 > 0.01 > float(found[-1].relative_distance)
    assert float(found[1].sparse_value) < 0.9 * float(found[1].dense_value)
    assert float(found[-1].sparse_value) > 0.99


T = 380  # 20 epochs
FAILURES = {
    "a small penalty": (safe_core.safe(0.95, dual_update_interval=8), T, "penalty"),
    "a run a third as long": (safe_core.safe(0.95, steps=3 * T), T, "length"),
    "few dual updates": (safe_core.safe(0.95, steps=T, dual_update_interval=38), None, "interval"),
    "a parameter without entries": (safe_core.magnitude(0.9995), T, "tensor"),
    "a large radius": (safe_core.safe(0.95, steps=T, rho=1e30), None, "diverged"),
}


# The rules are those of PyTorch, whose tests run these failures in every check.
REPEATED = ("penalty", "length", "tensor")
FAILED = [
    pytest.param(*case, id=name, marks=pytest.mark.long if case[-1] in REPEATED else ())
    for name, case in FAILURES.items()
]


@pytest.mark.parametrize(("method", "steps", "cause"), FAILED)
def test_a_failure_on_purpose_names_its_cause(method: Any, steps: int | None, cause: str) -> None:
    assert causes(reports(digits(epochs=20), method, steps))[-2] == [cause]


def test_16_bit_leaves_are_known_by_name() -> None:
    params = start(jnp.bfloat16)
    state = sparse_optimizer(optax.sgd(0.1), METHOD).init(params)
    assert report(params, state, METHOD).course.narrow == ("kernel",)
    assert report(*trained(), METHOD).course.narrow == ()


def test_a_report_shows_the_distance_that_finalize_removes() -> None:
    params, state = trained()
    distance = float(report(params, state, METHOD).relative_distance)
    with pytest.warns(safe_core.FinalizeWarning, match=f"= {distance:.2f} of the weights"):
        done = finalize(params, state, METHOD)
    np.testing.assert_array_equal(report(done, state, METHOD).relative_distance, 0)
