"""Report on the sparse leaves of a parameter tree."""

from __future__ import annotations

from typing import Any

from safe_core import Method
from safe_core.report import Report, TensorReport, outlook, sums

from .arguments import check_number
from .evaluation import last_metric
from .state import check_anchor, check_layout, find_state, split_of, trained_tree
from .transform import at_step

__all__ = ["report"]

PyTree = Any


def report(
    params: PyTree, state: PyTree, method: Method, *, penalty: Any = None, layout: Any = None
) -> Report:
    """Return the distance to the constraint and other figures for each sparse leaf.

    This computes a projection and a dual update and changes no state. Under `jax.jit`, return
    `Report.scalars`, a flat dictionary for a metric writer.

    Parameters
    ----------
    params : pytree
    state : pytree
        An optimizer state that contains one `SparseOptimizerState`, possibly nested.
    method : Method
        The method of the run.
    penalty : float, array or schedule, optional
        As passed to `sparse_optimizer`.
    layout : optional
        Not needed: the state holds the axis roles. If given, it must be that of the run.

    Returns
    -------
    safe_core.report.Report
        Its figures are scalar arrays.

    Raises
    ------
    TypeError, ValueError
        As for `finalize`.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> method = safe_core.admm(0.5)
    >>> params = {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 2.0]])}
    >>> state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    >>> round(float(report(params, state, method).scalars()["distance"]), 4)
    2.2361
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    check_number("penalty", penalty)
    ours = find_state(state)
    tree = trained_tree(params, ours, method, layout)
    values = tree.sparse(params)
    check_anchor(ours, method)
    split = split_of(ours, tree)
    check_layout(split.support, method, tree)
    metric = last_metric(method, ours, tree)
    compared = outlook(method, values, split, ours.step, tree.info, metric)
    schedule = method.constraint.penalty if penalty is None else penalty
    weight = 0.0 if schedule is None else at_step(schedule, ours.step)
    found = zip(tree.info.names, values, sums(values, *compared), strict=True)
    return Report(
        ours.step,
        [TensorReport.of(name, x.size, method.sparsity, part, weight) for name, x, part in found],
    )
