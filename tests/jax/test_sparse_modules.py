"""Flax layers in BCSR compute the same, and are chosen by their times alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.sparse import BCSR

import safe_core
from safe_core.adapters.jax.flax import SparseLinen, sparse_modules
from safe_core.adapters.jax.flax.sparse_model import (
    Layer,
    LinenLayers,
    NnxLayers,
    SparseLinear,
    bcsr,
)

X = jnp.sin(jnp.arange(6 * 16, dtype="float32")).reshape(6, 16)


class Module(nnx.Module):
    """Layers of several kinds, of which one is called twice."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])
        self.twice = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(16, 4, (1,), rngs=rngs)
        self.half = nnx.Linear(16, 4, dtype="bfloat16", rngs=rngs)
        self.dense = nnx.Linear(16, 4, rngs=rngs)
        for layer in (self.layers[0], self.twice, self.conv, self.half):
            layer.kernel[...] = safe_core.project(layer.kernel[...], 0.75).values

    def __call__(self, x: jax.Array) -> Any:
        for layer in self.layers:
            x = layer(x)
        x = self.twice(self.twice(x[None])[0])
        return {"y": self.conv(x) + self.dense(x), "half": self.half(x)}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        x = nn.MultiHeadDotProductAttention(2)(x, x)
        return nn.Dense(8, use_bias=False)(nn.Dense(16, precision="highest")(x))


def linen() -> tuple[nn.Module, Any]:
    variables = Linen().init(jax.random.key(0), X)
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, x: safe_core.project(x.reshape(len(x), -1), 0.75).values.reshape(x.shape)
        if "kernel" in str(path) else x, variables["params"],
    )  # fmt: skip
    return Linen(), {**variables, "params": kernels}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times of the forms in the place of measured ones."""
    known = {"dense": 3.0, "BCSR": 1.0, "sparse": 2.0}

    def timed(
        candidates: Mapping[str, Callable[[], Any]], repeats: int, clock: Any = None
    ) -> dict[str, list[float]]:
        for run in candidates.values():
            run()
        return {name: [known[name]] * repeats for name in candidates}

    monkeypatch.setattr("safe_core.adapters.jax.flax.sparse_model.interleaved", timed)
    return known


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a, "f4"), np.asarray(b, "f4"), rtol=1e-4, atol=1e-4)


def test_kernels_become_the_matrices_of_jax() -> None:
    kernel = safe_core.project(jnp.cos(jnp.arange(48.0)).reshape(8, 6), 0.75).values.at[:, 2].set(0)
    found, wanted = bcsr(kernel), BCSR.fromdense(kernel.T)
    assert (found.shape, found.indices.dtype) == (wanted.shape, wanted.indices.dtype)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_layers_of_nnx_are_replaced(seconds: dict[str, float]) -> None:
    model = Module()
    found = sparse_modules(model, X)
    assert found.replaced == {"layers/0/kernel": "BCSR", "twice/kernel": "BCSR"}
    assert {layer.name: layer.reason for layer in found.layers if layer.form == "dense"} == {
        "conv/kernel": "it has no sparse kernel",
        "half/kernel": "it computes in bfloat16, its kernel is float32",
    }
    (twice,) = (layer for layer in found.layers if layer.name == "twice/kernel")
    assert (twice.rows, twice.seconds["dense"]) == (12, 6.0)
    assert isinstance(found.model.layers[0], SparseLinear)
    assert type(model.twice) is nnx.Linear
    assert not model.layers[1].deterministic
    model.eval()
    assert_same(found.model(X), model(X))
    assert_same(nnx.jit(lambda m, x: m(x))(found.model, X[:1]), model(X[:1]))
    assert "whole model: 3000 ms dense, 2000 ms sparse, 1.50 times faster" in str(found)


def test_layers_of_linen_are_replaced(seconds: dict[str, float]) -> None:
    module, variables = linen()
    found = sparse_modules(module, X, variables=variables)
    assert found.replaced == {"Dense_0/kernel": "BCSR", "Dense_1/kernel": "BCSR"}
    reasons = {layer.name: layer.reason for layer in found.layers if layer.form == "dense"}
    assert reasons.pop("Dense_2/kernel") == "it has a product or a precision of its own"
    assert set(reasons.values()) == {"it has no sparse kernel"}
    assert len(reasons) == 4  # of attention
    assert isinstance(found.model, SparseLinen)
    assert isinstance(found.model.variables["params"]["Dense_0"]["kernel"], BCSR)
    assert_same(jax.jit(found.model.apply)(found.model.variables, X), module.apply(variables, X))
    assert_same(found.model.apply(found.model.variables, X, train=False),
                module.apply(variables, X))  # fmt: skip


def test_what_is_not_faster_stays_dense(seconds: dict[str, float]) -> None:
    model = Module()
    seconds["BCSR"] = 2.8
    found = sparse_modules(model, X)
    assert found.model is model
    assert found.layers[-1].reason == "no form is a tenth faster"
    seconds.update({"BCSR": 1.0, "sparse": 2.8})
    found = sparse_modules(model, X)
    assert found.model is model
    assert found.layers[-1].reason == "the whole model is not a tenth faster"
    assert found.replaced == {}


def test_layers_with_few_zeros_and_layers_without_calls_stay(seconds: dict[str, float]) -> None:
    model = Module()
    model.dense.kernel[...] = safe_core.project(model.dense.kernel[...], 0.3).values
    model.unused = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model.unused.kernel[...] = jnp.zeros((4, 4), "float32")
    reasons = {layer.name: layer.reason for layer in sparse_modules(model, X).layers}
    assert reasons["dense/kernel"] == "fewer than half of the entries are zero"
    assert reasons["unused/kernel"] == "the model does not call it"


def test_times_are_measured() -> None:
    found = sparse_modules(Module(), X, repeats=2)
    assert all(taken > 0 for layer in found.layers for taken in layer.seconds.values())


def test_models_are_timed_as_functions_of_arrays(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call of `nnx.jit` takes longer than a small model."""
    monkeypatch.setattr(nnx, "jit", None)
    module, variables = linen()
    for layers in (NnxLayers(Module()), LinenLayers(module, variables)):
        names = [name for name, x in layers.layers((X,)).items() if isinstance(x, Layer)]
        for sparse in (None, layers.replaced(names)):
            calls = list[Any]()
            with monkeypatch.context() as patched:
                patched.setattr(jax, "jit", lambda f, calls=calls: lambda *a: calls.append(a))
                layers.call(sparse, (X,))()
            ((leaves, x),) = calls
            assert x is X
            assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_outputs_that_differ_are_refused(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = SparseLinear.__call__
    monkeypatch.setattr(SparseLinear, "__call__", lambda self, x: 2 * call(self, x))
    with pytest.raises(ValueError, match="model must compute the same with sparse layers"):
        sparse_modules(Module(), X)


def test_a_bad_argument_is_named() -> None:
    module, variables = linen()
    for arguments, message in (
        ((3, X), "model must be a Flax module"),
        ((module, X), "variables must be given for a Linen module"),
    ):
        with pytest.raises(TypeError, match=message):
            sparse_modules(*arguments)
    with pytest.raises(TypeError, match="variables must be left out for an NNX module"):
        sparse_modules(Module(), X, variables=variables)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        sparse_modules(Module(), X, repeats=0)
    with pytest.raises(ValueError, match=r"example_inputs must be .*shape \(6, 15\) float32: "):
        sparse_modules(Module(), X[:, 1:])
