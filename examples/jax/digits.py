"""Data and network of the examples: scikit-learn's digits and a small convolutional network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

SPLIT = 1257
Batch = tuple[jax.Array, jax.Array]


def datasets() -> tuple[Batch, Batch]:
    """Return the training and the test set: images of 8 by 8 in one channel, and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = (images[order] / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    y = labels[order].astype(np.int32)
    first, second = (x[:SPLIT], y[:SPLIT]), (x[SPLIT:], y[SPLIT:])
    return jax.tree.map(jnp.asarray, first), jax.tree.map(jnp.asarray, second)


def batches(data: Batch, epoch: int, size: int = 64) -> Iterator[Batch]:
    """Yield shuffled batches of equal size; the epoch number is the random seed."""
    order = np.random.default_rng(epoch).permutation(len(data[1]))
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield data[0][rows], data[1][rows]


class Network(nn.Module):
    """Two convolutions with batch normalisation, followed by two dense layers."""

    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for width, stride in ((16, 1), (32, 2)):
            x = nn.Conv(width, (3, 3), strides=stride)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def loss_fn(params: Any, batch: Batch, batch_stats: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    """Return the mean cross entropy and the updated batch statistics."""
    scores, new = Network().apply(
        {"params": params, "batch_stats": batch_stats},
        batch[0],
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()
    return loss, new["batch_stats"]


def accuracy(params: Any, batch_stats: Any, data: Batch) -> float:
    """Return the accuracy in percent."""
    scores = Network().apply({"params": params, "batch_stats": batch_stats}, data[0], train=False)
    return 100 * float((scores.argmax(-1) == data[1]).mean())
