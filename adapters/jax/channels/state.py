"""Cut the state of an optimizer like the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..state import SparseOptimizerState
from ..weights import name_of

__all__ = ["check_base_state", "cut_state"]

PyTree = Any


def check_base_state(state: PyTree) -> None:
    """Raise a TypeError if a state is that of a `sparse_optimizer`, or contains one."""
    nodes = jax.tree.leaves(state, is_leaf=_is_sparse)
    if any(map(_is_sparse, nodes)):
        raise TypeError(
            "state must be that of the base optimizer, the base of the SparseOptimizerState, got "
            "a SparseOptimizerState, whose masks are those of the larger network: pass its .base"
        )


def cut_state(state: PyTree, params: Mapping[str, Any], cut: Callable[[str, Any], Any]) -> PyTree:
    """Return an optimizer state whose copies of the parameters are cut like them.

    Parameters
    ----------
    state : pytree
        The state of an optimizer. Trees in it with the paths of parameters are such copies, also
        if some leaves are missing.
    params : dict of str to array
        By path.
    cut : callable
        Returns what is left of an array of the shape of a parameter, given its path.

    Raises
    ------
    ValueError
        If a copy has another shape than a parameter that is cut, or if the state has no copy, but
        arrays that may follow parameters.

    Examples
    --------
    >>> params = {"dense/bias": np.arange(3), "dense/kernel": np.ones((2, 3))}
    >>> state = {"count": np.array(1), "mu": {"dense": {"bias": np.arange(3)}}}
    >>> cut_state(state, params, lambda name, x: x[1:])
    {'count': array(1), 'mu': {'dense': {'bias': array([1, 2])}}}
    """

    def is_copy(node: PyTree) -> bool:
        paths = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
        return bool(paths) and params.keys() >= set(paths)

    def cut_leaf(path: tuple[Any, ...], x: Any) -> Any:
        name = name_of(path)
        param, shape = params[name], tuple(np.shape(x))
        if shape == tuple(param.shape):
            return cut(name, x)
        left = tuple(cut(name, param).shape)
        if np.size(x) > 1 and left != tuple(param.shape):
            raise ValueError(
                "state must keep arrays of the shapes of the parameters, got shape "
                f"{shape} for {name} of {tuple(param.shape)}"
            )
        return x

    def cut_node(node: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(cut_leaf, node) if is_copy(node) else node

    nodes = jax.tree.leaves(state, is_leaf=is_copy)
    if not any(map(is_copy, nodes)) and any(_may_follow(node, params) for node in nodes):
        raise ValueError(
            "state must be that of the optimizer of these parameters, got arrays, but no tree with "
            f"the paths of the parameters, such as {next(iter(params), '')!r}: was it made for "
            "other parameters, or does a wrapper such as optax.flatten hide them?"
        )
    return jax.tree.map(cut_node, state, is_leaf=is_copy)


def _may_follow(node: Any, params: Mapping[str, Any]) -> bool:
    """Return whether a leaf may belong to parameters, as counts and random keys do not."""
    if not isinstance(node, (jax.Array, np.ndarray)) or not jnp.issubdtype(node.dtype, jnp.inexact):
        return False
    shapes, sizes = {p.shape for p in params.values()}, [p.size for p in params.values()]
    # A vector of another size may be a record. That of all parameters is flattened.
    return node.ndim > 1 or (node.ndim > 0 and (node.shape in shapes or node.size == sum(sizes)))


def _is_sparse(node: Any) -> bool:
    return isinstance(node, SparseOptimizerState)
