"""Reports on pruning block by block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from safe_core._readable import aligned

from .memory import MemoryEstimate

__all__ = ["BlockReport", "Progress", "PruningReport", "TimeEstimate", "WeightReport"]


@dataclass(frozen=True)
class Progress:
    """Progress of pruning.

    Attributes
    ----------
    block, blocks : int
        The current block and the number of blocks.
    epoch : int or None
        The epoch that has ended; None at the end of the block.
    epochs : int
        Epochs in each block; 0 for a solver that does not train.
    loss : float
        Mean squared reconstruction error, in that epoch or of the pruned block.
    seconds_left : float
        Extrapolated from the time so far.
    sparse_loss : float or None
        The same with the weights projected, as `loss` is at the end of the block. In an epoch it
        is that of the last batch, and None if the solver does not report it.
    relative_error : float or None
        ``loss`` divided by the mean square of the targets, at the end of the block.
    training_kept : bool or None
        As in `BlockReport`, at the end of the block.

    Examples
    --------
    >>> Progress(block=1, blocks=4, epoch=1, epochs=4, loss=0.1, seconds_left=60.0).done
    1.4
    """

    block: int
    blocks: int
    epoch: int | None
    epochs: int
    loss: float
    seconds_left: float
    sparse_loss: float | None = None
    relative_error: float | None = None
    training_kept: bool | None = None

    @property
    def done(self) -> float:
        """Number of finished blocks, with fractions; work besides epochs counts as one epoch."""
        return self.block + (1.0 if self.epoch is None else (self.epoch + 1) / (self.epochs + 1))


class WeightReport(NamedTuple):
    """The sparsity of a pruned weight.

    Attributes
    ----------
    entries, kept : int
        Number of entries, and of entries on the support, exactly as requested. A kept entry may
        be zero, if it was before or if it rounds to zero in the model's dtype.
    tokens : int or None
        Number of inputs of the weight; for stacked experts the smallest of an expert. None for
        SAFE without importance, which does not record inputs.
    """

    entries: int
    kept: int
    tokens: int | None


class BlockReport(NamedTuple):
    """The result for one block.

    Attributes
    ----------
    name : str
    loss : float
        Mean squared error of the outputs of the pruned block.
    relative_error : float
        The same error divided by the mean square of the targets.
    weights : dict of str to WeightReport
    seconds : float
    training_kept : bool or None
        Whether the trained block was kept. False if training did not lower the error on the
        calibration samples, so that the block is its start, such as the solution of ALPS. None
        if nothing was compared.

    Examples
    --------
    >>> block = BlockReport("layers.0", 0.1, 0.02, {"weight": WeightReport(64, 16, 512)}, 3.5)
    >>> estimate = MemoryEstimate(device=4096, host=0, disk=0)
    >>> PruningReport((block,), {}, estimate, None, 3.5).sparsity
    0.75
    """

    name: str
    loss: float
    relative_error: float
    weights: dict[str, WeightReport]
    seconds: float
    training_kept: bool | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of entries of its pruned weights that are off their supports."""
        return _sparsity(self.weights.values())

    @property
    def training(self) -> str:
        """Whether its training was kept, for a table; "" if nothing was compared."""
        return {None: "", True: "kept", False: "start kept"}[self.training_kept]


class TimeEstimate(NamedTuple):
    """The time of a run, extrapolated from one block of each kind.

    Blocks are of one kind if they have the same modules, the same shapes of parameters and the same
    weights to prune.

    Attributes
    ----------
    recording : float
        Measured seconds in which the model runs without its blocks.
    blocks : tuple of float
        Seconds of each block: those that were measured for a block of its kind.
    measured : tuple of BlockReport
        The blocks that were pruned, and restored.

    Examples
    --------
    >>> block = BlockReport("layers.0", 0.1, 0.02, {}, 3.5)
    >>> estimate = TimeEstimate(1.0, (3.5, 3.5), (block,))
    >>> estimate.seconds, estimate.after(1)
    (8.0, 4.5)
    """

    recording: float
    blocks: tuple[float, ...]
    measured: tuple[BlockReport, ...]

    @property
    def seconds(self) -> float:
        """Seconds of a whole run."""
        return self.after(0)

    def after(self, finished: int) -> float:
        """Return the seconds of a run that resumes after so many finished blocks.

        The passes through the finished blocks are left out.
        """
        return self.recording + sum(self.blocks[finished:])


class PruningReport(NamedTuple):
    """The result of `prune_blocks`.

    Attributes
    ----------
    blocks : tuple of BlockReport
    dense : dict of str to str
        The matrices of the blocks that were not pruned, with the reason.
    predicted : MemoryEstimate
    peak : int or None
        Peak bytes relative to the start: from the allocator of the GPU or, with
        ``measure_memory``, by counting tensors on the CPU; None if not measured.
    seconds : float

    Examples
    --------
    >>> block = BlockReport("layers.0", 0.1, 0.02, {"weight": WeightReport(64, 16, 512)}, 3.5)
    >>> estimate = MemoryEstimate(device=4096, host=0, disk=0)
    >>> print(PruningReport((block,), {"layers.0.gate": "it is a router"}, estimate, None, 3.5))
    block     sparsity  relative error  seconds
    layers.0  75.0000%            0.02      3.5
    total     75.0000%                      3.5
    not pruned: 1 matrix of the blocks, see `dense`
    """

    blocks: tuple[BlockReport, ...]
    dense: dict[str, str]
    predicted: MemoryEstimate
    peak: int | None
    seconds: float

    @property
    def sparsity(self) -> float:
        """The fraction of entries of the pruned weights that are off their supports."""
        return _sparsity([w for block in self.blocks for w in block.weights.values()])

    def __str__(self) -> str:
        """Return a table of the blocks, with notes on discarded training and dense matrices."""
        training = any(block.training for block in self.blocks)
        rows = [("block", "sparsity", "relative error", "seconds", "training")]
        for block in self.blocks:
            error, seconds = f"{block.relative_error:.4g}", f"{block.seconds:.1f}"
            rows.append((block.name, f"{block.sparsity:.4%}", error, seconds, block.training))
        rows.append(("total", f"{self.sparsity:.4%}", "", f"{self.seconds:.1f}", ""))
        lines = aligned([row if training else row[:-1] for row in rows], right=(1, 2, 3))
        lines += [note] if (note := self.training_note) else []
        if n := len(self.dense):
            lines.append(
                f"not pruned: {n} matri{'x' if n == 1 else 'ces'} of the blocks, see `dense`"
            )
        return "\n".join(lines)

    @property
    def training_note(self) -> str | None:
        """A line that says that training was discarded, None if it was not.

        Examples
        --------
        >>> blocks = [BlockReport("0", 0.1, 0.02, {}, 3.5, kept) for kept in (True, False)]
        >>> estimate = MemoryEstimate(device=4096, host=0, disk=0)
        >>> PruningReport(tuple(blocks), {}, estimate, None, 7.0).training_note
        'training did not lower the error of 1 of 2 blocks on the samples; it keeps its start'
        """
        compared = [block for block in self.blocks if block.training_kept is not None]
        n = sum(not block.training_kept for block in compared)
        if not n:
            return None
        keep = "it keeps its start" if n == 1 else "they keep their start"
        return (
            f"training did not lower the error of {n} of {len(compared)} blocks on the samples; "
            f"{keep}"
        )


def _sparsity(weights: Collection[WeightReport]) -> float:
    entries = sum(w.entries for w in weights)
    return 1 - sum(w.kept for w in weights) / entries if entries else 0.0
