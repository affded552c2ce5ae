"""A function or Flax module that is saved for LiteRT computes the same there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from litert_files import operators, run
from processes import output_of

import safe_core
from safe_core.adapters.jax import save_litert
from safe_core.litert import UnsupportedError

pytestmark = pytest.mark.usefixtures("single_precision")

VECTORS = np.sin(np.linspace(-3, 3, 4 * 32, dtype=np.float32)).reshape(4, 32) * 3
IMAGES = np.sin(np.linspace(-9, 9, 4 * 12 * 12 * 3, dtype=np.float32)).reshape(4, 12, 12, 3)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


FUNCTIONS: dict[str, tuple[Callable[[jax.Array], Any], Any]] = {
    "activations": (
        lambda x: [
            f(x)
            for f in (
                jax.nn.relu, jax.nn.relu6, jax.nn.gelu, lambda x: jax.nn.gelu(x, approximate=False),
                jax.nn.silu, jax.nn.sigmoid, jnp.tanh, jax.nn.elu, jax.nn.leaky_relu,
                jax.nn.softplus, jax.nn.hard_swish, jax.nn.hard_sigmoid, jax.nn.softmax,
                jax.nn.log_softmax, jax.scipy.special.erf, jnp.square, lambda x: jnp.abs(x) ** 1.5,
                lambda x: jnp.clip(x, -1, 2), lambda x: x**3, lambda x: jnp.sqrt(jnp.abs(x)),
            )
        ],
        VECTORS,
    ),
    "products": (
        lambda x: [
            x @ draw(32, 5), draw(6, 32) @ x[0], x @ x.T,
            jnp.einsum("bi,oij->boj", x, draw(3, 32, 2)),
            jnp.einsum("bhi,bhj->hij", x.reshape(4, 4, 8), x.reshape(4, 4, 8)),
            jnp.concatenate([x[:, 3:7], x[:, ::8]], 1), x.reshape(4, 4, 8).transpose(0, 2, 1),
            jnp.abs(x).mean(), x.max(1), jnp.pad(x, ((0, 0), (1, 2))), 1 / (1 + jnp.abs(x)),
            jnp.where(x > 0, x, 0.1), jnp.stack(jnp.split(x, 2, 1)), x - x.mean(1, keepdims=True),
        ],
        VECTORS,
    ),
    "an embedding": (lambda x: draw(11, 8)[x].sum(1), np.asarray([[1, 2, 3], [9, 0, 9]], np.int32)),
    "pooling": (
        lambda x: [
            nnx.max_pool(x, (2, 2), (2, 2)), nnx.max_pool(x, (3, 3), (2, 2), "SAME"),
            nnx.avg_pool(x, (2, 2), (2, 2)), nnx.avg_pool(x, (3, 3), (2, 2), "SAME"),
            nnx.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False), x.mean((1, 2)),
        ],
        IMAGES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compute_the_same(name: str, tmp_path: Path) -> None:
    function, inputs = FUNCTIONS[name]
    report = save_litert(function, inputs, tmp_path / "model.tflite", batch_size=None)
    assert report.error < 2e-5


class Residual(nnx.Module):
    """A residual block between a convolution and a classifier, with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.point = nnx.Conv(8, 8, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)
        for norm in (self.norm, self.norm2):
            norm.mean[...], norm.var[...] = draw(8) * 0.1, jnp.linspace(0.5, 2, 8)
            norm.bias[...] = draw(8, seed=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(x + self.norm2(self.point(self.conv(x))))
        return self.head(self.dropout(x.mean((1, 2))))


class Layered(linen.Module):
    """Two dense layers with a layer norm, and attention."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.gelu(linen.LayerNorm()(linen.Dense(64)(x)))
        x = x.reshape(*x.shape[:-1], 8, 8)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(x)
        return linen.softmax(linen.Dense(5)(x.reshape(x.shape[0], -1)))


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_an_nnx_module(weights: str, tmp_path: Path) -> None:
    model = Residual(nnx.Rngs(0))
    report = save_litert(model, IMAGES, tmp_path / "model.tflite", weights)
    assert report.error < (1e-5 if weights == "float32" else 0.05)
    assert [layer.name for layer in report.layers] == ["stem", "conv", "point", "head"]
    assert not model.dropout.deterministic  # the module itself keeps its mode
    kinds = [kind for kind, _ in operators(report.path)]
    assert "MEAN" in kinds
    assert not {"MUL", "SUB", "TRANSPOSE"} & set(kinds)
    assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == (weights == "int8")


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_a_linen_module(weights: str, tmp_path: Path) -> None:
    module = Layered()
    variables = module.init(jax.random.key(0), VECTORS)
    path = tmp_path / "model.tflite"
    report = save_litert(module.bind(variables), VECTORS, path, weights, batch_size=2)
    assert report.error < (1e-5 if weights == "float32" else 0.05)
    names = [layer.name for layer in report.layers]
    assert (names[0], names[-1]) == ("Dense_0", "Dense_1")
    (found,) = run(path, VECTORS[2:])
    wanted = module.apply(variables, VECTORS[2:])
    assert np.abs(found - wanted).max() < (1e-5 if weights == "float32" else 0.05)
    applied = save_litert(lambda x: module.apply(variables, x), VECTORS, path, batch_size=2)
    assert applied.size == save_litert(module.bind(variables), VECTORS, path, batch_size=2).size


@pytest.mark.parametrize(("block", "weights"), [(4, "float32"), (16, "int8")])
def test_blocks_make_the_file_smaller(block: int, weights: str, tmp_path: Path) -> None:
    kernels = [draw(64, 64), draw(64, 64, seed=1)]
    pattern = safe_core.Block((1, block), 0.9)
    layout = safe_core.Layout(input_axes=(0,), output_axes=(1,))
    sparse = [safe_core.project(k, pattern, layout=layout).values for k in kernels]
    inputs = np.concatenate([VECTORS, VECTORS[::-1]], 1)
    path = tmp_path / "model.tflite"

    def save(held: list[jax.Array]) -> Any:
        def network(x: jax.Array) -> jax.Array:
            return jax.nn.relu(x @ held[0]) @ held[1]

        return save_litert(network, inputs, path, weights, compute="sparse")

    dense = save(kernels)
    report = save(sparse)
    assert [layer.format for layer in report.layers] == [f"1x{block}"] * 2
    assert report.error < (1e-5 if weights == "float32" else 0.05)
    assert dense.size - report.size > 0.8 * sum(layer.dense_size for layer in report.layers) - 1000


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.cumsum(x, 1), "got cumsum"),
        (jnp.sort, "got sort"),
        (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y + 1, x), "got (while|scan)"),
    ],
)
def test_what_cannot_be_expressed_is_named(
    function: Callable[[jax.Array], jax.Array], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        save_litert(function, VECTORS, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    class Sorted(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sort(linen.Dense(3)(x))

    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Sorted(name="sorting")(x)

    module = Outer()
    bound = module.bind(module.init(jax.random.key(0), VECTORS))
    with pytest.raises(UnsupportedError, match=r"got sort in module 'Outer/sorting'"):
        save_litert(bound, VECTORS, tmp_path / "model.tflite")


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    with pytest.raises(TypeError, match=r"model must be bound, as by module.bind"):
        save_litert(Layered(), VECTORS, path)
    with pytest.raises(TypeError, match="model must be callable, got 3"):
        save_litert(3, VECTORS, path)
    with pytest.raises(TypeError, match="example_inputs must hold arrays only"):
        save_litert(jnp.tanh, "text", path)
    with pytest.raises(ValueError, match="batch_size must divide"):
        save_litert(jnp.tanh, VECTORS, path, batch_size=3)
    kernel = jnp.ones((VECTORS.shape[1] + 1, 2))
    with pytest.raises(ValueError, match=r"example_inputs must be .*shape \(\d+, \d+\) float32: "):
        save_litert(lambda x: x @ kernel, VECTORS, path)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        save_litert(lambda x: x if x.sum() > 0 else -x, VECTORS, path)
    half = linen.Dense(3, param_dtype="bfloat16")
    bound = half.bind(half.init(jax.random.key(0), VECTORS))
    with pytest.raises(ValueError, match="model must be in float32, got bfloat16: pass"):
        save_litert(bound, VECTORS, path)


LINEN = """
import sys
import flax.linen as nn
import jax
import jax.numpy as jnp
from safe_core.adapters.jax.litert import litert_graph
assert "flax.nnx" not in sys.modules
x = jnp.ones((2, 8))
module = nn.Dense(4)
graph, _ = litert_graph(module.bind(module.init(jax.random.key(0), x)), [x])
print(len(graph.outputs))
"""


def test_linen_without_nnx() -> None:
    assert output_of("-c", LINEN) == "1\n"
