"""Train with both gradients in Flax Linen and NNX, and recalibrate batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

from safe_core import Method, _checks
from safe_core._dtypes import wide_dtype

from ..evaluation import LAST
from ..gradients import carrying_gradients, check_loss, loss_and_aux
from ..transform import finalize
from ..weights import name_of

__all__ = [
    "SparseTrainState",
    "nnx_finalize",
    "nnx_recalibrate",
    "nnx_value_and_gradients",
    "recalibrate",
]

PyTree = Any


class SparseTrainState(TrainState):  # type: ignore[no-untyped-call]
    """A `flax.training.train_state.TrainState` whose ``apply_gradients`` takes ``grad_fn``.

    Examples
    --------
    >>> import optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> from safe_core.adapters.jax.gradients import value_and_gradients
    >>> tx = sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5, steps=100))
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> state = SparseTrainState.create(apply_fn=jnp.matmul, params=params, tx=tx)
    >>> def loss(params, x):
    ...     return jnp.mean(state.apply_fn(x, params["kernel"]) ** 2)
    >>> _, grads, grad_fn = value_and_gradients(loss)(state.params, jnp.eye(2))
    >>> int(state.apply_gradients(grads=grads, grad_fn=grad_fn).step)
    1
    """

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        update_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> SparseTrainState:
        """Take a step, and replace the attributes in ``kwargs``.

        ``grads`` and ``grad_fn`` are as for ``update`` of `sparse_optimizer`, which raises if
        the method perturbs and ``grad_fn`` is None. Pass other arguments of the optimizer's
        ``update``, such as ``value``, in ``update_args``. Statistics of Flax's fp8 layers come
        from the first pass.
        """
        passed = dict(update_args or {})
        if grad_fn is not None:
            passed["grad_fn"] = self._of_weights(grad_fn, grads)
        # Flax's `apply_gradients` passes no extra arguments to the optimizer, so bind them.
        bound = self.replace(tx=self.tx._replace(update=partial(self.tx.update, **passed)))
        step = cast(Any, super(SparseTrainState, bound)).apply_gradients
        return step(grads=grads, **kwargs).replace(tx=self.tx)

    def _of_weights(self, grad_fn: Callable[[PyTree], PyTree], grads: PyTree) -> Any:
        """Return ``grad_fn`` for the part of the parameters that the optimizer updates.

        With fp8 layers, Flax passes it only ``params``, and overwrites the fp8 statistics by
        their gradients.
        """
        if OVERWRITE_WITH_GRADIENT not in grads:
            return grad_fn
        return lambda moved: grad_fn({**self.params, "params": moved})["params"]


def nnx_value_and_gradients(
    loss_fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    axis_name: Any = None,
    micro_batches: int = 1,
) -> Callable[..., tuple[Any, PyTree, Callable[[PyTree], PyTree]]]:
    """Return `value_and_gradients` for a loss of an NNX module; call it under `nnx.jit`.

    ``fn(model, *args, **kwargs)`` returns the loss and the arguments of
    ``optimizer.update(model, gradients, grad_fn=grad_fn)`` of an `nnx.Optimizer`. Batch
    statistics and the counts of random streams come from the first pass; the second pass
    draws the same dropout masks. Values that a pass sows into the module are dropped, so
    return them from ``loss_fn``.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(model, *args, **kwargs)`` returns a scalar.
    wrt : filter
        Variables to differentiate with respect to, the same as for the optimizer.
    has_aux : bool
        If True, ``loss_fn`` returns ``(loss, aux)``, and ``fn`` returns this pair as the loss.
    axis_name, micro_batches : optional
        As for `value_and_gradients`. Batch statistics are averaged over the axis, too, and
        each micro-batch continues from those of the one before.

    Returns
    -------
    callable

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, or ``micro_batches`` does not divide the batch.

    Examples
    --------
    >>> import optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> tx = sparse_optimizer(optax.sgd(0.1), safe_core.safe(0.5, steps=100))
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
    _checks.integer("micro_batches", micro_batches, low=1)

    def fn(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Callable[[PyTree], PyTree]]:
        graph, params, rest = nnx.split(model, wrt, ...)  # type: ignore[misc]
        known = {path for path, _ in nnx.to_flat_state(rest)}

        def loss(params: PyTree, rest: PyTree, *args: Any, **kwargs: Any) -> Any:
            module = nnx.merge(graph, params, rest)
            value, aux = loss_and_aux(loss_fn(module, *args, **kwargs), has_aux)
            held = nnx.to_flat_state(nnx.split(module, wrt, ...)[2])  # type: ignore[misc]
            kept = [(path, leaf) for path, leaf in held if path in known]
            return value, aux, nnx.as_pure(nnx.from_flat_state(kept))

        compute = carrying_gradients(loss, axis_name=axis_name, micro_batches=micro_batches)
        # Plain arrays: a pass would write to variables, and the second must start as the first.
        before = nnx.as_pure(rest)
        (value, aux, after), gradients = compute(params, before, *args, **kwargs)
        nnx.update(model, after)

        def grad_fn(moved: PyTree) -> PyTree:
            return nnx.as_pure(compute(moved, before, *args, **kwargs)[1])

        return (value, aux) if has_aux else value, gradients, grad_fn

    return fn


def recalibrate(
    update_fn: Callable[[PyTree, Any], PyTree],
    statistics: PyTree,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
) -> PyTree:
    """Recompute the running statistics of batch normalisation after `finalize`.

    Pruning shifts the activations, so the old statistics no longer fit. This returns the
    averages over ``batches``, weighted by batch size. It supports layers that average
    exponentially, ``new = momentum * old + (1 - momentum) * batch``, with any momentum below
    1, which need not be known.

    Parameters
    ----------
    update_fn : callable
        ``update_fn(statistics, batch)`` returns the statistics after a forward pass in
        training mode; it is compiled. In Flax Linen it is ``model.apply({"params": params,
        "batch_stats": statistics}, batch, mutable=["batch_stats"])[1]["batch_stats"]``.
    statistics : pytree of arrays
        The current statistics, for their shapes. Integer arrays, such as counters, are kept.
    batches : iterable of pytrees
        Batches whose leaves have examples along their first axis.
    samples : int, optional
        Stop after the batch that reaches this number of examples. The default uses all
        batches.

    Returns
    -------
    pytree
        The new statistics.

    Raises
    ------
    TypeError, ValueError
        If ``samples`` is not a positive integer, ``batches`` is empty, or the statistics do not
        change with the batch.

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

    leaves, treedef = jax.tree.leaves(statistics), cast(Any, jax.tree.structure(statistics))
    averaged = [jnp.issubdtype(s.dtype, jnp.floating) for s in leaves]

    def filled(values: Iterable[Any]) -> PyTree:
        """Return the statistics with ``values`` in place of the averages."""
        found = zip(leaves, averaged, values, strict=True)
        return treedef.unflatten([value if flag else s for s, flag, value in found])

    def after(value: float, batch: Any) -> PyTree:
        """Return the statistics after a batch, if every average starts at ``value``."""
        return update_fn(filled(jnp.full_like(s, value) for s in leaves), batch)

    @jax.jit
    def of_batch(batch: Any) -> PyTree:
        """Return the statistics of a batch alone.

        The momentum m of a layer is not known here. Two updates from zero give two equations
        for m and the batch's own average b.
        """
        low = jax.tree.leaves(after(0.0, batch))  # (1 - m) b
        high = jax.tree.leaves(update_fn(filled(low), batch))  # (1 + m) (1 - m) b
        found = zip(averaged, low, high, strict=True)
        return treedef.unflatten([_unaveraged(a, b) if flag else a for flag, a, b in found])

    @jax.jit
    def follow(batch: Any) -> PyTree:
        """Return whether each array of the statistics changes with a batch.

        In evaluation mode 0 would stay 0 and 1 would stay 1.
        """
        ends = zip(averaged, *(jax.tree.leaves(after(v, batch)) for v in (0.0, 1.0)), strict=True)
        return treedef.unflatten(
            [~(jnp.all(a == 0) & jnp.all(b == 1)) if flag else True for flag, a, b in ends]
        )

    total: PyTree = jax.tree.map(
        lambda s: jnp.zeros_like(s, dtype=wide_dtype(jnp, [s])), statistics
    )
    seen = 0
    for batch in batches:
        if seen == 0:
            _check_follows(follow(batch))
        rows = jnp.shape(jax.tree.leaves(batch)[0])[:1]
        if not rows:
            raise ValueError(
                "batches must hold arrays with the examples along their first axis, got a scalar"
            )
        count = rows[0]
        total = jax.tree.map(lambda a, b, n=count: a + n * b, total, of_batch(batch))
        seen += count
        if samples is not None and seen >= samples:
            break
    if seen == 0:
        raise ValueError("batches must not be empty, got none")
    mean = jax.tree.map(lambda a, s: (a / seen).astype(s.dtype), total, statistics)
    return filled(jax.tree.leaves(mean))


def nnx_finalize(model: Any, optimizer: Any, method: Method, *, importance: Any = LAST) -> None:
    """Project the weights of an NNX module in place after the last step, as `finalize` does.

    Parameters
    ----------
    model : nnx.Module
    optimizer : nnx.Optimizer
        The optimizer that trained ``model``, made with a transformation of `sparse_optimizer`.
    method : Method
        The method of the run.
    importance : optional
        As for `finalize`.

    Raises
    ------
    TypeError, ValueError
        As `finalize`, or if ``optimizer`` is not an `nnx.Optimizer`.

    Warns
    -----
    safe_core.FinalizeWarning
        As `finalize`.

    Examples
    --------
    >>> import optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> model, method = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), safe_core.baselines.magnitude(0.75)
    >>> optimizer = nnx.Optimizer(model, sparse_optimizer(optax.sgd(0.1), method), wrt=nnx.Param)
    >>> nnx_finalize(model, optimizer, method)
    >>> int((model.kernel[...] != 0).sum())
    2
    """
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(f"optimizer must be an nnx.Optimizer, got {type(optimizer)!r}")
    weights = nnx.as_pure(nnx.state(model, optimizer.wrt))
    state = nnx.as_pure(optimizer.opt_state)
    nnx.update(model, finalize(weights, state, method, importance=importance))


def nnx_recalibrate(
    model: Any,
    forward: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    *,
    samples: int | None = None,
) -> None:
    """Recompute the batch statistics of an NNX module in-place, as `recalibrate` does.

    Parameters
    ----------
    model : nnx.Module
        A module in training mode, set by ``model.train()``. Only its batch statistics change.
    forward : callable
        ``forward(model, batch)`` runs a forward pass. Its result is not used.
    batches : iterable of pytrees
        Batches whose leaves have examples along their first axis.
    samples : int, optional
        As for `recalibrate`.

    Raises
    ------
    TypeError, ValueError
        As for `recalibrate`, and if ``model`` has no batch statistics.

    Examples
    --------
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> batches = [jnp.ones((4, 2), jnp.float32), jnp.zeros((4, 2), jnp.float32)]
    >>> nnx_recalibrate(model, lambda model, x: model(x), batches)
    >>> model.mean[...].round(4).tolist()
    [0.5, 0.5]
    """
    graph, found, rest = nnx.split(model, nnx.BatchStat, ...)  # type: ignore[misc]
    statistics, others = nnx.as_pure(found), nnx.as_pure(rest)
    if not jax.tree.leaves(statistics):
        raise ValueError(f"model must have batch statistics, got {type(model)!r} without any")

    def update(statistics: PyTree, batch: Any) -> PyTree:
        module = nnx.merge(graph, statistics, others)
        forward(module, batch)
        return nnx.as_pure(nnx.state(module, nnx.BatchStat))

    nnx.update(model, recalibrate(update, statistics, batches, samples=samples))


def _unaveraged(low: jax.Array, high: jax.Array) -> jax.Array:
    """Solve ``low = (1 - m) b`` and ``high = (1 + m) low`` for b.

    m is the same for all entries, so the largest one gives it with the least rounding error.
    """
    low, high = (a.astype(wide_dtype(jnp, [a])) for a in (low, high))
    place = jnp.argmax(jnp.abs(low))
    a, b = low.ravel()[place], high.ravel()[place]
    momentum = jnp.where(a == 0, 0.0, (b - a) / jnp.where(a == 0, 1.0, a))
    return low / (1 - momentum)


def _check_follows(follows: PyTree) -> None:
    for path, flag in jax.tree_util.tree_leaves_with_path(follows):
        if not flag:
            name = name_of(path)
            raise ValueError(
                f"update_fn must average {name} with a batch, got what it was given, unchanged: "
                "is the model in training mode?"
            )
