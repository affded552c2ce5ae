"""Sassha on four simulated devices: averaged products, and signs where the parameters are."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import safe_core
from safe_core.adapters.optax import sassha, sparse_optimizer, value_and_gradients

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
# Rows of other sizes have other curvatures.
x = jnp.asarray(rng.normal(size=(16, 5)) * np.linspace(0.2, 3, 16)[:, None])
y, start = jnp.asarray(rng.normal(size=(16, 2))), {"kernel": jnp.asarray(rng.normal(size=(5, 2)))}

def loss(params, x, y):
    return jnp.mean(jnp.log(jnp.cosh(x @ params["kernel"] - y)))

def trained(tx, wrap, axis_name=None):
    def step(params, state, x, y):
        _, gradients, grad_fn = value_and_gradients(loss, axis_name=axis_name)(params, x, y)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state
    step = jax.jit(wrap(step))
    params, state = start, tx.init(start)
    for _ in range(5):
        params, state = step(params, state, x, y)
    return params["kernel"]

mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
def mapped(step):
    specs = (P(), P(), P("batch"), P("batch"))
    return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P()))

method = safe_core.safe(0.5, rho=0.1, penalty=0.1, dual_update_interval=2)
options = {"learning_rate": 0.02, "hessian_interval": 2}
for tx in (sassha(rho=0.1, **options), sparse_optimizer(sassha(rho=0, **options), method)):
    wanted = trained(tx, lambda step: step)
    np.testing.assert_allclose(trained(tx, mapped, "batch"), wanted, rtol=1e-12)
    print("agrees")

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    found = []
    for spec in (P(), P("batch")):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
        params = {"w": place(jnp.asarray(np.linspace(-1, 1, 32).reshape(8, 4)))}
        grad_fn = jax.grad(lambda params: jnp.sum(jnp.cosh(params["w"])))
        tx = sassha(0.1, rho=0.1)
        updates, state = jax.jit(
            lambda p, s: tx.update(grad_fn(p), s, p, grad_fn=grad_fn)
        )(params, tx.init(params))
        found.append(updates["w"])
    assert found[1].sharding.spec[0] == state.hessian["w"].sharding.spec[0] == "batch"
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    print("agrees")
"""


def test_devices_train_what_one_trains() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["agrees"] * 4
