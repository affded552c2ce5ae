"""Project parameters as at the end of training: for `finalize`, and during training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from safe_core import Method, _checks
from safe_core.backends import selecting_on_host
from safe_core.backends.jax import as_program
from safe_core.finalization import Finalized, describe, measure
from safe_core.projection import apply_support

from .importance import placed
from .nnx_trees import as_pure
from .state import (
    Layouts,
    SparseOptimizerState,
    check_layout,
    find_state,
    split_of,
    trained_tree,
)
from .tree import SparseTree

__all__ = ["LAST", "FinalProjection", "final_projection", "last_metric", "sparse_weights"]

LAST = "last"
PyTree = Any


def sparse_weights(
    params: PyTree,
    state: PyTree,
    method: Method,
    *,
    importance: Any = LAST,
    layout: Layouts = None,
    select_on_host: bool = False,
) -> PyTree:
    """Return the projected parameters, ``proj(x)``, to evaluate or save them during training.

    The values are those of `finalize`, which also warns if training ended too early or far from
    the constraint. Train on with ``params`` and not with the result. Buffers such as batch
    statistics are those of x.

    Parameters
    ----------
    params, state, method, importance, layout, select_on_host
        As for `finalize`. The sparsity is the final one of a schedule.

    Returns
    -------
    pytree
        The projected ``params``, exactly sparse. The function works under `jax.jit` and
        `jax.vmap`.

    Raises
    ------
    TypeError, ValueError
        As `finalize`.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> method = safe_core.admm(0.5, steps=640)
    >>> params = {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 2.0]])}
    >>> state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    >>> sparse_weights(params, state, method)["kernel"].tolist()
    [[0.0, 4.0], [3.0, 0.0]]
    """
    found = final_projection(params, state, method, importance, layout, select_on_host)
    found.describe()  # refuses NaN and infinity
    return found.result()


class FinalProjection(NamedTuple):
    """A final projection before it is applied.

    Attributes
    ----------
    tree : SparseTree
    leaves : list of arrays
        All leaves of the parameters.
    support : list of bool arrays
        Support of the sparse leaves.
    step : int32 scalar
        Number of steps taken.
    treedef
        Structure of the parameters as they were passed, which may hold variables of NNX.
    """

    tree: SparseTree
    leaves: list[Any]
    support: list[Any]
    step: Any
    treedef: Any

    @property
    def values(self) -> list[Any]:
        """The sparse leaves."""
        return [self.leaves[i] for i in self.tree.indices]

    def result(self) -> PyTree:
        """Return the projected parameters, in the structure that was passed."""
        found = self.tree.replaced(self.leaves, apply_support(self.values, self.support))
        return self.treedef.unflatten(jax.tree.leaves(found))

    def describe(self) -> Finalized | None:
        """Return what the projection removes, or None if traced; refuse NaN and infinity."""
        values = self.values
        if any(isinstance(x, jax.core.Tracer) for x in (self.step, *values, *self.support)):
            return None
        # Leaves of one shape and dtype share a program.
        pairs = zip(values, self.support, strict=True)
        numbers = [as_program(measure, (), x, kept) for x, kept in pairs]
        steps, read = jax.device_get((self.step, numbers))
        return describe(int(steps), self.tree.info.names, [x.size for x in values], read)


def final_projection(
    params: PyTree,
    state: PyTree,
    method: Method,
    importance: Any,
    layout: Layouts,
    select_on_host: bool,
) -> FinalProjection:
    """Return the projection of `finalize`, after all checks that tracing allows."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    _checks.flag("select_on_host", select_on_host)
    given = jax.tree.structure(params)
    params, ours = as_pure(params), as_pure(find_state(state))
    tree = trained_tree(params, ours, method, layout)
    values = tree.sparse(params)
    if isinstance(importance, str) and importance == LAST:
        metric = last_metric(method, ours, tree)
    else:
        metric = None if importance is None else placed(importance, values, tree)
    with selecting_on_host(select_on_host):
        check_layout(split_of(ours, tree).support, method, tree)
        support = method.support_at(values, tree.info, None, metric)
    return FinalProjection(tree, tree.leaves(params), support, ours.step, given)


def last_metric(method: Method, state: SparseOptimizerState, tree: SparseTree) -> Any:
    """Return the last P of the run, from the method's importance or the user's."""
    if state.importance is None:
        return None
    held = tree.sparse(state.importance)
    return held if method.importance is None else method.metric(held)
