"""Sassha, a second-order optimizer that seeks flat minima, as an optax transformation.

`optax.contrib.hutchinson_estimator_diag_hessian` is not used. It takes a loss, not the function
of gradients that averages over devices and micro-batches, and it draws from a key of its own, so
that no other framework could draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from safe_core import _checks
from safe_core.backends import backend_of
from safe_core.random_numbers import check_seed, rademacher
from safe_core.sassha import SasshaRule, check_number, estimates

from .arguments import gradients_by, way_to_grad_fn
from .leaves import check_arrays, check_gradient, flag_of
from .tree import NamedLeaves, is_function, is_masked, leaves_like

__all__ = ["SasshaState", "needs_product", "sassha", "summed_products"]

PyTree = Any
Schedule = Callable[[Any], Any]
Leaves = list[Any]


class SasshaState(NamedTuple):
    """State of `sassha`.

    Attributes
    ----------
    count : int32 array
        Number of steps taken.
    hessian_count : int32 array
        Number of updates of ``hessian``.
    mu : pytree
        Averages of gradients.
    hessian : pytree
        Averages of ``|z * (H z)|``, estimates of the magnitude of the Hessian diagonal.
    """

    count: jax.Array  # type: ignore[assignment]
    hessian_count: jax.Array
    mu: PyTree
    hessian: PyTree


def sassha(
    learning_rate: float | jax.Array | Schedule = 0.15,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    rho: float | jax.Array | Schedule = 0.2,
    weight_decay: float | jax.Array = 0.0,
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    hessian_interval: int = 10,
    eps: float | jax.Array = 1e-4,
    power: float | jax.Array | Schedule = 0.5,
    bias_correction: str = "corrected",
    ascent: str = "gradient",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sassha: scale by the curvature at a perturbed point, to reach flat minima.

    `safe_core.sassha.SasshaRule` writes out one step. ``update(grads, state, params,
    grad_fn=...)`` takes the gradients at ``params``, and ``grad_fn``, which maps parameters to
    gradients on the same batch. Every ``hessian_interval`` steps it differentiates ``grad_fn``
    for a Hessian product, at the point where it takes the gradient.

    Average the gradients over devices and micro-batches in ``grad_fn``, as
    `value_and_gradients` does. Its derivative is then the product of the averaged loss. Clip in
    ``grad_fn``, too: a transformation before this one sees only the gradient at ``params``.

    As the base of `sparse_optimizer` it needs ``rho=0``. The method then decides where the
    gradient and the product are taken.

    Parameters
    ----------
    learning_rate : float, array or schedule
        Applied to the weight decay, too.
    b1, b2 : float or array
        Weights of the previous averages, of the gradient and of the Hessian diagonal.
    rho : float, array or schedule
        Perturbation radius. With the number 0, ``grads`` are used as they are.
    weight_decay : float or array
        Decoupled weight decay. The published scripts divide that of a recipe by the initial
        learning rate.
    mask : pytree of bool or callable, optional
        Leaves to decay, or a function of the parameters that returns them.
    hessian_interval : int
        Steps between two Hessian products.
    eps : float or array
        Added to the denominator.
    power : float, array or schedule
        Exponent of the averaged Hessian diagonal.
    bias_correction : {"corrected", "published", "none"}
        Whether the average of the Hessian diagonal is corrected by the number of its updates, or
        by the number of steps, as in the published code. With "none", neither average is.
    ascent : {"gradient", "momentum"}
        With "momentum", perturb against the averaged gradient (M-Sassha). ``grads`` are then not
        used, and under `jax.jit` not computed.
    seed : int
        Seed of the random signs. Equal seeds draw the same in PyTorch.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        It works under `jax.jit`, `jax.lax.scan` and `jax.vmap`.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of its range, ``params`` or ``grad_fn`` is
        missing or masked, or ``rho`` is not 0 under `sparse_optimizer`.

    References
    ----------
    Shin et al. 2025, "Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable
    Hessian Approximation", arXiv 2502.18153.

    Examples
    --------
    >>> curvature = jnp.asarray([1.0, 100.0])
    >>> grad_fn = jax.grad(lambda params: (curvature * params["w"] ** 2).sum() / 2)
    >>> tx = sassha(0.5, rho=0.01, hessian_interval=5, power=1.0)
    >>> params = {"w": jnp.asarray([1.0, 1.0])}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(100):
    ...     params, state = step(params, state)
    >>> int(state.count), int(state.hessian_count), float(abs(params["w"]).max()) < 0.02
    (100, 20, True)
    """
    for name, value in (("learning_rate", learning_rate), ("rho", rho), ("power", power)):
        if not callable(value):
            check_number(name, value)
    _check_seed(seed)

    def rule_at(count: Any) -> SasshaRule:
        return SasshaRule(
            betas=(b1, b2),
            rho=rho(count) if callable(rho) else rho,
            weight_decay=weight_decay,
            hessian_interval=hessian_interval,
            eps=eps,
            power=power(count) if callable(power) else power,
            bias_correction=bias_correction,
            ascent=ascent,
        )

    rule_at(0)  # raise for a bad setting now, not at the first step

    def init(params: PyTree) -> SasshaState:
        _named(params)
        # Two arrays, because a buffer cannot be donated twice.
        count, hessian_count = (jnp.zeros((), jnp.int32) for _ in range(2))
        mu, hessian = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return SasshaState(count, hessian_count, mu, hessian)

    def update(
        updates: PyTree,
        state: SasshaState,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        hessian_product: Callable[[Leaves], Leaves] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SasshaState]:
        if params is None:
            raise ValueError("params must be passed to update(grads, state, params), got None")
        rule = rule_at(state.count)
        if hessian_product is None:
            _check_grad_fn(grad_fn, params)
        elif rule.perturbs:
            raise ValueError(
                "rho of sassha must be the number 0 under sparse_optimizer, whose method perturbs, "
                f"as safe_core.safe does, got {_checks.shown(rho)}"
            )
        tree = _named(params)
        x = [leaf for _, leaf in tree.named]
        m, d = (leaves_like("state", held, tree.treedef) for held in (state.mu, state.hessian))

        def read(argument: str, found: PyTree) -> Leaves:
            leaves = leaves_like(argument, found, tree.treedef)
            for (name, p), leaf in zip(tree.named, leaves, strict=True):
                check_gradient(argument, name, leaf, p)
            return leaves

        def gradient_at(point: Leaves) -> Leaves:
            moved = tree.treedef.unflatten(point)
            found = read("what grad_fn returns", gradients_by(grad_fn, moved))
            return [g.astype(p.dtype) for g, p in zip(found, x, strict=True)]

        point = x
        if rule.perturbs:
            e = rule.direction(m if rule.follows_momentum else read("updates", updates))
            moves = zip(x, e.perturbation(), strict=True)
            point = [(p.astype(e_i.dtype) + e_i).astype(p.dtype) for p, e_i in moves]

        def with_product(d: Leaves) -> tuple[Leaves, Leaves]:
            # Draw within the branch, so that other steps do not.
            z = rademacher(x, seed, state.hessian_count)
            if hessian_product is None:
                gradients, products = jax.jvp(gradient_at, (point,), (z,))
            else:
                products = hessian_product(z)
            if not rule.perturbs:
                gradients = read("updates", updates)
            return gradients, rule.average_curvatures(d, estimates(z, products))

        def without(d: Leaves) -> tuple[Leaves, Leaves]:
            return gradient_at(point) if rule.perturbs else read("updates", updates), d

        due = rule.needs_product(state.count)
        # Under jit this is lax.cond, so that other steps skip the product.
        gradients, d = backend_of(state.count).cond(due, with_product, without, d)
        m = rule.average_gradients(m, gradients)
        step = optax.safe_increment(state.count)
        hessian_count = state.hessian_count + jnp.asarray(due).astype(jnp.int32)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        out = []
        for decays, *parts in zip(_decayed(mask, params, tree), x, m, d, strict=True):
            of_leaf = rule if decays else replace(rule, weight_decay=0.0)
            leaf = ([part] for part in parts)
            out += of_leaf.updates(
                *leaf, learning_rate=rate, step=step, hessian_count=hessian_count
            )
        unflatten = tree.treedef.unflatten
        return unflatten(out), SasshaState(step, hessian_count, unflatten(m), unflatten(d))

    return optax.GradientTransformationExtraArgs(init, update)


def needs_product(base_state: PyTree) -> bool:
    """Return whether a base optimizer multiplies by the Hessian, which its state tells."""

    def has(node: Any) -> bool:
        return isinstance(node, SasshaState)

    return any(map(has, jax.tree.leaves(base_state, is_leaf=has)))


def summed_products(
    gradients_at: Callable[[Leaves], Leaves],
    points: Sequence[tuple[Leaves, Any]],
    vectors: Leaves,
) -> Leaves:
    """Return the sum of the products ``H v`` at the points whose flags are True."""
    total = [jnp.zeros_like(v) for v in vectors]
    for point, counts in points:
        products = jax.jvp(gradients_at, (point,), (vectors,))[1]
        total = [t + jnp.where(counts, p, 0) for t, p in zip(total, products, strict=True)]
    return total


def _named(params: PyTree) -> NamedLeaves:
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "params must not be masked, because grad_fn takes all of them: use sassha outside of "
            "masked and multi_transform, and choose what decays with mask="
        )
    tree = NamedLeaves.of(params)
    check_arrays("params", tree.named)
    return tree


def _check_grad_fn(grad_fn: Any, params: PyTree) -> None:
    if not callable(grad_fn):
        raise (ValueError if grad_fn is None else TypeError)(
            "grad_fn must be passed to update(grads, state, params, grad_fn=...), a function of "
            f"params to gradients, because sassha differentiates it, got {_checks.shown(grad_fn)}; "
            f"{way_to_grad_fn(params)}"
        )


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, jax.Array):  # as optax.inject_hyperparams makes it
        check_seed(seed)


def _decayed(mask: Any, params: PyTree, tree: NamedLeaves) -> list[bool]:
    """Return whether each leaf decays."""
    if mask is None:
        return [True] * len(tree.named)
    found = leaves_like("mask", mask(params) if is_function(mask) else mask, tree.treedef)
    return [flag_of("mask", name, flag) for name, flag in zip(tree.names, found, strict=True)]
