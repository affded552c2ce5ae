"""An argument of a wrong kind is refused by the name of the leaf and of the rule."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import safe_core
from safe_core.adapters.jax import loss_surface
from safe_core.adapters.jax.flax import to_torch_names
from safe_core.adapters.optax import (
    check_sparsity,
    finalize,
    fixed_support,
    hessian_diagonal,
    report,
    sparse_optimizer,
    value_and_gradients,
)

# The runs end far from the constraint, which `finalize` may warn about.
pytestmark = pytest.mark.filterwarnings("ignore:finalize:UserWarning")

METHOD = safe_core.admm(0.5)
PARAMS = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
BIG = {f"layer_{i}": PARAMS for i in range(100)}
KEY = jax.random.key(0)
COUNTED = {**PARAMS, "count": jnp.asarray(3)}
MLP = eqx.nn.MLP(2, 2, 2, 1, key=KEY)
SECOND = safe_core.admm(0.5, importance=safe_core.SecondMoment())


def optimizer(base: Any = None, method: Any = METHOD, **options: Any) -> Any:
    return sparse_optimizer(optax.sgd(0.1) if base is None else base, method, **options)


def scheduled(**options: Any) -> Any:
    tx = optimizer(method=safe_core.safe(0.5, steps=10), **options)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda params: PARAMS)


def update(params: Any, gradients: Any) -> Any:
    tx = optimizer()
    return tx.update(gradients, tx.init(params), params)


def around(base: Any) -> Any:
    """Finalize after a step of lookahead around our optimizer."""
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(base, 2, 0.5)
    state = tx.init(params)
    _, state = tx.update(PARAMS, state, params)
    return finalize(params, state, METHOD)


def reset() -> Any:
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(optimizer(), 2, 0.5, reset_state=True)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(PARAMS, state, params)


def fixed(params: Any, **options: Any) -> Any:
    tx = fixed_support(optax.sgd(0.1))
    given = {**PARAMS, "kernel": jnp.eye(4)}
    return fixed_support(optax.sgd(0.1), **options).update(params, tx.init(given), params)


def loss(params: Any, batch: Any) -> Any:
    return jnp.sum(params["kernel"]) * jnp.sum(batch)


ERRORS = {
    "a function among the params": (
        lambda: optimizer().init(MLP),
        r"^params must hold arrays, got .* at activation: .*eqx\.filter\(model, eqx\.is_inexact",
    ),
    "a Python number": (
        lambda: optimizer().init({**PARAMS, "scale": 2.0}),
        "^params must hold arrays, got 2.0 at scale",
    ),
    "a key": (
        lambda: optimizer().init({**PARAMS, "key": KEY}),
        "^params must hold numeric arrays, got a PRNG key at key",
    ),
    "a key in an export": (
        lambda: to_torch_names({"params": PARAMS, "rng": KEY}),
        "^variables must hold numeric arrays, got a PRNG key at rng",
    ),
    "a key in a check": (
        lambda: check_sparsity({**PARAMS, "key": KEY}, 0.5),
        "^params must hold numeric arrays, got a PRNG key at key",
    ),
    "a key as importance": (
        lambda: optimizer(importance={"kernel": KEY, "bias": None}).init(PARAMS),
        "^importance must hold numeric arrays, got a PRNG key at kernel",
    ),
    "8 bits": (
        lambda: optimizer().init({"kernel": jnp.ones((4, 4), jnp.float8_e4m3fn)}),
        "^kernel must be real floating with 16, 32 or 64 bits to be sparse, got float8",
    ),
    "no gradient": (
        lambda: update(COUNTED, {**PARAMS, "count": None}),
        r"^updates must .* got None for count, a leaf of dtype int\d\d.*eqx\.is_inexact_array",
    ),
    "a gradient of float0": (
        lambda: update(COUNTED, {**PARAMS, "count": np.zeros((), jax.dtypes.float0)}),
        r"^updates must hold a floating gradient .*float0.* for count",
    ),
    "gradients of another model": (
        lambda: update(PARAMS, BIG),
        r"^updates must have the structure of params, but lacks 'bias' and has 'layer_0/bias' "
        r"in addition \(200 more paths differ\)$",
    ),
    "gradients in another container": (
        lambda: update([PARAMS], (PARAMS,)),
        "^updates .*but has tuple in place of list at the root$",
    ),
    "the state of another model": (
        lambda: finalize(BIG, optimizer().init(PARAMS), METHOD),
        r"^params must have the structure .*lacks 'bias' and has 'layer_0/bias' in addition \(",
    ),
    "the state of another model at a step": (
        lambda: optimizer().update(BIG, optimizer().init(PARAMS), BIG),
        r"^params must have the structure .*lacks 'bias' and has 'layer_0/bias' in addition \(",
    ),
    "importance of another model": (
        lambda: optimizer(importance=BIG).init(PARAMS),
        "^importance must have the structure .*lacks 'bias' and has 'layer_0/bias'",
    ),
    "MultiSteps as a base": (
        lambda: optimizer(optax.MultiSteps(optax.sgd(0.1), 2)),
        r"^base must be .*accumulates gradients.*micro_batches",
    ),
    "MultiSteps as a transformation": (
        lambda: optimizer(
            optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
        ).init(PARAMS),
        r"^base must take a step at every update, .*in the state MultiStepsState: .*micro_batches",
    ),
    "apply_every in a base": (
        lambda: optimizer(optax.chain(optax.sgd(0.1), optax.apply_every(4))).init(PARAMS),
        r"^base must take a step at every update, .*in the state ApplyEvery",
    ),
    "a schedule of arrays": (
        lambda: scheduled(penalty=lambda step: jnp.ones(4)),
        r"^penalty at a step must be a scalar, got shape \(4,\)",
    ),
    "a schedule below zero": (
        lambda: scheduled(penalty=lambda step: -1.0),
        r"^penalty at a step must be a finite number of at least 0, got -1\.0",
    ),
    "a schedule of nothing": (
        lambda: scheduled(rho=lambda step: None),
        "^rho must be a number at every step, got None from <function",
    ),
    "a constructor as a base": (
        lambda: optimizer(optax.sgd),
        r"^base must be .*pass its result, such as optax\.sgd\(0\.1\)",
    ),
    "MultiSteps as a base after training": (
        lambda: fixed_support(optax.MultiSteps(optax.sgd(0.1), 2)),
        r"^base must be .*accumulates gradients",
    ),
    "where returns a string": (
        lambda: optimizer(where=lambda path, leaf: "no").init(PARAMS),
        "^where must be a function that returns True or False.*got 'no' for bias",
    ),
    "where returns an array": (
        lambda: optimizer(where=lambda path, leaf: jnp.any(leaf > 0)).init(PARAMS),
        r"^where must .*got .* for bias \(use the path, the shape and the dtype",
    ),
    "where returns nothing": (
        lambda: optimizer(where=lambda path, leaf: None).init(PARAMS),
        "^where must .*got None for bias",
    ),
    "lookahead as a base": (
        lambda: optimizer(optax.lookahead(optax.sgd(0.1), 2, 0.5)).init(PARAMS),
        r"^base must work on one copy .*optax\.lookahead",
    ),
    "params of lookahead": (
        lambda: optimizer().init(optax.LookaheadParams.init_synced(PARAMS)),
        "^params must hold one copy .*LookaheadParams.*lookahead neither within base nor around",
    ),
    "lookahead around": (lambda: around(optimizer()), "^params must hold one copy .*params.slow"),
    "lookahead around two passes": (
        lambda: around(optimizer(method=safe_core.safe(0.5))),
        r"^grad_fn must be passed .*such as optax\.lookahead",
    ),
    "lookahead that resets": (
        reset,
        r"^state\.support of kernel must be bool, .* got int\d\d.*optax\.lookahead",
    ),
    "lookahead after training": (
        lambda: fixed_support(optax.lookahead(optax.sgd(0.1), 2, 0.5)).init(PARAMS),
        "^base must work on one copy",
    ),
    "moments of a masked leaf": (
        lambda: optimizer(
            optax.masked(optax.adam(0.1), {"kernel": False, "bias": True}), SECOND
        ).init(PARAMS),
        "^base must keep second moments of every sparse leaf .*none for kernel",
    ),
    "a fixed support of another model": (lambda: fixed(BIG), "lacks 'bias' and has 'layer_0/bias'"),
    "a fixed support of other leaves": (
        lambda: fixed(PARAMS, where=lambda *_: True), "^where must select .*lacks bias, got True"
    ),
    "a fixed support of other shapes": (
        lambda: fixed({"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(4)}),
        r"^params must have the shapes .*\(4, 4\) for kernel, got \(2, 4\)",
    ),
    "a state of training after it": (
        lambda: fixed_support(optax.sgd(0.1)).update(PARAMS, optimizer().init(PARAMS), PARAMS),
        "^state must be that of fixed_support",
    ),
    "an integer to differentiate by": (
        lambda: value_and_gradients(loss)(COUNTED, jnp.ones(2)),
        r"^params must hold floating arrays .*int\d\d at count.*eqx\.filter",
    ),
    "an integer to accumulate by": (
        lambda: value_and_gradients(loss, micro_batches=2)(COUNTED, jnp.ones(2)),
        r"^params must hold floating arrays .*int\d\d at count",
    ),
    "an integer in a Hessian": (
        lambda: hessian_diagonal(loss, COUNTED, jnp.ones(2), key=KEY),
        r"^params must hold floating arrays .*int\d\d at count",
    ),
    "a seed in place of a key": (
        lambda: hessian_diagonal(loss, PARAMS, jnp.ones(2), key=0), "^key must be a key of jax"
    ),
    "a loss with axes": (
        lambda: value_and_gradients(lambda p, x: p["kernel"])(PARAMS, 1.0),
        r"^loss_fn must return a scalar, such as a mean, got shape \(4, 4\)",
    ),
    "a loss without its aux": (
        lambda: value_and_gradients(loss, has_aux=True)(PARAMS, jnp.ones(2)),
        r"^loss_fn must return a pair \(loss, aux\) with has_aux=True",
    ),
    "an aux that nobody asked for": (
        lambda: value_and_gradients(lambda p, x: (loss(p, x), 1))(PARAMS, jnp.ones(2)),
        "^loss_fn must return a scalar, or with has_aux=True a pair",
    ),
    "a batch of a number": (
        lambda: value_and_gradients(loss, micro_batches=2)(PARAMS, 1.0),
        r"^micro_batches must divide .*got 2 and shape \(\)",
    ),
    "a selection that is true of all": (
        lambda: loss_surface(loss, PARAMS, [jnp.ones(2)], trainable=lambda *_: "no"),
        "^trainable must .*got 'no' for bias",
    ),
    "a support of floats": (
        lambda: loss_surface(
            loss, PARAMS, [jnp.ones(2)], support={"kernel": jnp.ones((4, 4)), "bias": None}
        ),
        "^support of kernel must be a bool array",
    ),
    "a support of another shape": (
        lambda: loss_surface(
            loss, PARAMS, [jnp.ones(2)], support={"kernel": jnp.ones(4, bool), "bias": None}
        ),
        r"^support of kernel must have its shape \(4, 4\), got \(4,\)",
    ),
    "a penalty of a report": (
        lambda: report(PARAMS, optimizer().init(PARAMS), METHOD, penalty="0.1"),
        "^penalty must be a Python number, got '0.1'",
    ),
    "a choice of the host": (
        lambda: finalize(PARAMS, optimizer().init(PARAMS), METHOD, select_on_host="no"),
        "^select_on_host must be True or False, got 'no'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ERRORS))
def test_the_leaf_and_the_rule_are_named(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert len(str(caught.value)) < 600


def test_flags_of_numpy_select() -> None:
    state = optimizer(where=lambda path, leaf: np.True_ if leaf.ndim == 2 else np.False_).init(
        PARAMS
    )
    assert state.setup.names == ("kernel",)


def test_integers_may_stay_outside_of_the_params_as_the_message_says() -> None:
    class Net(eqx.Module):
        linear: eqx.nn.Linear
        count: jax.Array

    net = Net(eqx.nn.Linear(4, 4, key=KEY), jnp.asarray(3))
    weights, rest = eqx.partition(net, eqx.is_inexact_array)

    def of_module(weights: Any) -> Any:
        return jnp.mean(eqx.combine(weights, rest).linear(jnp.ones(4)) ** 2)

    updates, _ = update(weights, jax.grad(of_module)(weights))
    assert updates.linear.weight.any()
