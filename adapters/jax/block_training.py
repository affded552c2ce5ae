"""Train a block by SAFE on its reconstruction error, compiled once for equal blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_core._dtypes import wide_dtype
from safe_core.finalization import pruning_a_block
from safe_core.patterns import Pattern
from safe_core.reconstruction import Reconstruction, batches_at_random, batches_in_order
from safe_core.solvers import Gram
from safe_core.solvers.gram import positive_squares

from .gradients import value_and_gradients
from .layers import prune_layers
from .transform import finalize, sparse_optimizer
from .tree import SparseTree

__all__ = ["BlockTraining", "Reconstructed", "grams_of", "sample_count", "take_rows", "widened"]

PyTree = Any


class Reconstructed(NamedTuple):
    """The result of `reconstruct`.

    Attributes
    ----------
    params : pytree
        Exactly sparse, in their original dtypes.
    losses : list of float
        The mean loss of each epoch at x, before the perturbation.
    training_kept : bool or None
        Whether the trained block was kept. False if training raised the error on the samples, so
        that the block is its start, such as the solution of ALPS. None if nothing was compared.

    Examples
    --------
    >>> Reconstructed({}, [0.5, 0.25]).losses[-1]
    0.25
    """

    params: PyTree
    losses: list[float]
    training_kept: bool | None = None


class BlockTraining:
    """Train blocks of one function by SAFE; blocks of equal shapes share compiled programs."""

    def __init__(
        self,
        apply_fn: Callable[..., jax.Array],
        recipe: Reconstruction,
        pattern: Pattern,
        samples: int,
        where: Any,
        layout: Any,
    ) -> None:
        self.apply_fn, self.recipe, self.samples = apply_fn, recipe, samples
        self.where, self.layout = where, layout
        self.pattern = pattern
        each = len(batches_in_order([range(samples)], recipe.batch_size))
        self.steps = recipe.epochs * each
        self.method = recipe.bound(pattern, self.steps)
        # A table of the shares, because a recipe computes them in Python, not in JAX.
        shares = jnp.asarray([recipe.share(t, each) for t in range(self.steps)])
        self._base = optax.chain(
            optax.adam(lambda step: shares[step], *recipe.betas), self._scaled_by_peak()
        )
        if self.method.plan().needs_learning_rate and recipe.learning_rate is None:
            raise ValueError(
                "learning_rate must be given for a method with a decoupled penalty, got None"
            )
        self._rate = lambda step: recipe.peak(0.0) * shares[step]
        # No importance here: P is in the state, so blocks with different P share a program.
        self._tx = self._optimizer(None)
        self._epoch = jax.jit(self._steps, donate_argnums=0)
        self._mean_loss = jax.jit(self._mean_of_batches)

    def __call__(
        self,
        params: PyTree,
        inputs: PyTree,
        targets: jax.Array,
        importance: Any,
        *,
        seed: int,
        block: int,
    ) -> Reconstructed:
        # Copies, because the compiled epoch donates its buffers, and the caller keeps `params`.
        wide = jax.tree.map(lambda p: jnp.copy(widened(p)), params)
        start, first, grams = None, self.recipe.initial, grams_of(importance)
        training_kept = None
        data, order = (inputs, targets), self._batches(seed, block, 0)
        if first is not None:
            where, layout = self.where, self.layout
            wide = prune_layers(wide, grams, first, self.pattern, where=where, layout=layout)
            start = jax.tree.map(jnp.copy, wide)
            loss_at_start = float(self._mean_loss(start, data, *order))
        if isinstance(importance, Mapping):
            importance = self._of_grams(wide, importance)
        carried, losses = (wide, self._optimizer(importance).init(wide)), []
        kept = self._non_zeros(wide)
        for k in range(self.recipe.epochs):
            whole, rest = self._batches(seed, block, k)
            carried, mean = self._epoch(carried, data, kept, whole, rest)
            losses.append(float(mean))
            if not np.isfinite(losses[-1]):
                rate = self.recipe.peak(self._root_mean_square(params if start is None else start))
                raise ValueError(
                    f"learning_rate must be low enough for a finite loss, got {float(rate):g} and "
                    f"a loss of {losses[-1]} in epoch {k} of block {block}"
                )
        with pruning_a_block(self.method.constraint, self.method.sparsity, self.steps):
            found = finalize(*carried, self.method, layout=self.layout)
        # A start is a solution already, which training must not make worse.
        if start is not None:
            # Not `>`: a loss may be NaN.
            training_kept = float(self._mean_loss(found, data, *order)) <= loss_at_start
            found = found if training_kept else start
        found = jax.tree.map(lambda x, p: x.astype(p.dtype), found, params)
        return Reconstructed(found, losses, training_kept)

    def _non_zeros(self, params: PyTree) -> dict[int, jax.Array]:
        """Return masks of the matrices that stay dense but hold zeros, by number of the leaf.

        Their zeros were put there on purpose, such as by an earlier call, and stay.
        """
        tree = SparseTree.read(params, self.where, self.layout)
        leaves = dict(enumerate(tree.leaves(params)))
        masks = {i: x != 0 for i, x in leaves.items() if i not in tree.indices and x.ndim >= 2}
        return {i: mask for i, mask in masks.items() if not bool(mask.all())}

    def _optimizer(self, importance: Any) -> optax.GradientTransformationExtraArgs:
        return sparse_optimizer(
            self._base,
            self.method,
            learning_rate=self._rate if self.method.plan().needs_learning_rate else None,
            where=self.where,
            layout=self.layout,
            importance=importance,
        )

    def _scaled_by_peak(self) -> optax.GradientTransformation:
        """Return the transform that multiplies updates by the peak learning rate.

        The peak depends on the weights of a block, so it is in the state: blocks with different
        peaks share a program.
        """

        def init(params: PyTree) -> jax.Array:
            return jnp.asarray(self.recipe.peak(self._root_mean_square(params)))

        def update(updates: PyTree, peak: jax.Array, params: Any = None) -> tuple[PyTree, Any]:
            return jax.tree.map(lambda u: u * peak.astype(u.dtype), updates), peak

        return optax.GradientTransformation(init, update)

    def _root_mean_square(self, params: PyTree) -> jax.Array:
        """Return the root mean square of all entries of the weights to prune."""
        weights = SparseTree.read(params, self.where, self.layout).sparse(params)
        squares = sum(jnp.sum(widened(w) ** 2) for w in weights)
        return jnp.sqrt(squares / max(1, sum(w.size for w in weights)))

    def _mean_of_batches(
        self, params: PyTree, data: PyTree, whole: jax.Array, rest: jax.Array
    ) -> jax.Array:
        """Return the mean over batches of the loss."""

        def of(rows: jax.Array) -> jax.Array:
            batch, target = take_rows(data, rows)
            return self._loss(params, batch, target)

        losses = jax.lax.map(of, whole)
        return (jnp.append(losses, of(rest)) if rest.size else losses).mean()

    def _of_grams(self, params: PyTree, importance: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return P: arrays, and for SAFE+ the mean squares of inputs from Gram matrices.

        Gram matrices of dense leaves are left out.
        """
        names = SparseTree.read(params, self.where, self.layout).info.names
        given = {}
        for name, p in importance.items():
            if not isinstance(p, Gram):
                given[name] = p
            elif self.recipe.importance is not None and name in names:
                given[name] = positive_squares(p.mean_squares())
        return given or None

    def _batches(self, seed: int, block: int, epoch: int) -> tuple[Any, Any]:
        """Return the samples of full batches, of shape (count, size), and of the smaller last.

        `jax.lax.scan` needs batches of equal size, so the last one is taken separately.
        """
        size, groups = min(self.recipe.batch_size, self.samples), [range(self.samples)]
        batches = batches_at_random(groups, size, seed=seed, block=block, epoch=epoch)
        order = np.concatenate(batches)
        whole = self.samples // size * size
        return order[:whole].reshape(-1, size), order[whole:]

    def _steps(
        self,
        carried: Any,
        data: PyTree,
        kept: dict[int, jax.Array],
        whole: jax.Array,
        rest: jax.Array,
    ) -> tuple[Any, jax.Array]:
        """Run one epoch, and return the mean loss at x."""

        def loss_of(params: PyTree, batch: PyTree, target: jax.Array) -> jax.Array:
            # Gradients of masked entries are zero, so neither Adam nor the ascent moves them.
            leaves = jax.tree.leaves(params)
            for i, mask in kept.items():
                leaves[i] = jnp.where(mask, leaves[i], jnp.zeros_like(leaves[i]))
            whole = jax.tree.unflatten(jax.tree.structure(params), leaves)
            return self._loss(whole, batch, target)

        def take(carried: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carried
            batch, target = take_rows(data, rows)
            loss, gradients, grad_fn = value_and_gradients(loss_of)(params, batch, target)
            updates, state = self._tx.update(gradients, state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), state), loss

        carried, losses = jax.lax.scan(take, carried, whole)
        if rest.size:
            carried, last = take(carried, rest)
            losses = jnp.concatenate([losses, last[None]])
        return carried, losses.mean()

    def _loss(self, params: PyTree, batch: PyTree, target: jax.Array) -> jax.Array:
        output = self.apply_fn(params, batch)
        return jnp.mean((widened(output) - widened(target)) ** 2)


def grams_of(importance: Any) -> dict[str, Gram]:
    """Return the Gram matrices of an importance by path, which may hold none."""
    given = importance.items() if isinstance(importance, Mapping) else ()
    return {path: gram for path, gram in given if isinstance(gram, Gram)}


def sample_count(inputs: PyTree) -> int:
    """Return the number of samples along the first axis of every leaf, or raise ValueError."""
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        raise ValueError(
            "inputs must be arrays with the same non-zero number of samples along their first "
            f"axis, got {sorted(counts)}: repeat what all samples share, such as a mask"
        )
    return int(counts.pop()[0])


def take_rows(inputs: PyTree, rows: Any) -> PyTree:
    """Return the samples ``rows`` of every leaf."""
    return jax.tree.map(lambda x: x[rows], inputs)


def widened(x: Any) -> Any:
    """Return a floating array in float32 or wider, and any other as it is."""
    return x.astype(wide_dtype(jnp, [x])) if jnp.issubdtype(x.dtype, jnp.floating) else x
