"""`coverage` lists every weight, sparse or not, with the reason."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen

from safe_core import NM, Block, Layout
from safe_core.adapters.optax import coverage


class Model(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.Embed(10, 4)(x)
        x = linen.RNN(linen.LSTMCell(4))(linen.LayerNorm()(x))
        head = self.param("head", linen.initializers.ones, (4, 3))
        return linen.Dense(2)(x @ head)


def model_params() -> Any:
    return Model().init(jax.random.key(0), jnp.zeros((2, 5), jnp.int32))["params"]


def test_every_weight_is_listed_with_its_reason() -> None:
    found = coverage(model_params())
    assert {w.name.split("/")[-1] for w in found.sparse} == {"kernel"}
    dense = {w.name: (w.reason, w.expected) for w in found.dense}
    assert dense == {
        "Embed_0/embedding": ("a leaf named 'embedding' stays dense by default", True),
        "head": ("its path ends in 'head', which names no weight (select it with where=)", False),
    }
    assert [w.name for w in found.unexpected] == ["head"]
    assert "dense: Embed_0/embedding, because a leaf named 'embedding'" in str(found)
    entries = sum(w.entries for w in found.sparse)
    assert f"sparse: 9 of 11 weights, {entries} of {entries + 52} entries" in str(found)


def test_no_values_are_needed() -> None:
    shapes = jax.eval_shape(model_params)
    assert coverage(shapes) == coverage(model_params())


def test_a_choice_is_no_surprise() -> None:
    found = coverage(model_params(), where=lambda path, leaf: path == "head")
    assert [w.name for w in found.sparse] == ["head"]
    assert found.unexpected == ()
    assert {w.reason for w in found.dense} == {"where is False for it"}
    none = coverage(model_params(), where=lambda path, leaf: False)
    assert none.sparse == ()
    with pytest.raises(TypeError, match=r"where must be .*got 'no' for"):
        coverage(model_params(), where=lambda path, leaf: "no")


def test_vectors_count_where_they_are_chosen() -> None:
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "ids": jnp.ones((2, 2), jnp.int32)}
    assert [w.name for w in coverage(params).weights] == ["ids", "kernel"]
    assert coverage(params).dense[0].reason == "its dtype is int32"
    chosen = coverage(params, where={"kernel": False, "bias": True, "ids": False})
    assert [w.name for w in chosen.sparse] == ["bias"]


def test_stacked_vectors_are_no_weights() -> None:
    params = {"kernel": jnp.ones((3, 4, 2)), "shift": jnp.ones((3, 2))}
    layout = {
        "kernel": Layout(input_axes=(1,), output_axes=(2,), batch_axes=(0,)),
        "shift": Layout(output_axes=(1,), batch_axes=(0,)),
    }
    assert [w.name for w in coverage(params).unexpected] == ["shift"]
    assert coverage(params, layout=layout).unexpected == ()
    with pytest.raises(ValueError, match="layout names 'nope'"):
        coverage(params, layout={"nope": Layout()})


def test_modules_of_equinox_are_told_by_their_type() -> None:
    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        linear: eqx.nn.Linear

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.Embedding(10, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1]))
    found = coverage(net)
    assert [w.name for w in found.sparse] == ["linear/weight"]
    assert [w.name for w in found.dense] == ["embed/weight"]
    with pytest.raises(TypeError, match=r"got .* at activation: .*eqx\.is_inexact_array"):
        coverage(eqx.nn.MLP(2, 2, 2, 1, key=keys[0]))


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [
        (NM(2, 4, ragged="dense"), "its 3 inputs are fewer than 4"),
        (Block((1, 4), 0.5, ragged="dense"), "its 3 inputs are fewer than 4"),
        (Block((1, 2), 0.5, ragged="dense"), ""),
        (0.5, ""),
    ],
)
def test_a_leaf_without_a_whole_group_is_dense(sparsity: Any, reason: str) -> None:
    params = {"a": {"kernel": jnp.ones((3, 8))}, "b": {"kernel": jnp.ones((8, 4))}}
    found = coverage(params, sparsity=sparsity)
    assert {w.name: w.reason for w in found.weights} == {"a/kernel": reason, "b/kernel": ""}
    assert found.unexpected == ()
