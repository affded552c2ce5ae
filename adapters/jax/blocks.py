"""JAX: make the blocks of a trained network sparse, so that they return what they did.

A block is a function of parameters and inputs. Its layers are pruned one by one by a solver of
`safe_core.solvers`, or all together by SAFE on the reconstruction error; blocks in a row, one
after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_core import _checks
from safe_core._dtypes import wide_dtype
from safe_core.patterns import Pattern, as_pattern
from safe_core.reconstruction import (
    Reconstruction,
    batches_at_random,
    batches_in_order,
    block_pattern,
)
from safe_core.solvers import Gram
from safe_core.solvers.gram import gram_or_identity, positive_squares

from .gradients import value_and_gradients
from .transform import finalize, sparse_optimizer
from .tree import SparseTree, is_function

__all__ = [
    "Block",
    "PrunedBlock",
    "Reconstructed",
    "prune_blocks",
    "prune_layers",
    "reconstruct",
]

PyTree = Any


class Block(NamedTuple):
    """One of the blocks that `prune_blocks` takes.

    `safe_core.adapters.jax.flax.blocks` makes them of modules of Flax.

    Attributes
    ----------
    apply_fn : callable
        ``apply_fn(params, inputs) -> array``. Blocks with the same function and shapes share
        compiled programs.
    params : pytree
    grams : callable, optional
        ``grams(params, inputs)`` returns the Gram matrices of the inputs of each weight, a
        mapping of path to `safe_core.solvers.Gram`. Layer-wise solvers and SAFE+ need it.
    """

    apply_fn: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    grams: Callable[[PyTree, PyTree], Mapping[str, Gram]] | None = None


class PrunedBlock(NamedTuple):
    """What `prune_blocks` returns of a block.

    Attributes
    ----------
    params : pytree
        Exactly sparse, in the dtypes given.
    loss : float
        Mean squared error of what the pruned block returns, against the targets.
    relative_error : float
        The same error over the mean square of the targets.
    sparsity : float
        The fraction of zeros among the entries of its sparse weights.
    seconds : float
        Compilation included.
    """

    params: PyTree
    loss: float
    relative_error: float
    sparsity: float
    seconds: float


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
    importance : pytree or mapping of path to array or Gram, optional
        P; of a Gram matrix the mean square of each input, where one that was never active
        counts next to nothing. Needed where the recipe asks for "wanda" (SAFE+): pass what
        `linen_grams` or `nnx_grams` returns.
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
        If an argument is not of its kind, targets differ in shape from what ``apply_fn``
        returns, or a loss is not finite.

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
    if importance is not None and is_function(importance):
        raise TypeError(f"importance must hold arrays, got {importance!r}")
    _checks.integer("seed", seed, low=0)
    samples = _samples(inputs)
    inputs = jax.tree.map(jnp.asarray, inputs)
    if targets is None:
        targets = _in_batches(jax.jit(apply_fn), params, inputs, recipe.batch_size)
    else:
        output = jax.eval_shape(apply_fn, params, inputs)
        if jnp.shape(targets) != output.shape:
            raise ValueError(
                f"targets must have shape {output.shape}, as what apply_fn returns, got "
                f"{jnp.shape(targets)}"
            )
    pattern = as_pattern(sparsity, scope="tensor")
    training = _Training(apply_fn, recipe, pattern, samples, where, layout)
    return training(params, inputs, targets, importance, seed=seed, block=0)


def prune_blocks(
    blocks: Sequence[Block | tuple[Any, ...]],
    inputs: PyTree,
    solver: Any,
    sparsity: Any,
    *,
    targets: Literal["pruned", "dense"] = "pruned",
    propagate: Literal["pruned", "dense"] = "pruned",
    batch_size: int = 8,
    where: Any = None,
    layout: Any = None,
    seed: int = 0,
) -> list[PrunedBlock]:
    """Prune blocks of which each takes what the one before returns, block after block.

    Block i with parameters x is made sparse to minimise

        ``|block_x(h) - target|^2``,  ``target = block_dense(h')``,

    over the samples, as `safe_core.adapters.transformers.prune_blocks` does in PyTorch: with the
    same seed by the same batches. What is compiled for a block serves the others with the same
    function and shapes.

    Parameters
    ----------
    blocks : sequence of Block
        Or of tuples ``(apply_fn, params)`` or ``(apply_fn, params, grams)``.
    inputs : array or tuple of arrays
        Of the first block, with samples along the first axis. Of a tuple the first item goes
        from block to block, and the others, such as masks, to every block as they are.
    solver : Reconstruction or callable
        The whole block by SAFE or SAFE+, or a layer-wise solver
        ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``, as those of
        `safe_core.solvers`.
    sparsity : float, str or pattern
        As for `safe_core.project`. A number is that of each weight; a pattern must not compare
        entries over all weights (``scope="global"``).
    targets : {"pruned", "dense"}
        Whether h' is what the pruned blocks before give, ``h' = h``, or what the dense ones
        gave.
    propagate : {"pruned", "dense"}
        Whether h is what the pruned blocks before give. With "dense" every block is pruned as
        if the others were dense, and ``targets`` makes no difference.
    batch_size : int
        Samples in a forward pass; those in a step are the solver's.
    where, layout : optional
        As for `sparse_optimizer`, of each block.
    seed : int
        Of the order of samples.

    Returns
    -------
    list of PrunedBlock

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind, a block does not return an array of the samples or
        lacks ``grams``, or what blocks return is not finite.

    References
    ----------
    Lee et al. 2025, sections 3.4 and 4.3 and appendix B.4.

    Examples
    --------
    >>> def block(params, x):
    ...     return x + jnp.tanh(x @ params["kernel"])
    >>> def grams(params, x):
    ...     return {"kernel": Gram.of(x)}
    >>> weights = jax.random.normal(jax.random.key(0), (3, 8, 8)) / 8
    >>> blocks = [Block(block, {"kernel": kernel}, grams) for kernel in weights]
    >>> inputs = jax.random.normal(jax.random.key(1), (16, 8))
    >>> solver = Reconstruction(importance="wanda", epochs=2)
    >>> [pruned.sparsity for pruned in prune_blocks(blocks, inputs, solver, "2:4")]
    [0.5, 0.5, 0.5]
    """
    pattern = block_pattern(sparsity)
    if not isinstance(solver, Reconstruction):
        _check_solver(solver, "a Reconstruction or a function such as ALPS()")
    for name, value in (("targets", targets), ("propagate", propagate)):
        _checks.choice(name, value, ("pruned", "dense"))
    _checks.integer("batch_size", batch_size, low=1)
    _checks.integer("seed", seed, low=0)
    solve = _BlockSolver(solver, pattern, batch_size, where, layout, seed)
    chain = [_checked(i, block, solve.watches) for i, block in enumerate(blocks)]
    _samples(inputs)
    hidden, *others = jax.tree.map(jnp.asarray, inputs if isinstance(inputs, tuple) else (inputs,))
    beside = hidden if targets == "dense" and propagate == "pruned" else None

    def given(hidden: PyTree) -> PyTree:
        return (hidden, *others) if isinstance(inputs, tuple) else hidden

    pruned = []
    for i, block in enumerate(chain):
        started = time.monotonic()
        target = solve.outputs(block, block.params, given(hidden if beside is None else beside))
        _check_finite(i, jnp.isfinite(target).all())
        found = solve(i, block, given(hidden), target)
        output = solve.outputs(block, found, given(hidden))
        loss, size = (float(x) for x in _error(output, target))
        _check_finite(i, np.isfinite(loss))
        zeros = _sparsity(found, where, layout)
        seconds = time.monotonic() - started
        pruned.append(PrunedBlock(found, loss, loss / size if size else 0.0, zeros, seconds))
        hidden = output if propagate == "pruned" else target
        beside = None if beside is None else target
    return pruned


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
        ``X^T X`` of the inputs of each sparse leaf, as `linen_grams` and `nnx_grams` return.
        Where no input was ever active, a layer is pruned by magnitude.
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
    _check_solver(solver, "a function such as ALPS()")
    tree = SparseTree.read(params, where, layout)
    pattern = as_pattern(sparsity, scope="tensor")
    pruned = []
    for name, roles, x in zip(*tree.info[:2], tree.sparse(params), strict=True):
        if name not in grams:
            raise ValueError(f"grams must hold one for {name}, got {', '.join(grams) or 'none'}")
        gram = grams[name].matrix if isinstance(grams[name], Gram) else grams[name]
        values, _ = solver(x, gram_or_identity(jnp.asarray(gram)), pattern, layout=roles)
        pruned.append(values)
    return tree.replaced(tree.leaves(params), pruned)


class _Training:
    """SAFE on blocks of one function: what is compiled for one serves others of its shapes."""

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
        self.method = recipe.bound(pattern)
        steps = len(batches_in_order([range(samples)], recipe.batch_size))
        rates = jnp.asarray([recipe.rate(t, steps) for t in range(recipe.epochs * steps)])
        self._rate = lambda step: rates[step]
        self._base = optax.adam(self._rate, *recipe.betas)
        self._tx = self._optimizer(None)  # P, if there is one, is in the state
        self._epoch = jax.jit(self._steps, donate_argnums=0)

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
        wide = jax.tree.map(lambda p: jnp.copy(_widened(p)), params)  # to be written over
        if isinstance(importance, Mapping):
            importance = self._of_grams(wide, importance)
        carried, losses = (wide, self._optimizer(importance).init(wide)), []
        for k in range(self.recipe.epochs):
            whole, rest = self._batches(seed, block, k)
            carried, mean = self._epoch(carried, (inputs, targets), whole, rest)
            losses.append(float(mean))
            if not np.isfinite(losses[-1]):
                raise ValueError(
                    "learning_rate must be low enough for a finite loss, got "
                    f"{self.recipe.learning_rate!r} and a loss of {losses[-1]} in epoch {k} of "
                    f"block {block}"
                )
        found = finalize(*carried, self.method, layout=self.layout)
        return Reconstructed(jax.tree.map(lambda x, p: x.astype(p.dtype), found, params), losses)

    def _optimizer(self, importance: Any) -> optax.GradientTransformationExtraArgs:
        return sparse_optimizer(
            self._base,
            self.method,
            learning_rate=self._rate if self.method.plan().needs_learning_rate else None,
            where=self.where,
            layout=self.layout,
            importance=importance,
        )

    def _of_grams(self, params: PyTree, importance: Mapping[str, Any]) -> dict[str, Any]:
        """P of the mean squares of inputs; Gram matrices of dense leaves are left out."""
        names = SparseTree.read(params, self.where, self.layout).info.names
        return {
            name: positive_squares(p.mean_squares()) if isinstance(p, Gram) else p
            for name, p in importance.items()
            if name in names or not isinstance(p, Gram)
        }

    def _batches(self, seed: int, block: int, epoch: int) -> tuple[Any, Any]:
        """Samples of whole batches, shape (count, size), and those of what is left over."""
        size, groups = min(self.recipe.batch_size, self.samples), [range(self.samples)]
        batches = batches_at_random(groups, size, seed=seed, block=block, epoch=epoch)
        order = np.concatenate(batches)
        whole = self.samples // size * size
        return order[:whole].reshape(-1, size), order[whole:]

    def _steps(
        self, carried: Any, data: PyTree, whole: jax.Array, rest: jax.Array
    ) -> tuple[Any, jax.Array]:
        """One epoch; the mean loss at x."""

        def take(carried: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carried
            batch, target = _rows(data, rows)
            loss, gradients, grad_fn = value_and_gradients(self._loss)(params, batch, target)
            updates, state = self._tx.update(gradients, state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), state), loss

        carried, losses = jax.lax.scan(take, carried, whole)
        if rest.size:
            carried, last = take(carried, rest)
            losses = jnp.concatenate([losses, last[None]])
        return carried, losses.mean()

    def _loss(self, params: PyTree, batch: PyTree, target: jax.Array) -> jax.Array:
        output = self.apply_fn(params, batch)
        return jnp.mean((_widened(output) - _widened(target)) ** 2)


class _BlockSolver:
    """What `prune_blocks` does with each block; what is compiled for one serves the others."""

    def __init__(
        self, solver: Any, pattern: Pattern, batch_size: int, where: Any, layout: Any, seed: int
    ) -> None:
        self.solver, self.pattern, self.batch_size = solver, pattern, batch_size
        self.where, self.layout, self.seed = where, layout, seed
        self.watches = not isinstance(solver, Reconstruction) or solver.importance is not None
        self._compiled: dict[Any, Any] = {}
        self._trainings: dict[Any, _Training] = {}

    def __call__(self, i: int, block: Block, inputs: PyTree, targets: jax.Array) -> PyTree:
        """The parameters of a pruned block."""
        where, layout = self.where, self.layout
        grams = self._grams(block, inputs) if self.watches else None
        if grams is not None and not isinstance(self.solver, Reconstruction):
            return prune_layers(
                block.params, grams, self.solver, self.pattern, where=where, layout=layout
            )
        if block.apply_fn not in self._trainings:
            self._trainings[block.apply_fn] = _Training(
                block.apply_fn, self.solver, self.pattern, _samples(inputs), where, layout
            )
        training = self._trainings[block.apply_fn]
        return training(block.params, inputs, targets, grams, seed=self.seed, block=i).params

    def outputs(self, block: Block, params: PyTree, inputs: PyTree) -> jax.Array:
        """What a block with some parameters returns."""
        return _in_batches(self._jitted(block.apply_fn), params, inputs, self.batch_size)

    def _grams(self, block: Block, inputs: PyTree) -> Mapping[str, Gram]:
        grams = self._jitted(block.grams)
        batches = batches_in_order([range(_samples(inputs))], self.batch_size)
        found = [grams(block.params, _rows(inputs, np.asarray(rows))) for rows in batches]
        return jax.tree.map(lambda *parts: sum(parts), *found)  # field by field

    def _jitted(self, fn: Any) -> Any:
        """One compiled function for all that are equal."""
        return self._compiled.setdefault(fn, jax.jit(fn))


def _check_solver(solver: Any, kinds: str) -> None:
    if isinstance(solver, type) or not callable(solver):
        raise TypeError(f"solver must be {kinds}, got {solver!r}")


def _check_finite(i: int, finite: Any) -> None:
    if not finite:
        raise ValueError(f"inputs must lead to finite activations, got others behind block {i}")


def _checked(i: int, block: Any, watched: bool) -> Block:
    if not isinstance(block, tuple) or len(block) not in (2, 3):
        raise TypeError(f"blocks must be pairs of apply_fn and params, or Block, got {block!r}")
    found = Block(*block)
    if not callable(found.apply_fn):
        raise TypeError(f"apply_fn must be a function, got {type(found.apply_fn)!r} in block {i}")
    if watched and found.grams is None:
        raise ValueError(
            f"grams must be given for a layer-wise solver and SAFE+, got None in block {i}"
        )
    return found


def _in_batches(
    forward: Callable[..., jax.Array], params: PyTree, inputs: PyTree, size: int
) -> jax.Array:
    """What a block returns for all samples."""
    samples = _samples(inputs)
    batches = batches_in_order([range(samples)], size)
    outputs = [forward(params, _rows(inputs, np.asarray(rows))) for rows in batches]
    if any(jnp.shape(x)[:1] != (len(rows),) for x, rows in zip(outputs, batches, strict=True)):
        raise ValueError(
            "apply_fn must return an array with samples along its first axis, got shape "
            f"{jnp.shape(outputs[0])} for {len(batches[0])} samples"
        )
    return jnp.concatenate(outputs)


@jax.jit
def _error(output: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean squared error, and mean square of the target."""
    output, target = _widened(output), _widened(target)
    return jnp.mean((output - target) ** 2), jnp.mean(target**2)


def _sparsity(params: PyTree, where: Any, layout: Any) -> float:
    sparse = SparseTree.read(params, where, layout).sparse(params)
    return sum(int((x == 0).sum()) for x in sparse) / max(1, sum(x.size for x in sparse))


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
