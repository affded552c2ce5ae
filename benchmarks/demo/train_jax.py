"""Train the demo's network in JAX, with Flax and optax."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from safe_core.adapters.optax import finalize, sparse_optimizer

from .data import Dataset, Layer
from .recipe import CHOSEN, Recipe, Run

__all__ = ["hessian_product", "train"]


class Network(nn.Module):
    """Dense layers with ReLU between them."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, size in enumerate(self.sizes):
            x = nn.Dense(size)(nn.relu(x) if i else x)
        return x


def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross entropy of the network."""
    biases = [layer["bias"] for _, layer in sorted(params["params"].items())]
    scores = Network(tuple(b.size for b in biases)).apply(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def train(
    recipe: Recipe, run: Run, data: Dataset, layers: list[Layer], device: str
) -> tuple[list[Layer], list[Layer]]:
    """Train a network; return its layers before and after the final projection."""
    # One program serves every penalty, which is traced. The rise of GMP is static.
    setting = 1.0 if _is_penalised(run) else run.setting
    kind = Run(run.method, noise=0.0, seed=0, sparsity=run.sparsity, setting=setting)
    with jax.default_device(jax.devices(device)[0]):
        fit = compiled_training(recipe, kind, len(data.order))
        arrays = (data.inputs, data.labels.astype(np.int32), data.order)
        trained, projected = fit(build_params(layers), run.setting or 0.0, *arrays)
        return read_layers(trained), read_layers(projected)


def _is_penalised(run: Run) -> bool:
    return CHOSEN.get(run.method) == "penalty"


@cache
def compiled_training(recipe: Recipe, kind: Run, steps: int) -> Callable[..., Any]:
    """Return one compiled program for all steps of a run, for any seed and penalty."""
    per_epoch = steps // recipe.epochs
    rates = np.asarray([recipe.learning_rate_at(step, per_epoch) for step in range(steps)])
    base = optax.chain(
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(lambda step: jnp.asarray(rates, jnp.float32)[step], momentum=recipe.momentum),
    )

    @partial(jax.jit, donate_argnums=0)
    def fit(params: Any, penalty: Any, inputs: Any, labels: Any, order: Any) -> Any:
        tx: optax.GradientTransformation = base
        if kind.sparsity is not None:
            method = recipe.method(kind, steps)
            scaled = lambda step: penalty * method.constraint.penalty(step)  # noqa: E731
            schedule = scaled if _is_penalised(kind) else None
            tx = sparse_optimizer(base, method, penalty=schedule)
        tx = optax.with_extra_args_support(tx)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry

            def grad_fn(params: Any, rows: Any = batch) -> Any:
                return jax.grad(loss_fn)(params, inputs[rows], labels[rows])

            first = grad_fn(params, batch[: round(recipe.ascent_share * len(batch))])
            updates, state = tx.update(first, state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), order)
        if kind.sparsity is None:
            return params, params
        return params, finalize(params, state, method)

    return fit


def build_params(layers: list[Layer]) -> Any:
    """Return Flax variables with the given layers; Flax stores kernels as (input, output)."""
    return {
        "params": {
            f"Dense_{i}": {"kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}
            for i, (weight, bias) in enumerate(layers)
        }
    }


def read_layers(params: Any) -> list[Layer]:
    """Return the layers of the network as NumPy arrays."""
    layers = [layer for _, layer in sorted(params["params"].items())]
    return [Layer(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]


@jax.jit
def _product(flat: Any, v: Any, like: Any, inputs: Any, labels: Any) -> Any:
    unravel = ravel_pytree(like)[1]
    gradient = jax.grad(lambda flat: loss_fn(unravel(flat), inputs, labels))
    return jax.jvp(gradient, (flat,), (v,))[1]


def hessian_product(
    layers: list[Layer], data: Dataset, device: str
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return ``v -> H v``, where H is the Hessian of the training loss."""
    with jax.default_device(jax.devices(device)[0]):
        params = build_params(layers)
        flat = ravel_pytree(params)[0]
        inputs, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels.astype(np.int32))

    def product(v: NDArray[np.float32]) -> NDArray[np.float32]:
        along = np.asarray(v, np.float32).reshape(-1)
        return np.asarray(_product(flat, along, params, inputs, labels))

    return product
