"""Sharded parameters: an FSDP-like layout over several devices or processes.

    python examples/jax/sharded.py --devices 8
    python examples/jax/sharded.py --process 0 --processes 2 &
    python examples/jax/sharded.py --process 1 --processes 2

Weights are sharded along their largest axis and the batch along its rows. Anchors and masks are
sharded like the weights. ``--devices N`` simulates N devices on one CPU. With ``--processes``,
each process runs this script, and `jax.distributed` joins their devices in one mesh.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import batches, datasets
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import safe_core
from safe_core.adapters.optax import finalize, sparse_optimizer, value_and_gradients


def loss_fn(params: Any, batch: Any) -> jax.Array:
    x = batch[0].reshape(batch[0].shape[0], -1)
    for i, layer in enumerate(params):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(x, batch[1]).mean()


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def step(tx: Any, params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    loss, gradients, grad_fn = value_and_gradients(loss_fn)(params, batch)
    updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state, loss


def cut(x: Any, mesh: jax.sharding.Mesh) -> jax.Array:
    """Shard ``x``, which every process holds in full, over the devices along its largest axis."""
    axis = int(np.argmax(x.shape))
    names = [None] * x.ndim
    if x.shape[axis] % mesh.size == 0:
        names[axis] = "devices"
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1, help="number to simulate on one CPU")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--address", default="localhost:23456", help="address of process 0")
    options = parser.parse_args()
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.address, options.processes, options.process)

    auto = (AxisType.Auto,)  # the compiler partitions each operation
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=auto)
    rng, sizes = np.random.default_rng(0), (64, 128, 64, 10)
    params = [
        {
            "kernel": cut(rng.normal(size=(a, b)).astype(np.float32) / a**0.5, mesh),
            "bias": cut(np.zeros(b, np.float32), mesh),
        }
        for a, b in itertools.pairwise(sizes)
    ]
    train, _ = jax.tree.map(np.asarray, datasets())
    method = safe_core.safe(0.9, steps=options.epochs * (len(train[1]) // 64))
    tx = sparse_optimizer(optax.sgd(0.1, momentum=0.9), method)
    state = jax.jit(tx.init)(params)
    rows = NamedSharding(mesh, PartitionSpec("devices"))
    for epoch in range(options.epochs):
        for batch in batches(train, epoch):
            placed = [
                jax.make_array_from_callback(x.shape, rows, lambda index, x=x: x[index])
                for x in batch
            ]
            params, state, loss = step(tx, params, state, placed)
    # Under jit, because a process cannot read the shards of the others.
    projected = jax.jit(lambda params, state: finalize(params, state, method))(params, state)
    zeros = jax.jit(lambda tree: sum(jnp.sum(layer["kernel"] == 0) for layer in tree))(projected)
    total = sum(a * b for a, b in itertools.pairwise(sizes))
    if options.process == 0:
        print(f"{jax.device_count()} devices, loss {float(loss):.3f}, {int(zeros)} of {total} zero")


if __name__ == "__main__":
    main()
