"""Warn where 16-bit parameters round the steps of the base optimizer away."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core._calls import level_of_caller
from safe_core.backends.torch_sharding import local

from .run import Run
from .watching import is_capturing

__all__ = ["Sample", "samples_of", "warn_of_lost_steps"]

_ENTRIES = 2**16  # of each parameter, so that the copies stay small
_MOVED = 0.05  # the fraction of entries below which a step counts as lost


class Sample(NamedTuple):
    """A parameter, and a copy of evenly spaced entries of its local shard before a step."""

    p: Tensor
    before: Tensor


def samples_of(run: Run, sparse: Sequence[Tensor]) -> list[Sample]:
    """Return samples before the first step at the full learning rate, and [] at other steps.

    A schedule of torch notes the full rate of a param group in "initial_lr". In a warm-up, small
    steps that are lost tell nothing about later ones.
    """
    if run.checked_steps:
        return []
    narrow = [p for p in sparse if p.is_floating_point() and p.element_size() == 2]
    if not narrow:
        return []
    if any(map(is_capturing, narrow)) or not all(map(_is_full, run.groups)):
        return []
    copies = run.moved.copies(narrow) or [None] * len(narrow)  # x, where the parameters are not
    return [
        Sample(p, _entries(p if copy is None else copy).clone())
        for p, copy in zip(narrow, copies, strict=True)
    ]


@torch.no_grad()
def warn_of_lost_steps(run: Run, samples: Sequence[Sample]) -> None:
    """Warn once if nearly all entries with a gradient have the same bits after the step."""
    counts = []
    for p, before in samples:
        if p.grad is not None and not p.grad.is_sparse and before.numel():
            pushed = _entries(p.grad) != 0
            moved = (_entries(p) != before) & pushed
            counts.append(torch.stack([moved.sum(), pushed.sum()]).to(samples[0].p.device))
    if not counts:
        return
    moved, pushed = torch.stack(counts).sum(dim=0).tolist()  # the only read of the device
    if not pushed:  # all gradients are zero: check at a later step
        return
    run.checked_steps = True
    if moved < _MOVED * pushed:
        rates = [group["lr"] for group in run.groups if not torch.is_tensor(group.get("lr", 0.0))]
        at = f" at learning rate {max(rates):g}" if rates else ""
        warnings.warn(
            f"16-bit parameters round the steps away: the first step{at} moved "
            f"{moved / pushed:.2%} of the sparse weights that have a gradient; keep the parameters "
            "in float32 and use autocast",
            stacklevel=level_of_caller(),
        )


def _is_full(group: dict[str, Any]) -> bool:
    """Return whether a param group has its full learning rate, as far as the host knows."""
    rate, full = group.get("lr"), group.get("initial_lr", 0.0)
    if rate is None or torch.is_tensor(rate) or torch.is_tensor(full):
        return True
    return bool(rate > 0 and rate >= full)


def _entries(x: Tensor) -> Tensor:
    """Return evenly spaced entries of the local shard of a tensor."""
    shard = local(x.detach())
    return shard.reshape(-1)[:: max(1, shard.numel() // _ENTRIES)]
