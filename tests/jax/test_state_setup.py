"""A state knows what it was made with, and refuses to go on with anything else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import safe_core
from safe_core import Layout, SquaredGradient, schedules
from safe_core.adapters.jax import report
from safe_core.adapters.jax.flax import SparseTrainState
from safe_core.adapters.optax import SparseOptimizerState, finalize, find_state, sparse_optimizer

# The runs end far from the constraint, which `finalize` may warn about.
pytestmark = pytest.mark.filterwarnings("ignore:finalize:UserWarning")

METHOD = safe_core.admm(0.5, penalty=0.1, dual_update_interval=1)
SOURCE = safe_core.admm(0.5, penalty=0.1, dual_update_interval=1, importance=SquaredGradient(0.5))
OUTPUT_INPUT = Layout(input_axes=(1,), output_axes=(0,))
INPUT_OUTPUT = Layout(input_axes=(0,), output_axes=(1,))


def make_params(seed: int = 0) -> Any:
    draw = np.random.default_rng(seed).normal(size=(4, 4))
    return {"kernel": jnp.asarray(draw, jnp.float32), "bias": jnp.zeros(4)}


def fresh(method: Any = METHOD, base: Any = None, **options: Any) -> Any:
    tx = sparse_optimizer(optax.sgd(0.1) if base is None else base, method, **options)
    return tx, tx.init(make_params())


def ensemble() -> tuple[Any, Any, Any]:
    """Members whose weights differ in size, so that a pool over all would empty the small."""
    members = [jax.tree.map(lambda x, i=i: x * 10.0**i, make_params(i)) for i in range(3)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    tx = sparse_optimizer(optax.sgd(0.1), METHOD)
    return tx, params, jax.vmap(tx.init)(params)


# Ensembles


def test_an_ensemble_is_finalized_member_by_member() -> None:
    _, params, state = ensemble()
    message = r"state must be of one model.*step of shape \(3,\).*jax\.vmap.*leaf\[0\]"
    with pytest.raises(ValueError, match=message):
        finalize(params, state, METHOD)
    with pytest.raises(ValueError, match=message):
        jax.jit(finalize, static_argnums=2)(params, state, METHOD)
    found = jax.vmap(lambda p, s: finalize(p, s, METHOD))(params, state)
    assert (found["kernel"] == 0).sum((1, 2)).tolist() == [8, 8, 8]


def test_no_function_takes_the_state_of_an_ensemble_for_one() -> None:
    tx, params, state = ensemble()
    with pytest.raises(ValueError, match="state must be of one model"):
        report(params, state, METHOD)
    with pytest.raises(ValueError, match="state must be of one model"):
        tx.update(params, state, params)
    assert find_state(state).step.shape == (3,)
    figures = jax.vmap(lambda p, s: report(p, s, METHOD).scalars())(params, state)
    assert figures["distance"].shape == (3,)


def test_a_replicated_state_is_refused() -> None:
    _, state = fresh()
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), (make_params(), state))
    with pytest.raises(ValueError, match=r"replicated.*leaf\[0\]"):
        finalize(*copies, METHOD)
    one = jax.tree.map(lambda leaf: leaf[0], copies)
    assert (finalize(*one, METHOD)["kernel"] == 0).sum() == 8


# Another method


OTHERS = {
    "sparsity": (safe_core.admm(0.25), "its sparsity is .*1/2.*got .*1/4"),
    "pattern": (safe_core.admm("2:4"), "its sparsity is Unstructured.*got NM"),
    "scope": (safe_core.admm(safe_core.Unstructured(0.5, "tensor")), "global.*tensor"),
    "constraint": (safe_core.magnitude(0.5), "its constraint is ADMM, got AtEnd|state.anchor"),
    "importance": (SOURCE, "importance is none, got SquaredGradient"),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_another_method_is_refused_in_traced_code_too(name: str) -> None:
    other, message = OTHERS[name]
    params, (_, state) = make_params(), fresh()
    tx = sparse_optimizer(optax.sgd(0.1), other)
    for call in (
        lambda p, s: finalize(p, s, other),
        lambda p, s: report(p, s, other).scalars(),
        lambda p, s: tx.update(p, s, p),
    ):
        for function in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=message):
                function(params, state)


def test_a_state_with_an_importance_is_refused_without_it() -> None:
    params, (_, state) = make_params(), fresh(SOURCE)
    with pytest.raises(ValueError, match="importance is SquaredGradient, got none"):
        finalize(params, state, METHOD)
    with pytest.raises(ValueError, match="importance is SquaredGradient, got none"):
        sparse_optimizer(optax.sgd(0.1), METHOD).update(params, state, params)


def test_an_importance_passed_as_a_function_is_passed_again() -> None:
    """Without it, P would stay as it was at the last dual update."""
    params, ones = make_params(), {"kernel": jnp.ones((4, 4))}
    _, state = fresh(importance=lambda p: {"kernel": jnp.abs(p["kernel"])})
    with pytest.raises(ValueError, match=r"importance is a function.*got none"):
        sparse_optimizer(optax.sgd(0.1), METHOD).update(params, state, params)
    assert (finalize(params, state, METHOD)["kernel"] == 0).sum() == 8
    # Arrays are in the state, and need not be passed again.
    _, given = fresh(importance=ones)
    sparse_optimizer(optax.sgd(0.1), METHOD).update(params, given, params)
    with pytest.raises(ValueError, match="importance is none, got arrays"):
        sparse_optimizer(optax.sgd(0.1), METHOD, importance=ones).update(params, fresh()[1], params)


def test_a_state_without_a_record_still_needs_the_arrays_of_its_importance() -> None:
    params, (_, state) = make_params(), fresh()
    bare = state._replace(setup=None)
    with pytest.raises(ValueError, match=r"state\.importance must be there for SquaredGradient"):
        finalize(params, bare, SOURCE)
    tx = sparse_optimizer(optax.sgd(0.1), SOURCE)
    with pytest.raises(ValueError, match=r"state\.importance must be there for SquaredGradient"):
        tx.update(params, bare, params)


def test_settings_that_change_no_meaning_of_the_state_may_change() -> None:
    params, (_, state) = make_params(), fresh()
    other = safe_core.safe(0.5, rho=0.3, penalty=schedules.linear(0.2, 5), dual_update_interval=3)
    tx = sparse_optimizer(optax.sgd(0.1), other)
    _, state = tx.update(params, state, params, grad_fn=lambda p: p)
    assert (finalize(params, state, METHOD)["kernel"] == 0).sum() == 8
    rising = safe_core.admm(schedules.cubic(0.5, 8, every=2), dual_update_interval=1)
    _, state = fresh(rising)
    state = state._replace(support=fresh()[1].support)
    assert (finalize(params, state, METHOD)["kernel"] == 0).sum() == 8


# Layouts


@pytest.mark.parametrize(
    "layout",
    [OUTPUT_INPUT, {"kernel": OUTPUT_INPUT}, lambda path, leaf: Layout((-1,), (-2,))],
    ids=["layout", "mapping", "function"],
)
def test_nobody_passes_a_layout_twice(layout: Any) -> None:
    method, params = safe_core.admm("2:4"), make_params()
    _, state = fresh(method, layout=layout)
    for function in (finalize, jax.jit(finalize, static_argnums=2)):
        kept = function(params, state, method)["kernel"] != 0
        np.testing.assert_array_equal(kept, state.support["kernel"])
        assert (kept.sum(1) == 2).all()
    assert report(params, state, method).tensors[0].name == "kernel"
    finalize(params, state, method, layout=OUTPUT_INPUT)


def test_another_layout_is_refused_in_traced_code_too() -> None:
    method, params = safe_core.admm("2:4"), make_params()
    _, state = fresh(method, layout=OUTPUT_INPUT)
    for call in (
        lambda p, s: finalize(p, s, method, layout=INPUT_OUTPUT),
        lambda p, s: report(p, s, method, layout=INPUT_OUTPUT).scalars(),
        lambda p, s: sparse_optimizer(optax.sgd(0.1), method).update(p, s, p),
    ):
        for function in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=r"layout of kernel is Layout\(.*got Layout"):
                function(params, state)


def test_other_sparse_leaves_are_refused() -> None:
    params, (_, state) = make_params(), fresh()
    tx = sparse_optimizer(optax.sgd(0.1), METHOD, where=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"where must select .*lacks bias, got True for it"):
        tx.update(params, state, params)
    other = {"kernel": params["kernel"], "other": params["bias"]}
    with pytest.raises(ValueError, match=r"params lacks 'bias' and has 'other' in addition"):
        tx.update(other, state, other)


# The record is static


def test_the_record_never_changes_the_structure_of_a_state() -> None:
    tx, state = fresh(SOURCE, optax.adam(0.1))
    params = make_params()

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, scanned), _ = jax.lax.scan(step, (params, state), None, length=3)
    assert jax.tree.structure(scanned) == jax.tree.structure(state)
    assert jax.tree.structure(jax.jit(tx.init)(params)) == jax.tree.structure(state)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(state._replace(setup=None)))


def test_equal_settings_share_a_compiled_step() -> None:
    traces, params = [], make_params()

    @jax.jit
    def project(params: Any, state: Any) -> Any:
        traces.append(1)
        return finalize(params, state, safe_core.admm("2:4"))

    for axes in (OUTPUT_INPUT, Layout((-1,), (-2,)), INPUT_OUTPUT):
        _, state = fresh(safe_core.admm("2:4"), layout=axes)
        project(params, state)
        project(params, jax.tree.map(jnp.copy, state))
    assert len(traces) == 2


def test_optax_maps_specifications_over_a_state() -> None:
    tx, state = fresh(METHOD, optax.adam(0.1))
    specs = {"kernel": "k", "bias": "b"}
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    found = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None, is_leaf=masked
    )
    assert found.anchor == specs
    assert found.base[0].mu == specs
    kept = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    assert kept.setup == state.setup
    assert optax.tree.set(state, step=jnp.int32(7)).setup == state.setup


@pytest.mark.parametrize("setup", ["default", "sharding"])
def test_a_tree_of_shardings_may_leave_the_record_out(setup: str) -> None:
    tx, state = fresh()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = SparseOptimizerState(one, one, one, one, one)
    if setup == "sharding":
        shardings = shardings._replace(setup=one)
    found = jax.jit(tx.init, out_shardings=shardings)(make_params())
    assert jax.tree.structure(found) == jax.tree.structure(state)
    mapped = jax.tree.map(lambda _: one, state)
    assert jax.device_put(state, mapped).setup == state.setup


def test_wrappers_keep_the_record() -> None:
    tx = optax.MultiSteps(
        optax.apply_if_finite(optax.chain(sparse_optimizer(optax.sgd(0.1), METHOD)), 2), 2
    )
    params = make_params()
    state = tx.init(params)
    for _ in range(2):
        _, state = jax.jit(tx.update)(params, state, params)
    assert find_state(state).setup == fresh()[1].setup


# Checkpoints


class Early(NamedTuple):
    """The state before it had a record."""

    step: Any
    base: Any
    anchor: Any
    support: Any
    importance: Any
    flat_direction: Any = None


def test_a_record_survives_a_pickle() -> None:
    _, state = fresh(safe_core.safe(0.5, penalty=lambda step: 0.1), layout=lambda *_: OUTPUT_INPUT)
    assert pickle.loads(pickle.dumps(state)).setup == state.setup


def test_leaves_alone_restore_into_a_new_state(tmp_path: Path) -> None:
    tx, state = fresh(SOURCE)
    _, state = tx.update(make_params(), state, make_params())
    np.savez(tmp_path / "leaves.npz", *jax.tree.leaves(state))
    held = list(np.load(tmp_path / "leaves.npz").values())
    treedef = jax.tree.structure(tx.init(make_params()))
    assert jax.tree.structure(treedef.unflatten(held)) == jax.tree.structure(state)


def test_a_record_survives_flax() -> None:
    tx, state = fresh(safe_core.admm("2:4"), layout=OUTPUT_INPUT)
    saved = flax.serialization.to_bytes(state)
    assert flax.serialization.from_bytes(state, saved).setup == state.setup
    # The saved record wins over that of the template, so a wrong template is found out.
    other = fresh(safe_core.admm("2:4"), layout=INPUT_OUTPUT)[1]
    restored = flax.serialization.from_bytes(other, saved)
    assert restored.setup == state.setup
    with pytest.raises(ValueError, match="layout of kernel"):
        sparse_optimizer(optax.sgd(0.1), safe_core.admm("2:4")).update(
            make_params(), restored, make_params()
        )
    train = SparseTrainState.create(apply_fn=None, params=make_params(), tx=tx)
    again = flax.serialization.from_bytes(train, flax.serialization.to_bytes(train))
    assert jax.tree.structure(again.opt_state) == jax.tree.structure(train.opt_state)


def test_an_early_state_of_flax_loads_with_an_empty_record() -> None:
    _, state = fresh()
    early = flax.serialization.to_state_dict(Early(*state[:6]))
    later = {"setup": None, "motion": None, "scale": None}
    restored = flax.serialization.from_state_dict(state, {**early, **later})
    assert restored.setup == state.setup
    finalize(make_params(), restored, METHOD)


def orbax(folder: Path, saved: Any, like: Any, **options: Any) -> Any:
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "step", args=ocp.args.PyTreeSave(saved))
        args = ocp.args.PyTreeRestore(
            like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), **options
        )
        return checkpointer.restore(folder / "step", args=args)


def test_orbax_restores_into_a_template(tmp_path: Path) -> None:
    _, state = fresh(METHOD, optax.adam(0.1))
    restored = orbax(tmp_path, state, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.setup == state.setup


def test_orbax_restores_an_early_state(tmp_path: Path) -> None:
    _, state = fresh(METHOD, optax.adam(0.1))
    restored = orbax(tmp_path, Early(*state[:6]), state, partial_restore=True)
    assert restored.setup == state.setup
    np.testing.assert_array_equal(restored.anchor["kernel"], state.anchor["kernel"])
