"""Flax NNX: `sparse_optimizer` inside an `nnx.Optimizer`.

python examples/jax/nnx_module.py
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import optax
from digits import batches, datasets
from flax import nnx

import safe_core
from safe_core.adapters.jax.flax import nnx_finalize, nnx_recalibrate, nnx_value_and_gradients
from safe_core.adapters.optax import check_sparsity, sparse_optimizer


class Network(nnx.Module):
    """Two dense layers with batch normalisation and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1))))
        return self.second(self.dropout(x))


def loss_fn(model: Network, batch: Any) -> jax.Array:
    scores = model(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()


@nnx.jit
def step(model: Network, optimizer: nnx.Optimizer[Network], batch: Any) -> jax.Array:
    loss, gradients, grad_fn = nnx_value_and_gradients(loss_fn)(model, batch)
    optimizer.update(model, gradients, grad_fn=grad_fn)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    train, test = datasets()
    steps = options.epochs * (len(train[1]) // 64)
    method = safe_core.safe(0.9, steps=steps)
    model = Network(nnx.Rngs(0))
    tx = sparse_optimizer(optax.sgd(0.05, momentum=0.9), method)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for epoch in range(options.epochs):
        for batch in batches(train, epoch):
            step(model, optimizer, batch)
    nnx_finalize(model, optimizer, method)
    check_sparsity(nnx.state(model, nnx.Param), 0.9)
    images = (images for images, _ in batches(train, 0))
    nnx_recalibrate(model, lambda model, images: model(images), images, samples=1000)
    model.eval()
    right = (model(test[0]).argmax(-1) == test[1]).mean()
    print(f"accuracy {100 * float(right):.1f}%, exactly sparse")


if __name__ == "__main__":
    main()
