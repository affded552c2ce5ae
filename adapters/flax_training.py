"""Flax: train states and NNX optimizers that pass both gradients, and batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

from safe_core import _checks
from safe_core._dtypes import wide_dtype

from .optax_gradients import check_loss

__all__ = ["SparseTrainState", "nnx_value_and_gradients", "recalibrate"]

PyTree = Any


class SparseTrainState(TrainState):  # type: ignore[no-untyped-call]
    """A `flax.training.train_state.TrainState` whose ``apply_gradients`` takes ``grad_fn``.

    Examples
    --------
    >>> import safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> from safe_core.adapters.optax_gradients import value_and_gradients
    >>> tx = sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5))
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> state = SparseTrainState.create(apply_fn=jnp.matmul, params=params, tx=tx)
    >>> def loss(params, x):
    ...     return jnp.mean(state.apply_fn(x, params["kernel"]) ** 2)
    >>> _, grads, grad_fn = value_and_gradients(loss)(state.params, jnp.eye(2))
    >>> int(state.apply_gradients(grads=grads, grad_fn=grad_fn).step)
    1
    """

    def apply_gradients(
        self, *, grads: PyTree, grad_fn: Callable[[PyTree], PyTree] | None = None, **kwargs: Any
    ) -> SparseTrainState:
        """Take a step, and replace the attributes in ``kwargs``.

        ``grads`` and ``grad_fn`` are as for ``update`` of `sparse_optimizer`, which raises
        where the method perturbs and ``grad_fn`` is None.
        """
        extra = {} if grad_fn is None else {"grad_fn": grad_fn}
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **kwargs,
        )


def nnx_value_and_gradients(
    loss_fn: Callable[..., Any], *, wrt: Any = nnx.Param, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree, Callable[[PyTree], PyTree]]]:
    """`value_and_gradients` for a loss of an NNX module, to be called under `nnx.jit`.

    ``fn(model, *args)`` returns what ``optimizer.update(model, gradients, grad_fn=grad_fn)`` of
    an `nnx.Optimizer` takes. Batch statistics and the counts of random streams are those of
    the first pass; the second draws the same dropout masks.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(model, *args)`` returns a scalar.
    wrt : filter
        What to differentiate by, as of the optimizer.
    has_aux : bool
        ``loss_fn`` returns ``(loss, aux)``, and so does the value.

    Returns
    -------
    callable

    Raises
    ------
    TypeError
        If ``loss_fn`` is no function or ``has_aux`` not a bool.

    Examples
    --------
    >>> import safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> tx = sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, x):
    ...     loss = lambda model, x: jnp.mean(model(x) ** 2)
    ...     value, gradients, grad_fn = nnx_value_and_gradients(loss)(model, x)
    ...     optimizer.update(model, gradients, grad_fn=grad_fn)
    ...     return value
    >>> float(step(model, optimizer, jnp.zeros((3, 4))))
    0.0
    """
    check_loss(loss_fn, has_aux)
    differentiate = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=has_aux)

    def fn(model: Any, *args: Any) -> tuple[Any, PyTree, Callable[[PyTree], PyTree]]:
        graph, _, rest = nnx.split(model, wrt, ...)  # type: ignore[misc]
        before = nnx.as_pure(rest)  # arrays, which the first pass cannot write to

        def grad_fn(params: PyTree) -> PyTree:
            return nnx.as_pure(differentiate(nnx.merge(graph, params, before), *args)[1])

        value, gradients = differentiate(model, *args)
        return value, gradients, grad_fn

    return fn


def recalibrate(
    update_fn: Callable[[PyTree, Any], PyTree],
    statistics: PyTree,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
) -> PyTree:
    """Estimate the running statistics of batch normalisation anew, after `finalize`.

    Pruning shifts the activations, and the statistics gathered before do not fit them any
    more. Returned are the averages over ``batches``, weighted by their sizes, for layers that
    average exponentially, ``new = momentum * old + (1 - momentum) * batch`` with any
    momentum below 1.

    Parameters
    ----------
    update_fn : callable
        ``update_fn(statistics, batch)`` returns the statistics after a forward pass in
        training mode. In Flax Linen ``model.apply({"params": params, "batch_stats":
        statistics}, batch, mutable=["batch_stats"])[1]["batch_stats"]``. It is compiled.
    statistics : pytree of arrays
        The present ones, for their shapes.
    batches : iterable of pytrees
        Each leaf with the examples along its first axis.
    samples : int, optional
        Stop after the batch with which this number of examples is reached; by default after
        the last batch.

    Returns
    -------
    pytree
        As ``statistics``.

    Raises
    ------
    TypeError, ValueError
        If ``samples`` is not a positive integer, there is no batch, or the statistics do not
        follow the batch.

    References
    ----------
    Lee et al. 2025, section 5.1 and appendix F.2 (batch-norm tuning, with 10000 samples).

    Examples
    --------
    >>> update = lambda old, x: {"mean": 0.9 * old["mean"] + 0.1 * x.mean(0)}
    >>> found = recalibrate(update, {"mean": jnp.zeros(2)}, [jnp.ones((4, 2)), jnp.zeros((4, 2))])
    >>> found["mean"].round(4).tolist()
    [0.5, 0.5]
    """
    if samples is not None:
        _checks.integer("samples", samples, low=1)

    def after(value: float, batch: Any) -> PyTree:
        """The statistics after a batch, of ones that begin with one value."""
        return update_fn(jax.tree.map(lambda s: jnp.full_like(s, value), statistics), batch)

    @jax.jit
    def of_batch(batch: Any) -> PyTree:
        """The statistics of a batch alone."""
        low = after(0.0, batch)  # (1 - m) b
        return jax.tree.map(_unaveraged, low, update_fn(low, batch))  # (1 + m) (1 - m) b

    @jax.jit
    def follow(batch: Any) -> PyTree:
        """Whether each array of the statistics follows a batch."""
        same = lambda a, b: ~(jnp.all(a == 0) & jnp.all(b == 1))  # noqa: E731
        return jax.tree.map(same, after(0.0, batch), after(1.0, batch))

    total: PyTree = jax.tree.map(
        lambda s: jnp.zeros_like(s, dtype=wide_dtype(jnp, [s])), statistics
    )
    seen = 0
    for batch in batches:
        if seen == 0:
            _check_follows(follow(batch))
        rows = jnp.shape(jax.tree.leaves(batch)[0])[:1]
        if not rows:
            raise ValueError("batches must hold arrays with the examples along their first axis")
        count = rows[0]
        total = jax.tree.map(lambda a, b, n=count: a + n * b, total, of_batch(batch))
        seen += count
        if samples is not None and seen >= samples:
            break
    if seen == 0:
        raise ValueError("batches must not be empty, got none")
    return jax.tree.map(lambda a, s: (a / seen).astype(s.dtype), total, statistics)


def _unaveraged(low: jax.Array, high: jax.Array) -> jax.Array:
    """b of ``low = (1 - m) b`` and ``high = (1 + m) low``, by the largest entry's m."""
    low, high = (a.astype(wide_dtype(jnp, [a])) for a in (low, high))
    place = jnp.argmax(jnp.abs(low))
    a, b = low.ravel()[place], high.ravel()[place]
    momentum = jnp.where(a == 0, 0.0, (b - a) / jnp.where(a == 0, 1.0, a))
    return low / (1 - momentum)


def _check_follows(follows: PyTree) -> None:
    for path, flag in jax.tree_util.tree_leaves_with_path(follows):
        if not flag:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"update_fn must average {name} with a batch, got what it was given: is the model "
                "in training mode?"
            )
