"""Eight simulated devices: averages, ensembles, moved checkpoints, and layers on devices apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREAMBLE = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import safe_core
from safe_core.adapters.optax import finalize, sparse_optimizer
from safe_core.adapters.jax.gradients import value_and_gradients

method = safe_core.safe(0.75, rho=0.05, penalty=0.1, dual_update_interval=2,
                        perturbation_interval=2, reuse=0.5)
keys = jax.random.split(jax.random.key(0), 4)
x, y = jax.random.normal(keys[0], (32, 8)), jax.random.normal(keys[1], (32, 4))
params = {"kernel": jax.random.normal(keys[2], (8, 4)), "bias": jnp.zeros(4)}

def loss(params, data):
    return jnp.mean((data[0] @ params["kernel"] + params["bias"] - data[1]) ** 2)

def same(a, b, rtol=1e-3):
    for got, want in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64),
                                   rtol=rtol, atol=rtol / 100)
"""

AVERAGED = """
from functools import partial

def steps(tx, params, state, data, axis_name, count=4):
    def step(carry, _):
        params, state = carry
        _, gradients, grad_fn = value_and_gradients(loss, axis_name=axis_name)(params, data)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None
    (params, state), _ = jax.lax.scan(step, (params, state), None, length=count)
    return params, state

mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
for method in (method, safe_core.safe(0.75, steps=12)):
    tx = sparse_optimizer(optax.adam(0.01), method)
    train, state = partial(steps, tx), tx.init(params)
    wanted = jax.jit(train, static_argnums=(3, 4))(params, state, (x, y), None)
    for check in (True, False):
        mapped = jax.jit(jax.shard_map(
            lambda params, state, data: train(params, state, data, "batch"),
            mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=P(), check_vma=check))
        same(mapped(params, state, (x, y)), wanted)
        print("agrees")
    split = jax.tree.map(lambda a: a.reshape(8, -1, a.shape[1]), (x, y))
    mapped = jax.pmap(lambda p, s, d: train(p, s, d, "batch"), axis_name="batch",
                      in_axes=(None, None, 0))
    same(jax.tree.map(lambda a: a[3], mapped(params, state, split)), wanted)
    print("agrees")
"""

TYPED = """
mesh = jax.make_mesh((4, 2), ("f", "t"), axis_types=(AxisType.Explicit,) * 2)

def reduced(params, data):
    h = jnp.einsum("bi,io->bo", data[0], params["kernel"], out_sharding=P(None, params_spec[1]))
    return jnp.mean((h + params["bias"][None] - data[1]) ** 2)

def run(place, loss, method, base=optax.sgd(0.1), **options):
    tx = sparse_optimizer(base, method, **options)
    params = {"kernel": place(jax.random.normal(keys[2], (16, 8)), P(*params_spec)),
              "bias": place(jnp.zeros(8), P(params_spec[1]))}
    data = (place(jax.random.normal(keys[0], (32, 16)), P()),
            place(jax.random.normal(keys[1], (32, 8)), P(None, params_spec[1])))
    state = tx.init(params)
    @jax.jit
    def step(params, state):
        _, gradients, grad_fn = value_and_gradients(loss, micro_batches=2)(params, data)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state
    for _ in range(3):
        params, state = step(params, state)
    return finalize(params, state, method), state

def whole(params, data):
    return jnp.mean((data[0] @ params["kernel"] + params["bias"] - data[1]) ** 2)

given = {"importance": lambda params: jax.tree.map(lambda x: jnp.abs(x) + 1, params)}
def published(pattern):
    return safe_core.safe(pattern, rho=0.05, penalty=0.1, dual_update_interval=2)

channels = published(safe_core.Channel(0.5))
untuned = safe_core.safe(0.75, steps=12)
by_channel = safe_core.Method(0.75, safe_core.ADMM(0.1, 2), perturbation=safe_core.Staged(
    safe_core.ChannelSAM(0.05, adaptive=True, scope="tensor"), safe_core.ChannelSAM(0.05), 2))
# The eight entries of a byte lie in two shards here.
in_bits = safe_core.Method(0.75, safe_core.ADMM(0.1, 2, packed_support=True))
elsa = safe_core.elsa(0.75, dual_update_interval=2)
rising = safe_core.schedules.cubic(0.75, steps=4)
rows = published(safe_core.Unstructured(rising, "row"))
for params_spec, cases in (
    ((None, "t"), ((published(0.75), given), (by_channel, {}), (in_bits, {}), (untuned, {}),
                  (elsa, {"base": optax.adam(0.01)}))),
    (("f", "t"), ((published("2:4"), {}), (published(0.75), {}), (channels, {}), (by_channel, {}),
                  (untuned, {}), (rows, {}))),
):
    for method, options in cases[int(sys.argv[2])::2]:
        wanted = run(lambda x, spec: x, whole, method, **options)
        with jax.set_mesh(mesh):
            got = run(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), reduced,
                      method, **options)
            assert got[1].anchor["kernel"].sharding.spec == P(*params_spec)
        same(got, wanted)
        print("agrees")
"""

# Each device has one member of an ensemble. Rounded weights tie, so ties are cut, too.
ENSEMBLE = """
from functools import partial
from safe_core import Block, Channel, Unstructured, project

mesh = jax.make_mesh((8,), ("member",), axis_types=(getattr(AxisType, sys.argv[2]),))
members = {"kernel": jax.random.normal(keys[2], (8, 8, 4)), "bias": jnp.zeros((8, 4))}
data = jax.random.normal(keys[0], (8, 32, 8)), jax.random.normal(keys[1], (8, 32, 4))

def alone(fn, *args):
    found = [fn(*jax.tree.map(lambda a: a[i], args)) for i in range(8)]
    return jax.tree.map(lambda *a: jnp.stack(a), *found)

def apart(fn):
    def of_one(*args):
        return jax.tree.map(lambda a: a[None], fn(*jax.tree.map(lambda a: a[0], args)))
    return jax.shard_map(of_one, mesh=mesh, in_specs=P("member"), out_specs=P("member"))

def train(method, params, data):
    tx = sparse_optimizer(optax.adam(0.01), method)
    def step(carry, _):
        params, state = carry
        _, gradients, grad_fn = value_and_gradients(loss)(params, data)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=4)
    return finalize(params, state, method)

def agree(fn, rtol, *args):
    wanted = alone(jax.jit(fn), *args)
    with jax.set_mesh(mesh):
        args = jax.device_put(args, NamedSharding(mesh, P("member")))
        for spread in (jax.vmap(fn), apart(fn)):
            same(jax.jit(spread)(*args), wanted, rtol)
            print("agrees")

rounded = jnp.round(2 * members["kernel"]), jnp.round(2 * data[1])
for pattern in (0.4, Unstructured(0.4, scope="row"), Channel(0.5), Block((4, 2), 0.4)):
    agree(lambda *arrays: project(arrays, pattern), 0, *rounded)
agree(partial(train, safe_core.safe(0.75, steps=4)), 1e-3, members, data)
"""

CHECKPOINT = """
import orbax.checkpoint as ocp
folder = sys.argv[1]
tx = sparse_optimizer(optax.adam(0.01), method)

@jax.jit
def step(params, state):
    _, gradients, grad_fn = value_and_gradients(loss)(params, (x, y))
    updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

def placed(tree, mesh):
    def place(a):
        rows = a.ndim and a.shape[0] % mesh.size == 0
        return jax.device_put(a, NamedSharding(mesh, P("d") if rows else P()))
    return jax.tree.map(place, tree)

def train(run, count):
    for _ in range(count):
        run = step(*run)
    return run

eight, four = (jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,),
                             devices=jax.devices()[:n]) for n in (8, 4))
run = train(placed((params, tx.init(params)), eight), 3)
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder + "/step", run)
    checkpointer.wait_until_finished()
    for mesh in (eight, four):
        fresh = placed((params, tx.init(params)), mesh)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        found = checkpointer.restore(folder + "/step", shapes)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(run), strict=True):
            assert a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()
        assert found[1].anchor["kernel"].sharding.mesh.size == mesh.size
        assert type(found[1]).__name__ == "SparseOptimizerState"
        wanted, got = train(run, 3), train(found, 3)
        same(got, wanted, rtol=0 if mesh is eight else 1e-3)
        same(finalize(*got, method), finalize(*wanted, method), rtol=0 if mesh is eight else 1e-3)
        print("agrees")
"""

# Layers of a pipeline lie on devices of their own, and compete only within themselves.
PIPELINE = """
weights = {name: {"kernel": jax.random.normal(key, (8, 4))} for name, key in zip("ab", keys)}
apart = {name: jax.device_put(layer, device)
         for (name, layer), device in zip(weights.items(), jax.devices())}
for pattern in ("2:4", safe_core.Unstructured(0.5, scope="row")):
    method = safe_core.magnitude(pattern)
    tx = sparse_optimizer(optax.sgd(0.1), method)
    got, wanted = (finalize(tree, tx.init(tree), method) for tree in (apart, weights))
    same(got, wanted, rtol=0)
    assert got["b"]["kernel"].devices() == {jax.devices()[1]}
    print("agrees")
"""


@pytest.mark.parametrize(
    ("script", "checks", "arguments"),
    [
        pytest.param(AVERAGED, 6, (), id="average"),
        pytest.param(TYPED, 6, ("0",), id="explicit axes"),
        pytest.param(TYPED, 5, ("1",), id="explicit axes, others", marks=pytest.mark.long),
        pytest.param(ENSEMBLE, 10, ("Auto",), id="ensemble", marks=pytest.mark.long),
        pytest.param(
            ENSEMBLE, 10, ("Explicit",), id="ensemble over explicit axes", marks=pytest.mark.long
        ),
        pytest.param(CHECKPOINT, 2, (), id="checkpoint", marks=pytest.mark.long),
        pytest.param(PIPELINE, 2, (), id="pipeline"),
    ],
)
def test_eight_devices(
    script: str, checks: int, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    finished = subprocess.run(
        [sys.executable, "-P", "-c", PREAMBLE + script, str(tmp_path), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["agrees"] * checks
