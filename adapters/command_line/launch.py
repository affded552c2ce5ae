"""Run a command as one of several processes that torchrun has started."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import torch
import torch.distributed as dist
import typer

from safe_core.adapters.torch.blocks.processes import Processes, processes_of

from .errors import INTERRUPTED

__all__ = ["launched", "own_device"]

_GRACE = 1.0  # seconds in which another process cleans up, or prints its message


@contextmanager
def launched() -> Iterator[Processes]:
    """Join the processes that torchrun has started, and yield them; one process otherwise.

    Only the first prints. An error in one process ends all, and one of them prints it.

    Examples
    --------
    >>> with launched() as processes:
    ...     processes.first, processes.size
    (True, 1)
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes()
        return
    dist.init_process_group()
    processes = processes_of()
    try:
        with _silent(processes), processes.together():
            yield processes
            processes.meet()
    except BaseException as error:
        # torchrun ends all processes once one has ended, so the first to end is the one that
        # prints, after the one that removes files.
        grace = (not processes.first) + (not processes.reports)
        with suppress(KeyboardInterrupt):
            time.sleep(grace * _GRACE)
        if processes.reports:
            raise
        raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None
    dist.destroy_process_group()


@contextmanager
def _silent(processes: Processes) -> Iterator[None]:
    """Print nothing, except in the first process."""
    if processes.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, if torchrun has started one process for each.

    Raises
    ------
    ValueError
        If this machine has fewer GPUs than processes.

    Examples
    --------
    >>> own_device(torch.device("cpu"))
    device(type='cpu')
    """
    if device.type == "cpu" or device.index is not None or not dist.is_initialized():
        return device
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if rank >= count:
        raise ValueError(
            f"torchrun must start at most one process for each GPU, got process {rank} on a "
            f"machine with {count}: pass --nproc-per-node {count}"
        )
    torch.accelerator.set_device_index(rank)
    return torch.device(device.type, rank)
