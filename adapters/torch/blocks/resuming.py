"""Check whether a run may resume an earlier one, before and as it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .fingerprints import sample_of
from .structure import block_name
from .task import Task
from .work_folder import earlier_run

__all__ = ["block_digests", "check_weights", "finished_blocks"]


def finished_blocks(task: Task) -> int:
    """Return the number of blocks that a run of the task finds finished in its folder.

    Only the first of several processes looks; the others return 0.

    Raises
    ------
    ValueError
        If the run in the folder had other settings, or began with another model.
    """
    work_dir = task.settings.work_dir
    if work_dir is None or not task.processes.first:
        return 0
    found = earlier_run(work_dir, task.described())
    if found is None:
        return 0
    check_weights(task, block_digests(task), found["notes"], found["blocks"])
    return len(found["blocks"])


def block_digests(task: Task) -> list[str]:
    """Return a digest of the parameters of each block."""
    return [sample_of(block.parameters()) for block in task.blocks]


def check_weights(
    task: Task, now: Sequence[str], dense: Sequence[str], finished: Sequence[Mapping[str, Any]]
) -> None:
    """Raise unless the blocks hold the weights with which the earlier run began, or its results.

    Parameters
    ----------
    task : Task
    now, dense : sequence of str
        Digests of the blocks, and of those with which the earlier run began.
    finished : sequence of mapping
        The entries of its finished blocks.
    """
    s = task.settings
    needed = s.two_streams or s.propagate == "dense"
    for i, (digest, then) in enumerate(zip(now, dense, strict=True)):
        pruned = i < len(finished) and digest == finished[i]["digest"]
        if digest != then and (not pruned or needed):
            state = "it was, when dense" if pruned else "it was"
            raise ValueError(
                f"model must be as {state} when the run in {Path(s.work_dir or '')} was begun, got "
                f"other weights in {block_name(task.name, i)}: load the dense model again"
            )
