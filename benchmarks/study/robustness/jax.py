"""Attack models in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .pgd import PGD, check_inputs, start, step, within

__all__ = ["attacker"]

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss of each input."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def attacker(
    logits_fn: Callable[..., jax.Array], attack: PGD, *, loss: Loss = cross_entropy
) -> Callable[..., jax.Array]:
    """Return a function ``(inputs, labels, seed=0, *args) -> adversarial inputs``.

    It is compiled once for each shape of the inputs, so reuse it for all batches. The seed draws
    the starting points; give every batch a different one.

    Parameters
    ----------
    logits_fn : callable
        Maps inputs of shape (n, ...), and ``args`` such as variables, to logits (n, classes).
        The model must be in evaluation mode and normalise its inputs itself; see
        `safe_core.study.models.flax.normalised`.
    attack : PGD
    loss : callable
        Maps logits and labels to the loss of each input, (n,), which the attack increases.

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        When the returned function gets inputs out of range.

    Examples
    --------
    >>> fool = attacker(lambda x, weight: x @ weight, PGD("linf", 0.1))
    >>> x, weight = jnp.full((1, 2), 0.5, jnp.float32), jnp.eye(2, dtype=jnp.float32)
    >>> moved = fool(x, jnp.asarray([0]), 0, weight)
    >>> [round(value, 4) for value in moved[0].tolist()]
    [0.4, 0.6]
    """

    @jax.jit
    def ascend(origin: jax.Array, noise: jax.Array, labels: jax.Array, *args: Any) -> jax.Array:
        def total(x: jax.Array) -> jax.Array:
            return loss(logits_fn(x, *args), labels).sum()

        def moved(_: int, x: jax.Array) -> jax.Array:
            return step(attack, x, origin, jax.grad(total)(x), xp=jnp)

        first = within(attack, origin + noise, origin, xp=jnp)
        return jax.lax.fori_loop(0, attack.steps, moved, first)

    def attacked(inputs: Any, labels: Any, seed: int = 0, *args: Any) -> jax.Array:
        origin = jnp.asarray(inputs)
        check_inputs(attack, float(origin.min()), float(origin.max()))
        noise = jnp.asarray(start(attack, origin.shape, seed), origin.dtype)
        return ascend(origin, noise, jnp.asarray(labels), *args)

    return attacked
