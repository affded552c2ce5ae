"""Resume with orbax: an interrupted run continues bit for bit.

    python examples/jax/resume.py FOLDER

Saves a checkpoint after every epoch. Starts from the last checkpoint if there is one.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from digits import Network, accuracy, batches, datasets, loss_fn

import safe_core
from safe_core.adapters.optax import (
    check_sparsity,
    finalize,
    sparse_optimizer,
    value_and_gradients,
)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(tx: Any, run: dict[str, Any], batch: Any) -> dict[str, Any]:
    key, used = jax.random.split(jax.random.wrap_key_data(run["key"]))
    (_, batch_stats), gradients, grad_fn = value_and_gradients(loss_fn, has_aux=True)(
        run["params"], batch, run["batch_stats"], used
    )
    updates, state = tx.update(gradients, run["state"], run["params"], grad_fn=grad_fn)
    params = optax.apply_updates(run["params"], updates)
    return {
        "params": params,
        "batch_stats": batch_stats,
        "state": state,
        "key": jax.random.key_data(key),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    train, test = datasets()
    key = jax.random.key(0)
    variables = Network().init({"params": key, "dropout": key}, train[0][:1])
    steps = options.epochs * (len(train[1]) // 64)  # of the whole run, also when it resumes
    method = safe_core.safe(0.9, steps=steps, importance=safe_core.SquaredGradient(0.9))
    tx = sparse_optimizer(optax.adam(2e-3), method)
    run = {**variables, "state": tx.init(variables["params"]), "key": jax.random.key_data(key)}
    with ocp.CheckpointManager(options.folder.resolve()) as manager:
        start = manager.latest_step() or 0
        if start:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, run)
            run = manager.restore(start, args=ocp.args.StandardRestore(like))
            print(f"resumed after epoch {start}", flush=True)
        for epoch in range(start, options.epochs):
            for batch in batches(train, epoch):
                run = step(tx, run, batch)
            manager.save(epoch + 1, args=ocp.args.StandardSave(run))
            manager.wait_until_finished()
            print(f"saved epoch {epoch + 1}", flush=True)
    params = finalize(run["params"], run["state"], method)
    check_sparsity(params, method.sparsity)
    total = sum(float(jnp.sum(x.astype(jnp.float32))) for x in jax.tree.leaves(params))
    print(f"accuracy {accuracy(params, run['batch_stats'], test):.1f}%, sum of weights {total!r}")


if __name__ == "__main__":
    main()
