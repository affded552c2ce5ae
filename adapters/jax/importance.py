"""Importances that take derivatives of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax

from safe_core import _checks
from safe_core.importance import hutchinson

__all__ = ["hessian_diagonal"]

PyTree = Any


def hessian_diagonal(
    loss_fn: Callable[..., Any], params: PyTree, *args: Any, key: jax.Array, samples: int = 1
) -> PyTree:
    """The diagonal of the Hessian of a loss, negative entries as 0: the importance of OBD.

    Hutchinson's estimate, see `safe_core.importance.hutchinson`, with products by forward
    over reverse differentiation. For ``importance=`` of `sparse_optimizer`, which calls its
    function at dual updates, with the loss on a batch at hand.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params, *args)`` returns a scalar, twice differentiable.
    params : pytree of floating arrays
    args : optional
        Passed on to ``loss_fn``.
    key : array
        A key of `jax.random`, from which the vectors are drawn.
    samples : int
        Vectors to average over; each costs a gradient and its derivative.

    Returns
    -------
    pytree
        As ``params``, in float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``loss_fn`` is not a function or ``samples`` not a positive integer.

    References
    ----------
    LeCun et al. 1989, "Optimal Brain Damage".

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> loss = lambda params: jnp.sum(jnp.asarray([2.0, -1.0]) * params["w"] ** 2)
    >>> params = {"w": jnp.asarray([3.0, 1.0])}
    >>> hessian_diagonal(loss, params, key=jax.random.key(0))["w"].tolist()
    [4.0, 0.0]
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn)!r}")
    _checks.integer("samples", samples, low=1)
    leaves, treedef = jax.tree.leaves(params), cast(Any, jax.tree.structure(params))

    def gradient(params: PyTree) -> PyTree:
        return jax.grad(loss_fn)(params, *args)

    probes, products = [], []
    for own in jax.random.split(key, samples):
        keys = jax.random.split(own, len(leaves))
        r = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        product = jax.jvp(gradient, (params,), (treedef.unflatten(r),))[1]
        probes.append(r)
        products.append(jax.tree.leaves(product))
    by_leaf = zip(zip(*probes, strict=True), zip(*products, strict=True), strict=True)
    return treedef.unflatten([hutchinson(r, product) for r, product in by_leaf])
