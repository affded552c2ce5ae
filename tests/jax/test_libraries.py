"""`sparse_optimizer` on the parameters of Equinox and Haiku, and under optax's own contract."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from short_runs import short_run

import safe_core
from safe_core import Layout
from safe_core.adapters.jax.gradients import value_and_gradients
from safe_core.adapters.jax.weights import is_prunable, layout_of, name_of, owner_of
from safe_core.adapters.optax import finalize, sparse_optimizer

pytestmark = pytest.mark.usefixtures("single_precision")

INPUT_OUTPUT = Layout((-2,), (-1,))
OUTPUT_INPUT = Layout((-1,), (-2,))


def layouts(params: Any) -> dict[str, Layout | None]:
    """Layouts of the leaves that are sparse by default, by path."""
    found, paths = {}, jax.tree_util.tree_leaves_with_path(params)
    leaves = {name_of(path): leaf for path, leaf in paths}
    for path, leaf in paths:
        name, owner = name_of(path), owner_of(params, path)
        if is_prunable(name, leaf, owner):
            found[name] = layout_of(name, leaf, owner, leaves=leaves)
    return found


def trained(loss: Any, params: Any, method: Any, steps: int = 3) -> Any:
    tx = sparse_optimizer(optax.adam(0.01), method)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, gradients, grad_fn = value_and_gradients(loss)(params)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return finalize(params, state, method)


# Equinox


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    depthwise: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    table: dict[str, list[Any]]

    def __init__(self, key: Any) -> None:
        keys = iter(jax.random.split(key, 8))
        self.embed = eqx.nn.Embedding(8, 4, key=next(keys))
        self.conv = eqx.nn.Conv2d(4, 8, 3, key=next(keys))
        self.up = eqx.nn.ConvTranspose2d(4, 8, 3, key=next(keys))
        self.depthwise = eqx.nn.Conv2d(4, 4, 3, groups=4, key=next(keys))
        self.norm = eqx.nn.LayerNorm((4, 4))
        self.cell = eqx.nn.GRUCell(4, 4, key=next(keys))
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=next(keys))
        self.mlp = eqx.nn.MLP(4, 2, 8, 1, key=next(keys))
        self.table = {"heads": [None, eqx.nn.Linear(4, 4, key=next(keys))]}


def equinox_params(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def test_weights_of_equinox_are_told_from_embeddings_and_norms() -> None:
    params = eqx.filter_eval_shape(lambda key: equinox_params(EquinoxModel(key)), jax.random.key(0))
    matrices = [
        *(f"attention/{part}_proj/weight" for part in ("query", "key", "value", "output")),
        *(f"cell/weight_{part}" for part in ("ih", "hh")),
        *(f"mlp/layers/{i}/weight" for i in range(2)),
        "table/heads/1/weight",
    ]
    convolutions = [f"{name}/weight" for name in ("conv", "up", "depthwise")]
    rows = Layout((1,), (0,))
    assert layouts(params) == dict.fromkeys([*matrices, *convolutions], rows)


def test_an_ensemble_of_equinox_has_batch_axes() -> None:
    def make(key: Any) -> Any:
        return equinox_params(eqx.nn.MLP(4, 2, 8, 1, key=key))

    params = eqx.filter_eval_shape(jax.vmap(make), jax.random.split(jax.random.key(0), 3))
    stacked = Layout((2,), (1,), (0,))
    assert layouts(params) == {f"layers/{i}/weight": stacked for i in range(2)}


@short_run
def test_a_model_of_equinox_trains_to_groups() -> None:
    """Its trees can be called, and are taken for trees where a function could be meant."""
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(8, 4, key=jax.random.key(0)), eqx.nn.Linear(4, 4, key=jax.random.key(1))]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(2), (16, 8))

    def loss(params: Any) -> Any:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - 1) ** 2)

    found = trained(loss, params, safe_core.safe("2:4", rho=0.05))
    for layer in found.layers:
        groups = np.asarray(layer.weight).reshape(4, -1, 4)
        assert ((groups != 0).sum(-1) == 2).all()
        assert (layer.bias != 0).all()


def test_importance_may_be_a_tree_of_equinox() -> None:
    params = equinox_params(eqx.nn.Sequential([eqx.nn.Linear(4, 2, key=jax.random.key(0))]))
    importance = jax.tree.map(lambda x: jnp.zeros_like(x).at[..., 0].set(1.0), params)
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.admm(0.75), importance=importance)
    support = tx.init(params).support.layers[0].weight
    assert support.tolist() == [[True, False, False, False]] * 2


# Haiku


def haiku_model(images: Any, tokens: Any) -> Any:
    hidden = hk.Conv2D(8, 3)(images)
    hidden = hk.Conv2DTranspose(4, 3)(hidden)
    hidden = hk.DepthwiseConv2D(1, 3)(hidden)
    hidden = hk.BatchNorm(True, True, 0.9)(hidden, is_training=True)
    words = hk.LayerNorm(-1, True, True)(hk.Embed(8, 4)(tokens))
    words = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.Constant(1.0))(words, words, words)
    words, _ = hk.dynamic_unroll(hk.GRU(4), words, hk.GRU(4).initial_state(1), time_major=False)
    return hk.nets.MLP([8, 4])(words).mean() + hidden.mean()


def test_weights_of_haiku_are_told_by_their_paths() -> None:
    model = hk.transform_with_state(haiku_model)
    given = jnp.ones((1, 4, 4, 4)), jnp.zeros((1, 3), jnp.int32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), *given)
    found = layouts(params)
    transposed = found.pop("conv2_d_transpose/w")
    shape = params["conv2_d_transpose"]["w"].shape
    assert (transposed, shape) == (OUTPUT_INPUT, (3, 3, 4, 8))
    assert set(found.values()) == {INPUT_OUTPUT}
    attention = [f"multi_head_attention/{part}/w" for part in ("query", "key", "value", "linear")]
    others = ["conv2_d/w", "depthwise_conv2_d/w", "gru/w_i", "gru/w_h"]
    assert set(found) == {*attention, *others, "mlp/~/linear_0/w", "mlp/~/linear_1/w"}


@short_run
def test_a_model_of_haiku_trains_to_channels() -> None:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 4])(x)))
    x = jax.random.normal(jax.random.key(2), (16, 8))
    params = model.init(jax.random.key(0), x)
    method = safe_core.safe(safe_core.Channel(0.25), rho=0.05)
    found = trained(lambda params: jnp.mean((model.apply(params, x) - 1) ** 2), params, method)
    empty = [int((np.asarray(found[f"mlp/~/linear_{i}"]["w"]) == 0).all(0).sum()) for i in (0, 1)]
    assert empty == [2, 1]


def test_a_stack_of_haiku_needs_a_layout() -> None:
    params = {"stack/linear": {"w": jnp.ones((3, 8, 4))}}
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.admm("2:4"))
    with pytest.raises(ValueError, match="stack/linear/w"):
        tx.init(params)
    layout = Layout((1,), (2,), (0,))
    state = sparse_optimizer(optax.sgd(0.1), safe_core.admm("2:4"), layout=layout).init(params)
    assert int(state.support["stack/linear"]["w"].sum()) == 48


# The contract of optax


BASES = {
    "schedule": optax.adamw(optax.linear_schedule(0.1, 0.0, 4)),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lamb": optax.lamb(0.01),
    "lion": optax.lion(0.01),
    "masked": optax.masked(optax.sgd(0.1), {"kernel": True, "bias": False}),
    "mechanic": optax.contrib.mechanize(optax.sgd(0.1)),
    "muon": optax.contrib.muon(0.1),
    "momo": optax.contrib.momo(0.1),
    "schedule free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "prodigy": optax.contrib.prodigy(0.1),
}


@pytest.mark.every_second
@short_run
@pytest.mark.parametrize("base", list(BASES))
def test_any_base_keeps_the_contract(base: str) -> None:
    """Unknown arguments pass, nothing changes shape or dtype, a step is traced once.

    And `optax.tree.map_params` finds the parameters within.
    """
    method = safe_core.safe(0.5, rho=0.05, penalty=0.01, dual_update_interval=2)
    tx, traces = sparse_optimizer(BASES[base], method), []
    draw = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.bfloat16)
    params = {"kernel": draw, "bias": jnp.zeros(4, jnp.bfloat16)}

    def loss(params: Any) -> Any:
        return jnp.sum((params["kernel"] - 1) ** 2) + jnp.sum(params["bias"] ** 2)

    @jax.jit
    def step(params: Any, state: Any, take: Any) -> Any:
        traces.append(1)
        value, gradients, grad_fn = value_and_gradients(loss)(params)
        passed = {"value": value.astype(jnp.float32), "unknown_to_all": 1}
        # Both branches of a condition must have the same shapes and dtypes.
        updates, state = jax.lax.cond(
            take,
            lambda: tx.update(gradients, state, params, grad_fn=grad_fn, **passed),
            lambda: (params, state),
        )
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    state = optax.tree.map_params(tx, lambda leaf: leaf, state)
    for _ in range(3):
        params, state = step(params, state, jnp.asarray(True))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == kinds
    assert len(traces) == 1
    assert int((finalize(params, state, method)["kernel"] == 0).sum()) == 16
