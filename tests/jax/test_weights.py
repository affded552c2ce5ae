"""Which leaves of a Flax model are made sparse, how far, and which never are."""

from __future__ import annotations

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from short_runs import short_run

import safe_core
from safe_core import NM, Block, Channel, Layout, Unstructured
from safe_core.adapters.jax.weights import is_prunable, layout_of, name_of
from safe_core.adapters.optax import check_sparsity, finalize, find_state, sparse_optimizer

INPUT_OUTPUT = Layout(input_axes=(-2,), output_axes=(-1,))
INTO_HEADS = Layout(input_axes=(0,), output_axes=(1, 2))
FROM_HEADS = Layout(input_axes=(0, 1), output_axes=(2,))


def by_path(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): leaf for path, leaf in leaves}


def found(params):
    """Layouts of the prunable leaves by path."""
    leaves = by_path(params)
    return {
        path: layout_of(path, leaf, leaves=leaves)
        for path, leaf in leaves.items()
        if is_prunable(path, leaf)
    }


class Net(linen.Module):
    """Convolutions, attention, norms, an embedding and a head."""

    @linen.compact
    def __call__(self, images, tokens):
        pixels = linen.Conv(6, (3, 3))(images)
        pixels = linen.BatchNorm(use_running_average=True)(linen.ConvTranspose(4, (2, 2))(pixels))
        hidden = linen.Embed(10, 8)(tokens)
        hidden = linen.LayerNorm()(linen.MultiHeadDotProductAttention(num_heads=2)(hidden))
        return jnp.mean(linen.Dense(4)(hidden) ** 2) + jnp.mean(pixels**2)


WEIGHTS = {
    "params/Conv_0/kernel": INPUT_OUTPUT,
    "params/ConvTranspose_0/kernel": INPUT_OUTPUT,
    "params/Dense_0/kernel": INPUT_OUTPUT,
    "params/MultiHeadDotProductAttention_0/key/kernel": INTO_HEADS,
    "params/MultiHeadDotProductAttention_0/out/kernel": FROM_HEADS,
    "params/MultiHeadDotProductAttention_0/query/kernel": INTO_HEADS,
    "params/MultiHeadDotProductAttention_0/value/kernel": INTO_HEADS,
}
INPUTS = (jnp.ones((2, 4, 4, 4), jnp.float32), jnp.arange(6).reshape(2, 3))
PATTERNS = [
    Unstructured(0.9),
    Unstructured(0.7, scope="tensor"),
    NM(2, 4, ragged="dense"),
    Unstructured(0.6, scope="row"),
    Channel(0.4, scope="global"),
    Block((2, 2), 0.6),
]


@pytest.fixture(scope="module")
def net():
    """Parameters with every bias and scale off its start, and their gradient."""
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), *INPUTS)
    rest = {k: v for k, v in variables.items() if k != "params"}
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype),
        {"params": variables["params"]},
    )
    return params, jax.jit(jax.grad(lambda params: model.apply({**params, **rest}, *INPUTS)))


def trained(net, method, steps=2, base=None, **options):
    params, grad_fn = net
    tx = sparse_optimizer(optax.sgd(0.05) if base is None else base, method, **options)
    state = jax.jit(tx.init)(params)
    update = jax.jit(lambda g, state, params: tx.update(g, state, params, grad_fn=grad_fn))
    for _ in range(steps):
        updates, state = update(grad_fn(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_kernels_of_linen_modules(net):
    assert found(net[0]) == WEIGHTS
    others = set(by_path(net[0])) - set(WEIGHTS)
    assert {path.rsplit("/", 1)[1] for path in others} == {"bias", "scale", "embedding"}


@pytest.mark.every_second
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_finalize_leaves_exactly_as_many_as_the_pattern_asks(net, pattern):
    method = safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=1)
    params, state = trained(net, method)
    before, after = (
        by_path(params),
        by_path(jax.jit(lambda p, s: finalize(p, s, method))(params, state)),
    )
    for path, leaf in before.items():
        old, new = np.asarray(leaf), np.asarray(after[path])
        if path not in WEIGHTS:
            np.testing.assert_array_equal(new, old, err_msg=path)
            continue
        kept = new != 0
        np.testing.assert_array_equal(new[kept], old[kept], err_msg=path)
        assert not np.signbit(new[~kept]).any(), path
    arrays = [np.asarray(after[path]) != 0 for path in WEIGHTS]
    masks = by_path(find_state(state).support)
    supports = [np.asarray(masks[path]) for path in WEIGHTS]
    pools = reference.pools([a.shape for a in arrays], pattern, list(WEIGHTS.values()))
    covered = sum(len(unit) for pool in pools for unit in pool.units)
    # Of the six inputs of the transposed convolution two are no whole group of four.
    tail = 2 * 2 * 2 * 4 if isinstance(pattern, NM) else 0
    assert covered == sum(a.size for a in arrays) - tail
    for chosen in (arrays, supports):
        flat = [mask.ravel() for mask in chosen]
        for pool in pools:
            whole = [{bool(flat[i][j]) for i, j in unit} for unit in pool.units]
            assert all(len(values) == 1 for values in whole), "units are kept or zeroed whole"
            assert sum(values == {True} for values in whole) == pool.kept


def test_the_penalty_acts_on_the_kernels_alone(net):
    params, _ = net
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.admm(0.5, penalty=2.0))
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(nothing, tx.init(params), params)
    assert {path for path, u in by_path(updates).items() if u.any()} == set(WEIGHTS)


# Paths


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("Dense_0/bias", (6,)),
        ("LayerNorm_0/scale", (6,)),
        ("Embed_0/embedding", (10, 6)),
        ("kernel/bias", (4, 6)),
        ("Dense_0/kernels", (4, 6)),
        ("scaling/kernel", (6,)),
        ("scaling/kernel", ()),
        ("attention/value/bias", (2, 4)),
        ("", (4, 6)),
    ],
)
def test_other_leaves_are_not_pruned(path, shape):
    assert not is_prunable(path, np.zeros(shape))
    assert layout_of(path, np.zeros(shape)) is None


def test_layouts_name_the_axes_that_modules_contract():
    tokens = jnp.ones((1, 3, 8))
    attention = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, out_features=6)
    params = attention.init(jax.random.key(0), tokens)
    inputs, outputs = {}, {}
    for path, layout in found(params).items():
        leaf = by_path(params)[path]
        inputs[path.split("/")[1]] = tuple(leaf.shape[axis] for axis in layout.input_axes)
        outputs[path.split("/")[1]] = tuple(leaf.shape[axis] for axis in layout.output_axes)
    into = dict.fromkeys(("query", "key", "value"))
    assert inputs == {**dict.fromkeys(into, (8,)), "out": (2, 6)}
    assert outputs == {**dict.fromkeys(into, (2, 6)), "out": (6,)}


@short_run
def test_a_stack_of_layers_needs_a_layout():
    params = {"layers": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 8)))}}
    method = safe_core.safe("2:4")
    message = r"layout of layers/kernel is unknown.*\(3, 4, 8\); pass layout=.*layouts_of\(model"
    with pytest.raises(ValueError, match=message):
        sparse_optimizer(optax.sgd(0.1), method).init(params)
    with pytest.raises(ValueError, match=message):
        check_sparsity(params, "2:4")
    stacked = Layout(input_axes=(1,), output_axes=(2,), batch_axes=(0,))
    state = sparse_optimizer(optax.sgd(0.1), method, layout=stacked).init(params)
    final = finalize(params, state, method, layout=stacked)
    assert ((np.asarray(final["layers"]["kernel"]) != 0).sum(axis=1) == 2).all()


# Boxes


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.embedding = nnx.Embed(10, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, images, tokens):
        hidden = self.head(self.attention(self.embedding(tokens)))
        return jnp.mean(hidden**2) + jnp.mean(self.norm(self.conv(images)) ** 2)


@short_run
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), pytest.param(Unstructured(0.7), marks=pytest.mark.long)], ids=str
)
def test_a_model_of_nnx_trains(pattern):
    model = NNXNet(nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return nnx.merge(graph, params, rest)(*INPUTS)

    method = safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=1)
    start = {path: np.asarray(leaf) for path, leaf in by_path(params).items()}
    params, state = trained((params, jax.jit(jax.grad(loss))), method, base=optax.adam(0.01))
    trained_loss = float(loss(params))
    final = finalize(params, state, method)
    nnx.update(model, final)
    assert np.isfinite(trained_loss)
    assert np.isfinite(float(loss(final)))
    head = np.asarray(model.head.kernel[...])
    assert (head != start["head/kernel"]).any()
    sparse = {
        path.removesuffix("/value"): np.asarray(leaf)
        for path, leaf in by_path(final).items()
        if "kernel" in path
    }
    assert set(sparse) == {"conv/kernel", "head/kernel"} | {
        f"attention/{name}/kernel" for name in ("query", "key", "value", "out")
    }
    assert {path.removesuffix("/value") for path in by_path(find_state(state).anchor)} == set(
        sparse
    )
    named = {path.removesuffix("/value"): leaf for path, leaf in by_path(final).items()}
    layouts = [layout_of(path, array, leaves=named) for path, array in sparse.items()]
    flat = [array.ravel() != 0 for array in sparse.values()]
    for pool in reference.pools([a.shape for a in sparse.values()], pattern, layouts):
        assert sum(bool(flat[i][j]) for [(i, j)] in pool.units) == pool.kept


@short_run
def test_partitioned_kernels_are_found():
    init = linen.with_partitioning(linen.initializers.normal(), ("in", "out"))
    params = linen.Dense(4, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 8)))
    method = safe_core.safe(0.5)
    state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    kernel = finalize(params, state, method)["params"]["kernel"]
    assert kernel.names == ("in", "out")
    assert int((kernel.value == 0).sum()) == 16
