"""`sparse_optimizer` in the training loops of JAX's libraries, and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.linen import fp8_ops
from short_runs import short_run

import safe_core
from safe_core.adapters.jax.flax.export import (
    load_safetensors,
    save_safetensors,
    to_bcoo,
    to_torch_names,
)
from safe_core.adapters.jax.flax.training import (
    SparseTrainState,
    nnx_finalize,
    nnx_recalibrate,
    nnx_value_and_gradients,
    recalibrate,
)
from safe_core.adapters.jax.gradients import value_and_gradients
from safe_core.adapters.jax.reporting import report
from safe_core.adapters.jax.support import check_sparsity, fixed_support
from safe_core.adapters.optax import finalize, find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

pytestmark = pytest.mark.usefixtures("single_precision", "strict_promotion")

METHOD = safe_core.safe(0.75, rho=0.05, penalty=0.1, dual_update_interval=2)


class Network(linen.Module):
    """Two layers with batch normalisation and dropout between."""

    dropout: float = 0.0

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = linen.Dense(16)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(self.dropout, deterministic=not train)(linen.tanh(x))
        return linen.Dense(4)(x)


def batch(seed: int = 1, rows: int = 32) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (rows, 8)), jax.random.normal(keys[1], (rows, 4))


def variables() -> Any:
    return Network().init(jax.random.key(0), batch()[0])


def same(a: Any, b: Any, **tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, **{"rtol": 0, "atol": 0, **tolerance})


# Both gradients from one loss


def stateful_loss(dropout: float) -> Any:
    def loss(params: Any, data: Any, stats: Any, key: Any) -> Any:
        out, new = Network(dropout).apply(
            {"params": params, "batch_stats": stats},
            data[0],
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.mean((out - data[1]) ** 2), new["batch_stats"]

    return loss


def test_statistics_and_dropout_are_those_of_the_first_pass() -> None:
    held, loss, key = variables(), stateful_loss(0.5), jax.random.key(3)
    params, stats = held["params"], held["batch_stats"]
    (value, aux), gradients, grad_fn = value_and_gradients(loss, has_aux=True)(
        params, batch(), stats, key
    )
    (wanted, new), first = jax.value_and_grad(loss, has_aux=True)(params, batch(), stats, key)
    same((value, aux, gradients), (wanted, new, first))
    same(grad_fn(params), gradients)  # the same masks, though every call draws them
    moved = jax.tree.map(lambda x: x + 0.1, params)
    same(grad_fn(moved), jax.grad(loss, has_aux=True)(moved, batch(), stats, key)[0])


@pytest.mark.parametrize("has_aux", [False, True])
def test_gradients_of_parts_are_those_of_the_whole(has_aux: bool) -> None:
    def loss(params: Any, data: Any, scale: float) -> Any:
        value = scale * jnp.mean((data[0] @ params["kernel"] - data[1]) ** 2)
        return (value, data[0].sum()) if has_aux else value

    params = {"kernel": jnp.ones((8, 4))}
    whole = value_and_gradients(loss, has_aux=has_aux)(params, batch(), 2.0)
    parts = value_and_gradients(loss, has_aux=has_aux, micro_batches=4)(params, batch(), 2.0)
    if has_aux:
        assert parts[0][1].shape == (4,)
        same(parts[0][1].sum(), whole[0][1], rtol=1e-5, atol=1e-5)
    pick = (lambda found: found[0][0]) if has_aux else lambda found: found[0]
    same(pick(parts), pick(whole), rtol=1e-5)
    same(parts[1], whole[1], rtol=1e-5, atol=1e-7)
    moved = jax.tree.map(lambda x: 2 * x, params)
    same(parts[2](moved), whole[2](moved), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradients", [value_and_gradients, nnx_value_and_gradients])
@pytest.mark.parametrize("options", [{"micro_batches": 0}, {"has_aux": 1}])
def test_a_bad_option_of_the_gradients_is_named(gradients: Any, options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        gradients(lambda params: 0.0, **options)


def test_parts_must_divide_the_batch() -> None:
    fn = value_and_gradients(lambda params, x: jnp.mean(params["kernel"] * x), micro_batches=3)
    with pytest.raises(ValueError, match=r"micro_batches must divide .*got 3 and shape \(4,\)"):
        fn({"kernel": jnp.ones((4, 4))}, jnp.ones(4))


def test_both_gradients_are_averaged_over_an_axis() -> None:
    def loss(params: Any, data: Any) -> Any:
        return jnp.mean((data[0] @ params["kernel"] - data[1]) ** 2)

    def step(params: Any, data: Any) -> Any:
        value, gradients, grad_fn = value_and_gradients(loss, axis_name="batch")(params, data)
        return value, gradients, grad_fn(jax.tree.map(lambda x: 2 * x, params))

    params, data = {"kernel": jnp.ones((8, 4))}, batch()
    whole = value_and_gradients(loss)(params, data)
    split = jax.tree.map(lambda x: x.reshape(4, -1, x.shape[1]), data)
    got = jax.vmap(step, axis_name="batch", in_axes=(None, 0))(params, split)
    wanted = (*whole[:2], whole[2](jax.tree.map(lambda x: 2 * x, params)))
    same(jax.tree.map(lambda x: x[-1], got), wanted, rtol=1e-5, atol=1e-7)


def test_parts_need_a_batch_by_position() -> None:
    fn = value_and_gradients(lambda params, x: jnp.mean(params["kernel"] * x), micro_batches=2)
    with pytest.raises(TypeError, match="batch must be the first argument"):
        fn({"kernel": jnp.ones((4, 4))}, x=jnp.ones(4))


def test_parts_take_any_argument() -> None:
    def loss(params: Any, x: Any, *, train: bool, name: str) -> Any:
        assert train is True
        assert name == "mean"
        return jnp.mean(x @ params["kernel"])

    params = {"kernel": jnp.ones((8, 4))}
    fn = value_and_gradients(loss, micro_batches=2)
    assert float(fn(params, batch()[0], train=True, name="mean")[0]) != 0


@short_run
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"perturbation_interval": 2, "reuse": 0.5}])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_no_step_promotes_dtypes_or_ranks_silently(
    dtype: Any, options: Any, state_dtype: Any
) -> None:
    method = safe_core.safe(0.5, rho=0.5, penalty=0.1, state_dtype=state_dtype, **options)
    tx = sparse_optimizer(optax.sgd(0.1), method)
    params = {"kernel": jnp.ones((8, 4), dtype), "bias": jnp.zeros(4, dtype)}

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean((x @ params["kernel"] + params["bias"][None]) ** 2)

    x = batch()[0].astype(dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = tx.init(params)
        for _ in range(2):
            _, gradients, grad_fn = value_and_gradients(loss, micro_batches=2)(params, x)
            updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
            params = optax.apply_updates(params, updates)
        report(params, state, method)
        params = finalize(params, state, method)
        fine = fixed_support(optax.sgd(0.1))
        updates, _ = fine.update(params, fine.init(params), params)
        check_sparsity(optax.apply_updates(params, updates), 0.5)


# Flax


def plain_steps(count: int) -> Any:
    """The loop written out, for Flax's own ways to agree with."""
    held, tx, loss = variables(), sparse_optimizer(optax.sgd(0.1), METHOD), stateful_loss(0.0)
    params, stats = held["params"], held["batch_stats"]
    state, key = tx.init(params), jax.random.key(3)
    for _ in range(count):
        gradients, new = jax.grad(loss, has_aux=True)(params, batch(), stats, key)

        def second(moved: Any, stats: Any = stats) -> Any:
            return jax.grad(loss, has_aux=True)(moved, batch(), stats, key)[0]

        updates, state = tx.update(gradients, state, params, grad_fn=second)
        params, stats = optax.apply_updates(params, updates), new
    return params, stats, state


class TrainState(SparseTrainState):
    batch_stats: Any = None


def test_a_train_state_passes_both_gradients() -> None:
    held, loss = variables(), stateful_loss(0.0)
    state = TrainState.create(
        apply_fn=Network().apply,
        params=held["params"],
        batch_stats=held["batch_stats"],
        tx=sparse_optimizer(optax.sgd(0.1), METHOD),
    )

    @jax.jit
    def step(state: TrainState, data: Any, key: Any) -> TrainState:
        (_, stats), grads, grad_fn = value_and_gradients(loss, has_aux=True)(
            state.params, data, state.batch_stats, key
        )
        return state.apply_gradients(grads=grads, grad_fn=grad_fn, batch_stats=stats)

    for _ in range(4):
        state = step(state, batch(), jax.random.key(3))
    params, stats, _ = plain_steps(4)
    same((state.params, state.batch_stats), (params, stats), rtol=1e-4, atol=1e-5)
    assert int(state.step) == 4
    with pytest.raises(ValueError, match="grad_fn must be passed"):
        state.apply_gradients(grads=state.params)


def test_a_train_state_keeps_the_statistics_of_fp8_layers() -> None:
    layer = linen.Dense(8, dot_general_cls=fp8_ops.Fp8DotGeneral)
    held = layer.init(jax.random.key(0), jnp.ones((16, 16)))
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    state = SparseTrainState.create(apply_fn=layer.apply, params=held, tx=tx)
    assert fp8_ops.OVERWRITE_WITH_GRADIENT in state.params
    x = jnp.linspace(-2.0, 3.0, 256).reshape(16, 16)

    def loss(variables: Any) -> Any:
        return jnp.mean((layer.apply(variables, x) - 1) ** 2)

    _, grads, grad_fn = value_and_gradients(loss)(state.params)
    new = state.apply_gradients(grads=grads, grad_fn=grad_fn)
    name = fp8_ops.OVERWRITE_WITH_GRADIENT
    same(new.params[name], grads[name])
    e = METHOD.perturb(*(jax.tree.leaves(t["params"]) for t in (state.params, grads)), 0)
    moved = jax.tree.unflatten(
        jax.tree.structure(held["params"]),
        [x + d for x, d in zip(jax.tree.leaves(held["params"]), e, strict=True)],
    )
    second = grad_fn({**state.params, "params": moved})["params"]
    plain, _ = tx.update(grads["params"], state.opt_state, held["params"], grad_fn=lambda _: second)
    same(new.params["params"], optax.apply_updates(held["params"], plain))
    assert new.tx is state.tx


@pytest.mark.usefixtures("library_promotes")
def test_a_train_state_passes_other_arguments_to_the_optimizer() -> None:
    base = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    params = {"kernel": jnp.ones((4, 4))}
    state = SparseTrainState.create(
        apply_fn=None, params=params, tx=sparse_optimizer(base, safe_core.admm(0.5))
    )
    new = state.apply_gradients(grads=params, update_args={"value": jnp.asarray(3.0)})
    assert float(optax.tree.get(new.opt_state, "best_value")) == 3.0


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def module_loss(model: Any, data: Any) -> Any:
    loss = jnp.mean((model(data[0]) - data[1]) ** 2)
    return loss, loss


def test_an_nnx_module_trains_with_statistics_and_masks_of_the_first_pass() -> None:
    model = Module(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = nnx.as_pure(jax.tree.map(jnp.copy, rest))
    (value, _), gradients, grad_fn = nnx_value_and_gradients(module_loss, has_aux=True)(
        model, batch()
    )
    # The model has gone one pass on, in its statistics and in its random numbers.
    once = nnx.merge(graph, params, rest)
    assert module_loss(once, batch())[0] == value
    same(nnx.as_pure(nnx.state(once)), nnx.as_pure(nnx.state(model)))
    assert float(jnp.abs(model.norm.mean[...]).sum()) > 0
    same(grad_fn(nnx.as_pure(params)), nnx.as_pure(gradients))
    assert float(module_loss(model, batch())[0]) != float(value)  # other masks


def test_parts_of_a_batch_follow_each_other_through_a_module() -> None:
    """Statistics go on from part to part, and every part draws masks of its own."""
    model, twin = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    fn = nnx_value_and_gradients(module_loss, has_aux=True, micro_batches=2)
    (value, aux), gradients, grad_fn = fn(model, batch())
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch()) for i in range(2)]
    before = nnx.as_pure(jax.tree.map(jnp.copy, nnx.state(twin, nnx.Param)))
    found = [nnx_value_and_gradients(module_loss, has_aux=True)(twin, part) for part in parts]
    same(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(twin)), rtol=1e-6, atol=1e-7)
    same(aux, jnp.stack([loss for (loss, _), _, _ in found]), rtol=1e-6)
    assert float(value) == pytest.approx(float(aux.mean()), rel=1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(nnx.as_pure(g) for _, g, _ in found))
    same(nnx.as_pure(gradients), mean, rtol=1e-5, atol=1e-7)
    same(grad_fn(before), nnx.as_pure(gradients))


def test_gradients_and_statistics_of_a_module_are_averaged_over_an_axis() -> None:
    def step(model: Any, data: Any) -> Any:
        fn = nnx_value_and_gradients(quiet_loss, axis_name="batch")
        value, gradients, grad_fn = fn(model, data)
        return value, gradients, grad_fn(jax.tree.map(lambda g: 2 * g, gradients))

    def quiet_loss(model: Any, data: Any) -> Any:
        return jnp.mean((model(data[0]) - data[1]) ** 2)

    model, twin = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    split = jax.tree.map(lambda x: x.reshape(4, -1, x.shape[1]), batch())
    axes = nnx.StateAxes({...: None})
    got = nnx.vmap(step, axis_name="batch", in_axes=(axes, 0))(model, split)
    value, gradients, grad_fn = nnx_value_and_gradients(quiet_loss)(twin, batch())
    wanted = (value, gradients, grad_fn(jax.tree.map(lambda g: 2 * g, gradients)))
    same(jax.tree.map(lambda x: x[-1], got), wanted, rtol=1e-5, atol=1e-6)


def test_arguments_by_name_reach_the_loss_of_a_module() -> None:
    def loss(model: Any, x: Any, *, scale: float) -> Any:
        return scale * jnp.mean(model(x) ** 2)

    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    value, _, _ = nnx_value_and_gradients(loss)(model, batch()[0], scale=2.0)
    assert float(value) == pytest.approx(2 * float(jnp.mean(model(batch()[0]) ** 2)))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_a_loss_may_sow_into_a_module() -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            hidden = self.layer(x)
            self.sow(nnx.Intermediate, "hidden", hidden)
            return hidden

    model = Sowing()
    before = nnx.as_pure(jax.tree.map(jnp.copy, nnx.state(model)))
    nnx_value_and_gradients(lambda model, x: jnp.mean(model(x) ** 2))(model, batch()[0])
    same(nnx.as_pure(nnx.state(model)), before)


def test_what_is_no_loss_of_a_module_is_named() -> None:
    with pytest.raises(TypeError, match="loss_fn must be a function, got <class 'int'>"):
        nnx_value_and_gradients(3)
    with pytest.raises(TypeError, match="has_aux must be True or False, got 1"):
        nnx_value_and_gradients(module_loss, has_aux=1)


@short_run
def test_a_leaf_of_nnx_has_one_name() -> None:
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    names: list[str] = []
    layout = {"kernel": safe_core.Layout((0,), (1,))}
    where = lambda path, leaf: names.append(path) or path == "kernel"  # noqa: E731
    method = safe_core.safe("2:4")
    tx = sparse_optimizer(optax.sgd(0.1), method, where=where, layout=layout)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert names == ["bias", "kernel"]
    params = nnx.state(model, nnx.Param)
    pure = nnx.as_pure(params), nnx.as_pure(optimizer.opt_state)
    check_sparsity(finalize(*pure, method, layout=layout), "2:4", layout=layout)
    same(nnx.as_pure(finalize(params, pure[1], method)), finalize(*pure, method))


@short_run
@pytest.mark.usefixtures("library_promotes")
def test_an_nnx_optimizer_ends_sparse() -> None:
    model, traces = Module(nnx.Rngs(0)), []
    tx = sparse_optimizer(optax.adam(0.01), METHOD)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, data: Any) -> Any:
        traces.append(1)
        (value, _), gradients, grad_fn = nnx_value_and_gradients(module_loss, has_aux=True)(
            model, data
        )
        optimizer.update(model, gradients, grad_fn=grad_fn)
        return value

    losses = [float(step(model, optimizer, batch())) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert len(traces) == 1
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    projected = finalize(params, nnx.as_pure(optimizer.opt_state), METHOD)
    with pytest.raises(TypeError, match=r"^optimizer must be an nnx\.Optimizer, got <class"):
        nnx_finalize(model, optimizer.opt_state, METHOD)
    nnx_finalize(model, optimizer, METHOD)
    for name, leaf in {"first": model.first, "second": model.second}.items():
        np.testing.assert_array_equal(leaf.kernel[...], projected[name]["kernel"])
    zeros = [int((layer.kernel[...] == 0).sum()) for layer in (model.first, model.second)]
    assert sum(zeros) == (8 * 16 + 16 * 4) * 3 // 4


def test_recalibrated_statistics_are_averages_over_the_samples_asked_for() -> None:
    held = variables()
    data = [batch(seed)[0] for seed in range(4)]

    def update(stats: Any, x: Any) -> Any:
        given = {"params": held["params"], "batch_stats": stats}
        return Network().apply(given, x, mutable=["batch_stats"])[1]["batch_stats"]

    found = recalibrate(update, held["batch_stats"], data, samples=90)["BatchNorm_0"]
    outputs = [x @ held["params"]["Dense_0"]["kernel"] for x in data[:3]]
    mean = jnp.stack([x.mean(0) for x in outputs]).mean(0)
    variance = jnp.stack([x.var(0) for x in outputs]).mean(0)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["var"], variance, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batches must not be empty"):
        recalibrate(update, held["batch_stats"], [])
    # The momentum is found whatever the scale of the activations.
    large = recalibrate(
        lambda s, x: {"var": 0.99 * s["var"] + 0.01 * x.var(0)},
        {"var": jnp.ones(8)},
        [1e4 * data[0]],
    )
    np.testing.assert_allclose(large["var"], 1e8 * data[0].var(0), rtol=1e-4)
    with pytest.raises(ValueError, match=r"update_fn must average BatchNorm_0/mean .*was given"):
        recalibrate(lambda stats, x: stats, held["batch_stats"], data)


# After training


def trained(steps: int = 5) -> tuple[Any, Any]:
    params, _, state = plain_steps(steps)
    return params, state


def test_counters_among_the_statistics_stay() -> None:
    def update(held: Any, x: jax.Array) -> Any:
        counter = held["counter"] + 1
        hidden = 0.9 * held["hidden"] + 0.1 * x.mean(0)
        debiased = hidden / (1 - 0.9 ** counter.astype(jnp.float32))
        return {"counter": counter, "hidden": hidden, "average": debiased}

    held = {"counter": jnp.asarray(7), "hidden": jnp.zeros(8), "average": jnp.zeros(8)}
    data = [batch(seed)[0] for seed in range(3)]
    found = recalibrate(update, held, data)
    assert int(found["counter"]) == 7
    same(found["hidden"], np.mean([x.mean(0) for x in data], axis=0), rtol=1e-4, atol=1e-6)


def test_statistics_of_a_module_are_recalibrated_in_place() -> None:
    model = Module(nnx.Rngs(0))
    others = nnx.as_pure(jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.BatchStat))))
    data = [batch(seed)[0] for seed in range(3)]
    nnx_recalibrate(model, lambda model, x: model(x), data)
    hidden = [np.asarray(model.first(x)) for x in data]
    same(model.norm.mean[...], np.mean([h.mean(0) for h in hidden], axis=0), rtol=1e-5, atol=1e-6)
    same(model.norm.var[...], np.mean([h.var(0) for h in hidden], axis=0), rtol=1e-4, atol=1e-6)
    same(nnx.as_pure(nnx.state(model, nnx.Not(nnx.BatchStat))), others)
    with pytest.raises(ValueError, match="model must have batch statistics"):
        nnx_recalibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda model, x: model(x), data)
    model.eval()
    with pytest.raises(ValueError, match="is the model in training mode"):
        nnx_recalibrate(model, lambda model, x: model(x), data)


@short_run
@pytest.mark.usefixtures("library_promotes")
def test_a_fixed_support_stays_under_weight_decay_and_momentum() -> None:
    params, state = trained()
    params = finalize(params, state, METHOD)
    before = params
    tx = fixed_support(optax.adamw(0.05, weight_decay=0.1))
    support = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for seed in range(3):
        gradients = jax.tree.map(
            lambda x, seed=seed: jax.random.normal(jax.random.key(seed), x.shape), params
        )
        updates, support = step(gradients, support, params)
        params = optax.apply_updates(params, updates)
        check_sparsity(params, 0.75)
        for name in ("Dense_0", "Dense_1"):
            same(params[name]["kernel"] == 0, before[name]["kernel"] == 0)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, before)
    assert min(map(float, jax.tree.leaves(moved))) > 0
    # What was filled from outside is emptied again.
    filled = jax.tree.map(lambda x: x + 1.0, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), support, filled)
    check_sparsity(optax.apply_updates(filled, updates), 0.75)


def test_a_channel_of_zeros_is_one_beside_tiny_weights() -> None:
    kernel = jnp.asarray([[1.0, 0.0, 1e-25], [1.0, 0.0, 1e-25]])
    check_sparsity({"kernel": kernel}, safe_core.Channel(0.34))


def test_a_state_shares_no_memory_with_a_given_importance() -> None:
    given, params = {"kernel": jnp.ones((4, 4))}, {"kernel": jnp.ones((4, 4))}
    tx = sparse_optimizer(optax.sgd(0.1), safe_core.admm(0.5), importance=given)
    jax.jit(tx.update, donate_argnums=1)(params, tx.init(params), params)
    tx.init(params)
    assert float(given["kernel"].sum()) == 16


def test_gradients_of_zeros_do_not_count_in_a_norm_of_the_base() -> None:
    params = {"kernel": jnp.asarray([[0.0, 2.0], [3.0, 0.0]])}
    tx = fixed_support(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    gradients = {"kernel": jnp.asarray([[100.0, 0.6], [0.8, 100.0]])}
    updates, _ = tx.update(gradients, tx.init(params), params)
    same(updates["kernel"], jnp.asarray([[0.0, -0.6], [-0.8, 0.0]]), rtol=1e-6)


@short_run
def test_filled_leaves_are_named() -> None:
    params, state = trained()
    params = finalize(params, state, METHOD)
    check_sparsity(params, 0.75)
    kernel = params["Dense_1"]["kernel"]
    first = int(jnp.argmax(kernel.ravel() == 0))
    params["Dense_1"]["kernel"] = kernel.ravel().at[first].set(1e-6).reshape(kernel.shape)
    with pytest.raises(ValueError, match=r"got non-zeros in Dense_1/kernel \(1 too many\)"):
        check_sparsity(params, 0.75)


def test_a_report_has_the_figures_of_pytorch() -> None:
    rng = np.random.default_rng(0)
    kernels = {
        f"{i}": rng.normal(size=s).astype(np.float32) for i, s in enumerate([(8, 6), (6, 4)])
    }
    model = torch.nn.ModuleDict(
        {k: torch.nn.Linear(*x.shape, bias=False) for k, x in kernels.items()}
    )
    for k, x in kernels.items():
        model[k].weight.data = torch.tensor(x.T)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), METHOD, model=model)
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params: Any = {k: {"kernel": jnp.asarray(x)} for k, x in kernels.items()}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params, grad_fn=lambda p: p)
        params = optax.apply_updates(params, updates)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in model.parameters()) / 2
            loss.backward()
            return loss

        optimizer.step(closure)
    theirs = optimizer.report()
    ours = report(params, state, METHOD)
    assert int(ours.step) == theirs.step == 3
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.entries, a.asked) == (
            b.name.replace("weight", "kernel").replace(".", "/"),
            *b[1:3],
        )
        np.testing.assert_allclose(np.asarray(a[3:]), b[3:], rtol=1e-4, atol=1e-6)
    scalars = jax.jit(lambda p, s: report(p, s, METHOD).scalars())(params, state)
    wanted = theirs.scalars()
    assert float(scalars["distance"]) == pytest.approx(wanted["distance"], rel=1e-4)
    assert len(scalars) == len(wanted)


def test_a_report_of_a_narrow_state_rounds_nothing_of_its_own() -> None:
    method = safe_core.safe(0.5, penalty=0.2, state_dtype="bfloat16")
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    z = jnp.where(state.support["kernel"], state.anchor["kernel"].astype(jnp.float32), 0)
    u = jnp.where(state.support["kernel"], 0, -state.anchor["kernel"].astype(jnp.float32))
    now = safe_core.project(params["kernel"] + u, 0.5).values
    (row,) = report(params, state, method).tensors
    assert float(row.dual_residual) == pytest.approx(
        0.2 * float(jnp.linalg.norm(now - z)), rel=1e-5
    )


@short_run
def test_a_sparse_matrix_holds_what_is_not_zero() -> None:
    params, state = trained()
    params = finalize(params, state, METHOD)
    found = to_bcoo(params)
    held = [found[name]["kernel"] for name in ("Dense_0", "Dense_1")]
    assert sum(kernel.nse for kernel in held) == (8 * 16 + 16 * 4) // 4
    for name, kernel in zip(("Dense_0", "Dense_1"), held, strict=True):
        same(kernel.todense(), params[name]["kernel"])
    same(found["Dense_0"]["bias"], params["Dense_0"]["bias"])


# Files


def test_a_file_reads_in_pytorch_and_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    held = variables()
    held["params"] = trained()[0]
    save_safetensors(held, tmp_path / "model.safetensors")
    modules = {
        "Dense_0": torch.nn.Linear(8, 16),
        "BatchNorm_0": torch.nn.BatchNorm1d(16),
        "Dense_1": torch.nn.Linear(16, 4),
    }
    model = torch.nn.ModuleDict(modules)
    found = load_file(tmp_path / "model.safetensors")
    counter = {"BatchNorm_0.num_batches_tracked": torch.tensor(0)}  # which Flax does not keep
    model.load_state_dict({**found, **counter})
    x = batch()[0]
    with torch.no_grad():
        model.eval()
        y = torch.tanh(modules["BatchNorm_0"](modules["Dense_0"](torch.tensor(np.asarray(x)))))
        got = modules["Dense_1"](y)
    np.testing.assert_allclose(got, Network().apply(held, x, train=False), rtol=1e-4, atol=1e-5)
    empty = jax.tree.map(jnp.zeros_like, held)
    same(load_safetensors(tmp_path / "model.safetensors", empty), held)
    scalar = {"params": {"scale": jnp.asarray(2.0)}}
    save_safetensors(scalar, tmp_path / "scalar.safetensors")
    same(load_safetensors(tmp_path / "scalar.safetensors", scalar), scalar)
    with pytest.raises(ValueError, match=r"must hold 'other.weight' of shape \(2, 3\), got none"):
        load_safetensors(tmp_path / "model.safetensors", {"other": {"kernel": jnp.ones((3, 2))}})


def test_convolution_and_attention_get_the_axes_of_pytorch() -> None:
    class Mixed(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> Any:
            y = linen.Conv(6, (3, 3), padding=1)(x)
            rows = y.reshape(y.shape[0], -1, 6)
            return y, linen.MultiHeadDotProductAttention(2, name="attention")(rows)

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    held = Mixed().init(jax.random.key(1), x)
    found = to_torch_names(held)
    weight, bias = (torch.tensor(found[f"Conv_0.{key}"]) for key in ("weight", "bias"))
    image = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    got = torch.nn.functional.conv2d(image, weight, bias, padding=1).permute(0, 2, 3, 1)
    wanted, attended = Mixed().apply(held, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    rows = np.asarray(wanted).reshape(2, 16, 6)
    query, key, value = (
        (rows @ found[f"attention.{k}.weight"].T + found[f"attention.{k}.bias"])
        .reshape(2, 16, 2, 3)
        .transpose(0, 2, 1, 3)
        for k in ("query", "key", "value")
    )
    heads = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.ascontiguousarray(part)) for part in (query, key, value))
    )
    joined = heads.permute(0, 2, 1, 3).reshape(2, 16, 6).numpy()
    out = joined @ found["attention.out.weight"].T + found["attention.out.bias"]
    np.testing.assert_allclose(out, attended, rtol=1e-4, atol=1e-5)


def test_a_layout_tells_the_axes_that_a_path_does_not(tmp_path: Path) -> None:
    params = {"stem": {"kernel": jnp.arange(24.0).reshape(3, 1, 4, 2)}}
    layout = {"stem/kernel": safe_core.Layout((-2,), (-1,))}
    with pytest.raises(ValueError, match=r"layout of stem/kernel must be known, .* \(3, 1, 4, 2\)"):
        to_torch_names(params)
    found = to_torch_names(params, layout=layout)["stem.weight"]
    np.testing.assert_array_equal(found, params["stem"]["kernel"].transpose(3, 2, 0, 1))
    save_safetensors(params, tmp_path / "x.safetensors", layout=layout)
    same(load_safetensors(tmp_path / "x.safetensors", params, layout=layout), params)
    strange = layout | {"stem/kernal": safe_core.Layout()}
    for call in (
        lambda: to_torch_names(params, layout=strange),
        lambda: load_safetensors(tmp_path / "x.safetensors", params, layout=strange),
    ):
        with pytest.raises(ValueError, match=r"names 'stem/kernal', .* no path of variables; they"):
            call()


def test_the_boxes_of_nnx_go_unnamed(tmp_path: Path) -> None:
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    shapes = {name: x.shape for name, x in to_torch_names(state).items()}
    assert shapes == {"weight": (2, 3), "bias": (2,)}
    attention = linen.MultiHeadDotProductAttention(2).init(jax.random.key(0), jnp.ones((1, 3, 6)))
    save_safetensors(attention, tmp_path / "a.safetensors")
    same(load_safetensors(tmp_path / "a.safetensors", attention), attention)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"ConvTranspose_0": {"kernel": jnp.ones((3, 3, 2, 2))}}, "must not be of a transposed"),
        ({"stack": {"kernel": jnp.ones((3, 2, 2))}}, "layout of stack/kernel must be known"),
        (
            {"a": {"kernel": jnp.ones((2, 2))}, "a.weight": jnp.ones(2)},
            "got two arrays named 'a.weight'",
        ),
    ],
)
def test_what_has_no_name_in_pytorch_is_refused(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_torch_names(tree)


# Transforms


@short_run
def test_an_ensemble_over_hyperparameters_is_one_program() -> None:
    def run(rho: Any, penalty: Any, seed: Any) -> Any:
        tx = sparse_optimizer(optax.sgd(0.1), METHOD, rho=rho, penalty=penalty)
        params = {"kernel": jax.random.normal(jax.random.key(seed), (8, 4))}

        def loss(params: Any, data: Any) -> Any:
            return jnp.mean((data[0] @ params["kernel"] - data[1]) ** 2)

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            _, gradients, grad_fn = value_and_gradients(loss)(params, batch())
            updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=5)
        return finalize(params, state, METHOD)

    settings = jnp.asarray([0.0, 0.1, 0.1]), jnp.asarray([0.1, 0.1, 0.5]), jnp.asarray([0, 0, 1])
    mapped = jax.jit(jax.vmap(run))(*settings)
    for i in range(3):
        alone = run(*(float(s[i]) for s in settings[:2]), int(settings[2][i]))
        same(mapped["kernel"][i], alone["kernel"], rtol=1e-4, atol=1e-5)
    assert not jnp.array_equal(mapped["kernel"][0], mapped["kernel"][1])


@pytest.mark.usefixtures("library_promotes")
def test_a_checkpointed_model_and_donated_buffers_give_the_same_step() -> None:
    def layer(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["kernel"])

    def loss(params: Any, data: Any, wrap: Any) -> Any:
        return jnp.mean((wrap(layer)(params, data[0]) - data[1]) ** 2)

    results = []
    for wrap, donated in ((lambda f: f, ()), (jax.checkpoint, (0, 1))):
        tx = sparse_optimizer(optax.adam(0.01), METHOD)

        def step(params: Any, state: Any, wrap: Any = wrap, tx: Any = tx) -> Any:
            _, gradients, grad_fn = value_and_gradients(loss)(params, batch(), wrap)
            updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=donated)
        params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
        state = tx.init(params)
        for _ in range(3):
            params, state = compiled(params, state)
        results.append((params, find_state(state).anchor))
    same(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    same(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_a_gradient_through_a_step_traces() -> None:
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 4))}

    def after(rate: Any) -> Any:
        state = tx.init(params)
        gradients = jax.tree.map(lambda x: rate * x, params)
        updates, _ = tx.update(gradients, state, params, grad_fn=lambda p: gradients)
        return sum(map(jnp.sum, jax.tree.leaves(optax.apply_updates(params, updates))))

    assert jnp.isfinite(jax.grad(after)(1.0))


@pytest.mark.usefixtures("library_promotes")
def test_optax_maps_over_the_parameters_within_the_state() -> None:
    tx = sparse_optimizer(optax.adam(0.01), METHOD)
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: x + 2, state)
    same(doubled.base[0].mu, jax.tree.map(lambda x: x + 2, state.base[0].mu))
    assert int(optax.tree.get(state, "step")) == 0
    assert int(find_state(optax.tree.set(state, step=jnp.int32(7))).step) == 7
