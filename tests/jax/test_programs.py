"""Outside of `jax.jit`, init, steps, report and finalize share compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import safe_core
import safe_core.adapters.jax.evaluation
import safe_core.projection
import safe_core.report
from safe_core import ByName, Unstructured, schedules
from safe_core.adapters.optax import finalize, report, sparse_optimizer, sparse_weights

RISING = schedules.cubic(0.5, steps=4)
METHODS = {
    "constant": safe_core.admm(0.5, dual_update_interval=1),
    "rising": safe_core.gmp(RISING),
    "derived": safe_core.safe(0.5, steps=8),
    "by name": safe_core.admm(
        ByName({"a/kernel": Unstructured(RISING, "tensor")}, default=0.5), dual_update_interval=1
    ),
    "rows": safe_core.admm(Unstructured(RISING, "row"), dual_update_interval=1),
}


def traced(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Return a list that gets the shapes at every call of a function.

    A function within a compiled program is called only when the program is traced.
    """
    found: list[Any] = []
    original: Callable[..., Any] = getattr(module, name)

    def counted(*args: Any) -> Any:
        arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
        found.append(tuple(x.shape for x in arrays))
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    return found


def start() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (8, 4), "b": (4, 6), "c": (8, 4)}
    drawn = [
        jax.random.normal(key, shapes[name], "float32")
        for name, key in zip(shapes, keys, strict=True)
    ]
    return {name: {"kernel": kernel} for name, kernel in zip(shapes, drawn, strict=True)}


def run(method: safe_core.Method) -> None:
    tx, params = sparse_optimizer(optax.sgd(0.1), method), start()
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params, grad_fn=lambda _, g=grads: g)
        params = optax.apply_updates(params, updates)
    report(params, state, method)
    sparse_weights(params, state, method)
    finalize(params, state, method)


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_all_steps_share_a_selection(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    found = traced(monkeypatch, safe_core.projection, "_select_by_pattern")
    run(method)
    assert len(found) == 1


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_a_mesh_in_use_changes_no_support(scope: Any) -> None:
    """Use a mesh of explicit axes, where a function of local shards must enclose no array."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    method, plain = safe_core.gmp(Unstructured(RISING, scope)), start()
    tx = sparse_optimizer(optax.sgd(0.1), method)

    def trained(params: Any) -> Any:
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return sparse_weights(params, state, method), state.support

    wanted = trained(plain)
    with jax.set_mesh(mesh):
        found = trained(jax.device_put(plain, spread))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (safe_core.report, "_sums_of"),
        (safe_core.adapters.jax.evaluation, "measure"),
        (safe_core.backends.jax, "_where_kept"),
        (safe_core.constraints.splitting, "_anchor"),
        (safe_core.constraints.splitting, "_relaxed"),
    ],
    ids=["report", "finalize", "support", "anchor", "relaxed"],
)
def test_leaves_of_one_shape_share_a_program(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    found = traced(monkeypatch, module, name)
    run(METHODS["constant"])
    assert len(found) == len(set(found)) == 2
