"""Flax Linen: a train state with batch statistics and dropout, then fine-tuning.

    python examples/jax/linen.py

`value_and_gradients` computes both gradients. Batch statistics come from the first pass, and
both passes use the same dropout masks.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import optax
from digits import Network, accuracy, batches, datasets, loss_fn

import safe_core
from safe_core.adapters.jax.flax import SparseTrainState, recalibrate
from safe_core.adapters.optax import (
    check_sparsity,
    finalize,
    fixed_support,
    sparse_optimizer,
    value_and_gradients,
)


class TrainState(SparseTrainState):
    batch_stats: Any = None


@partial(jax.jit, donate_argnums=0)
def step(state: TrainState, batch: Any, key: jax.Array) -> TrainState:
    (_, batch_stats), grads, grad_fn = value_and_gradients(loss_fn, has_aux=True)(
        state.params, batch, state.batch_stats, key
    )
    return state.apply_gradients(grads=grads, grad_fn=grad_fn, batch_stats=batch_stats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    train, test = datasets()
    key = jax.random.key(0)
    variables = Network().init({"params": key, "dropout": key}, train[0][:1])
    steps = options.epochs * (len(train[1]) // 64)
    method = safe_core.safe(0.9, steps=steps)
    tx = sparse_optimizer(optax.sgd(0.05, momentum=0.9), method)
    state = TrainState.create(apply_fn=Network().apply, tx=tx, **variables)
    for epoch in range(options.epochs):
        for batch in batches(train, epoch):
            key, used = jax.random.split(key)
            state = step(state, batch, used)

    # Fine-tune: the mask is fixed and the kept weights continue to train.
    params = finalize(state.params, state.opt_state, method)
    fine = TrainState.create(
        apply_fn=state.apply_fn,
        params=params,
        batch_stats=state.batch_stats,
        tx=fixed_support(optax.sgd(0.01)),
    )
    for batch in batches(train, options.epochs):
        key, used = jax.random.split(key)
        fine = step(fine, batch, used)
    check_sparsity(fine.params, 0.9)

    def update(batch_stats: Any, inputs: jax.Array) -> Any:
        variables = {"params": fine.params, "batch_stats": batch_stats}
        found = Network(dropout=0.0).apply(variables, inputs, mutable=["batch_stats"])
        return found[1]["batch_stats"]

    images = (images for images, _ in batches(train, 0))
    batch_stats = recalibrate(update, fine.batch_stats, images, samples=1000)
    print(f"accuracy {accuracy(fine.params, batch_stats, test):.1f}%, exactly sparse")


if __name__ == "__main__":
    main()
