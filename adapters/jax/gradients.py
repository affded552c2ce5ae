"""Compute both gradients of a step from one loss function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from safe_core import _checks
from safe_core._dtypes import wide_dtype

from .leaves import check_differentiable

__all__ = ["check_loss", "loss_and_aux", "value_and_gradients"]

PyTree = Any


def value_and_gradients(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    micro_batches: int = 1,
) -> Callable[..., tuple[Any, PyTree, Callable[[PyTree], PyTree]]]:
    """Return a function that computes the arguments of `sparse_optimizer` for a step.

    ``fn(params, *args, **kwargs)`` returns the loss, its gradient at ``params``, and
    ``grad_fn``. ``grad_fn(other_params)`` returns the gradient at other parameters with the
    same arguments: the same batch, dropout keys and batch statistics. It drops auxiliary
    outputs, so that batch statistics come from the first pass only.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params, *args, **kwargs)`` returns a scalar, the mean over a batch.
    has_aux : bool
        If True, ``loss_fn`` returns ``(loss, aux)``, and ``fn`` returns this pair as the loss.
    axis_name : str or tuple of str, optional
        Average the loss and both gradients over this axis of `jax.shard_map`, `jax.pmap` or
        `jax.vmap`. ``aux`` is not averaged.
    micro_batches : int
        Number of micro-batches for gradient accumulation. Both gradients then need the memory
        of one micro-batch. The batch is the first of ``args``, a pytree with examples along
        the first axis of every leaf, which may include dropout keys. Micro-batch i takes rows
        ``i::micro_batches``. ``aux`` gets a leading axis over micro-batches. Sums are in
        float32 or wider.

    Returns
    -------
    callable

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, or ``micro_batches`` does not divide the batch.

    Examples
    --------
    >>> import safe_core, optax
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> def loss(params, x, scale):
    ...     return scale * jnp.mean((x @ params["kernel"]) ** 2)
    >>> tx = sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5, steps=100))
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> state = tx.init(params)
    >>> value, gradients, grad_fn = value_and_gradients(loss)(params, jnp.eye(2), 2.0)
    >>> float(value), gradients["kernel"].tolist()
    (2.0, [[2.0], [2.0]])
    >>> updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
    """
    check_loss(loss_fn, has_aux)

    def plain(params: PyTree, carried: None, *args: Any, **kwargs: Any) -> Any:
        return (*loss_and_aux(loss_fn(params, *args, **kwargs), has_aux), None)

    compute = carrying_gradients(plain, axis_name=axis_name, micro_batches=micro_batches)

    def fn(
        params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, PyTree, Callable[[PyTree], PyTree]]:
        (loss, aux, _), gradients = compute(params, None, *args, **kwargs)
        grad_fn = lambda moved: compute(moved, None, *args, **kwargs)[1]  # noqa: E731
        return (loss, aux) if has_aux else loss, gradients, grad_fn

    return fn


def carrying_gradients(
    loss_fn: Callable[..., Any], *, axis_name: Any, micro_batches: int
) -> Callable[..., tuple[tuple[Any, Any, Any], PyTree]]:
    """Differentiate ``loss_fn(params, carried, *args, **kwargs) -> (loss, aux, carried)``.

    Each micro-batch gets ``carried`` from the one before, and the last one's is returned.
    Its floating arrays are averaged over the devices of an axis.
    """
    _checks.integer("micro_batches", micro_batches, low=1)

    def split_aux(params: PyTree, carried: Any, *args: Any, **kwargs: Any) -> Any:
        loss, aux, carried = loss_fn(params, carried, *args, **kwargs)
        check_scalar(loss)
        return loss, (aux, carried)

    differentiate = jax.value_and_grad(split_aux, has_aux=True)

    def whole(
        params: PyTree, carried: Any, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, Any, Any], PyTree]:
        check_differentiable("params", params)
        params = _varying(params, axis_name)
        (loss, (aux, carried)), gradients = differentiate(params, carried, *args, **kwargs)
        loss, gradients, carried = _averaged((loss, gradients, carried), axis_name)
        return (loss, aux, carried), gradients

    def in_parts(
        params: PyTree, carried: Any, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, Any, Any], PyTree]:
        if not args:
            raise TypeError("batch must be the first argument after params, got no argument")
        check_differentiable("params", params)
        batch, *args = args  # type: ignore[assignment]
        parts = jax.tree.map(lambda x: _cut(x, micro_batches), batch)

        def add(held: tuple[PyTree, Any], part: PyTree) -> tuple[tuple[PyTree, Any], Any]:
            sums, carried = held
            (loss, aux, carried), gradients = whole(params, carried, part, *args, **kwargs)
            sums = jax.tree.map(lambda a, g: a + g.astype(a.dtype), sums, gradients)
            return (sums, carried), (loss, aux)

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(jnp, [p])), params)
        (sums, carried), (losses, aux) = jax.lax.scan(add, (zeros, carried), parts)
        gradients = jax.tree.map(lambda a, p: (a / micro_batches).astype(p.dtype), sums, params)
        return (losses.mean(), aux, carried), gradients

    return whole if micro_batches == 1 else in_parts


def _averaged(tree: PyTree, axis_name: Any) -> PyTree:
    """Return the mean of every floating array over an axis."""
    if axis_name is None:
        return tree

    def mean(x: Any) -> Any:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.lax.pmean(x, axis_name) if floating else x  # type: ignore[no-untyped-call]

    return jax.tree.map(mean, tree)


def check_loss(loss_fn: Any, has_aux: Any) -> None:
    """Raise if ``loss_fn`` is not a function or ``has_aux`` is not a bool."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn)!r}")
    if not isinstance(has_aux, bool):
        raise TypeError(f"has_aux must be True or False, got {has_aux!r}")


def loss_and_aux(found: Any, has_aux: bool) -> tuple[Any, Any]:
    """Return the loss and the auxiliary output of what ``loss_fn`` returned."""
    if not has_aux:
        return found, None
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(
            f"loss_fn must return a pair (loss, aux) with has_aux=True, got {_checks.shown(found)}"
        )
    return found[0], found[1]


def check_scalar(loss: Any) -> None:
    """Raise unless a loss is a scalar, which has a gradient."""
    if isinstance(loss, (tuple, list, dict)):
        raise TypeError(
            "loss_fn must return a scalar, or with has_aux=True a pair (loss, aux), got "
            f"{type(loss).__name__}"
        )
    if jnp.shape(loss) != ():
        raise TypeError(
            f"loss_fn must return a scalar, such as a mean, got shape {jnp.shape(loss)}"
        )


def _varying(params: PyTree, axis_name: Any) -> PyTree:
    """Mark parameters as varying between devices.

    The gradient with respect to a value that all devices of a `jax.shard_map` share is already
    summed over them. Averaging this sum would leave a gradient that is too large.
    """
    if axis_name is None:
        return params
    names = set(axis_name if isinstance(axis_name, tuple) else (axis_name,))

    def cast(x: Any) -> Any:
        kind = jax.typeof(x)
        # The attribute's name depends on the version of JAX.
        held = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
        missing = tuple((names & set(kind.sharding.mesh.manual_axes)) - set(held))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, params)


def _cut(x: Any, parts: int) -> Any:
    if jnp.shape(x)[:1] == () or x.shape[0] % parts:
        raise ValueError(
            f"micro_batches must divide the first axis of every array of the batch, got {parts} "
            f"and shape {jnp.shape(x)}"
        )
    # Take every n-th row, so that a micro-batch of a sharded batch uses all devices.
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
