"""Warn where 16-bit parameters round the steps of the base optimizer away."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core._calls import level_of_caller
from safe_core.backends.torch_sharding import local

from .run import Run, known_rate
from .watching import is_capturing

__all__ = ["begin_window", "end_window"]

_STEPS = 32  # between the two looks at the parameters
_ENTRIES = 2**16  # about as many of each parameter are looked at, so that the copies stay small
_MOVED = 0.05  # the fraction of entries below which the steps count as lost


class Window(NamedTuple):
    """Remember how some steps began.

    Attributes
    ----------
    start : int
        The step before which they start.
    rates : list of float
        The learning rate of each param group.
    samples : list of tuple, or None
        The 16-bit sparse parameters of groups with a learning rate above 0, each with a copy of
        evenly spaced entries of its local shard. None while the learning rate rises.
    """

    start: int
    rates: list[float]
    samples: list[tuple[Tensor, Tensor]] | None


@torch.no_grad()
def begin_window(run: Run, sparse: Sequence[Tensor]) -> None:
    """Remember some entries of the 16-bit parameters, once, before a base step.

    A run is judged by 32 steps at once: bases that round stochastically, or that add up what they
    round away, need several to move an entry. A window starts anew after the learning rate has
    risen, because lost steps of a warm-up tell nothing about later ones. A run that was resumed was
    judged at its beginning, and one whose learning rates are on an accelerator is not judged.
    """
    if run.checked_steps:
        return
    window: Window | None = run.window
    rises = window is not None and _rises(run.groups, window.rates)
    if window is not None and window.samples is not None and not rises:
        return
    own = {id(p) for p in sparse if p.is_floating_point() and p.element_size() == 2}
    rates = [known_rate(group) for group in run.groups]
    known = [rate for rate in rates if rate is not None]
    resumed = window is None and run.steps
    if not own or resumed or len(known) < len(rates) or any(map(is_capturing, sparse[:1])):
        run.checked_steps, run.window = True, None
        return
    if rises:  # nothing is copied in the steps of a warm-up
        run.window = Window(run.steps, known, None)
        return
    narrow = [
        p
        for group, rate in zip(run.groups, known, strict=True)
        for p in group["params"]
        if rate and id(p) in own
    ]
    copies = run.moved.copies(narrow) or [None] * len(narrow)  # x, where the parameters are not
    samples = [
        (p, _entries(p if copy is None else copy).clone())
        for p, copy in zip(narrow, copies, strict=True)
    ]
    run.window = Window(run.steps, known, samples)


@torch.no_grad()
def end_window(run: Run) -> None:
    """Warn once, after 32 steps, if nearly all entries with a gradient have the same bits."""
    window: Window | None = run.window
    if run.checked_steps or window is None or window.samples is None:
        return
    if run.steps + 1 < window.start + _STEPS:
        return
    run.checked_steps, run.window = True, None
    counts = []
    for p, before in window.samples:
        if p.grad is not None and not p.grad.is_sparse and before.numel():
            pushed = _entries(p.grad) != 0
            moved = (_entries(p) != before) & pushed
            counts.append(torch.stack([moved.sum(), pushed.sum()]).to(window.samples[0][0].device))
    if not counts:
        return
    moved, pushed = torch.stack(counts).sum(dim=0).tolist()  # the only read of the device
    if moved < _MOVED * pushed:
        warnings.warn(
            f"16-bit parameters round the steps away: {_STEPS} steps at learning rate "
            f"{max(window.rates):g} moved {moved / pushed:.2%} of the sparse weights that have a "
            "gradient; keep the parameters in float32 and use autocast",
            stacklevel=level_of_caller(),
        )


def _rises(groups: Sequence[dict[str, Any]], before: Sequence[float]) -> bool:
    """Return whether a learning rate is higher than before."""
    pairs = zip(map(known_rate, groups), before, strict=False)
    return any(now is not None and now > then for now, then in pairs)


def _entries(x: Tensor) -> Tensor:
    """Return evenly spaced entries of the local shard of a tensor."""
    shard = local(x.detach())
    # An odd stride visits every column of rows whose length is a power of two.
    return shard.reshape(-1)[:: shard.numel() // _ENTRIES | 1]
