"""Prune one block in JAX, layer by layer or by training the whole block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from safe_core.patterns import Pattern
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Gram, LayerSolver, as_solver

from .block_training import BlockTraining, sample_count
from .layers import prune_layers

__all__ = ["Block", "BlockSolver", "block_solver"]

PyTree = Any


class Block(NamedTuple):
    """One block of `prune_blocks`.

    `safe_core.adapters.jax.flax.blocks` makes them from Flax modules.

    Attributes
    ----------
    apply_fn : callable
        ``apply_fn(params, inputs) -> array``. Blocks with the same function and shapes share
        compiled programs.
    params : pytree
    grams : callable, optional
        ``grams(params, inputs)`` returns the Gram matrices of the inputs of each weight, a
        mapping of path to `safe_core.solvers.Gram`. Magnitude pruning does not need it, nor
        does SAFE with ``start="dense"``.
    """

    apply_fn: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    grams: Callable[[PyTree, PyTree], Mapping[str, Gram]] | None = None


class BlockSolver(Protocol):
    """A solver of blocks in JAX."""

    @property
    def needs(self) -> str:
        """Statistics of inputs that the solver needs, as in `safe_core.solvers.Solver`."""

    def prune(
        self,
        i: int,
        block: Block,
        inputs: PyTree,
        targets: jax.Array,
        grams: Mapping[str, Gram] | None,
    ) -> tuple[PyTree, bool | None]:
        """Return the pruned parameters of block i, and whether training was kept."""


class _LayerByLayer:
    """Apply a layer-wise solver to each sparse leaf of a block."""

    def __init__(self, solver: LayerSolver, pattern: Pattern, where: Any, layout: Any) -> None:
        self.solver, self.pattern = solver, pattern
        self.where, self.layout = where, layout
        self.needs = solver.needs

    def prune(
        self,
        i: int,
        block: Block,
        inputs: PyTree,
        targets: jax.Array,
        grams: Mapping[str, Gram] | None,
    ) -> tuple[PyTree, bool | None]:
        where, layout = self.where, self.layout
        pruned = prune_layers(
            block.params, grams, self.solver, self.pattern, where=where, layout=layout
        )
        return pruned, None


class _Trained:
    """Train the whole block by SAFE."""

    def __init__(
        self, recipe: Reconstruction, pattern: Pattern, seed: int, where: Any, layout: Any
    ) -> None:
        self.recipe, self.pattern, self.seed = recipe, pattern, seed
        self.where, self.layout = where, layout
        self.needs = recipe.needs
        self._trainings: dict[Any, BlockTraining] = {}

    def prune(
        self,
        i: int,
        block: Block,
        inputs: PyTree,
        targets: jax.Array,
        grams: Mapping[str, Gram] | None,
    ) -> tuple[PyTree, bool | None]:
        # One training for equal functions, so that equal blocks compile once.
        if block.apply_fn not in self._trainings:
            self._trainings[block.apply_fn] = BlockTraining(
                block.apply_fn,
                self.recipe,
                self.pattern,
                sample_count(inputs),
                self.where,
                self.layout,
            )
        training = self._trainings[block.apply_fn]
        found = training(block.params, inputs, targets, grams, seed=self.seed, block=i)
        return found.params, found.training_kept


def block_solver(solver: Any, pattern: Pattern, seed: int, where: Any, layout: Any) -> BlockSolver:
    """Return the block solver for the argument ``solver`` of `prune_blocks`."""
    found = as_solver(solver)
    if isinstance(found, Reconstruction):
        return _Trained(found, pattern, seed, where, layout)
    if isinstance(found, LayerSolver):
        return _LayerByLayer(found, pattern, where, layout)
    raise TypeError(f"solver must be a Reconstruction or prune layers, got {found!r}")
