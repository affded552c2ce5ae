"""The settings of `prune_blocks`: from Python, in a plan and on the command line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core.reconstruction import BlockSettings

from .work_folder import existing_folder

__all__ = ["OFFLOADS", "PruningSettings", "writing_nothing"]

OFFLOADS = ("cpu", "disk", "none")


@dataclass(frozen=True, kw_only=True)
class PruningSettings(BlockSettings):
    """Settings of `prune_blocks`.

    Attributes
    ----------
    propagate, target_inputs, batch_size, seed
        As in `safe_core.reconstruction.BlockSettings`.
    blocks : str or torch.nn.Module, optional
        The `ModuleList`, or `Sequential`, of the blocks, or its name; "" is the model itself. By
        default the `ModuleList` with the most parameters. Prune an encoder and a decoder by two
        calls, one after the other.
    where : callable, optional
        ``where(name, parameter) -> bool`` selects the weights to prune.
    device : torch.device or str, optional
        Where blocks are pruned; by default the device of the model.
    offload : {"cpu", "disk", "none"}
        Where the activations of all samples are kept: on the CPU, in memory-mapped files under
        ``work_dir``, or on the device.
    work_dir : path, optional
        A folder for finished blocks: new, empty, or that of an earlier run. The same call resumes
        after the last finished block, and the result is bit-identical. A solver of your own must
        then be a function or a dataclass, so that it can be compared.
    distributed : bool
        Whether all processes of `torch.distributed` prune the model together, if it is
        initialised, see `prune_blocks`. If it is False, each process prunes a model of its own.
    shard : bool
        Whether several processes share the optimizer state of a block in training. This takes
        less memory, and the steps are the same up to rounding.

    Raises
    ------
    TypeError, ValueError
        If a field is of another kind or out of its range.

    Examples
    --------
    >>> PruningSettings(offload="disk")
    Traceback (most recent call last):
    ValueError: work_dir must name a folder for offload="disk", got None
    """

    blocks: str | nn.Module | None = None
    where: Callable[[str, Tensor], bool] | None = None
    device: torch.device | str | None = None
    offload: Literal["cpu", "disk", "none"] = "cpu"
    work_dir: str | os.PathLike[str] | None = None
    distributed: bool = True
    shard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.flag("distributed", self.distributed)
        _checks.flag("shard", self.shard)
        _checks.choice("offload", self.offload, OFFLOADS)
        if self.offload == "disk" and self.work_dir is None:
            raise ValueError('work_dir must name a folder for offload="disk", got None')


@contextmanager
def writing_nothing(settings: PruningSettings) -> Iterator[PruningSettings]:
    """Yield settings of a run that leaves no file.

    With ``offload="disk"`` activations are kept in a temporary folder beside ``work_dir``.

    Examples
    --------
    >>> with writing_nothing(PruningSettings(work_dir="work")) as settings:
    ...     settings.work_dir is None
    True
    """
    with ExitStack() as stack:
        folder = None
        if settings.offload == "disk":
            beside = existing_folder(Path(settings.work_dir or "").absolute().parent)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=beside))
        yield replace(settings, work_dir=folder)
