"""Read importances from the user, the base optimizer's second moments or the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from safe_core import Method, _checks
from safe_core.arguments import check_importance
from safe_core.importance import Computed, Given, Importance, hutchinson
from safe_core.layout import place_importance

from .leaves import check_arrays, check_differentiable, difference
from .nnx_trees import as_pure
from .tree import SparseTree, is_function, is_masked

__all__ = [
    "hessian_diagonal",
    "importance_in_use",
    "initial_importance",
    "placed",
    "second_moments",
]

PyTree = Any


def hessian_diagonal(
    loss_fn: Callable[..., Any], params: PyTree, *args: Any, key: jax.Array, samples: int = 1
) -> PyTree:
    """Estimate the diagonal of the Hessian of a loss, with negative entries set to 0.

    This is the importance of Optimal Brain Damage. It uses Hutchinson's estimator, see
    `safe_core.importance.hutchinson`, and computes each Hessian-vector product by
    forward-over-reverse differentiation. Call it in a function that you pass as
    ``importance=`` of `sparse_optimizer`, which calls that function at dual updates.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params, *args)`` returns a scalar. It must be twice differentiable.
    params : pytree of floating arrays
    args : optional
        Further arguments of ``loss_fn``.
    key : array
        A key of `jax.random`, to draw the random vectors.
    samples : int
        Number of random vectors to average over. Each costs a gradient and its derivative.

    Returns
    -------
    pytree
        The structure of ``params``, in float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``loss_fn`` is not a function or ``samples`` is not a positive integer.

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
    check_differentiable("params", params)
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise TypeError(f"key must be a key of jax.random, such as jax.random.key(0), got {key!r}")
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


def importance_in_use(
    handed: Any, method: Method, tree: SparseTree, *, known: bool = False
) -> Importance | None:
    """Return the importance of a run: the one that the user passed, or that of the method.

    ``known`` means that the state already holds a P, for example from a checkpoint.
    """
    if handed is None and method.importance is None and known:
        return Given(lambda values: [])
    if handed is None:
        return method.importance
    if is_function(handed):

        def compute(leaves: Any) -> list[Any]:
            params = tree.treedef.unflatten(leaves)
            return placed(handed(params), tree.sparse(params), tree)

        return Computed(compute, reads="model")
    # Copy, because donating the state to a compiled step would delete the caller's arrays.
    return Given(
        lambda values: [jnp.array(p, copy=True) for p in placed(handed, list(values), tree)]
    )


def initial_importance(
    handed: Any, source: Importance | None, params: PyTree, base_state: PyTree, tree: SparseTree
) -> list[Any] | None:
    """Return the state of an importance before step 0.

    Its structure and dtypes never change later, because a compiled step requires this.
    """
    values = tree.sparse(params)
    if source is None:
        return None
    if source.reads == "second_moments":
        second_moments(base_state, tree)  # raise now if the base has none
    if not is_function(handed):
        return source.init(values)
    # P is 1 until the first dual update calls the function, so only its shapes are needed.
    shapes = jax.eval_shape(lambda p: placed(handed(p), tree.sparse(p), tree), params)
    return [
        jnp.ones_like(x, dtype=shape.dtype)
        if shape.shape == x.shape
        else jnp.ones(shape.shape, shape.dtype)
        for x, shape in zip(values, shapes, strict=True)
    ]


def second_moments(base_state: PyTree, tree: SparseTree) -> list[Any]:
    """Return the base's running averages of squared gradients for the sparse leaves.

    optax stores them in a field ``nu``, a pytree like the parameters.
    """

    def has_moments(node: Any) -> bool:
        return hasattr(node, "nu") and isinstance(node, tuple)

    nodes = jax.tree.leaves(base_state, is_leaf=has_moments)
    found = [node.nu for node in nodes if has_moments(node)]
    if len(found) != 1:
        raise ValueError(
            "base must keep one tree of second moments, as optax.adam does, for an importance "
            f"that reads them, got {len(found)} in {type(base_state).__name__}"
        )
    moments = tree.sparse(found[0])
    for name, moment in zip(tree.info.names, moments, strict=True):
        if is_masked(moment):
            raise ValueError(
                "base must keep second moments of every sparse leaf for an importance that reads "
                f"them, got none for {name}, which base masks"
            )
    return moments


def placed(importance: Any, sparse: list[Any], tree: SparseTree) -> list[Any]:
    """Return P of each sparse leaf, checked and with its axes."""
    names = tree.info.names
    try:
        given = list(as_pure(tree.sparse(importance)))
    except (ValueError, TypeError):
        if not (isinstance(importance, Mapping) and set(importance) & set(names)):
            raise ValueError(
                "importance must have the structure of params or map the paths "
                f"{', '.join(names)} to arrays, but {difference(tree.flags(), importance)}"
            ) from None
        unknown = sorted(set(importance) - set(names))
        if unknown:
            raise ValueError(
                f"importance must name sparse parameters, {', '.join(names)}, got {unknown[0]!r}"
            ) from None
        given = [importance.get(name) for name in names]
    found = []
    for p, x, name, layout in zip(given, sparse, names, tree.info.layouts, strict=True):
        if p is None:
            raise ValueError(f"importance must be given for every sparse parameter, lacks {name!r}")
        if not isinstance(p, (int, float, np.ndarray, np.generic, jax.Array)):
            raise TypeError(f"importance of {name} must be an array, got {_checks.shown(p)}")
        # A number stays one: as a float32 array, a small one would become zero.
        value = p if isinstance(p, (int, float)) else jnp.asarray(p)
        check_arrays("importance", [(name, jnp.asarray(p))])
        found.append(place_importance(value, x, layout, name))
    check_importance(found, names)
    return found
