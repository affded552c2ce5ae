"""Prune a trained network block by block in JAX, while preserving the outputs of each block.

A block is a function of parameters and inputs. A solver of `safe_core.solvers` prunes its layers
one by one, or SAFE trains the whole block on its reconstruction error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safe_core import _checks
from safe_core.patterns import as_pattern
from safe_core.reconstruction import (
    BlockSettings,
    Reconstruction,
    batches_in_order,
    block_pattern,
    changed,
)
from safe_core.solvers import Gram, named_solver

from .block_solvers import Block, BlockSolver, block_solver
from .block_training import (
    BlockTraining,
    Reconstructed,
    grams_of,
    sample_count,
    take_rows,
    widened,
)
from .layers import prune_layers
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

_DEFAULTS = BlockSettings()


class PrunedBlock(NamedTuple):
    """The result of `prune_blocks` for one block.

    Attributes
    ----------
    params : pytree
        Exactly sparse, in their original dtypes.
    loss : float
        Mean squared error of the outputs of the pruned block.
    relative_error : float
        The same error divided by the mean square of the targets.
    sparsity : float
        The fraction of zeros among the entries of its sparse weights.
    seconds : float
        Elapsed time, including compilation.
    training_kept : bool or None
        As in `Reconstructed`; None for a solver that does not train.
    """

    params: PyTree
    loss: float
    relative_error: float
    sparsity: float
    seconds: float
    training_kept: bool | None = None


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
    """Prune a block by SAFE, or by SAFE+ with an importance, on its reconstruction error.

    It minimises ``mean((apply_fn(params, inputs) - targets)**2)`` under the sparsity. Parameters
    are trained in float32 or wider and returned in their own dtypes.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, batch) -> array``, for a batch of samples of ``inputs``.
    params : pytree
        Parameters of the dense block.
    inputs : pytree of arrays
        Arrays with samples along their first axis.
    sparsity : float, str or pattern
        As for `safe_core.project`; a number is the sparsity of each weight.
    recipe : Reconstruction, optional
        Training settings and method. By default it is ``Reconstruction(importance="wanda")`` if
        ``importance`` holds Gram matrices, and ``Reconstruction(start="dense")`` otherwise.
    targets : array, optional
        The outputs that the block should have; by default those of the dense block.
    importance : pytree or mapping of path to array or Gram, optional
        P as arrays, or the Gram matrices of the inputs, as `linen_grams` and `nnx_grams` return
        them. The start is computed from Gram matrices. A recipe with ``importance="wanda"``
        (SAFE+) also takes P from them: the mean square of each input, with a tiny value for
        inputs that are never active.
    where, layout : optional
        As for `sparse_optimizer`.
    seed : int
        Seed of the order of samples.

    Returns
    -------
    Reconstructed

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, targets differ in shape from the outputs of
        ``apply_fn``, or a loss is not finite.

    References
    ----------
    Lee et al. 2025, sections 3.4 and 4.3 and appendix B.4.

    Examples
    --------
    >>> def block(params, x):
    ...     return jnp.tanh(x @ params["kernel"])
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> inputs = jax.random.normal(jax.random.key(1), (16, 8))
    >>> recipe = Reconstruction(epochs=10)
    >>> grams = {"kernel": Gram.of(inputs)}
    >>> found = reconstruct(block, params, inputs, 0.5, recipe=recipe, importance=grams)
    >>> int((found.params["kernel"] == 0).sum())
    16
    """
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function, got {type(apply_fn)!r}")
    if recipe is None:
        grams = grams_of(importance)
        recipe = Reconstruction(importance="wanda") if grams else Reconstruction(start="dense")
    if not isinstance(recipe, Reconstruction):
        raise TypeError(f"recipe must be a Reconstruction, got {_checks.shown(recipe)}")
    if recipe.importance is not None and importance is None:
        raise ValueError(
            f"importance must be given for a recipe with importance={recipe.importance!r}, got None"
        )
    first = recipe.initial
    if first is not None and first.needs != "nothing" and not grams_of(importance):
        raise ValueError(
            f"importance must hold Gram matrices, from which {first.name} computes the start, such "
            "as linen_grams and nnx_grams return, or the recipe must have start='dense', got "
            f"{type(importance).__name__}"
        )
    if importance is not None and is_function(importance):
        raise TypeError(f"importance must hold arrays, got {importance!r}")
    _checks.integer("seed", seed, low=0)
    samples = sample_count(inputs)
    inputs = jax.tree.map(jnp.asarray, inputs)
    if targets is None:
        targets = _in_batches(jax.jit(apply_fn), params, inputs, recipe.batch_size)
    else:
        output = jax.eval_shape(apply_fn, params, inputs)
        if jnp.shape(targets) != output.shape:
            raise ValueError(
                f"targets must have shape {output.shape}, as the outputs of apply_fn, got "
                f"{jnp.shape(targets)}"
            )
    pattern = as_pattern(sparsity, scope="tensor")
    training = BlockTraining(apply_fn, recipe, pattern, samples, where, layout)
    return training(params, inputs, targets, importance, seed=seed, block=0)


def prune_blocks(
    blocks: Sequence[Block | tuple[Any, ...]],
    inputs: PyTree,
    solver: Any,
    sparsity: Any,
    *,
    where: Any = None,
    layout: Any = None,
    settings: BlockSettings = _DEFAULTS,
    **changes: Any,
) -> list[PrunedBlock]:
    """Prune blocks in order; each takes the outputs of the one before.

    Block i with parameters x becomes sparse while minimising

        ``|block_x(h) - target|^2``,  ``target = block_dense(h')``,

    over the samples, as `safe_core.adapters.transformers.prune_blocks` does in PyTorch, with the
    same batches for the same seed. Blocks with the same function and shapes share compiled
    programs.

    Parameters
    ----------
    blocks : sequence of Block
        Or tuples ``(apply_fn, params)`` or ``(apply_fn, params, grams)``.
    inputs : array or tuple of arrays
        Inputs of the first block, with samples along the first axis. The first item of a tuple
        goes from block to block; the others, such as masks, go to every block unchanged.
    solver : str, Reconstruction, layer-wise solver or callable
        The name of a solver, see `safe_core.solvers.named_solvers`; SAFE or SAFE+ on the whole
        block; a layer-wise solver, an instance or a class, such as those of `safe_core.solvers`;
        or a function ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``.
    sparsity : float, str, pattern or mapping
        As for `safe_core.project`. A number is the sparsity of each weight, or of each output of
        each weight for the name "wanda", as published. A mapping gives the weights of every
        block their own, by their paths in the block. A pattern must not compare entries of
        different weights (``scope="global"``).
    where, layout : optional
        As for `sparse_optimizer`, for each block. Weights that ``where`` leaves out keep the
        zeros that they have.
    settings : BlockSettings, optional
        All other settings.
    **changes
        Fields of `safe_core.reconstruction.BlockSettings`, which replace those of ``settings``:
        ``propagate``, ``target_inputs``, ``batch_size`` and ``seed``.

    Returns
    -------
    list of PrunedBlock

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, a block does not return one row for each sample or
        lacks ``grams``, or outputs are not finite.

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
    >>> solver = Reconstruction(importance="wanda", epochs=10)
    >>> [pruned.sparsity for pruned in prune_blocks(blocks, inputs, solver, "2:4")]
    [0.5, 0.5, 0.5]
    """
    settings = changed(settings, changes)
    scope = named_solver(solver).default_scope if isinstance(solver, str) else "tensor"
    pattern = block_pattern(sparsity, scope)
    chosen = block_solver(solver, pattern, settings.seed, where, layout)
    checked = [_checked(i, block, chosen.needs) for i, block in enumerate(blocks)]
    chain = _Chain(chosen, settings, where, layout)
    sample_count(inputs)
    hidden, *others = jax.tree.map(jnp.asarray, inputs if isinstance(inputs, tuple) else (inputs,))
    # Two streams: the pruned network's activations, and the dense network's for the targets.
    dense = hidden if settings.two_streams else None

    def arguments(hidden: PyTree) -> PyTree:
        return (hidden, *others) if isinstance(inputs, tuple) else hidden

    pruned = []
    for i, block in enumerate(checked):
        started = time.monotonic()
        target = chain.outputs(block, block.params, arguments(hidden if dense is None else dense))
        _check_finite(i, jnp.isfinite(target).all())
        found, training_kept = chain.prune(i, block, arguments(hidden), target)
        output = chain.outputs(block, found, arguments(hidden))
        loss, size = (float(x) for x in _error(output, target))
        _check_finite(i, np.isfinite(loss))
        zeros = _sparsity(found, where, layout)
        seconds = time.monotonic() - started
        relative = loss / size if size else 0.0
        pruned.append(PrunedBlock(found, loss, relative, zeros, seconds, training_kept))
        hidden = output if settings.propagate == "pruned" else target
        dense = None if dense is None else target
    return pruned


class _Chain:
    """Run the blocks of one call of `prune_blocks`, with one program for equal functions."""

    def __init__(
        self, solver: BlockSolver, settings: BlockSettings, where: Any, layout: Any
    ) -> None:
        self.solver, self.settings = solver, settings
        self.where, self.layout = where, layout
        self._compiled: dict[Any, Any] = {}

    def prune(
        self, i: int, block: Block, inputs: PyTree, targets: jax.Array
    ) -> tuple[PyTree, bool | None]:
        """Return the parameters of a pruned block, and whether its training was kept."""
        grams = None if self.solver.needs == "nothing" else self._grams(block, inputs)
        return self.solver.prune(i, block, inputs, targets, grams)

    def outputs(self, block: Block, params: PyTree, inputs: PyTree) -> jax.Array:
        """Return the outputs of a block with these parameters."""
        forward = self._jitted(block.apply_fn)
        return _in_batches(forward, params, inputs, self.settings.batch_size)

    def _grams(self, block: Block, inputs: PyTree) -> Mapping[str, Gram]:
        grams = self._jitted(block.grams)
        batches = batches_in_order([range(sample_count(inputs))], self.settings.batch_size)
        found = [grams(block.params, take_rows(inputs, np.asarray(rows))) for rows in batches]
        return jax.tree.map(lambda *parts: sum(parts), *found)  # field by field

    def _jitted(self, fn: Any) -> Any:
        """Return one compiled function for all equal ones."""
        return self._compiled.setdefault(fn, jax.jit(fn))


def _check_finite(i: int, finite: Any) -> None:
    if not finite:
        raise ValueError(
            f"inputs must lead to finite activations, got NaN or infinity after block {i}"
        )


def _checked(i: int, block: Any, needs: str) -> Block:
    if not isinstance(block, tuple) or len(block) not in (2, 3):
        raise TypeError(f"blocks must be pairs of apply_fn and params, or Block, got {block!r}")
    found = Block(*block)
    if not callable(found.apply_fn):
        raise TypeError(f"apply_fn must be a function, got {type(found.apply_fn)!r} in block {i}")
    if needs != "nothing" and found.grams is None:
        raise ValueError(
            f"grams must be given for a solver that needs {needs} of inputs, such as SAFE without "
            f"start='dense', got None in block {i}"
        )
    return found


def _in_batches(
    forward: Callable[..., jax.Array], params: PyTree, inputs: PyTree, size: int
) -> jax.Array:
    """Return the outputs of a block for all samples."""
    samples = sample_count(inputs)
    batches = batches_in_order([range(samples)], size)
    outputs = [forward(params, take_rows(inputs, np.asarray(rows))) for rows in batches]
    if any(jnp.shape(x)[:1] != (len(rows),) for x, rows in zip(outputs, batches, strict=True)):
        raise ValueError(
            "apply_fn must return an array with samples along its first axis, got shape "
            f"{jnp.shape(outputs[0])} for {len(batches[0])} samples"
        )
    return jnp.concatenate(outputs)


@jax.jit
def _error(output: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean squared error, and the mean square of the target."""
    output, target = widened(output), widened(target)
    return jnp.mean((output - target) ** 2), jnp.mean(target**2)


def _sparsity(params: PyTree, where: Any, layout: Any) -> float:
    sparse = SparseTree.read(params, where, layout).sparse(params)
    return sum(int((x == 0).sum()) for x in sparse) / max(1, sum(x.size for x in sparse))
