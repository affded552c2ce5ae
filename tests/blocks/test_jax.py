"""Blocks in JAX: layer-wise solvers, and SAFE on the reconstruction error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from short_runs import short_run

import safe_core
from safe_core.adapters.jax.blocks import prune_blocks, prune_layers, reconstruct
from safe_core.adapters.jax.flax.blocks import linen_block, linen_grams, nnx_block, nnx_grams
from safe_core.reconstruction import BlockSettings, Reconstruction
from safe_core.solvers import Gram, LayerSolver, Magnitude, Solver, Wanda

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
    with pytest.raises(ValueError, match=r"kernel must have no batch axes, got \(0,\)"):
        linen_grams(layer, variables, x)


def test_a_layer_within_a_transform_is_refused() -> None:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.remat(nn.Dense)(8)(x)

    params = parameters(Stack())
    with pytest.raises(ValueError, match=r"kernel must be called outside of scan, vmap, remat"):
        linen_grams(Stack(), {"params": params}, inputs())


class Module(nnx.Module):
    """Attention, a layer given by an equation and a plain one, in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Einsum("...d,df->...f", (8, 16), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 8, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.layers[0](jnp.tanh(self.up(x)))


def test_grams_of_nnx_are_those_of_what_each_layer_takes() -> None:
    module, x = Module(nnx.Rngs(0)), inputs()
    before = nnx.as_pure(nnx.state(module))
    grams = nnx_grams(module, x)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.as_pure(nnx.state(module)))
    assert set(grams) == set(zeros(nnx.as_pure(nnx.state(module, nnx.Param))))
    rows = x.reshape(-1, 8) / jnp.sqrt(1 + 1e-5)  # in evaluation mode
    np.testing.assert_allclose(grams["attention/key/kernel"].matrix, rows.T @ rows, rtol=1e-4)
    assert grams["attention/out/kernel"].matrix.shape == (8, 8)
    module.eval()
    hidden = x + module.attention(module.norm(x))
    rows = hidden.reshape(-1, 8)
    np.testing.assert_allclose(grams["up/kernel"].matrix, rows.T @ rows, rtol=1e-4, atol=1e-4)
    rows = jnp.tanh(module.up(hidden)).reshape(-1, 16)
    found = grams["layers/0/kernel"]
    np.testing.assert_allclose(found.matrix, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.count == 50


@pytest.mark.parametrize("equation", ["abd,bdf->abf", "abd,df->bf", "aad,df->af"])
def test_an_equation_that_is_no_matrix_product_is_refused(equation: str) -> None:
    letters = equation.split("->")[0].split(",")[1]
    shape = tuple({"b": 5, "d": 8, "f": 2}[letter] for letter in letters)
    layer = nnx.Einsum(equation, shape, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel must be a matrix of which inputs contract"):
        nnx_grams(layer, inputs())


def test_contracted_axes_follow_the_kernel() -> None:
    layer = nnx.Einsum("bthd,dhf->btf", (4, 2, 3), rngs=nnx.Rngs(0))
    x = inputs().reshape(10, 5, 2, 4)
    rows = x.transpose(0, 1, 3, 2).reshape(-1, 8)
    np.testing.assert_allclose(nnx_grams(layer, x)["kernel"].matrix, rows.T @ rows, rtol=1e-5)


def test_blocks_of_nnx_are_pruned_and_put_back() -> None:
    modules = [nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)]
    dense = [module.kernel[...] for module in modules]
    pruned = prune_blocks([nnx_block(m) for m in modules], inputs(), Wanda(), "2:4")
    for module, found, kernel in zip(modules, pruned, dense, strict=True):
        np.testing.assert_array_equal(module.kernel[...], kernel)
        nnx.update(module, found.params)
        left = module.kernel[...]
        assert found.sparsity == float((left == 0).mean()) == 0.5
        np.testing.assert_array_equal(left[left != 0], kernel[left != 0])


def test_layers_are_pruned_by_a_solver() -> None:
    params = parameters(Layers())
    grams = linen_grams(Layers(), {"params": params}, inputs())
    pruned = prune_layers(params, grams, Wanda(), "2:4")
    assert set(zeros(pruned).values()) == {0.5}
    assert error(pruned) < error(prune_layers(params, grams, Magnitude(), "2:4"))
    same = prune_layers(params, grams, "wanda", "2:4")
    jax.tree.map(np.testing.assert_array_equal, pruned, same)
    jax.tree.map(np.testing.assert_array_equal, pruned, prune_layers(params, grams, Wanda, "2:4"))
    without = prune_layers(params, None, Magnitude(), "2:4")  # which needs no statistics
    plain = prune_layers(params, grams, Magnitude(), "2:4")
    jax.tree.map(np.testing.assert_array_equal, without, plain)
    with pytest.raises(TypeError, match=r"solver must prune layers, such as ALPS\(\), got Recons"):
        prune_layers(params, grams, "safe", "2:4")
    missing = {name: gram for name, gram in grams.items() if "1" not in name}
    with pytest.raises(
        ValueError, match=r"grams must hold a Gram matrix for Dense_1/kernel, got Dense_0"
    ):
        prune_layers(params, missing, Wanda(), "2:4")


@short_run
@pytest.mark.parametrize("importance", [pytest.param(None, marks=pytest.mark.long), "wanda"])
def test_reconstruction_beats_the_projection(importance: Any) -> None:
    params = parameters(Layers())
    method = safe_core.safe(0.5, rho=1e-3, penalty=0.1, dual_update_interval=4)
    recipe = Reconstruction(
        method, learning_rate=1e-2, epochs=30, batch_size=4, importance=importance
    )
    given = linen_grams(Layers(), {"params": params}, inputs()) if importance else None
    found = reconstruct(apply, params, inputs(), 0.5, recipe=recipe, importance=given)
    assert zeros(found.params) == {"Dense_0/kernel": 0.5, "Dense_1/kernel": 0.5}
    none = Reconstruction(
        method, learning_rate=0.0, epochs=1, warmup_epochs=0, importance=importance
    )
    projected = reconstruct(apply, params, inputs(), 0.5, recipe=none, importance=given)
    assert error(found.params) < 0.75 * error(projected.params)
    assert len(found.losses) == 30
    assert float(jnp.abs(found.params["Dense_0"]["bias"]).max()) > 0  # biases follow


def linear(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["kernel"])


def gram(params: Any, x: jax.Array) -> dict[str, Gram]:
    return {"kernel": Gram.of(x)}


def chain(blocks: int = 2) -> list[Any]:
    weights = jax.random.normal(jax.random.key(3), (blocks, 8, 8))
    return [(linear, {"kernel": w}, gram) for w in weights]


@pytest.mark.parametrize(
    ("target_inputs", "propagate"), [("pruned", "pruned"), ("dense", "pruned"), ("pruned", "dense")]
)
def test_blocks_are_pruned_on_what_comes_before(target_inputs: Any, propagate: Any) -> None:
    blocks, x = chain(), inputs()
    rules = {"target_inputs": target_inputs, "propagate": propagate, "batch_size": 4}
    first, second = prune_blocks(blocks, x, Wanda(), 0.5, **rules)
    (_, dense, _), (_, behind, _) = blocks
    expected = prune_layers(dense, gram(dense, x), Wanda(), 0.5)
    np.testing.assert_array_equal(first.params["kernel"], expected["kernel"])
    streams = {"pruned": linear(expected, x), "dense": linear(dense, x)}
    hidden = streams[propagate]
    expected = prune_layers(behind, gram(behind, hidden), Wanda(), 0.5)
    np.testing.assert_array_equal(second.params["kernel"], expected["kernel"])
    target = linear(behind, hidden if propagate == "dense" else streams[target_inputs])
    loss = jnp.mean((linear(expected, hidden) - target) ** 2)
    assert second.loss == pytest.approx(float(loss), rel=1e-5)
    assert second.relative_error == pytest.approx(float(loss / jnp.mean(target**2)), rel=1e-5)
    assert second.sparsity == 0.5


@short_run
@pytest.mark.parametrize("solver", [Wanda(), Reconstruction(importance="wanda", epochs=2)])
def test_blocks_of_equal_modules_compile_once(solver: Any) -> None:
    def traces(blocks: int) -> int:
        seen = []

        class Counted(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
                seen.append(None)
                return jnp.tanh(nn.Dense(8, use_bias=False)(x)) * scale

        params = [{"params": {"Dense_0": params}} for _, params, _ in chain(blocks)]
        equal = [linen_block(Counted(), variables) for variables in params]
        prune_blocks(equal, (inputs(), jnp.ones((10, 1, 1))), solver, 0.5)
        return len(seen)

    assert traces(3) == traces(1) > 0


def test_equal_modules_are_one_function() -> None:
    params = parameters(Layers())
    same = [linen_block(Layers(), {"params": params}) for _ in range(2)]
    assert same[0].apply_fn == same[1].apply_fn
    assert same[0].grams == same[1].grams
    assert hash(same[0].apply_fn) == hash(same[1].apply_fn)
    beside = {"params": params, "batch_stats": {"mean": jnp.ones(3)}}
    assert linen_block(Layers(), beside).apply_fn != same[0].apply_fn
    layers = [nnx_block(nnx.Linear(8, 8, rngs=nnx.Rngs(i))) for i in range(2)]
    assert layers[0].apply_fn == layers[1].apply_fn
    assert hash(layers[0].grams) == hash(layers[1].grams)
    assert nnx_block(nnx.Linear(8, 4, rngs=nnx.Rngs(0))).apply_fn != layers[0].apply_fn


@short_run
def test_methods_go_by_name() -> None:
    named = prune_blocks(chain(), inputs(), "wanda", 0.5)
    for block in named:  # compared within each output, as published
        assert (block.params["kernel"] == 0).sum(axis=0).tolist() == [4] * 8
    given = prune_blocks(chain(), inputs(), Magnitude(), 0.5)
    for a, b in zip(prune_blocks(chain(), inputs(), "magnitude", 0.5), given, strict=True):
        np.testing.assert_array_equal(a.params["kernel"], b.params["kernel"])
    settings = BlockSettings(propagate="dense", seed=7)
    recipe = Reconstruction(learning_rate=1e-2, epochs=1, batch_size=4)
    by_object = prune_blocks(chain(), inputs(), recipe, 0.5, settings=settings)
    by_name = prune_blocks(chain(), inputs(), recipe, 0.5, propagate="dense", seed=7)
    for a, b in zip(by_object, by_name, strict=True):
        np.testing.assert_array_equal(a.params["kernel"], b.params["kernel"])


@dataclass(frozen=True)
class Needing(LayerSolver):
    """Prunes by magnitude and keeps the statistics that it is given."""

    needs: Any
    seen: Any = field(default_factory=list)

    def __call__(
        self, weight: Any, statistics: Any, sparsity: Any, /, *, layout: Any = None
    ) -> Any:
        self.seen.append(statistics)
        return safe_core.project(weight, sparsity, layout=layout)


def test_a_solver_gets_the_statistics_that_it_needs() -> None:
    solvers = {needs: Needing(needs) for needs in ("nothing", "squares", "gram")}
    for solver in solvers.values():
        prune_blocks(chain(1), inputs(), solver, 0.5)
    rows = inputs().reshape(-1, 8)
    assert solvers["nothing"].seen == [None]
    np.testing.assert_allclose(solvers["gram"].seen[0], rows.T @ rows, rtol=1e-5)
    np.testing.assert_array_equal(solvers["squares"].seen[0], jnp.diagonal(solvers["gram"].seen[0]))


@short_run
def test_the_first_block_is_reconstructed_as_alone() -> None:
    (apply_fn, params, _), *_ = chain()
    recipe = Reconstruction(learning_rate=1e-2, epochs=2, batch_size=4, start="dense")
    alone = reconstruct(apply_fn, params, inputs(), 0.5, recipe=recipe, seed=2)
    first, second = prune_blocks(chain(), inputs(), recipe, 0.5, batch_size=4, seed=2)
    np.testing.assert_array_equal(first.params["kernel"], alone.params["kernel"])
    assert second.sparsity == 0.5
    other = prune_blocks(chain(1), inputs(), recipe, 0.5, batch_size=4, seed=3)
    assert (other[0].params["kernel"] != first.params["kernel"]).any()


@short_run
def test_a_decoupled_penalty_has_the_rate_of_the_recipe() -> None:
    apply_fn, params, _ = chain(1)[0]
    method = safe_core.admm(0.5, penalty=5.0, decoupled=True)
    recipe = Reconstruction(method, learning_rate=0.2, epochs=1, warmup_epochs=0, batch_size=10)
    found = reconstruct(apply_fn, params, inputs(), 0.5, recipe=recipe)
    # A rate of 0.2 times 5 takes what is off the support of the start to it, and Adam 0.2 back.
    start = safe_core.project(params["kernel"], 0.5).support
    np.testing.assert_array_equal(found.params["kernel"] != 0, start)


@short_run
def test_grams_of_dense_leaves_are_left_out() -> None:
    params, x = parameters(Layers()), inputs()
    recipe = Reconstruction(importance="wanda", epochs=1, warmup_epochs=0)
    block = linen_block(Layers(), {"params": params})
    where = lambda path, leaf: path == "Dense_1/kernel"  # noqa: E731
    (found,) = prune_blocks([block], x, recipe, 0.5, where=where)
    assert zeros(found.params) == {"Dense_0/kernel": 0.0, "Dense_1/kernel": 0.5}


def test_a_module_with_a_list_is_pruned_as_one_with_a_tuple() -> None:
    found = []
    for kind in (list, tuple):
        module = nn.Sequential(kind([nn.Dense(8), nn.tanh, nn.Dense(8)]))
        block = linen_block(module, module.init(jax.random.key(0), inputs()))
        found.append(prune_blocks([block], inputs(), Wanda(), "2:4")[0].params)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_layer_that_was_never_active_is_pruned_by_magnitude() -> None:
    params = chain()[0][1]
    pruned = prune_layers(params, {"kernel": jnp.zeros((8, 8))}, Wanda(), 0.5)["kernel"]
    wanted = prune_layers(params, {"kernel": jnp.eye(8)}, Magnitude(), 0.5)["kernel"]
    np.testing.assert_array_equal(pruned, wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blocks": [(linear, {}, gram, 1)]}, TypeError, "blocks must be pairs of apply_fn"),
        ({"blocks": [(3, {}, gram)]}, TypeError, "apply_fn must be a function.* in block 0"),
        (
            {"blocks": [chain()[0][:2]], "solver": Wanda()},
            ValueError,
            "grams must be given .* None in block 0",
        ),
        ({"blocks": [(lambda p, x: x.sum(), {}, gram)]}, ValueError, "apply_fn must return an"),
        ({"solver": 3}, TypeError, r"solver must be a name, a solver .* or a function .* got 3"),
        ({"solver": LayerSolver}, TypeError, "solver must be an instance of LayerSolver"),
        ({"solver": "obd"}, ValueError, "solver must be one of 'alps', .* got 'obd'"),
        ({"solver": Solver()}, TypeError, "solver must be a Reconstruction or prune layers"),
        ({"device": "cpu"}, TypeError, "settings must be batch_size, .* got 'device'"),
        ({"target_inputs": "sparse"}, ValueError, "target_inputs must be one of"),
        ({"propagate": None}, ValueError, "propagate must be one of"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        (
            {
                "inputs": np.full((10, 5, 8), np.nan, np.float32),
                "solver": Reconstruction(epochs=1),
            },
            ValueError,
            "inputs must lead to finite activations, got NaN or infinity after block 0",
        ),
        ({"sparsity": safe_core.Unstructured(0.5)}, ValueError, "sparsity must not compare"),
    ],
)
def test_a_bad_argument_of_a_chain_is_named(options: Any, error: Any, message: str) -> None:
    given = {"blocks": chain(), "inputs": inputs(), "solver": Magnitude(), "sparsity": 0.5}
    with pytest.raises(error, match=message):
        prune_blocks(**{**given, **options})


@short_run
def test_a_narrow_block_is_trained_in_float32_and_returned_as_it_was() -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4), jnp.bfloat16)}
    recipe = Reconstruction(learning_rate=1e-4, epochs=3, start="dense")
    x = inputs().astype(jnp.bfloat16)
    found = reconstruct(lambda p, x: x @ p["kernel"].astype(x.dtype), params, x, 0.5, recipe=recipe)
    assert found.params["kernel"].dtype == jnp.bfloat16
    assert int((found.params["kernel"] == 0).sum()) == 16
    assert found.losses[0] < 1e-3  # targets are those of the dense block


def test_targets_may_be_given() -> None:
    params, x = {"kernel": jnp.eye(8)}, inputs()
    recipe = Reconstruction(learning_rate=1e-2, epochs=20, batch_size=2, start="dense")
    found = reconstruct(lambda p, x: x @ p["kernel"], params, x, 0.25, recipe=recipe, targets=2 * x)
    assert found.losses[-1] < 0.6 * found.losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": Reconstruction(importance="wanda")}, ValueError, "importance must be given"),
        ({"recipe": 3}, TypeError, "recipe must be a Reconstruction"),
        (
            {"targets": jnp.ones((10, 1, 8))},  # which would be broadcast
            ValueError,
            r"targets must have shape \(10, 5, 8\), .* got \(10, 1, 8\)",
        ),
        (
            {"inputs": jnp.ones(())},
            ValueError,
            "inputs must be arrays with the same non-zero number",
        ),
        ({"apply_fn": None}, TypeError, "apply_fn must be a function"),
        ({"seed": -1}, ValueError, "seed"),
        ({"importance": lambda params: params}, TypeError, "importance must hold arrays"),
        (
            {
                "recipe": Reconstruction(
                    learning_rate=1e30, epochs=2, warmup_epochs=0, start="dense"
                )
            },
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


def _two_kernels(params: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def _some_blocks(count: int = 2) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), 2 * count)
    return [
        (
            _two_kernels,
            {
                "up": {"kernel": jax.random.normal(keys[2 * i], (8, 16)) / 4},
                "down": {"kernel": jax.random.normal(keys[2 * i + 1], (16, 8)) / 4},
            },
        )
        for i in range(count)
    ]


@short_run
def test_a_second_call_keeps_the_zeros_of_the_first() -> None:
    inputs = jax.random.normal(jax.random.key(1), (6, 8))
    solver = Reconstruction(epochs=2, batch_size=2, learning_rate=1e-2, start="dense")
    first = prune_blocks(
        _some_blocks(), inputs, solver, "2:4", where=lambda name, x: name.startswith("up")
    )
    blocks = [(_two_kernels, found.params) for found in first]
    second = prune_blocks(
        blocks, inputs, solver, 0.75, where=lambda name, x: name.startswith("down")
    )
    for before, after in zip(first, second, strict=True):
        kept = np.asarray(before.params["up"]["kernel"]) == 0
        assert kept.sum() == 64
        assert np.array_equal(np.asarray(after.params["up"]["kernel"]) == 0, kept)
        assert not np.array_equal(after.params["up"]["kernel"], before.params["up"]["kernel"])
        assert int((after.params["down"]["kernel"] == 0).sum()) == 96


@short_run
@pytest.mark.parametrize(
    "solver", ["magnitude", Reconstruction(epochs=2, batch_size=2, start="dense")]
)
def test_weights_can_have_sparsities_of_their_own(solver: Any) -> None:
    inputs = jax.random.normal(jax.random.key(1), (6, 8))
    sparsity = {"up/kernel": "2:4", "down/kernel": 0.75}
    for found in prune_blocks(_some_blocks(), inputs, solver, sparsity):
        up, down = (np.asarray(found.params[name]["kernel"]) for name in ("up", "down"))
        assert ((up != 0).reshape(2, 4, 16).sum(1) == 2).all()
        assert (down == 0).sum() == 96
    with pytest.raises(ValueError, match=r"sparsity must name sparse arrays.*got up$"):
        prune_blocks(_some_blocks(), inputs, solver, {**sparsity, "up": 0.5})
