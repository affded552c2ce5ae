"""Axis roles of kernels: what modules know, and what shapes may conclude from biases."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import safe_core
from safe_core import Layout
from safe_core.adapters.jax.flax import layouts_of, load_safetensors, save_safetensors
from safe_core.adapters.jax.flax.export import to_torch_names
from safe_core.adapters.jax.tree import SparseTree
from safe_core.adapters.jax.weights import is_prunable, layout_of, name_of, owner_of
from safe_core.adapters.optax import check_sparsity, sparse_optimizer
from safe_core.layout import resolve


def shapes_of(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def inferred(leaves: dict[str, Any]) -> dict[str, Layout | None]:
    """Layouts of all weights from shapes alone, with non-negative axes."""
    found = {}
    for path, x in leaves.items():
        if is_prunable(path, x):
            layout = layout_of(path, x, leaves=leaves)
            found[path] = None if layout is None else resolve(layout, x.ndim, path)
    return found


class Calls(nn.Module):
    """One layer under a name of choice."""

    layer: Any
    name_given: str
    norms: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = self.layer(name=self.name_given)(x)
        if self.norms:
            y = nn.LayerNorm(name="norm", reduction_axes=-1, feature_axes=-1)(y)
        return y


def stacked(cls: Any, place: int, length: int, **options: Any) -> Any:
    """A stack of modules along an axis of their parameters, all of the same inputs."""
    lifted = nn.vmap(
        cls,
        variable_axes={"params": place},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=length,
    )
    return partial(lifted, **options)


# Modules

WORDS, IMAGES = jnp.ones((2, 7, 6), jnp.float32), jnp.ones((2, 9, 9, 4), jnp.float32)
LINEN: list[tuple[Any, Any, Layout]] = [
    (partial(nn.Dense, features=8), WORDS, Layout((0,), (1,))),
    (partial(nn.DenseGeneral, features=(2, 4)), WORDS, Layout((0,), (1, 2))),
    (partial(nn.DenseGeneral, features=8, axis=(-2, -1)), WORDS, Layout((0, 1), (2,))),
    (partial(nn.DenseGeneral, features=(2, 4), batch_dims=(0,)), WORDS, Layout((1,), (2, 3), (0,))),
    (partial(nn.Einsum, shape=(8, 6), einsum_str="btd,fd->btf"), WORDS, Layout((1,), (0,))),
    (
        partial(nn.Einsum, shape=(2, 6, 4), einsum_str="btd,ndh->btnh"),
        WORDS,
        Layout((1,), (2,), (0,)),
    ),
    (partial(nn.Einsum, shape=(6, 2, 4), einsum_str="btd,dnh->btnh"), WORDS, Layout((0,), (1, 2))),
    (
        partial(nn.Einsum, shape=(2, 6, 4), einsum_str="btd,bdf->btf"),
        WORDS,
        Layout((1,), (2,), (0,)),
    ),
    (partial(nn.Conv, features=8, kernel_size=(3,)), WORDS, Layout((1,), (2,))),
    (partial(nn.Conv, features=8, kernel_size=(3, 3)), IMAGES, Layout((2,), (3,))),
    (
        partial(nn.Conv, features=8, kernel_size=(3, 3), feature_group_count=4),
        IMAGES,
        Layout((2,), (3,)),
    ),
    (partial(nn.ConvLocal, features=8, kernel_size=(3, 3)), IMAGES, Layout((2,), (3,), (0, 1))),
    (partial(nn.ConvTranspose, features=8, kernel_size=(3, 3)), IMAGES, Layout((2,), (3,))),
    (
        partial(nn.ConvTranspose, features=8, kernel_size=(3, 3), transpose_kernel=True),
        IMAGES,
        Layout((3,), (2,)),
    ),
]


def inserted(layout: Layout, ndim: int, axis: int) -> Layout:
    """The layout of a stack along an axis, of which the layer has ``ndim`` axes."""
    place = axis % (ndim + 1)

    def moved(axes: Any) -> tuple[int, ...]:
        return tuple(a + (a >= place) for a in axes)

    batch = tuple(sorted((*moved(layout.batch_axes), place)))
    return Layout(moved(layout.input_axes), moved(layout.output_axes), batch)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("layer", "x", "wanted"), LINEN)
def test_modules_of_linen_know_their_axes(layer: Any, x: Any, wanted: Layout, bias: bool) -> None:
    layer = partial(layer, use_bias=bias)
    model = Calls(layer, "out")
    assert layouts_of(model, x) == {"out/kernel": wanted}
    ndim = shapes_of(model, x)["out/kernel"].ndim
    for axis in (0, 1, -1):
        stack = Calls(stacked(layer.func, axis, 5, **layer.keywords), "query")
        assert layouts_of(stack, x) == {"query/kernel": inserted(wanted, ndim, axis)}


class Body(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(2, use_bias=self.bias, name="attention")(x)
        return nn.Dense(6, use_bias=self.bias, name="dense")(x), None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scanned_block_of_linen_knows_its_stack(axis: int, bias: bool) -> None:
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            lifted = nn.scan(
                nn.remat(Body),
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=5,
            )
            x, _ = lifted(bias, name="blocks")(x, None)
            return nn.RNN(nn.OptimizedLSTMCell(4))(x)

    into, out, matrix = Layout((0,), (1, 2)), Layout((0, 1), (2,)), Layout((0,), (1,))
    single = {
        **{f"attention/{name}": (into, 3) for name in ("query", "key", "value")},
        "attention/out": (out, 3),
        "dense": (matrix, 2),
    }
    found = layouts_of(Deep(), WORDS)
    cell = {path: layout for path, layout in found.items() if not path.startswith("blocks")}
    assert set(cell.values()) == {matrix}
    assert len(cell) == 8
    wanted = {
        f"blocks/{name}/kernel": inserted(layout, ndim, axis)
        for name, (layout, ndim) in single.items()
    }
    assert found == cell | wanted
    known = inferred(shapes_of(Deep(), WORDS))
    assert set(known) == set(found)
    assert all(layout in (None, found[path]) for path, layout in known.items())


def nnx_layer(kind: str, bias: bool, rngs: Any) -> Any:
    options: dict[str, Any] = {"use_bias": bias, "rngs": rngs}
    if kind == "einsum":
        return nnx.Einsum("btd,ndh->btnh", (2, 6, 4), (2, 4) if bias else None, rngs=rngs)
    return {
        "linear": lambda: nnx.Linear(6, 8, **options),
        "into": lambda: nnx.LinearGeneral(6, (2, 4), **options),
        "from": lambda: nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), **options),
        "conv": lambda: nnx.Conv(4, 8, (3, 3), **options),
        "transposed": lambda: nnx.ConvTranspose(4, 8, (3, 3), transpose_kernel=True, **options),
        "attention": lambda: nnx.MultiHeadAttention(2, 6, decode=False, **options),
    }[kind]()


NNX = {
    "einsum": Layout((1,), (2,), (0,)),
    "linear": Layout((0,), (1,)),
    "into": Layout((0,), (1, 2)),
    "from": Layout((0, 1), (2,)),
    "conv": Layout((2,), (3,)),
    "transposed": Layout((3,), (2,)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_modules_of_nnx_know_their_axes(axis: int | None, bias: bool) -> None:
    def layouts(make: Any) -> tuple[dict[str, Layout], dict[str, Any]]:
        model = nnx.eval_shape(make)
        leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
        return layouts_of(model), {name_of(path): x for path, x in leaves}

    for kind in (*NNX, "attention"):

        def make(kind: str = kind) -> Any:
            if axis is None:
                return nnx_layer(kind, bias, nnx.Rngs(0))
            create = partial(nnx_layer, kind, bias)
            lifted = nnx.vmap(create, in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
            return lifted(nnx.Rngs(0).split(5))

        found, leaves = layouts(make)
        single = (
            {f"{name}/kernel": NNX["into"] for name in ("query", "key", "value")}
            | {"out/kernel": NNX["from"]}
            if kind == "attention"
            else {"kernel": NNX[kind]}
        )
        wanted = {
            path: layout if axis is None else inserted(layout, leaves[path].ndim - 1, axis)
            for path, layout in single.items()
        }
        assert found == wanted, kind
        known = inferred(leaves)
        assert all(layout in (None, wanted[path]) for path, layout in known.items()), kind


def test_an_axis_that_shapes_leave_open_is_not_claimed() -> None:
    """Four matrices of four inputs may be stacked along either of two axes."""

    def make(rngs: Any, *, use_bias: bool) -> Any:
        return nnx.Linear(4, 8, use_bias=use_bias, rngs=rngs)

    def stack(**options: Any) -> Any:
        return nnx.vmap(partial(make, **options))(nnx.Rngs(0).split(4))

    assert layouts_of(stack(use_bias=False)) == {}
    assert layouts_of(stack(use_bias=True)) == {}  # axis 0 or -2


def test_layouts_of_other_arguments() -> None:
    with pytest.raises(TypeError, match="model must be a Flax module"):
        layouts_of({"kernel": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match="inputs must be left out"):
        layouts_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), WORDS)
    shape = jax.ShapeDtypeStruct(WORDS.shape, WORDS.dtype)
    assert layouts_of(nn.Dense(3), shape) == {"kernel": Layout((0,), (1,))}


def test_an_nnx_module_in_place_of_its_parameters() -> None:
    model = nnx.LinearGeneral(6, (2, 4), use_bias=False, rngs=nnx.Rngs(0))
    assert SparseTree.read(model, None, None).info.layouts == (Layout((0,), (1, 2)),)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacks_of_equinox(axis: int) -> None:
    def make(key: Any) -> Any:
        conv = eqx.nn.Conv1d(2, 4, 3, key=key)
        return eqx.nn.GRUCell(6, 3, key=key), eqx.nn.Linear(6, 8, key=key), conv

    keys = jax.random.split(jax.random.key(0), 5)
    model = eqx.filter_eval_shape(eqx.filter_vmap(make, out_axes=eqx.if_array(axis)), keys)
    params = eqx.filter(model, lambda x: hasattr(x, "shape"))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {}
    for path, x in leaves:
        owner = owner_of(params, path)
        if is_prunable(name_of(path), x, owner):
            found[name_of(path)] = layout_of(name_of(path), x, owner)
    matrix = inserted(Layout((1,), (0,)), 2, axis)
    names = ("0/weight_ih", "0/weight_hh", "1/weight")
    assert found == {
        **dict.fromkeys(names, matrix),
        "2/weight": inserted(Layout((1,), (0,)), 3, axis),
    }


# Shapes


def leaves(**shapes: Any) -> dict[str, Any]:
    """Leaves by path, where ``__`` stands for ``/``."""
    return {name.replace("__", "/"): np.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        # A Dense that happens to have a name of attention
        (leaves(query__kernel=(4, 6)), Layout((0,), (1,))),
        (leaves(out__kernel=(4, 6), out__bias=(6,)), Layout((0,), (1,))),
        # Stacks
        (leaves(query__kernel=(5, 4, 6), query__bias=(5, 6)), Layout((1,), (2,), (0,))),
        (leaves(x__kernel=(5, 4, 6), x__bias=(5, 6)), Layout((1,), (2,), (0,))),
        (leaves(x__kernel=(5, 4, 2, 3), x__bias=(5, 2, 3)), None),  # heads, or a stack of stacks
        (leaves(x__kernel=(5, 4, 2, 3), x__bias=(5, 4, 3)), Layout((2,), (3,), (0, 1))),
        (leaves(x__kernel=(4, 4, 6), x__bias=(4, 6)), None),  # or heads
        (leaves(query__kernel=(5, 4, 6)), None),
        (leaves(x__kernel=(4, 5, 6), x__bias=(6, 5)), None),  # a stack along axis 1, or an einsum
        # Attention by halves
        (leaves(query__kernel=(8, 2, 4), query__bias=(2, 4)), None),
        (leaves(out__kernel=(2, 4, 8), out__bias=(8,)), None),
        # Convolutions
        (leaves(conv__kernel=(3, 4, 6), conv__bias=(6,)), Layout((1,), (2,))),
        (leaves(conv__kernel=(3, 3, 4, 6), conv__bias=(6,)), Layout((2,), (3,))),
        (leaves(conv__kernel=(5, 3, 4, 6), conv__bias=(5, 6)), Layout((2,), (3,), (0,))),
        (leaves(conv__kernel=(3, 3, 4, 6)), None),
        (leaves(conv__kernel=(3, 3, 4, 6), norm__scale=(6,)), Layout((2,), (3,))),
        (leaves(conv__kernel=(3, 3, 4, 6), norm__scale=(4,)), Layout((2,), (3,))),
        (leaves(conv__kernel=(5, 3, 4, 6), norm__scale=(6,)), None),
        (leaves(conv__kernel=(3, 3, 4, 6), norm__scale=(3, 6)), None),
        (leaves(conv__kernel=(3, 3, 4, 6), other__norm__scale=(6,)), None),
        (leaves(layers__0__kernel=(3, 3, 4, 6), layers__0__bias=(6,)), None),  # or three axes in
        # Transposed convolutions
        (leaves(up__kernel=(3, 3, 4, 6), up__bias=(4,)), None),
        (leaves(convtranspose__kernel=(3, 3, 4, 6), convtranspose__bias=(4,)), Layout((3,), (2,))),
        (leaves(convtranspose__kernel=(3, 3, 4, 6), convtranspose__bias=(6,)), Layout((2,), (3,))),
        (leaves(convtranspose__kernel=(3, 3, 6, 6), convtranspose__bias=(6,)), None),
        (leaves(convtranspose__kernel=(3, 3, 4, 6), norm__scale=(6,)), None),
        (leaves(conv_transpose__w=(3, 3, 6, 6), conv_transpose__b=(6, 1, 1)), Layout((3,), (2,))),
        # Matrices
        (leaves(x__kernel=(4, 6), x__bias=(4,)), Layout((1,), (0,))),
        (leaves(x__kernel=(4, 4), x__bias=(4,)), Layout((0,), (1,))),
        (leaves(einsum__kernel=(4, 4), einsum__bias=(4,)), None),
        (leaves(einsum__kernel=(4, 6)), None),
        (leaves(einsum__kernel=(4, 6), einsum__bias=(4,)), Layout((1,), (0,))),
        (leaves(x__kernel=(4, 6), x__bias=(5,)), None),
    ],
)
def test_shapes_tell_axes_only_where_one_reading_fits(given: Any, wanted: Layout | None) -> None:
    assert list(inferred(given).values()) == [wanted]


def attention(q: Any, k: Any, v: Any, out: Any, *biases: Any) -> dict[str, Any]:
    names = ("query", "key", "value", "out")
    found = {f"a/{name}/kernel": np.zeros(s) for name, s in zip(names, (q, k, v, out), strict=True)}
    for name, shape in zip(names, biases, strict=False):
        found[f"a/{name}/bias"] = np.zeros(shape)
    return found


HEADS = [Layout((0,), (1, 2))] * 3 + [Layout((0, 1), (2,))]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (attention(*[(8, 2, 4)] * 3, (2, 4, 8)), HEADS),
        (attention((8, 2, 4), (6, 2, 4), (6, 2, 4), (2, 4, 8)), HEADS),  # to another sequence
        (attention(*[(8, 8, 4)] * 3, (8, 4, 8)), [None] * 4),  # or eight layers
        (attention(*[(8, 8, 4)] * 3, (8, 4, 8), *[(8, 4)] * 3, (8,)), HEADS),
        (attention(*[(8, 3, 3)] * 3, (3, 3, 8)), [None] * 4),  # or three layers along axis 1
        (attention(*[(8, 3, 3)] * 3, (3, 3, 8), *[(3, 3)] * 3, (8,)), HEADS),
        (attention(*[(8, 2, 4)] * 3, (8, 2, 4)), [None] * 4),  # layers
        (
            attention(*[(3, 8, 4)] * 3, (3, 4, 8), *[(3, 4)] * 3, (3, 8)),
            [Layout((1,), (2,), (0,))] * 4,
        ),
        (attention(*[(8, 2, 4)] * 3, (2, 4, 8), *[(8, 4)] * 3, (2, 8)), None),  # stacks
    ],
)
def test_attention_must_fit_together(given: Any, wanted: Any) -> None:
    found = list(inferred(given).values())
    if wanted is None:
        assert not set(HEADS) & set(found)
    else:
        assert found == wanted


SIZES = st.sampled_from([2, 3, 4])
NAMES = st.sampled_from(["query", "out", "x", "conv", "Conv_0", "ConvTranspose_0", "Einsum_0"])


@st.composite
def layers(draw: Any) -> tuple[nn.Module, Any, str]:
    """A layer of Linen under any name, perhaps stacked, with lengths that coincide often."""
    inputs, outputs, heads, window = (draw(SIZES) for _ in range(4))
    name, bias = draw(NAMES), draw(st.booleans())
    x = jnp.ones((2, 5, inputs))
    kind, options = draw(
        st.sampled_from(
            [
                (nn.Dense, {"features": outputs}),
                (nn.DenseGeneral, {"features": (heads, outputs)}),
                (nn.Conv, {"features": outputs, "kernel_size": (window,)}),
                (
                    nn.ConvTranspose,
                    {"features": outputs, "kernel_size": (window,), "transpose_kernel": True},
                ),
                (
                    nn.Einsum,
                    {"shape": (heads, inputs, outputs), "einsum_str": "btd,ndh->btnh"},
                ),
                (
                    nn.Einsum,
                    {"shape": (inputs, heads, outputs), "einsum_str": "btd,dnh->bthn"},
                ),
            ]
        )
    )
    # A name with "conv" is taken for a convolution, and only one with "transpose" for such one.
    if ("conv" in name.lower()) != (kind in (nn.Conv, nn.ConvTranspose)):
        name = {nn.Conv: "Conv_0", nn.ConvTranspose: "ConvTranspose_0"}.get(kind, "out")
    if kind is nn.ConvTranspose:
        name = "ConvTranspose_0"
    options["use_bias"] = bias
    axis = draw(st.sampled_from([None, 0, 1, -1]))
    if axis is None:
        return Calls(partial(kind, **options), name, draw(st.booleans())), x, name
    length = draw(SIZES)
    # Shapes cannot tell a stack of convolutions alone, without biases, beside a norm.
    norms = draw(st.booleans()) and (bias or kind is not nn.Conv)
    return Calls(stacked(kind, axis, length, **options), name, norms), x, name


@settings(max_examples=200, deadline=None)
@given(layers())
def test_shapes_never_contradict_the_module(drawn: tuple[nn.Module, Any, str]) -> None:
    model, x, name = drawn
    leaves = shapes_of(model, x)
    path = f"{name}/kernel"
    wanted, found = layouts_of(model, x)[path], inferred(leaves)[path]
    shapes = {k: v.shape for k, v in leaves.items()}
    assert found in (None, wanted), shapes


def test_convolutions_of_haiku_in_either_format() -> None:
    def network(x: Any) -> Any:
        x = hk.Conv2D(6, 3, data_format="NCHW")(x)
        x = hk.Conv2D(5, 3, with_bias=False, data_format="NCHW")(x)
        x = hk.BatchNorm(True, True, 0.9, data_format="NCHW")(x, True)
        return hk.vmap(lambda x: hk.Linear(7)(x), split_rng=False)(x)

    model = hk.transform_with_state(network)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 4, 8, 8)))
    shapes = {name_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    assert inferred(shapes) == {
        "conv2_d/w": Layout((2,), (3,)),
        "conv2_d_1/w": Layout((2,), (3,)),
        "linear/w": Layout((0,), (1,)),
    }


# Use


class Scanned(nn.Module):
    """Blocks of attention, for which only the module knows its stack."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return lifted(False, name="blocks")(x, None)[0]


@pytest.mark.parametrize("collection", [False, True])
def test_layouts_of_a_module_serve_training_and_export(tmp_path: Any, collection: bool) -> None:
    x = jnp.ones((2, 5, 6))
    variables = jax.jit(Scanned().init)(jax.random.key(0), x)
    params = variables if collection else variables["params"]
    method = safe_core.admm("2:4", penalty=0.1)
    with pytest.raises(ValueError, match=r"layout of .*blocks/attention/key/kernel"):
        sparse_optimizer(optax.sgd(0.1), safe_core.admm("1:2")).init(params)
    layout = layouts_of(Scanned(), x)
    with pytest.raises(ValueError, match="6 entries, which 4 does not divide"):
        sparse_optimizer(optax.sgd(0.1), method, layout=layout).init(params)
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.admm("1:2"), layout=layout)
    state = tx.init(params)
    support = jax.tree.leaves(state.support)
    assert support[0].shape == (3, 6, 2, 3)
    # Groups run along the six inputs, in each of three layers.
    assert (np.asarray(support[0]).reshape(3, 3, 2, -1).sum(2) == 1).all()
    found = to_torch_names(params, layout=layout)
    assert found["blocks.attention.query.weight"].shape == (3, 6, 6)
    assert found["blocks.attention.out.weight"].shape == (3, 6, 6)
    inner = params["params"] if collection else params
    query = np.asarray(inner["blocks"]["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(
        found["blocks.attention.query.weight"], query.reshape(3, 6, 6).swapaxes(1, 2)
    )
    save_safetensors(params, tmp_path / "x.safetensors", layout=layout)
    back = load_safetensors(tmp_path / "x.safetensors", params, layout=layout)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_counts_within_tensors_need_to_know_stacks() -> None:
    """Without biases a stack looks like one tensor, and would be pruned as one."""
    params = {"layers": {"kernel": jnp.ones((3, 6, 8))}}
    for pattern in (
        safe_core.Unstructured(0.5, scope="tensor"),
        safe_core.Unstructured(0.5, "tensor", "erdos_renyi_kernel"),
        safe_core.Unstructured(0.5, floor=0.5),
    ):
        message = r"layout of layers/kernel is unknown.*\(3, 6, 8\) may be a stack.*layouts_of"
        with pytest.raises(ValueError, match=message):
            sparse_optimizer(optax.sgd(0.1), safe_core.admm(pattern)).init(params)
        with pytest.raises(ValueError, match=message):
            check_sparsity(params, pattern)
        options = {"layout": Layout((1,), (2,), (0,))}
        sparse_optimizer(optax.sgd(0.1), safe_core.admm(pattern), **options).init(params)
    sparse_optimizer(optax.sgd(0.1), safe_core.admm(0.5)).init(params)
    own = {"experts": jnp.ones((3, 6, 8))}  # selected as it is
    method = safe_core.admm(safe_core.Unstructured(0.5, scope="tensor"))
    sparse_optimizer(optax.sgd(0.1), method, where={"experts": True}).init(own)


def test_a_global_pattern_of_another_array_does_not_hide_a_stack() -> None:
    params = {"layers": {"kernel": jnp.ones((3, 6, 8))}, "head": {"kernel": jnp.ones((8, 4))}}
    within = safe_core.Unstructured(0.5, scope="tensor")
    pattern = safe_core.ByName({"layers/kernel": within}, default=0.5)
    with pytest.raises(ValueError, match="layout of layers/kernel is unknown"):
        sparse_optimizer(optax.sgd(0.1), safe_core.admm(pattern)).init(params)


def test_a_stack_exports_with_its_biases() -> None:
    params = {"a": {"kernel": jnp.ones((5, 4, 2, 3)), "bias": jnp.ones((5, 2, 3))}}
    layout = Layout((1,), (2, 3), (0,))
    shapes = {name: x.shape for name, x in to_torch_names(params, layout=layout).items()}
    assert shapes == {"a.weight": (5, 6, 4), "a.bias": (5, 6)}
