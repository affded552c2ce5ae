"""Prune each layer of a block by a layer-wise solver in JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from safe_core.patterns import as_pattern
from safe_core.solvers import Gram, LayerSolver, as_solver
from safe_core.solvers.gram import solver_statistics

from .tree import SparseTree

__all__ = ["prune_layers"]

PyTree = Any


def prune_layers(
    params: PyTree,
    grams: Mapping[str, Any] | None,
    solver: Any,
    sparsity: Any,
    *,
    where: Any = None,
    layout: Any = None,
) -> PyTree:
    """Prune each layer of a block by a layer-wise solver.

    Parameters
    ----------
    params : pytree
    grams : mapping of path to Gram or array, or None
        ``X^T X`` of the inputs of each sparse leaf, as `linen_grams` and `nnx_grams` return.
        None for a solver that needs no statistics. A layer whose inputs are all zero is pruned
        by magnitude.
    solver : str, layer-wise solver or callable
        A name, an instance or a class of `safe_core.solvers`, or a function
        ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``.
    sparsity : float, str, pattern or mapping of path to them
        A number is the sparsity of each weight.
    where, layout : optional
        As for `sparse_optimizer`.

    Returns
    -------
    pytree
        The pruned ``params``, exactly sparse.

    Raises
    ------
    TypeError, ValueError
        If the solver raises, or the Gram matrix of a leaf is missing.

    Examples
    --------
    >>> import jax
    >>> from safe_core.solvers import SparseGPT
    >>> inputs = jax.random.normal(jax.random.key(1), (64, 8))
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> pruned = prune_layers(params, {"kernel": Gram.of(inputs)}, SparseGPT(), "2:4")
    >>> (pruned["kernel"] != 0).sum(0).tolist()
    [4, 4, 4, 4]
    """
    found = as_solver(solver)
    if not isinstance(found, LayerSolver):
        raise TypeError(f"solver must prune layers, such as ALPS(), got {found!r}")
    tree = SparseTree.read(params, where, layout)
    pattern = as_pattern(sparsity, scope="tensor")
    pattern.check_names(tree.info.names)
    pruned = []
    for name, roles, x in zip(*tree.info[:2], tree.sparse(params), strict=True):
        statistics = None
        if found.needs != "nothing":
            statistics = solver_statistics(found.needs, jnp.asarray(_matrix(grams or {}, name)))
        values, _ = found(x, statistics, pattern.of(name), layout=roles)
        pruned.append(values)
    return tree.replaced(tree.leaves(params), pruned)


def _matrix(grams: Mapping[str, Any], name: str) -> Any:
    if name not in grams:
        raise ValueError(
            f"grams must hold a Gram matrix for {name}, got {', '.join(grams) or 'none'}"
        )
    return grams[name].matrix if isinstance(grams[name], Gram) else grams[name]
