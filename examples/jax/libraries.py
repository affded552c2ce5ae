"""Equinox and Haiku: one training loop for the arrays of a module and the parameters of a function.

python examples/jax/libraries.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import optax
from digits import batches, datasets

import safe_core
from safe_core.adapters.optax import (
    check_sparsity,
    finalize,
    sparse_optimizer,
    value_and_gradients,
)


def train(apply: Callable[..., jax.Array], params: Any, epochs: int) -> tuple[Any, float]:
    """Train to 2:4 sparsity; return the parameters and the test accuracy."""
    train_set, test_set = datasets()
    steps = epochs * (len(train_set[1]) // 64)
    method = safe_core.safe("2:4", steps=steps)
    tx = sparse_optimizer(optax.adam(2e-3), method)
    state = tx.init(params)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        scores = apply(params, batch[0].reshape(len(batch[1]), -1))
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        _, gradients, grad_fn = value_and_gradients(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    for epoch in range(epochs):
        for batch in batches(train_set, epoch):
            params, state = step(params, state, batch)
    params = finalize(params, state, method)
    check_sparsity(params, "2:4")
    scores = apply(params, test_set[0].reshape(len(test_set[1]), -1))
    return params, 100 * float((scores.argmax(-1) == test_set[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    model = eqx.nn.MLP(64, 10, 128, depth=1, key=jax.random.key(0))
    weights, static = eqx.partition(model, eqx.is_inexact_array)
    _, accuracy = train(lambda w, x: jax.vmap(eqx.combine(w, static))(x), weights, epochs)
    print(f"Equinox: accuracy {accuracy:.1f}%, exactly sparse")

    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([128, 10])(x)))
    weights = network.init(jax.random.key(0), jax.numpy.ones((1, 64)))
    _, accuracy = train(network.apply, weights, epochs)
    print(f"Haiku: accuracy {accuracy:.1f}%, exactly sparse")


if __name__ == "__main__":
    main()
