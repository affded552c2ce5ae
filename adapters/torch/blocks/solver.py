"""The protocol of block solvers in PyTorch, and layer-wise solvers as block solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from safe_core._dtypes import wide_dtype
from safe_core.patterns import Pattern
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import LayerSolver, Solver, as_solver
from safe_core.solvers.gram import solver_statistics

from .fingerprints import Description, identity
from .memory import BlockSize
from .processes import Processes
from .shares import rounds
from .statistics import InputStatistics, matrix_layout

__all__ = ["Batch", "BlockProblem", "BlockSolver", "LayerByLayer", "WorkBytes", "as_block_solver"]


class Batch(NamedTuple):
    """The part of a batch that this process computes: the whole batch of one process.

    Attributes
    ----------
    run : callable
        ``run(block)`` returns the outputs of a block.
    target : tensor
    share : float
        The fraction of the samples of the batch. If it is 0, there is nothing to run.
    """

    run: Callable[[nn.Module], Tensor]
    target: Tensor
    share: float = 1.0


class WorkBytes(Protocol):
    """Predict the bytes of a pass through the block, beside its parameters."""

    def __call__(
        self, batch_size: int | None = None, *, backward: bool = False, autocast: bool = False
    ) -> int:
        """Return the bytes for a batch; None is the batch size of the forward passes."""


@dataclass
class BlockProblem:
    """One block to prune.

    Attributes
    ----------
    name : str
    pattern : pattern
        The sparsity of the weights; ``pattern.of(name)`` is that of one.
    statistics : dict of str to InputStatistics
        Layouts of the weights to prune, and the statistics of their inputs that the solver needs.
    trainable : set of str
        Names of the parameters that a solver may train.
    dense : torch.nn.Module or None
        A copy of the dense block on the device, in its own dtypes.
    dtype : torch.dtype
        The dtype of the block.
    device : torch.device
    batches : callable
        ``batches(batch_size, dtype)`` returns a function of the epoch, which yields a `Batch`
        for each step with floating tensors in ``dtype``, and the number of steps in an epoch.
    copy : callable
        ``copy(dtype)`` returns a copy of the dense block on the device.
    report : callable
        ``report(epoch, loss)`` after each epoch, or ``report(epoch, loss, sparse_loss)`` with
        the loss of the projected weights, too.
    processes : Processes
        Those that prune the block together. They hold the same statistics, and each its part of
        every batch.
    shard : bool
        Whether they share the state of an optimizer.
    training_kept : bool or None
        Set by a solver that compares its training with the start: whether it kept the training.
    """

    name: str
    pattern: Pattern
    statistics: dict[str, InputStatistics]
    trainable: set[str]
    dense: nn.Module | None
    dtype: torch.dtype
    device: torch.device
    batches: Callable[[int, torch.dtype], tuple[Callable[[int], Iterator[Batch]], int]]
    copy: Callable[[torch.dtype], nn.Module]
    report: Callable[..., None]
    processes: Processes = field(default_factory=Processes)
    shard: bool = False
    training_kept: bool | None = None

    def in_dtype(self, dtype: torch.dtype) -> nn.Module:
        """Return a copy of the dense block in another dtype, and free ``dense``."""
        self.dense = None
        return self.copy(dtype)


class BlockSolver(Solver, ABC):
    """A solver that prunes all weights of a block together.

    Attributes
    ----------
    watches : {"nothing", "tokens", "squares", "gram"}
        What is recorded of the inputs of each weight. "tokens" only counts them, so that
        weights that no matrix product uses are known and not pruned.
    epochs : int
        Epochs of training in each block; 0 without training.
    distributed : bool
        Whether `prune` returns the same in all of several processes, which it does if it sums over
        ``problem.processes`` what it computes from batches. Others are refused there.

    Examples
    --------
    >>> as_block_solver("sparsegpt").watches, as_block_solver("safe-published").watches
    ('gram', 'nothing')
    """

    watches: Literal["nothing", "tokens", "squares", "gram"] = "gram"
    epochs: int = 0
    distributed: ClassVar[bool] = False

    @abstractmethod
    def prune(self, problem: BlockProblem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return new values of parameters, and the supports of the pruned weights, by name."""

    @abstractmethod
    def memory(self, size: BlockSize, work: WorkBytes) -> int:
        """Return the bytes that pruning a block needs on the device."""

    def steps(self, groups: Sequence[int]) -> int:
        """Return the number of training steps in each block, 0 without training.

        ``groups`` holds the numbers of samples that can share a batch.
        """
        return 0

    def described(self, pattern: Pattern) -> dict[str, Description]:
        """Return what must be the same for a run to be resumed."""
        return {"solver": identity(self)}


@dataclass(frozen=True)
class LayerByLayer(BlockSolver):
    """A layer-wise solver, applied to each weight of a block.

    Attributes
    ----------
    solver : LayerSolver

    Examples
    --------
    >>> LayerByLayer(as_solver("wanda")).name
    'wanda'
    """

    solver: LayerSolver

    distributed: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the layer-wise solver."""
        return self.solver.name

    @property
    def watches(self) -> Literal["tokens", "squares", "gram"]:  # type: ignore[override]
        """The statistics of inputs to record: those that the solver needs, or their count."""
        return "tokens" if self.solver.needs == "nothing" else self.solver.needs

    def described(self, pattern: Pattern) -> dict[str, Description]:
        """Return what must be the same for a run to be resumed."""
        return {"solver": identity(self.solver.origin)}

    def memory(self, size: BlockSize, work: WorkBytes) -> int:
        """Return the bytes for the dense block, all statistics, and a pass or one layer.

        One of several processes keeps its solutions until the others have theirs. A single one
        writes the values into the block, and keeps the supports.
        """
        return self.solving(size, work, size.solutions if size.processes > 1 else size.sparse)

    def solving(self, size: BlockSize, work: WorkBytes, solutions: int) -> int:
        """Return the bytes if ``solutions`` bytes of solutions are kept beside one layer."""
        layers = [self.solver.memory(*shape, size.number) for shape in size.layers]
        held = size.stored + size.number * size.statistics(self.watches)
        return held + max([work(), *(solutions + layer for layer in layers)])

    def prune(self, problem: BlockProblem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Prune the weights of the dense block in place, one after the other."""
        dense = problem.dense
        assert dense is not None  # no solver has run before
        values, supports = {}, {}
        for key, solved, support in self.solutions(problem):
            values[key], supports[key] = dense.get_parameter(key).detach(), support
            values[key].copy_(solved)
        return values, supports

    @torch.no_grad()
    def solutions(self, problem: BlockProblem) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name, the values in float32 or wider, and the support of each weight.

        The statistics of a weight are freed as soon as it is solved. Several processes share the
        matrices of the block, and copy the solutions.
        """
        processes = problem.processes
        costs: dict[tuple[str, int], float] = {}
        solved: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for key, found in problem.statistics.items():
            costs |= dict.fromkeys(
                ((key, e) for e in range(len(found.tokens))), _cost(problem, key)
            )
            solved[key] = {}
        for parts in rounds(costs, processes.size):
            own = {(key, e): self._solve(problem, key, e) for key, e in parts[processes.rank]}
            for source, units in enumerate(parts):
                for key, e in units:
                    pair = own.pop((key, e), None) or _like_a_solution(_matrix(problem, key, e))
                    processes.copy_(pair, source)
                    solved[key][e] = pair
                    if len(solved[key]) == len(problem.statistics[key].tokens):
                        stacked = bool(problem.statistics.pop(key).layout.batch_axes)
                        yield key, *_joined(solved.pop(key), stacked=stacked)

    def _solve(self, problem: BlockProblem, key: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return the values and the support of one matrix."""
        weight, found = _matrix(problem, key, expert), problem.statistics[key]
        sums = None if found.sums is None else found.sums[expert]
        statistics = sums if sums is None else solver_statistics(self.solver.needs, sums)
        layout, pattern = matrix_layout(found.layout), problem.pattern.of(key)
        result = self.solver(weight, statistics, pattern, layout=layout)
        _check_result(f"{problem.name}.{key}", weight, result)
        # Contiguous, because a solver may return a view that repeats entries.
        return result[0].to(weight.dtype).contiguous(), result[1].contiguous()


def _matrix(problem: BlockProblem, key: str, expert: int) -> Tensor:
    """Return one matrix of a weight, in float32 or wider."""
    assert problem.dense is not None  # no solver has run before
    p = problem.dense.get_parameter(key).detach()
    stacked = bool(problem.statistics[key].layout.batch_axes)
    return (p[expert] if stacked else p).to(wide_dtype(torch, [p]))


def _cost(problem: BlockProblem, key: str) -> float:
    """Return about how many operations it takes to solve one matrix of a weight."""
    assert problem.dense is not None  # no solver has run before
    shape, found = problem.dense.get_parameter(key).shape, problem.statistics[key]
    inputs = shape[found.layout.input_axes[0]]
    return float(inputs * (inputs**2 + shape.numel() // len(found.tokens)))


def _like_a_solution(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for values and a support."""
    return torch.empty_like(matrix), torch.empty_like(matrix, dtype=torch.bool)


def _joined(found: dict[int, tuple[Tensor, Tensor]], *, stacked: bool) -> tuple[Tensor, Tensor]:
    """Return the solution of a weight, from those of its matrices."""
    if not stacked:
        return found[0]
    pairs = [found[e] for e in sorted(found)]
    return torch.stack([v for v, _ in pairs]), torch.stack([s for _, s in pairs])


def _check_result(name: str, weight: Tensor, result: Any) -> None:
    """Raise where a layer-wise solver breaks its contract."""
    values, support = result
    if values.shape != weight.shape or support.shape != weight.shape:
        wrong = f"shapes {tuple(values.shape)} and {tuple(support.shape)}"
    elif support.dtype != torch.bool:
        wrong = f"a support of {support.dtype}"
    elif not bool(values.isfinite().all()):
        wrong = "values that are not finite"
    elif bool((values[~support] != 0).any()):
        wrong = "values that are not zero off the support"
    else:
        return
    raise ValueError(
        f"solver must return finite values {tuple(weight.shape)} for {name} that are zero off a "
        f"bool support, got {wrong}"
    )


def as_block_solver(solver: Any) -> BlockSolver:
    """Return the block solver that an argument of `prune_blocks` stands for.

    Parameters
    ----------
    solver : str, Solver, subclass of it, or callable
        As for `safe_core.solvers.as_solver`.

    Raises
    ------
    TypeError, ValueError
        If no solver has this name, or the argument is of another kind.

    Examples
    --------
    >>> as_block_solver("alps").solver.iterations, as_block_solver(Reconstruction(epochs=3)).epochs
    (300, 3)
    """
    from .reconstruction import SafeReconstruction  # which is a block solver

    found = as_solver(solver)
    if isinstance(found, BlockSolver):
        return found
    if isinstance(found, Reconstruction):
        return SafeReconstruction(**vars(found))
    if isinstance(found, LayerSolver):
        return LayerByLayer(found)
    raise TypeError(f"solver must prune layers or blocks of PyTorch, got {found!r}")
