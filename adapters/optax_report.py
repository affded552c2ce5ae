"""The report of the sparse leaves of a parameter tree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from safe_core import Method, SplitState
from safe_core._dtypes import wide_dtype
from safe_core.report import Report, TensorReport, sums

from .optax import find_state
from .optax_tree import SparseTree, is_sparse_in

__all__ = ["report"]

PyTree = Any


def report(
    params: PyTree, state: PyTree, method: Method, *, penalty: Any = None, layout: Any = None
) -> Report:
    """Return what the constraint looks like from here, leaf by leaf.

    Computes a projection and a dual update, and changes nothing. Under `jax.jit` return
    its `Report.scalars`, a flat dictionary for a metric writer.

    Parameters
    ----------
    params : pytree
    state : pytree
        An optimizer state that holds ours anywhere within.
    method : Method
        The method that is trained with.
    penalty : float, array or schedule, optional
        As passed to `sparse_optimizer`.
    layout : optional
        As passed to `sparse_optimizer`.

    Returns
    -------
    safe_core.report.Report
        Its figures are scalar arrays.

    Raises
    ------
    TypeError, ValueError
        As `finalize`.

    Examples
    --------
    >>> import optax, safe_core
    >>> from safe_core.adapters.optax import sparse_optimizer
    >>> method = safe_core.admm(0.5)
    >>> params = {"kernel": jnp.asarray([[1.0, 4.0], [3.0, 2.0]])}
    >>> state = sparse_optimizer(optax.sgd(0.1), method).init(params)
    >>> round(float(report(params, state, method).scalars()["distance"]), 4)
    2.2361
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    ours = find_state(state)
    tree = SparseTree.read(params, is_sparse_in(ours.anchor), layout, False)
    values = tree.sparse(params)
    wide = [a.astype(wide_dtype(jnp, [a])) for a in tree.sparse(ours.anchor)]
    split = SplitState(wide, tree.sparse(ours.support))
    metric = None if ours.importance is None else method.metric(tree.sparse(ours.importance))
    exact = replace(method, state_dtype=None)
    update = exact.dual_update(values, split, ours.step, tree.targets, metric)
    final = method.final_support(values, tree.targets, metric)
    weight = method.penalty if penalty is None else penalty
    weight = weight(ours.step) if callable(weight) else weight
    found = zip(tree.targets.names, values, sums(values, split, update, final), strict=True)
    return Report(
        ours.step,
        [TensorReport.of(name, x.size, method.sparsity, part, weight) for name, x, part in found],
    )
