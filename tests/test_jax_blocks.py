"""Blocks in JAX: layer-wise solvers, and SAFE on the reconstruction error."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import safe_core
from safe_core.adapters.jax_blocks import linen_grams, prune_layers, reconstruct
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Magnitude, Wanda

pytestmark = pytest.mark.usefixtures("single_precision")


class Block(nn.Module):
    """Attention and a layer behind it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x)))


class Layers(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(8)(nn.tanh(nn.Dense(16)(x)))


def inputs(samples: int = 10) -> jax.Array:
    """Correlated tokens."""
    mixing = jax.random.normal(jax.random.key(1), (8, 8)) * jnp.linspace(0.1, 2, 8)
    return jax.random.normal(jax.random.key(2), (samples, 5, 8)) @ mixing


def parameters(block: nn.Module) -> Any:
    return block.init(jax.random.key(0), inputs())["params"]


def apply(params: Any, x: jax.Array) -> jax.Array:
    return Layers().apply({"params": params}, x)


def error(params: Any) -> float:
    return float(jnp.mean((apply(params, inputs()) - apply(parameters(Layers()), inputs())) ** 2))


def zeros(params: Any) -> dict[str, float]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    return {name: float((x == 0).mean()) for name, x in named.items() if name.endswith("kernel")}


def test_grams_are_those_of_what_each_layer_takes() -> None:
    params, x = parameters(Block()), inputs()
    grams = linen_grams(Block(), {"params": params}, x)
    assert set(grams) == set(zeros(params))
    norm = params["LayerNorm_0"]
    centred = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    rows = (centred * norm["scale"] + norm["bias"]).reshape(-1, 8)
    found = grams["MultiHeadDotProductAttention_0/query/kernel"]
    np.testing.assert_allclose(found.matrix, rows.T @ rows, rtol=2e-4, atol=2e-4)
    assert found.count == 50
    np.testing.assert_allclose(found.mean_squares(), (rows**2).mean(0), rtol=2e-4)
    # The output projection of attention contracts heads and their entries.
    assert grams["MultiHeadDotProductAttention_0/out/kernel"].matrix.shape == (8, 8)


def test_a_shared_layer_sums_over_its_calls() -> None:
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = nn.Dense(3)
            return layer(x) + layer(2 * x)

    x = jnp.arange(6.0).reshape(2, 3)
    variables = Shared().init(jax.random.key(0), x)
    found = linen_grams(Shared(), variables, x)["Dense_0/kernel"]
    np.testing.assert_allclose(found.matrix, 5 * x.T @ x)
    assert found.count == 4


def test_a_layer_with_batch_axes_is_refused() -> None:
    layer, x = nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), jnp.ones((2, 4, 5))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.ones(v.shape), variables)
    with pytest.raises(ValueError, match=r"kernel must have no batch_dims, got \(0,\)"):
        linen_grams(layer, variables, x)


def test_layers_are_pruned_by_a_solver() -> None:
    params = parameters(Layers())
    grams = linen_grams(Layers(), {"params": params}, inputs())
    pruned = prune_layers(params, grams, Wanda(), "2:4")
    assert set(zeros(pruned).values()) == {0.5}
    assert error(pruned) < error(prune_layers(params, grams, Magnitude(), "2:4"))
    missing = {name: gram for name, gram in grams.items() if "1" not in name}
    with pytest.raises(ValueError, match=r"grams must hold one for Dense_1/kernel, got Dense_0"):
        prune_layers(params, missing, Wanda(), "2:4")


@pytest.mark.parametrize("importance", [None, "wanda"])
def test_reconstruction_beats_the_projection(importance: Any) -> None:
    params = parameters(Layers())
    method = safe_core.safe(0.5, rho=1e-3, penalty=0.1, dual_update_interval=4)
    recipe = Reconstruction(
        method, learning_rate=1e-2, epochs=30, batch_size=4, importance=importance
    )
    given = None
    if importance is not None:
        grams = linen_grams(Layers(), {"params": params}, inputs())
        given = {name: gram.mean_squares() for name, gram in grams.items()}
    found = reconstruct(apply, params, inputs(), 0.5, recipe=recipe, importance=given)
    assert zeros(found.params) == {"Dense_0/kernel": 0.5, "Dense_1/kernel": 0.5}
    none = Reconstruction(
        method, learning_rate=0.0, epochs=1, warmup_epochs=0, importance=importance
    )
    projected = reconstruct(apply, params, inputs(), 0.5, recipe=none, importance=given)
    assert error(found.params) < 0.75 * error(projected.params)
    assert len(found.losses) == 30
    assert float(jnp.abs(found.params["Dense_0"]["bias"]).max()) > 0  # biases follow


def test_a_narrow_block_is_trained_in_float32_and_returned_as_it_was() -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4), jnp.bfloat16)}
    recipe = Reconstruction(learning_rate=1e-4, epochs=3)
    x = inputs().astype(jnp.bfloat16)
    found = reconstruct(lambda p, x: x @ p["kernel"].astype(x.dtype), params, x, 0.5, recipe=recipe)
    assert found.params["kernel"].dtype == jnp.bfloat16
    assert int((found.params["kernel"] == 0).sum()) == 16
    assert found.losses[0] < 1e-3  # targets are those of the dense block


def test_targets_may_be_given() -> None:
    params, x = {"kernel": jnp.eye(8)}, inputs()
    recipe = Reconstruction(learning_rate=1e-2, epochs=20, batch_size=2)
    found = reconstruct(lambda p, x: x @ p["kernel"], params, x, 0.25, recipe=recipe, targets=2 * x)
    assert found.losses[-1] < 0.6 * found.losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": Reconstruction(importance="wanda")}, ValueError, "importance must be given"),
        ({"recipe": 3}, TypeError, "recipe must be a Reconstruction"),
        ({"targets": jnp.ones((3, 5, 8))}, ValueError, "targets must have 10 samples"),
        ({"inputs": jnp.ones(())}, ValueError, "inputs must be arrays with the same number"),
        ({"apply_fn": None}, TypeError, "apply_fn must be a function"),
        ({"seed": -1}, ValueError, "seed"),
        (
            {"recipe": Reconstruction(learning_rate=1e30, epochs=2, warmup_epochs=0)},
            ValueError,
            "learning_rate must be low enough",
        ),
    ],
)
def test_a_bad_argument_is_named(options: Any, error: Any, message: str) -> None:
    given = {"apply_fn": lambda p, x: x @ p["kernel"], "params": {"kernel": jnp.ones((8, 8))}}
    given |= {"inputs": inputs(), "sparsity": 0.5}
    with pytest.raises(error, match=message):
        reconstruct(**{**given, **options})
