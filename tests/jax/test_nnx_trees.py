"""States of NNX are read with and without their variables."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import safe_core
from safe_core.adapters.jax.flax import nnx_finalize
from safe_core.adapters.optax import (
    check_sparsity,
    coverage,
    finalize,
    report,
    sassha,
    sparse_optimizer,
    sparse_weights,
)

# The runs end at their first step.
pytestmark = pytest.mark.filterwarnings("ignore:finalize:UserWarning")

METHOD = safe_core.admm(0.5, steps=100)
SAFE = safe_core.safe(0.5, steps=100)
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def loss(model: Any) -> Any:
    return jnp.mean(model(X) ** 2)


def made(method: Any = METHOD, **options: Any) -> tuple[Any, Any]:
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    tx = sparse_optimizer(optax.adam(0.1), method, **options)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(wanted)))


@pytest.mark.parametrize("read", [finalize, sparse_weights])
def test_a_projection_keeps_the_variables_that_it_is_given(read: Any) -> None:
    model, optimizer = made()
    raw, state = nnx.state(model, nnx.Param), optimizer.opt_state
    pure = read(nnx.as_pure(raw), nnx.as_pure(state), METHOD)
    same(read(nnx.as_pure(raw), state, METHOD), pure)
    got = read(raw, state, METHOD, importance=jax.tree.map(jnp.ones_like, raw))
    assert isinstance(got["kernel"], nnx.Param)
    same(nnx.as_pure(got), pure)
    nnx.update(model, got)
    check_sparsity(nnx.state(model, nnx.Param), 0.5)
    assert len(coverage(raw).sparse) == 1


def test_a_report_evaluates_the_state_that_it_is_given() -> None:
    model, optimizer = made()
    graph, raw = nnx.split(model)
    evaluate = lambda params: loss(nnx.merge(graph, params))  # noqa: E731
    found = report(raw, optimizer.opt_state, METHOD, evaluate=evaluate)
    compiled = jax.jit(lambda params, state: report(params, state, METHOD).scalars())
    distance = compiled(raw, optimizer.opt_state)["distance"]
    assert float(distance) == pytest.approx(float(found.scalars()["distance"]))
    assert float(found.dense_value) == pytest.approx(float(loss(model)))
    nnx_finalize(model, optimizer, METHOD)
    assert float(found.sparse_value) == pytest.approx(float(loss(model)))


def test_flags_and_importances_may_hold_variables() -> None:
    raw = nnx.state(made()[0], nnx.Param)
    flags = jax.tree.map(lambda x: x.ndim > 1, raw)
    ones = jax.tree.map(jnp.ones_like, raw)
    _, optimizer = made(where=flags, importance=ones)
    assert optimizer.opt_state.setup.names == ("kernel",)


@pytest.mark.parametrize("base", ["sparse_optimizer", "sassha"])
def test_a_grad_fn_of_modules_is_told_that_it_gets_a_state(base: str) -> None:
    model, optimizer = made(SAFE)
    if base == "sassha":
        optimizer = nnx.Optimizer(model, sassha(), wrt=nnx.Param)
    with pytest.raises(TypeError, match="'State' object is not callable") as caught:
        optimizer.update(model, nnx.grad(loss)(model), grad_fn=nnx.grad(loss))
    told = "an nnx.State of the parameters, not with the module. nnx_value_and_gradients"
    assert told in "".join(caught.value.__notes__)


def test_a_grad_fn_may_return_variables_but_no_pair() -> None:
    model, optimizer = made(SAFE)
    graph, _ = nnx.split(model)
    gradients = nnx.grad(loss)(model)
    both = lambda state: nnx.value_and_grad(loss)(nnx.merge(graph, state))  # noqa: E731
    with pytest.raises(ValueError, match=r"^what grad_fn returns .* return the gradients only$"):
        optimizer.update(model, gradients, grad_fn=both)
    optimizer.update(model, gradients, grad_fn=lambda state: both(state)[1])


def test_a_missing_grad_fn_names_the_way_of_nnx() -> None:
    model, optimizer = made(SAFE)
    with pytest.raises(ValueError, match=r"^grad_fn .*perturbed.*; nnx_value_and") as caught:
        optimizer.update(model, nnx.grad(loss)(model))
    assert "TrainState" not in str(caught.value)


def test_a_state_is_read_without_importing_flax() -> None:
    program = (
        "import sys, jax.numpy as jnp, optax, safe_core\n"
        "from safe_core.adapters.optax import *\n"
        "params, method = {'kernel': jnp.ones((2, 2))}, safe_core.magnitude(0.5)\n"
        "state = sparse_optimizer(optax.sgd(0.1), method).init(params)\n"
        "report(params, state, method), sparse_weights(params, state, method)\n"
        "assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
