"""Plan the pruning of a folder, and measure what it takes: the work of ``--dry-run``."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from safe_core import Pattern
from safe_core._readable import readable_bytes, readable_seconds
from safe_core.adapters.torch.blocks.memory import MemoryEstimate
from safe_core.adapters.torch.blocks.processes import processes_of
from safe_core.adapters.torch.blocks.pruning import PruningPlan
from safe_core.adapters.torch.blocks.report import BlockReport, TimeEstimate
from safe_core.adapters.torch.blocks.work_folder import existing_folder

from .job import PruningJob
from .output import numbers_left_out, numbers_listed, printable, spread
from .preparation import check_job, naming_blocks, prepare

__all__ = ["FolderPlan", "PlannedWeight", "plan_folder"]


_PATTERNS = 6  # with more patterns, weights of one kind share a row


class PlannedWeight(NamedTuple):
    """A weight to prune.

    Attributes
    ----------
    name : str
    shape : tuple of int
    sparsity : float
        The fraction of zeros that a weight of this shape and pattern has got, which is rounded
        down to whole entries; the requested fraction if none was pruned to measure the time.
    pattern : str
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str


class FolderPlan(NamedTuple):
    """Hold what `prune_folder` would do, and the memory, disk space and time that it would take.

    Attributes
    ----------
    device : str
    blocks : str
        The name of the list of blocks.
    weights : list of PlannedWeight
    dense : dict of str to str
        The matrices that stay dense, with the reason.
    settings : list of (str, str)
        Names and values of the method's settings, with those that are derived from the number of
        training steps.
    samples, tokens, text_tokens : int
        Calibration samples, tokens in all of them, and tokens in the texts; 0 for inputs that are
        not text.
    model_bytes : int
        Memory of the model.
    memory : MemoryEstimate
        The predicted peak beside the model.
    disk_bytes, free_bytes : int
        Disk space for the new folder, and what is free.
    finished : int
        Finished blocks in the work folder.
    time : TimeEstimate
        Of a run from the first block on, without loading and saving.
    """

    device: str
    blocks: str
    weights: list[PlannedWeight]
    dense: dict[str, str]
    settings: list[tuple[str, str]]
    samples: int
    tokens: int
    text_tokens: int
    model_bytes: int
    memory: MemoryEstimate
    disk_bytes: int
    free_bytes: int
    finished: int
    time: TimeEstimate

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in all weights together."""
        entries = sum(_entries(w) for w in self.weights)
        return sum(w.sparsity * _entries(w) for w in self.weights) / max(1, entries)

    def table(self) -> Any:
        """Return a `rich.table.Table` of the weights.

        Weights of one shape share a row if their names differ in numbers only. If they have
        a few different patterns, there is a row for each, whose name lists the numbers.
        """
        from rich.table import Table

        table = Table(padding=(0, 1, 0, 0), show_footer=True, box=None)
        entries = sum(_entries(w) for w in self.weights)
        table.add_column("weights to prune", "total", overflow="fold", ratio=1)
        for header, footer in (
            ("number", f"{len(self.weights):,}"),
            ("shape", ""),
            ("entries", f"{entries:,}"),
            ("sparsity", f"{self.sparsity:.4%}"),
            ("pattern", ""),
        ):
            table.add_column(header, footer, justify="right", no_wrap=True)
        alike: dict[tuple[str, tuple[int, ...]], list[PlannedWeight]] = {}
        for w in self.weights:
            alike.setdefault((numbers_left_out(w.name), w.shape), []).append(w)
        for (name, shape), rows in alike.items():
            for pattern, some in _by_pattern(rows).items():
                size = " x ".join(map(str, shape)), f"{sum(map(_entries, some)):,}"
                share = spread([w.sparsity for w in some], ".4%", ".2%")
                shown = name if len(some) == len(rows) else numbers_listed([w.name for w in some])
                table.add_row(printable(shown), f"{len(some):,}", *size, share, pattern)
        return table

    def lines(self) -> Iterator[str]:
        """Yield lines on the method, the calibration, memory, disk space and time."""
        for name, value in self.settings:
            yield f"{name}: {value}"
        tokens = ""
        if self.tokens:
            tokens = f", {self.tokens:,} tokens, from {self.text_tokens:,} tokens of text"
        yield f"calibration: {self.samples:,} samples{tokens}"
        yield f"memory: model {readable_bytes(self.model_bytes)}, beside it {self.memory}"
        yield (
            f"disk: {readable_bytes(self.disk_bytes)} for the new folder, "
            f"{readable_bytes(self.free_bytes)} free"
        )
        measured = ", ".join(
            f"{block.seconds:.1f} s for {printable(block.name)}" for block in self.time.measured
        )
        total, n = len(self.time.blocks), len(self.time.blocks) - self.finished
        rest = f"{n} of {total} blocks" if self.finished else f"{total} blocks"
        yield (
            f"time: about {readable_seconds(self.time.after(self.finished))} for {rest} "
            f"(measured {measured}, and {self.time.recording:.1f} s before the first block), "
            "without loading and saving"
        )
        first = self.time.measured[0]  # the only one with the inputs that it has in the run
        yield f"error of {printable(first.name)} when pruned: {first.relative_error:.3g}"


def plan_folder(
    job: PruningJob,
    out: str | os.PathLike[str],
    *,
    say: Callable[[str], object] = lambda text: None,
) -> FolderPlan:
    """Make all checks of `prune_folder`, plan the run, measure one block, and write nothing.

    The model is loaded. One block of each kind is pruned in memory, on inputs of the first blocks,
    and restored, see `safe_core.adapters.transformers.PruningPlan.measure_time`. A model of n
    equal blocks thus takes about one n-th of the time of the run.

    Parameters
    ----------
    job : PruningJob
    out : path
        The new folder of the run.
    say : callable
        Called with a line of text before a block is pruned.

    Returns
    -------
    FolderPlan

    Raises
    ------
    TypeError, ValueError, OSError
        As `prune_folder`, before it prunes.

    Examples
    --------
    >>> plan_folder(PruningJob(".", ["text.txt"]), "out")
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    target = Path(out)
    processes = processes_of(distributed=job.settings.distributed)
    with processes.together():
        checked = check_job(job, target, processes)
        source, where, model, data, plan = prepare(job, checked, say, processes)
        finished = plan.finished_blocks()
        say("pruning one block of each kind, to measure the time")
        with naming_blocks(model, plan):
            time = plan.measure_time()
    samples = len(data.batches)
    return FolderPlan(
        device=where,
        blocks=plan.name,
        weights=_weights(model, plan, time.measured),
        dense={**plan.dense, **_outside(model, plan.name)},
        settings=[("method", job.method), *job.solver.describe(job.pattern, plan.steps or None)],
        samples=samples,
        tokens=0 if checked.texts is None else samples * job.length,
        text_tokens=data.tokens,
        model_bytes=sum(p.nbytes for p in model.parameters()),
        memory=plan.memory,
        disk_bytes=source.nbytes,
        free_bytes=shutil.disk_usage(existing_folder(target.absolute().parent)).free,
        finished=finished,
        time=time,
    )


def _weights(
    model: nn.Module, plan: PruningPlan, measured: Sequence[BlockReport]
) -> list[PlannedWeight]:
    """Return the weights to prune, with the sparsity of a weight alike that was pruned."""

    def kind(name: str) -> tuple[tuple[int, ...], Pattern]:
        return tuple(model.get_parameter(name).shape), plan.patterns[name]

    pruned: dict[tuple[tuple[int, ...], Pattern], float] = {}
    for block in measured:
        for own, weight in block.weights.items():
            pruned[kind(f"{block.name}.{own}")] = 1 - weight.kept / weight.entries
    rows = []
    for name in plan.patterns:
        shape, pattern = kind(name)
        share = pruned.get((shape, pattern), float(pattern.fractions()[-1]))
        rows.append(PlannedWeight(name, shape, share, pattern.describe()))
    return rows


def _outside(model: nn.Module, blocks: str) -> dict[str, str]:
    """Return the matrices outside the blocks, with the reason why they stay dense."""
    return {
        name: f"it is outside {blocks or 'the blocks'}"
        for name, p in model.named_parameters()
        if p.ndim >= 2 and not name.startswith(f"{blocks}." if blocks else "")
    }


def _by_pattern(weights: list[PlannedWeight]) -> dict[str, list[PlannedWeight]]:
    """Return the weights of each pattern, or all of them together if there are many patterns."""
    found: dict[str, list[PlannedWeight]] = {}
    for weight in weights:
        found.setdefault(weight.pattern, []).append(weight)
    return found if len(found) <= _PATTERNS else {"differs by name": weights}


def _entries(weight: PlannedWeight) -> int:
    return math.prod(weight.shape)
