"""What pruning a model block by block tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .memory import MemoryEstimate

__all__ = ["BlockReport", "Progress", "PruningReport", "WeightReport"]


@dataclass(frozen=True)
class Progress:
    """Where pruning stands.

    Attributes
    ----------
    block, blocks : int
        The block at work and how many there are.
    epoch : int or None
        The epoch that has ended; None for the whole block.
    epochs : int
        How many there are in a block; 0 for a solver that does not train.
    loss : float
        Mean squared error of the reconstruction, in that epoch or in the end.
    seconds_left : float
        By the time that was taken so far.

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

    @property
    def done(self) -> float:
        """How many blocks are done; what comes with a block beside its epochs counts as one."""
        return self.block + (1.0 if self.epoch is None else (self.epoch + 1) / (self.epochs + 1))


class WeightReport(NamedTuple):
    """How sparse a weight has become.

    Attributes
    ----------
    entries, kept : int
        All entries and those on the support, exactly as many as asked. Of these some may be
        zero: those that were, or that the rounding to the model's dtype makes zero.
    tokens : int or None
        Inputs that the weight has seen; for stacked experts the fewest of an expert. None for
        SAFE without importance, which does not look at them.
    """

    entries: int
    kept: int
    tokens: int | None


class BlockReport(NamedTuple):
    """What has become of a block.

    Attributes
    ----------
    name : str
    loss : float
        Mean squared error of what the pruned block returns, against the targets.
    relative_error : float
        The same error over the mean square of the targets.
    weights : dict of str to WeightReport
    seconds : float

    Examples
    --------
    >>> block = BlockReport("layers.0", 0.1, 0.02, {"weight": WeightReport(64, 16, 512)}, 3.5)
    >>> estimate = MemoryEstimate(device=4096, host=0, disk=0)
    >>> PruningReport((block,), (), estimate, None, 3.5).sparsity
    0.75
    """

    name: str
    loss: float
    relative_error: float
    weights: dict[str, WeightReport]
    seconds: float


class PruningReport(NamedTuple):
    """What `prune_blocks` has done.

    Attributes
    ----------
    blocks : tuple of BlockReport
    dense : tuple of str
        Weights within blocks that no matrix product was seen to take, left as they are.
    predicted : MemoryEstimate
    peak : int or None
        Bytes at the peak over those at the start: as the allocator of the GPU counts them or,
        with ``measure_memory``, by tensors on the CPU; None where they were not measured.
    seconds : float
    """

    blocks: tuple[BlockReport, ...]
    dense: tuple[str, ...]
    predicted: MemoryEstimate
    peak: int | None
    seconds: float

    @property
    def sparsity(self) -> float:
        """The fraction of entries of the pruned weights that are off their supports."""
        found = [w for block in self.blocks for w in block.weights.values()]
        return 1 - sum(w.kept for w in found) / max(1, sum(w.entries for w in found))
