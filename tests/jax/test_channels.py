"""Removing zero channels from Flax networks leaves smaller networks with the same outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import safe_core
from safe_core.adapters.jax import sparse_optimizer
from safe_core.adapters.jax.channels.reshapes import reshaped
from safe_core.adapters.jax.channels.sets import STAYS, ChannelSets, constant
from safe_core.adapters.jax.flax import ShrunkLinen, shrink, silence_channels

IMAGES = np.sin(np.arange(4 * 8 * 8 * 3, dtype="float32")).reshape(4, 8, 8, 3)
ROWS = IMAGES.reshape(-1, 16)


class Chain(nn.Module):
    """Compact layers, with an activation between them that may be given."""

    activation: Callable[..., Any] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="last")(nn.gelu(nn.Dense(6, name="second")(x)))


class Block(nn.Module):
    """A residual block."""

    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(nn.Conv(10, (3, 3), use_bias=False)(x)))
        return nn.relu(x + self.norm()(nn.Conv(8, (3, 3), use_bias=False)(y)))


class Network(nn.Module):
    """A stem, a residual block in a submodule, poolings, and a classifier of flattened maps."""

    remat: bool = False

    def setup(self) -> None:
        self.stem = nn.Conv(8, (3, 3))
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        self.block = (nn.remat(Block) if self.remat else Block)(norm)
        self.head = nn.Dense(5)

    def __call__(self, x: jax.Array, *, scale: float = 1.0) -> dict[str, jax.Array]:
        x = nn.max_pool(self.block(nn.relu(self.stem(x))), (2, 2), strides=(2, 2))
        x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return {"y": scale * self.head(x.reshape(len(x), -1))}


class Nnx(nnx.Module):
    """The same network without the residual sum, and with a layer that is called twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.twice = nnx.Linear(8 * 4, 8 * 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8 * 4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.avg_pool(x, (4, 4), strides=(4, 4)).reshape(len(x), -1)
        x = self.dropout(nnx.tanh(self.twice(nnx.tanh(self.twice(x)))))
        return self.layers[1](nnx.relu(self.layers[0](x)))


def linen(module: nn.Module, zero: Mapping[str, Sequence[int]], x: Any = ROWS) -> Any:
    """Return random variables of a module, in which some channels are zero."""
    variables = module.init(jax.random.key(0), x)
    leaves, structure = jax.tree.flatten_with_path(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    found = []
    for (path, leaf), key in zip(leaves, keys, strict=True):
        name = "/".join(k.key for k in path[1:-1])
        value = jax.random.uniform(key, leaf.shape, leaf.dtype, 0.5, 1.5)
        if path[-1].key in ("kernel", "bias", "mean"):
            value = value - 1
        if path[0].key == "params" and name in zero:
            value = value.at[..., list(zero[name])].set(0)
        found.append(value)
    return jax.tree.unflatten(structure, found)


def module(zero: Mapping[str, Sequence[int]]) -> Nnx:
    found = Nnx(nnx.Rngs(0))
    found.norm.bias[...] += 0.1
    found.norm.mean[...] -= 0.3
    layers = {"conv": found.conv, "norm": found.norm, "twice": found.twice,
              "first": found.layers[0], "last": found.layers[1]}  # fmt: skip
    for name, channels in zero.items():
        for value in jax.tree.leaves(nnx.state(layers[name], nnx.Param), is_leaf=is_variable):
            value[...] = value[...].at[..., list(channels)].set(0)
    return found


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def copied(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def same(a: Any, b: Any, *, exactly: bool = False) -> None:
    tolerance = 0 if exactly else 1e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


def shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    return {
        "/".join(k.key for k in path): x.shape
        for path, x in jax.tree.flatten_with_path(variables["params"])[0]
    }


# Linen


def test_a_chain_of_dense_layers_loses_exactly_its_zero_channels() -> None:
    variables = linen(Chain(), {"first": [1, 4], "second": [0]})
    before, wanted = copied(variables), Chain().apply(variables, ROWS)
    found = shrink(Chain(), ROWS, variables=variables)
    assert isinstance(found.model, ShrunkLinen)
    assert found.removed == {"first": 2, "second": 1}
    assert found.features == {"first": 6, "second": 5}
    assert found.kept == {}
    assert found.state is None
    assert shapes(found.variables) == {
        "first/kernel": (16, 6), "first/bias": (6,), "second/kernel": (6, 5),
        "second/bias": (5,), "last/kernel": (5, 3), "last/bias": (3,),
    }  # fmt: skip
    left = [0, 2, 3, 5, 6, 7]
    own = found.variables["params"]["first"]
    same(own["kernel"], before["params"]["first"]["kernel"][:, left], exactly=True)
    same(own["bias"], before["params"]["first"]["bias"][left], exactly=True)
    same(jax.jit(found.model.apply)(found.variables, ROWS), wanted)
    same(variables, before, exactly=True)
    # The module runs as before, and shrinks no further.
    same(Chain().apply(variables, ROWS), wanted, exactly=True)


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("remat", "zero", "removed", "kept"),
    [
        (
            True,
            {"block/Conv_0": [1, 4], "block/BatchNorm_0": [1, 4]},
            {"block/Conv_0": 2},
            {},
        ),
        (
            False,
            {"stem": [2, 5, 7], "block/Conv_1": [2, 5], "block/BatchNorm_1": [2, 5]},
            {"stem": 2, "block/Conv_1": 2},
            {"stem": "they go together with channels that are not zero"},
        ),
    ],
    ids=["inner", "residual"],
)
def test_a_residual_network_with_setup_and_submodules(
    remat: bool, zero: Any, removed: dict[str, int], kept: dict[str, str]
) -> None:
    network = Network(remat)
    variables = linen(network, zero, IMAGES)
    wanted = network.apply(variables, IMAGES, scale=2.0)
    found = shrink(network, {"x": IMAGES, "scale": 2.0}, variables=variables)
    assert (found.removed, found.kept) == (removed, kept)
    same(found.model.apply(found.variables, IMAGES, scale=2.0), wanted)
    for name, count in removed.items():
        assert found.features[name] == (10 if name == "block/Conv_0" else 8) - count
    statistics = found.variables["batch_stats"]["block"]
    norm = "BatchNorm_0" if "block/Conv_0" in removed else "BatchNorm_1"
    assert statistics[norm]["mean"].shape == (10 - 2 if norm == "BatchNorm_0" else 8 - 2,)
    if "stem" in removed:  # four maps of 2 x 2 for each channel
        assert found.variables["params"]["head"]["kernel"].shape == (6 * 4, 5)


@pytest.mark.every_second
@pytest.mark.parametrize("swapped", [False, True])
def test_a_transposed_convolution(swapped: bool) -> None:
    network = nn.Sequential([
        nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=swapped), nn.relu,
        nn.ConvTranspose(5, (3, 3), transpose_kernel=swapped), nn.relu, nn.Conv(2, (1, 1)),
    ])  # fmt: skip
    variables = linen(network, {} if swapped else {"layers_0": [1]}, IMAGES)
    if swapped:
        params = variables["params"]["layers_0"]
        params["kernel"] = params["kernel"].at[..., 1, :].set(0)
        params["bias"] = params["bias"].at[1].set(0)
    found = shrink(network, IMAGES, variables=variables)
    assert found.features == {"layers_0": 5}
    same(found.model.apply(found.variables, IMAGES), network.apply(variables, IMAGES))


# NNX


def test_an_nnx_module_becomes_a_smaller_copy() -> None:
    model = module({"conv": [1, 4, 6], "norm": [1, 4], "first": [5], "last": [0]})
    before = copied(nnx.as_pure(nnx.state(model, nnx.Param)))
    wanted = nnx.view(model, deterministic=True, use_running_average=True)(IMAGES)
    found = shrink(model, IMAGES)
    # The layer that is called twice ties the channels of all that it reads to those it writes.
    assert found.removed == {"layers/0": 1}
    assert set(found.kept) == {"conv", "layers/1"}
    assert found.kept["layers/1"] == "they are outputs of the network"
    smaller = found.model
    assert type(smaller) is Nnx
    assert smaller is not model
    assert (smaller.layers[0].out_features, smaller.layers[1].in_features) == (5, 5)
    assert found.features == {"layers/0": 5}
    assert smaller.dropout.deterministic == model.dropout.deterministic
    same(nnx.view(smaller, deterministic=True, use_running_average=True)(IMAGES), wanted)
    same(nnx.as_pure(nnx.state(model, nnx.Param)), before, exactly=True)
    assert model.layers[0].out_features == 6


def test_a_layer_that_is_called_twice_is_cut_on_both_axes() -> None:
    model = module({"conv": [1], "norm": [1], "twice": range(1, 32, 8)})
    before = nnx.view(model, deterministic=True, use_running_average=True)
    wanted = before(IMAGES)
    found = shrink(model, IMAGES)
    assert found.removed == {"conv": 1, "twice": 4}
    smaller = nnx.view(found.model, deterministic=True, use_running_average=True)
    assert smaller.twice.kernel.shape == (28, 28)
    assert (smaller.twice.in_features, smaller.twice.out_features) == (28, 28)
    assert (smaller.conv.out_features, smaller.conv.kernel_shape) == (7, (3, 3, 3, 7))
    assert smaller.norm.num_features == 7
    same(smaller(IMAGES), wanted)
    sizes = tuple(
        sum(x.size for x in jax.tree.leaves(nnx.as_pure(nnx.state(each, nnx.Param))))
        for each in (model, found.model)
    )
    assert found.parameters == sizes
    assert str(found).splitlines() == [
        f"{sizes[1]:,} of {sizes[0]:,} parameters are left",
        "removed channels: 1 of 'conv', 4 of 'twice'",
    ]


# Channels that stay


class Odd(nn.Module):
    """A layer, an operation that cannot lose channels, and a second layer."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        images = x.ndim == 4
        y = (nn.Conv(8, (1, 1), name="first") if images else nn.Dense(8, name="first"))(x)
        if self.kind == "LayerNorm":
            y = nn.LayerNorm()(y)
        elif self.kind == "GroupNorm":
            y = nn.GroupNorm(2)(y)
        elif self.kind == "softmax":
            y = nn.softmax(y)
        elif self.kind == "groups":
            y = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(y)
        elif self.kind == "parameter":
            y = y * self.param("gamma", nn.initializers.ones, (8,))
        elif self.kind == "slice":
            y = y[..., :4] * y[..., 4:]
        elif self.kind == "input":
            y = nn.Dense(x.shape[-1], name="back")(y) + x
        elif self.kind == "sort":
            y = jnp.sort(y, -1)
        elif self.kind == "added":
            y = nn.relu(y + nn.Dense(1, name="shared")(x))
        elif self.kind == "number":
            y = nn.relu(y) + x.min()
        elif self.kind == "selected":
            y = jnp.where(x.sum() > -1e9, y, y + 1)
        else:
            y = getattr(nn, self.kind)(y)
        return nn.Dense(3, name="last")(y)


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("kind", "reason", "name"),
    [
        ("LayerNorm", "as in LayerNorm or softmax", "first"),
        ("softmax", "as in LayerNorm or softmax", "first"),
        ("GroupNorm", "", "first"),
        ("sigmoid", "makes them constant instead of zero", "first"),
        ("softplus", "makes them constant instead of zero", "first"),
        ("groups", "a convolution in groups", "first"),
        ("groups", "a convolution in groups", "grouped"),
        ("parameter", "the parameter 'gamma' belongs to no dense", "first"),
        ("slice", "a slice or padding fixes positions", "first"),
        ("input", "such as an input", "back"),
        ("sort", "the operation sort reads them", "first"),
        ("added", "depends on the inputs is added", "first"),
        ("number", "depends on the inputs is added", "first"),
        ("selected", "or selects among values", "first"),
        ("relu", "they are outputs of the network", "last"),
    ],
)
def test_channels_that_cannot_go_stay_with_a_reason(kind: str, reason: str, name: str) -> None:
    x = IMAGES if kind in ("groups", "GroupNorm") else ROWS
    variables = linen(Odd(kind), {name: [1]}, x)
    found = shrink(Odd(kind), x, variables=variables)
    assert (found.removed, found.features) == ({}, {})
    assert list(found.kept) == [name]
    assert reason in found.kept[name]
    same(found.variables, variables, exactly=True)
    same(found.model.apply(found.variables, x), Odd(kind).apply(variables, x), exactly=True)


def test_a_value_of_the_inputs_that_is_zero_here_alone_keeps_channels() -> None:
    """Zeros as example inputs hide what the inputs add to a channel."""
    for kind in ("added", "number"):
        variables = linen(Odd(kind), {"first": [1]}, ROWS)
        assert shrink(Odd(kind), jnp.zeros_like(ROWS), variables=variables).removed == {}


@pytest.mark.parametrize("gate", [False, True])
def test_a_factor_of_the_inputs_lets_channels_go(gate: bool) -> None:
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            y = nn.elu(nn.Dense(8, name="first")(x))
            other = nn.Dense(1, name="gate")(x)
            y = y * nn.sigmoid(other) if gate else y / (1 + other**2)
            return nn.Dense(3, name="last")(y)

    variables = linen(Scaled(), {"first": [1]}, ROWS)
    found = shrink(Scaled(), ROWS, variables=variables)
    assert found.removed == {"first": 1}
    same(found.model.apply(found.variables, -3 * ROWS), Scaled().apply(variables, -3 * ROWS))


def test_channels_are_removed_outside_of_jit_alone() -> None:
    variables = linen(Odd("relu"), {"first": [1]}, ROWS)
    with pytest.raises(TypeError, match=r"got traced ones: call this outside of jax\.jit"):
        jax.jit(lambda v: shrink(Odd("relu"), ROWS, variables=v).variables)(variables)
    with pytest.raises(TypeError, match="example_inputs must hold arrays that can be read"):
        jax.jit(lambda x: shrink(Odd("relu"), x, variables=variables).variables)(ROWS)


def test_a_layer_keeps_one_channel() -> None:
    variables = linen(Chain(), {"first": range(8)})
    found = shrink(Chain(), ROWS, variables=variables)
    assert found.removed == {"first": 7}
    assert found.kept == {"first": "each layer keeps at least one channel"}
    same(found.model.apply(found.variables, ROWS), Chain().apply(variables, ROWS))


def test_a_channel_that_is_zero_on_the_examples_alone_stays() -> None:
    variables = linen(Chain(), {})
    variables["params"]["first"]["bias"] = variables["params"]["first"]["bias"].at[2].set(-99)
    found = shrink(Chain(), ROWS, variables=variables)
    assert (found.removed, found.kept) == ({}, {})


class Joined(nn.Module):
    """Two layers side by side."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.concatenate([nn.Dense(4, name="a")(x), nn.Dense(5, name="b")(x)], -1)
        return nn.Dense(3, name="last")(nn.relu(y))


def test_concatenated_layers_lose_their_own_channels() -> None:
    variables = linen(Joined(), {"a": [0], "b": [1, 3]})
    found = shrink(Joined(), ROWS, variables=variables)
    assert found.removed == {"a": 1, "b": 2}
    kernel = variables["params"]["last"]["kernel"]
    left = np.array([1, 2, 3, 4, 6, 8])
    same(found.variables["params"]["last"]["kernel"], kernel[left], exactly=True)
    same(found.model.apply(found.variables, ROWS), Joined().apply(variables, ROWS))


class Sized(nn.Module):
    """A network that computes with the number of its channels, or with a fixed shape."""

    fixed: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(8, name="first")(x)
        y = y.reshape(len(x), 8) if self.fixed else y / y.shape[-1]
        return nn.Dense(3)(y)


@pytest.mark.parametrize(
    ("fixed", "message"), [(True, "take its sizes from its arrays"), (False, "the number of its")]
)
def test_a_model_that_would_compute_something_else_is_refused(fixed: bool, message: str) -> None:
    variables = linen(Sized(fixed), {"first": [1]})
    if fixed:
        variables = linen(Sized(fixed), {"first": [1, 2]})
    with pytest.raises(ValueError, match=message):
        shrink(Sized(fixed), ROWS, variables=variables)


def test_a_smaller_network_can_shrink_again() -> None:
    variables = linen(Chain(), {"first": [1], "second": [2]})
    once = shrink(Chain(), ROWS, variables=variables)
    params = once.variables["params"]
    params["first"] = {key: x.at[..., :3].set(0) for key, x in params["first"].items()}
    wanted = once.model.apply(once.variables, ROWS)
    twice = shrink(once.model, ROWS, variables=once.variables)
    assert twice.removed == {"first": 3}
    assert twice.model.features == {"first": 4, "second": 5}
    same(twice.model.apply(twice.variables, ROWS), wanted)


# Constants


@pytest.mark.every_second
@pytest.mark.parametrize("scale", [False, True])
def test_constants_raise_until_they_are_silent(scale: bool) -> None:
    network = nn.Sequential([
        nn.Conv(8, (3, 3)), nn.BatchNorm(use_running_average=True, use_scale=scale), nn.relu,
        nn.Conv(4, (3, 3)),
    ])  # fmt: skip
    variables = linen(network, {}, IMAGES)
    params, statistics = variables["params"], variables["batch_stats"]["layers_1"]
    params["layers_0"]["kernel"] = params["layers_0"]["kernel"].at[..., [1, 4]].set(0)
    params["layers_0"]["bias"] = params["layers_0"]["bias"].at[:].set(1)
    params["layers_1"]["bias"] = params["layers_1"]["bias"].at[jnp.array([1, 4])].set(3)
    before = copied(variables)
    message = r"constant channels: 2 of layers_0, 2 of layers_1\. Call silence_channels first"
    with pytest.raises(ValueError, match=message):
        shrink(network, IMAGES, variables=variables)
    silent = silence_channels(network, IMAGES, variables=variables)
    same(variables, before, exactly=True)
    assert silent.model is network
    assert silent.silent == {"layers_0": 2, "layers_1": 2}
    assert (silent.variables["batch_stats"]["layers_1"]["mean"] != statistics["mean"]).sum() == (
        0 if scale else 2
    )
    assert str(silent) == "silenced channels: 2 of 'layers_0', 2 of 'layers_1'"
    again = silence_channels(network, IMAGES, variables=silent.variables)
    assert again.silent == {}
    assert str(again) == "no channel changed"
    found = shrink(network, IMAGES, variables=silent.variables)
    assert found.removed == {"layers_0": 2}
    dropped = copied(variables)
    for values in dropped["params"]["layers_1"].values():
        values[[1, 4]] = 0
    dropped["params"]["layers_0"]["bias"][[1, 4]] = 0
    if not scale:
        dropped["batch_stats"]["layers_1"]["mean"][[1, 4]] = 0
    same(found.model.apply(found.variables, IMAGES), network.apply(dropped, IMAGES))


def test_channels_that_cannot_go_are_not_silenced() -> None:
    for kind in ("sigmoid", "LayerNorm", "input"):
        variables = linen(Odd(kind), {})
        params = variables["params"]["first" if kind != "input" else "back"]
        params["kernel"] = params["kernel"].at[:, 1].set(0)
        assert silence_channels(Odd(kind), ROWS, variables=variables).silent == {}


def test_an_nnx_module_is_silenced_in_a_copy() -> None:
    model = module({"conv": [3]})
    model.norm.scale[...] += 1
    tied = silence_channels(model, IMAGES)
    assert tied.silent == {}  # because of the layer that is called twice
    model = module({"conv": [3], "twice": range(3, 32, 8)})
    model.norm.bias[...] += 1
    found = silence_channels(model, IMAGES)
    assert (found.silent, found.variables) == ({"norm": 1}, None)
    assert not found.model.norm.bias[3]
    assert model.norm.bias[3]
    assert shrink(found.model, IMAGES).removed == {"conv": 1, "twice": 4}


# The state of the optimizer


@pytest.mark.every_second
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_the_smaller_network_is_that_of_the_larger_one(masked: bool) -> None:
    zero = {"first": [1, 4], "second": [0]}
    variables = linen(Chain(), zero)
    optimizer = optax.adam(1e-2)
    if masked:
        optimizer = optax.chain(
            optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
            optimizer,
        )

    def step(apply: Any, params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.square(apply({"params": p}, ROWS)).sum())(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def cut(tree: Any) -> Any:
        left = [np.delete(np.arange(8), [1, 4]), np.arange(1, 6)]
        axes = {"first": (None, left[0]), "second": (left[0], left[1]), "last": (left[1], None)}
        found = {}
        for name, layer in tree.items():
            rows, columns = axes[name]
            kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
            kernel = kernel if rows is None else kernel[rows]
            found[name] = {
                "kernel": kernel if columns is None else kernel[:, columns],
                "bias": bias if columns is None else bias[columns],
            }
        return found

    params, state = variables["params"], optimizer.init(variables["params"])
    _, state = step(Chain().apply, params, state)
    before = copied(state)
    found = shrink(Chain(), ROWS, variables=variables, state=state)
    same(state, before, exactly=True)
    own, small = (x[-1][0] if masked else x[0] for x in (state, found.state))
    assert small.count == own.count
    same(small.mu, cut(own.mu), exactly=True)
    same(small.nu, cut(own.nu), exactly=True)
    if masked:
        kernel = found.state[0].inner_state.trace["first"]["kernel"]
        assert kernel.shape == (16, 6)
    wanted, _ = step(Chain().apply, params, state)
    run = jax.jit(lambda p, s: step(found.model.apply, p, s))
    got, _ = run(found.variables["params"], found.state)
    same(got, cut(wanted))


def test_the_state_of_an_nnx_optimizer() -> None:
    model = module({"first": [2, 5]})
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)

    def loss(model: Nnx) -> jax.Array:
        return jnp.square(model(IMAGES)).sum()

    model.eval()
    optimizer.update(model, nnx.grad(loss)(model))
    for value in (model.layers[0].kernel, model.layers[0].bias):
        value[...] = value[...].at[..., [2, 5]].set(0)
    found = shrink(model, IMAGES, state=optimizer.opt_state)
    assert found.removed == {"layers/0": 2}
    trace = nnx.as_pure(found.state[0].trace)
    held = nnx.as_pure(optimizer.opt_state[0].trace)
    left = np.array([0, 1, 3, 4])
    same(trace["layers"][0]["kernel"], held["layers"][0]["kernel"][:, left], exactly=True)
    same(trace["layers"][1]["kernel"], held["layers"][1]["kernel"][left], exactly=True)
    same(trace["twice"], held["twice"], exactly=True)
    smaller = nnx.Optimizer(found.model, optimizer.tx, wrt=nnx.Param)
    smaller.opt_state = found.state
    for each, own in ((optimizer, model), (smaller, found.model)):
        each.update(own, nnx.grad(loss)(own))
    kernel = model.layers[0].kernel[...][:, left]
    same(found.model.layers[0].kernel[...], kernel)


def test_an_array_of_another_shape_in_the_state_is_refused() -> None:
    variables = linen(Chain(), {"first": [1]})
    rows = jax.tree.map(lambda x: x.sum(0, keepdims=True)[0], variables["params"])
    state = {"rows": rows, "scalars": jax.tree.map(jnp.sum, rows)}
    with pytest.raises(ValueError, match=r"got shape \(8,\) for first/kernel of \(16, 8\)"):
        shrink(Chain(), ROWS, variables=variables, state=state)


def test_a_state_of_other_parameters_is_refused() -> None:
    variables = linen(Chain(), {"first": [1]})
    base = optax.sgd(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"no tree with the paths of .* such as 'first/"):
        shrink(Chain(), ROWS, variables=variables, state=base.init({"other": jnp.ones((2, 3))}))
    with pytest.raises(ValueError, match=r"does a wrapper such as optax\.flatten hide them"):
        shrink(
            Chain(), ROWS, variables=variables, state=optax.flatten(base).init(variables["params"])
        )
    held = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.scale_by_schedule(lambda t: 1.0))
    # A key, counts and a record, which follow no parameter
    state = held.init(variables["params"]), {"losses": np.zeros(10)}
    found = shrink(Chain(), ROWS, variables=variables, state=state).state
    assert list(map(id, jax.tree.leaves(found))) == list(map(id, jax.tree.leaves(state)))


def test_adasap_continues_on_the_smaller_network() -> None:
    network = Chain()
    variables = linen(network, {})
    schedule = safe_core.schedules.exponential_sparsity(0.5, steps=2, start=1, every=1)
    method = safe_core.adasap(safe_core.Channel(schedule, scope="tensor"), rho_max=0.5)
    base = optax.sgd(1e-3, momentum=0.9)

    def inner(name: str, _: Any) -> bool:
        return name == "first/kernel"

    state = sparse_optimizer(base, method, where=inner).init(variables["params"])
    with pytest.raises(TypeError, match=r"state must be that of the base .* pass its \.base"):
        shrink(network, ROWS, variables=variables, state=(state,))
    params = variables["params"]
    params["first"]["kernel"] = params["first"]["kernel"].at[:, :4].set(0)
    silent = silence_channels(network, ROWS, variables=variables)
    assert silent.silent == {"first": 4}
    found = shrink(network, ROWS, variables=silent.variables, state=state.base)
    assert found.removed == {"first": 4}
    last = sparse_optimizer(base, safe_core.safe(0.5, rho=0.0), where=inner)
    assert last.init(found.variables["params"]).support["first"]["kernel"].shape == (16, 4)
    assert found.state[0].trace["first"]["kernel"].shape == (16, 4)


# Arguments


@pytest.mark.parametrize("function", [shrink, silence_channels])
@pytest.mark.parametrize(
    ("model", "inputs", "variables", "message"),
    [
        (3, ROWS, None, "model must be a Flax module, of Linen or NNX, got <class 'int'>"),
        (Chain(), ROWS, None, "variables must be given for a Linen module, got None"),
        (Chain(), ROWS, {"first": {}}, "variables must be a mapping with the entry 'params'"),
        (module({}), ROWS, {}, "variables must be left out for an NNX module"),
        (module({}), 3, None, "example_inputs must be an array, a tuple or a mapping"),
        (module({}), {"x": IMAGES * np.nan}, None, r"must hold no NaN, .* \(4, 8, 8, 3\)"),
        (nn.BatchNorm(), ROWS, nn.BatchNorm(True).init(jax.random.key(0), ROWS) | {"params": {}},
         'pass flags by name, such as {"x": x, "train": False}'),
        (module({}), ROWS, None, r"example_inputs must be .* got shape \(48, 16\) float32"),
        (nn.Sequential([lambda x: x if x.sum() > 0 else -x]), ROWS, {"params": {}},
         "model must be one that JAX can trace"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(
    function: Any, model: Any, inputs: Any, variables: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        function(model, inputs, variables=variables)


def test_an_optimizer_is_not_a_state() -> None:
    model = module({})
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"state must be the opt_state of the nnx\.Optimizer"):
        shrink(model, IMAGES, state=optimizer)


def test_weights_that_are_nan_are_named() -> None:
    variables = linen(Chain(), {"first": [1]})
    last = variables["params"]["last"]
    last["bias"] = last["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="model must give numbers for example_inputs, got outputs"):
        shrink(Chain(), ROWS, variables=variables)


# Labels


def test_a_reshape_that_mixes_two_named_axes_keeps_both() -> None:
    sets = ChannelSets()
    named = sets.new(2), sets.new(3)
    assert reshaped(sets, named, (6,))[0].tolist() == [STAYS] * 6
    assert len(sets.reasons()) == 5


def test_a_reshape_that_splits_channels_keeps_them() -> None:
    sets = ChannelSets()
    found = reshaped(sets, [constant(STAYS, 2), sets.new(6)], (2, 3, 2))
    assert [own.tolist() for own in found] == [[STAYS] * 2, [STAYS] * 3, [STAYS] * 2]
    assert set(sets.reasons()) == set(range(6))
