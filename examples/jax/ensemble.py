"""Train an ensemble over radii in one program, report from inside it, and export the best network.

    python examples/jax/ensemble.py

`jax.vmap` trains one network for each radius, and `jax.lax.scan` runs over the steps. The best
network is saved as a file that PyTorch can load, and converted to sparse matrices.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from digits import batches, datasets

import safe_core
from safe_core.adapters.jax.flax import save_safetensors, to_bcoo
from safe_core.adapters.optax import (
    check_sparsity,
    finalize,
    report,
    sparse_optimizer,
    value_and_gradients,
)

METHOD = safe_core.safe(0.9, penalty=0.05)


def scores_of(params: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    scores = scores_of(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()


def initial(key: jax.Array) -> Any:
    first, second = jax.random.split(key)
    return {
        "first": {"kernel": jax.random.normal(first, (64, 128)) / 8, "bias": jnp.zeros(128)},
        "second": {"kernel": jax.random.normal(second, (128, 10)) / 11, "bias": jnp.zeros(10)},
    }


def run(rho: jax.Array, data: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Train one network; return its sparse parameters and the figures of every step."""
    tx = sparse_optimizer(optax.adam(2e-3), METHOD, rho=rho)
    params = initial(jax.random.key(0))

    def step(carried: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        params, state = carried
        loss, gradients, grad_fn = value_and_gradients(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        figures = {"loss": loss, **report(params, state, METHOD).scalars()}
        return (optax.apply_updates(params, updates), state), figures

    (params, state), figures = jax.lax.scan(step, (params, tx.init(params)), data)
    return finalize(params, state, METHOD), figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"))
    options = parser.parse_args()
    train_set, (images, labels) = datasets()
    drawn = [batch for epoch in range(options.epochs) for batch in batches(train_set, epoch)]
    x, y = (jnp.stack(parts) for parts in zip(*drawn, strict=True))
    radii = jnp.asarray([0.0, 0.02, 0.05, 0.1])
    data = (x.reshape(*x.shape[:2], -1), y)
    ensemble, figures = jax.jit(jax.vmap(run, in_axes=(0, None)))(radii, data)
    scores = jax.vmap(scores_of, in_axes=(0, None))(ensemble, images.reshape(len(labels), -1))
    right = (scores.argmax(-1) == labels).mean(-1)
    for rho, share, distance in zip(radii, right, figures["distance"][:, -1], strict=True):
        print(f"rho {rho:.2f}: accuracy {100 * share:.1f}%, distance before {distance:.3f}")
    best = jax.tree.map(lambda leaf: leaf[right.argmax()], ensemble)
    check_sparsity(best, METHOD.sparsity)
    save_safetensors(best, options.out)
    matrices = to_bcoo(best)
    print(f"kept {matrices['first']['kernel'].nse + matrices['second']['kernel'].nse} weights")


if __name__ == "__main__":
    main()
