"""Sassha in JAX: every step is that of plain NumPy, alone and as the base of SAFE."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sassha_reference import CASES, PLAIN, UNDER_SAFE, Problem, Recipe

import safe_core
from safe_core import Layout
from safe_core.adapters.optax import (
    SasshaState,
    sassha,
    sparse_optimizer,
    value_and_gradients,
)
from safe_core.random_numbers import rademacher

pytestmark = pytest.mark.usefixtures("strict_promotion")

PROBLEM = Problem.make()
OUTPUT_INPUT = Layout(input_axes=(1,), output_axes=(0,))
# Leaves are sorted by name: the weight comes first, as in the reference.
START = {"0": jnp.asarray(PROBLEM.start[0]), "1": jnp.asarray(PROBLEM.start[1])}


def test_the_state_may_be_donated() -> None:
    tx, grad_fn = sassha(0.1), jax.grad(loss)

    def step(params: Any, state: Any) -> Any:
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[1]

    state = tx.init(START)
    found = jax.jit(step, donate_argnums=1)(START, state)
    assert int(found.count) == 1


def draw(seed: int = 0) -> Any:
    return lambda c: rademacher(PROBLEM.start, seed, c)


def loss(params: Any, rows: Any = slice(None)) -> jax.Array:
    inputs, targets = (jnp.asarray(a)[rows] for a in (PROBLEM.inputs, PROBLEM.targets))
    residual = inputs @ params["0"].T + params["1"][None] - targets
    return jnp.log(jnp.cosh(residual)).sum() / len(residual)


grad_fn = jax.grad(loss)


def transformation(recipe: Recipe, **settings: Any) -> optax.GradientTransformationExtraArgs:
    given = {
        "learning_rate": recipe.rate[0],
        "b1": recipe.betas[0],
        "b2": recipe.betas[1],
        "rho": recipe.rho[0],
        "weight_decay": recipe.decay[0],
        "mask": {"0": True, "1": recipe.decay[1] > 0},
        "hessian_interval": recipe.interval,
        "eps": recipe.eps,
        "power": recipe.power,
        "bias_correction": recipe.correction,
        "ascent": "momentum" if recipe.momentum else "gradient",
    }
    return sassha(**{**given, **settings})


def stepper(tx: Any, grad_fn: Any = grad_fn) -> Any:
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def counting(step: Any) -> tuple[Any, list[None]]:
    """The compiled step, and a list that grows by one whenever JAX traces it."""
    traces: list[None] = []

    def traced(params: Any, state: Any) -> Any:
        traces.append(None)
        return step(params, state)

    return jax.jit(traced), traces


def train(tx: Any, steps: int, params: Any = START) -> Any:
    state, step = tx.init(params), jax.jit(stepper(tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_near(params: Any, wanted: Any, rtol: float = 1e-10) -> None:
    for name, b in zip("01", wanted, strict=True):
        np.testing.assert_allclose(params[name], b, rtol=rtol, atol=1e-13)


@pytest.mark.every_second
@pytest.mark.parametrize("name", list(CASES))
def test_every_step_is_that_of_numpy(name: str) -> None:
    recipe = CASES[name]
    tx = transformation(recipe, seed=3)
    params, state = START, tx.init(START)
    step, traces = counting(stepper(tx))
    for point in recipe.steps(PROBLEM, draw(3)):
        params, state = step(params, state)
        assert_near(params, point)
    assert len(traces) == 1
    assert (int(state.count), int(state.hessian_count)) == (
        recipe.length,
        -(-recipe.length // recipe.interval),
    )


@pytest.mark.every_second
@pytest.mark.parametrize("name", list(UNDER_SAFE))
def test_every_step_under_a_method_is_that_of_numpy(name: str) -> None:
    method, safe = UNDER_SAFE[name]
    tx = sparse_optimizer(
        transformation(PLAIN), method, where={"0": True, "1": False}, layout=OUTPUT_INPUT
    )
    params, state = START, tx.init(START)
    step, traces = counting(stepper(tx))
    first = state.support["0"]
    for *point, support in safe.steps(PROBLEM, PLAIN, draw()):
        params, state = step(params, state)
        assert_near(params, point)
        np.testing.assert_array_equal(state.support["0"], support)
    assert (first != support).any(), "the support must move to be tested"
    assert len(traces) == 1


def test_a_sum_of_gradients_that_is_not_due_counts_once() -> None:
    e = safe_core.SAM(0.1, interval=2)
    points = (
        safe_core.Evaluation(safe_core.Point.X),
        safe_core.Evaluation(safe_core.Point.PERTURBED, "add"),
    )
    method = safe_core.Method(0.0, safe_core.AtEnd(), perturbation=e, evaluations=points)
    where = {"0": True, "1": False}
    every = transformation(PLAIN, hessian_interval=1)
    tx = sparse_optimizer(every, method, where=where, layout=OUTPUT_INPUT)
    params, state = train(tx, 1)
    before = state.base.hessian["0"]
    _, state = jax.jit(stepper(tx))(params, state)
    # The second step does not perturb, so it has the gradient and the product at x alone.
    z = draw()(1)
    x = [np.asarray(params[name]) for name in "01"]
    wanted = 0.99 * before + 0.01 * np.abs(z[0] * PROBLEM.product(x, z)[0])
    np.testing.assert_allclose(state.base.hessian["0"], wanted, rtol=1e-12)


def test_jit_scan_eager_and_micro_batches_agree() -> None:
    tx = transformation(Recipe(interval=2))
    jitted, _ = train(tx, 4)
    params, state = START, tx.init(START)
    for _ in range(4):
        params, state = stepper(tx)(params, state)
    step = stepper(tx)
    start = (START, tx.init(START))
    scanned = jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=4)[0][0]
    in_parts = value_and_gradients(loss, micro_batches=4)
    parts, state = START, tx.init(START)
    for _ in range(4):
        _, gradients, at = in_parts(parts, jnp.arange(20))
        updates, state = tx.update(gradients, state, parts, grad_fn=at)
        parts = optax.apply_updates(parts, updates)
    for found in (params, scanned, parts):
        assert_near(found, [jitted["0"], jitted["1"]], rtol=1e-12)


def test_a_resumed_run_has_the_same_bits() -> None:
    tx = transformation(Recipe(interval=4))
    params, state = train(tx, 6)
    step = jax.jit(stepper(tx))
    leaves, treedef = jax.tree.flatten((params, state))
    kept = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    for _ in range(6):
        params, state = step(params, state)
        kept = step(*kept)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)


def test_schedules_and_injected_numbers_are_those_at_the_step() -> None:
    rates, radii, powers = ([v * (1 + t) for t in range(4)] for v in (0.01, 0.05, 0.2))
    look_up = lambda table: lambda t: jnp.asarray(table)[t]  # noqa: E731
    scheduled = transformation(
        Recipe(interval=2), learning_rate=look_up(rates), rho=look_up(radii), power=look_up(powers)
    )
    params, state = START, scheduled.init(START)
    other = START
    for numbers in zip(rates, radii, powers, strict=True):
        names = ("learning_rate", "rho", "power")
        tx = transformation(Recipe(interval=2), **dict(zip(names, numbers, strict=True)))
        updates, _ = tx.update(grad_fn(other), state, other, grad_fn=grad_fn)
        other = optax.apply_updates(other, updates)
        params, state = stepper(scheduled)(params, state)
        assert_near(params, [other["0"], other["1"]], rtol=1e-13)


@pytest.mark.usefixtures("library_promotes")
def test_injected_hyperparameters_may_be_traced() -> None:
    tx = optax.inject_hyperparams(sassha)(learning_rate=0.02, rho=0.1, b2=0.99, eps=1e-3)
    found, _ = train(tx, 12)
    wanted, _ = train(sassha(learning_rate=0.02, rho=0.1, b2=0.99, eps=1e-3), 12)
    assert_near(found, [wanted["0"], wanted["1"]], rtol=1e-6)


def test_members_of_an_ensemble_are_trained_as_alone() -> None:
    def run(rate: Any) -> Any:
        tx = transformation(Recipe(interval=2), learning_rate=rate)
        step = stepper(tx)
        start = (START, tx.init(START))
        return jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=3)[0][0]

    members = jax.vmap(run)(jnp.asarray([0.01, 0.02]))
    wanted, _ = train(transformation(Recipe(interval=2)), 3)
    assert_near({k: v[1] for k, v in members.items()}, [wanted["0"], wanted["1"]], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("single_precision")
def test_dtypes_are_kept(dtype: Any) -> None:
    params = {name: jnp.asarray(np.asarray(x), dtype) for name, x in START.items()}
    tx = transformation(Recipe(interval=2))

    def low(params: Any) -> jax.Array:
        return jnp.sum(params["0"].astype(jnp.float32) ** 2) + jnp.sum(
            params["1"].astype(jnp.float32) ** 2
        )

    state, (step, traces) = tx.init(params), counting(stepper(tx, jax.grad(low)))
    for _ in range(3):
        params, state = step(params, state)
    for leaf in jax.tree.leaves((params, state.mu, state.hessian)):
        assert leaf.dtype == dtype
    assert len(traces) == 1


def test_momentum_needs_no_gradient_at_x() -> None:
    tx = transformation(Recipe(momentum=True))
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), START)
    updates, _ = tx.update(nothing, tx.init(START), START, grad_fn=grad_fn)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number of at least 0, got -1"),
        ({"b2": 1.0}, r"betas\[1\] must be in \[0, 1\), got 1"),
        ({"rho": jnp.ones(2)}, r"rho must be a scalar, got shape \(2,\)"),
        ({"hessian_interval": 0}, "hessian_interval must be at least 1, got 0"),
        ({"power": "half"}, "power must be a Python number, got 'half'"),
        ({"bias_correction": "no"}, "bias_correction must be one of"),
        ({"ascent": "up"}, "ascent must be one of 'gradient', 'momentum', got 'up'"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sassha(**settings)


def test_missing_arguments_are_named() -> None:
    tx, gradients = transformation(Recipe()), grad_fn(START)
    state = tx.init(START)
    with pytest.raises(ValueError, match="params must be passed"):
        tx.update(gradients, state, grad_fn=grad_fn)
    with pytest.raises(ValueError, match="because sassha differentiates it, got None"):
        tx.update(gradients, state, START)
    with pytest.raises(TypeError, match="because sassha differentiates it, got 3"):
        tx.update(gradients, state, START, grad_fn=3)
    with pytest.raises(ValueError, match="what grad_fn returns must have the structure of params"):
        tx.update(gradients, state, START, grad_fn=lambda params: params["0"])
    with pytest.raises(ValueError, match="mask must have the structure of params"):
        transformation(Recipe(), mask={"0": True}).update(gradients, state, START, grad_fn=grad_fn)


def test_masked_parameters_are_refused() -> None:
    tx = optax.multi_transform({"a": sassha(), "b": optax.sgd(0.1)}, {"0": "a", "1": "b"})
    with pytest.raises(ValueError, match=r"params must not be masked, .* choose what decays"):
        tx.init(START)


def test_a_base_that_perturbs_is_refused_under_a_method() -> None:
    method = safe_core.safe(0.5, steps=10)
    where = {"0": True, "1": False}
    tx = sparse_optimizer(sassha(), method, where=where, layout=OUTPUT_INPUT)
    with pytest.raises(ValueError, match="rho of sassha must be the number 0 under sparse_opt"):
        stepper(tx)(START, tx.init(START))
    tx = sparse_optimizer(
        optax.chain(optax.clip(1.0), sassha(rho=0)),
        safe_core.admm(0.5, steps=10),
        where=where,
        layout=OUTPUT_INPUT,
    )
    with pytest.raises(ValueError, match=r"grad_fn must be .*because base multiplies by the"):
        tx.update(grad_fn(START), tx.init(START), START)
    _, state = train(tx, 2)
    assert isinstance(state.base[1], SasshaState)
