"""JAX: make one block of a trained network sparse, so that it returns what it did.

A block is a function of parameters and inputs. Its layers are pruned one by one by a solver of
`safe_core.solvers`, or all together by SAFE on the reconstruction error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_core import _checks
from safe_core._dtypes import wide_dtype
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Gram
from safe_core.sparsity import as_pattern

from .optax import finalize, sparse_optimizer
from .optax_gradients import value_and_gradients
from .optax_tree import SparseTree

__all__ = ["Reconstructed", "linen_grams", "prune_layers", "reconstruct"]

PyTree = Any


class Reconstructed(NamedTuple):
    """What `reconstruct` returns.

    Attributes
    ----------
    params : pytree
        Exactly sparse, in the dtypes given.
    losses : list of float
        The mean loss at x, before the perturbation, of each epoch.
    """

    params: PyTree
    losses: list[float]


def reconstruct(
    apply_fn: Callable[..., jax.Array],
    params: PyTree,
    inputs: PyTree,
    sparsity: Any,
    *,
    recipe: Reconstruction | None = None,
    targets: jax.Array | None = None,
    importance: Any = None,
    where: Any = None,
    layout: Any = None,
    seed: int = 0,
) -> Reconstructed:
    """Prune a block by SAFE, or SAFE+ with an importance, on its reconstruction error.

    Minimises ``mean((apply_fn(params, inputs) - targets)**2)`` under the sparsity. Parameters
    are trained in float32 or wider and returned in their own dtypes.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, batch) -> array``, for some samples of ``inputs``.
    params : pytree
        Of the dense block.
    inputs : pytree of arrays
        With samples along the first axis of every leaf.
    sparsity : float, str or pattern
        As for `safe_core.project`; a number is that of each weight.
    recipe : Reconstruction, optional
        Steps, rates and method; the paper's by default.
    targets : array, optional
        What the block shall return; by default what it returns when dense.
    importance : pytree or mapping of path to array, optional
        P, such as ``{name: gram.mean_squares() for name, gram in linen_grams(...).items()}`` for
        SAFE+. Needed where the recipe asks for "wanda".
    where, layout : optional
        As for `sparse_optimizer`.
    seed : int
        Of the order of samples.

    Returns
    -------
    Reconstructed

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind, inputs and targets differ in their samples, or a
        loss is not finite.

    References
    ----------
    Lee et al. 2025, sections 3.4 and 4.3 and appendix B.4.

    Examples
    --------
    >>> def block(params, x):
    ...     return jnp.tanh(x @ params["kernel"])
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> inputs = jax.random.normal(jax.random.key(1), (16, 8))
    >>> found = reconstruct(block, params, inputs, 0.5, recipe=Reconstruction(epochs=2))
    >>> int((found.params["kernel"] == 0).sum())
    16
    """
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function, got {type(apply_fn)!r}")
    recipe = Reconstruction() if recipe is None else recipe
    if not isinstance(recipe, Reconstruction):
        raise TypeError(f"recipe must be a Reconstruction, got {_checks.shown(recipe)}")
    if recipe.importance is not None and importance is None:
        raise ValueError(
            f"importance must be given for a recipe with importance={recipe.importance!r}, got None"
        )
    _checks.integer("seed", seed, low=0)
    samples = _samples(inputs)
    inputs = jax.tree.map(jnp.asarray, inputs)
    wide = jax.tree.map(lambda p: jnp.copy(_widened(p)), params)  # to be written over
    batches = _Batches(samples, recipe.batch_size, np.random.default_rng(seed))
    if targets is None:
        dense = jax.jit(lambda batch: apply_fn(params, batch))
        targets = jnp.concatenate([dense(_rows(inputs, rows)) for rows in batches.in_order()])
    elif _samples(targets) != samples:
        raise ValueError(
            f"targets must have {samples} samples, as inputs do, got shape {jnp.shape(targets)}"
        )
    method = recipe.bound(as_pattern(sparsity, scope="tensor"))
    rates = [recipe.rate(t, batches.count) for t in range(recipe.epochs * batches.count)]
    table = jnp.asarray(rates, jnp.float32)
    tx = sparse_optimizer(
        optax.adam(lambda step: table[step], *recipe.betas),
        method,
        where=where,
        layout=layout,
        importance=importance,
    )

    def loss_of(params: PyTree, batch: PyTree, target: jax.Array) -> jax.Array:
        output = apply_fn(params, batch)
        return jnp.mean((_widened(output) - _widened(target)) ** 2)

    def step(carried: tuple[PyTree, Any], data: PyTree) -> tuple[tuple[PyTree, Any], jax.Array]:
        (params, state), (batch, target) = carried, data
        loss, gradients, grad_fn = value_and_gradients(loss_of)(params, batch, target)
        updates, state = tx.update(gradients, state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), loss

    @partial(jax.jit, donate_argnums=0)
    def epoch(carried: Any, data: PyTree, whole: Any, rest: Any) -> tuple[Any, jax.Array]:
        def take(carried: Any, rows: Any) -> tuple[Any, jax.Array]:
            return step(carried, _rows(data, rows))

        carried, losses = jax.lax.scan(take, carried, whole)
        if rest.size:
            carried, last = take(carried, rest)
            losses = jnp.concatenate([losses, last[None]])
        return carried, losses.mean()

    carried, losses = (wide, tx.init(wide)), []
    for k in range(recipe.epochs):
        carried, mean = epoch(carried, (inputs, targets), *batches.drawn())
        losses.append(float(mean))
        if not np.isfinite(losses[-1]):
            raise ValueError(
                "learning_rate must be low enough for a finite loss, got "
                f"{recipe.learning_rate!r} and a loss of {losses[-1]} in epoch {k}"
            )
    found = finalize(carried[0], carried[1], method, layout=layout)
    return Reconstructed(jax.tree.map(lambda x, p: x.astype(p.dtype), found, params), losses)


def prune_layers(
    params: PyTree,
    grams: Mapping[str, Any],
    solver: Callable[..., Any],
    sparsity: Any,
    *,
    where: Any = None,
    layout: Any = None,
) -> PyTree:
    """Prune every layer of a block by a layer-wise solver.

    Parameters
    ----------
    params : pytree
    grams : mapping of path to Gram or array
        ``X^T X`` of the inputs of each sparse leaf, as `linen_grams` returns.
    solver : callable
        ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``, as those of
        `safe_core.solvers`.
    sparsity : float, str or pattern
        A number is that of each weight.
    where, layout : optional
        As for `sparse_optimizer`.

    Returns
    -------
    pytree
        As ``params``, exactly sparse.

    Raises
    ------
    TypeError, ValueError
        As the solver, or if the Gram matrix of a leaf is missing.

    Examples
    --------
    >>> from safe_core.solvers import SparseGPT
    >>> inputs = jax.random.normal(jax.random.key(1), (64, 8))
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> pruned = prune_layers(params, {"kernel": Gram.of(inputs)}, SparseGPT(), "2:4")
    >>> (pruned["kernel"] != 0).sum(0).tolist()
    [4, 4, 4, 4]
    """
    tree = SparseTree.read(params, where, layout, False)
    pattern = as_pattern(sparsity, scope="tensor")
    pruned = []
    for name, roles, x in zip(*tree.targets[:2], tree.sparse(params), strict=True):
        if name not in grams:
            raise ValueError(f"grams must hold one for {name}, got {', '.join(grams) or 'none'}")
        values, _ = solver(x, grams[name], pattern, layout=roles)
        pruned.append(values)
    return tree.replaced(tree.leaves(params), pruned)


def linen_grams(module: nn.Module, variables: PyTree, inputs: PyTree) -> dict[str, Gram]:
    """The Gram matrices of the inputs of every dense layer in a module of Flax Linen.

    Parameters
    ----------
    module : flax.linen.Module
    variables : pytree
        As for ``module.apply``.
    inputs : array or tuple of arrays
        The arguments of ``module.apply(variables, *inputs)``.

    Returns
    -------
    dict of str to Gram
        By the paths of kernels within ``variables["params"]``, for `flax.linen.Dense` and
        `flax.linen.DenseGeneral`, and so for attention. The mean squares of the inputs, Wanda's
        importance, are ``gram.mean_squares()``.

    Raises
    ------
    TypeError, ValueError
        If ``module`` is no Linen module, or a layer has batch axes of its own.

    Examples
    --------
    >>> module = nn.Dense(2)
    >>> variables = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    >>> grams = linen_grams(module, variables, jnp.ones((5, 3)))
    >>> grams["kernel"].matrix.tolist()[0], grams["kernel"].count
    ([5.0, 5.0, 5.0], 5)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module)!r}")
    found: dict[str, Gram] = {}

    def watch(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, (nn.Dense, nn.DenseGeneral)) and context.method_name == "__call__":
            name = "/".join((*layer.path, "kernel"))
            if getattr(layer, "batch_dims", ()):
                raise ValueError(f"{name} must have no batch_dims, got {layer.batch_dims!r}")
            x = _features_last(args[0], getattr(layer, "axis", -1))
            found[name] = found[name].add(x) if name in found else Gram.of(x)
        return next_fn(*args, **kwargs)

    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with nn.intercept_methods(watch):
        module.apply(variables, *given)
    return found


def _features_last(x: jax.Array, axis: int | Sequence[int]) -> jax.Array:
    """Inputs with the axes that a layer contracts merged into a last one."""
    axes = [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


class _Batches:
    """Indices of samples, cut into batches."""

    def __init__(self, samples: int, size: int, random: np.random.Generator) -> None:
        self.samples, self.size, self.random = samples, size, random
        self.count = -(-samples // size)

    def in_order(self) -> list[np.ndarray[Any, Any]]:
        return np.array_split(np.arange(self.samples), range(self.size, self.samples, self.size))

    def drawn(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Whole batches, shape (count, size), and what is left over."""
        order = self.random.permutation(self.samples)
        whole = self.samples // self.size * self.size
        return order[:whole].reshape(-1, self.size), order[whole:]


def _samples(inputs: PyTree) -> int:
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        raise ValueError(
            "inputs must be arrays with the same number of samples, not none, along their first "
            f"axis, got {sorted(counts)}"
        )
    return int(counts.pop()[0])


def _rows(inputs: PyTree, rows: Any) -> PyTree:
    return jax.tree.map(lambda x: x[rows], inputs)


def _widened(x: Any) -> Any:
    return x.astype(wide_dtype(jnp, [x])) if jnp.issubdtype(x.dtype, jnp.floating) else x
