"""Report on sparse parameters, which may be sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_core import Importance, Method, Pattern, SplitState, _checks
from safe_core.advice import Course
from safe_core.backends.torch_sharding import summed
from safe_core.finalization import Finalized, describe, measure
from safe_core.report import Report, TensorReport, outlook, sums

from .kernels import local_shards
from .run import Run
from .state import ParameterState

__all__ = ["describe_final", "report"]


def report(run: Run, steps: int | None) -> Report:
    """Return the figures of all sparse parameters, and the facts that they are judged by."""
    if steps is not None:
        _checks.integer("steps", steps, low=1)
    if run.frozen:
        raise ValueError("report() must come before the support is frozen, got frozen=True")
    found: dict[Tensor, TensorReport] = {}
    patterns: list[Pattern] = []
    with run.as_started() as sparse:
        state = run.parameters
        for pattern, members in state.pools(sparse):
            penalties = run.magnitudes("penalty", members)
            rows = _tensor_reports(
                state, run.method, run.source, pattern, members, run.steps, penalties
            )
            found.update(zip(members, rows, strict=True))
            patterns.append(pattern)
    rules = [
        run.rules_of(group)
        for group in run.groups
        if any(p in run.selected for p in group["params"])
    ]
    names = [run.selected[p].name for p in sparse if p.dtype.itemsize == 2]
    # Groups may have penalties of their own. Those of the first show the length of the run.
    course = Course(
        run.method.constraint,
        tuple(patterns),
        rules[0].penalty,
        steps,
        narrow=tuple(names),
        idle=tuple(run.idle()),
    )
    return Report(run.steps, [found[p] for p in sparse], course=course)


def _tensor_reports(
    state: ParameterState,
    method: Method,
    source: Importance | None,
    pattern: Pattern,
    params: Sequence[Tensor],
    step: int,
    penalties: Sequence[float],
) -> list[TensorReport]:
    """Return the figures of parameters that are projected together, with one host read.

    Sums are computed over local shards and then added over the processes.
    """
    values, info = [p.detach() for p in params], state.info(params)
    held = state.importance(params)
    metric = None if source is None or held is None else source.metric(held, joint=pattern.joint)
    compared = outlook(method, values, state.split(params), step, info, metric, pattern)
    split, update, final = compared
    parts = sums(local_shards(values), _shards(split), _shards(update), local_shards(final))
    table = torch.stack([part.to(parts[0].device, torch.float32) for part in parts])
    rows = zip(info.names, values, penalties, summed(table, values).tolist(), strict=True)
    return [
        TensorReport.of(name, x.numel(), pattern, found, penalty)
        for name, x, penalty, found in rows
    ]


def describe_final(
    state: ParameterState, params: Sequence[Tensor], support: Sequence[Tensor], steps: int
) -> Finalized:
    """Return what the projection onto ``support`` removes, with one host read.

    Raise a ValueError if a parameter holds NaN or infinity.
    """
    values = [p.detach() for p in params]
    parts = [
        torch.stack([number.to(_double(x.device)) for number in measure(x, kept)])
        for x, kept in zip(local_shards(values), local_shards(support), strict=True)
    ]
    names, sizes = state.info(params).names, [x.numel() for x in values]
    if not parts:
        return describe(steps, names, sizes, [])
    table = torch.stack([part.to(parts[0].device) for part in parts])
    norms = slice(0, 2)
    table[:, norms] = table[:, norms].square()  # squares of the shards' norms add up
    table = summed(table, values)
    table[:, norms] = table[:, norms].sqrt()
    return describe(steps, names, sizes, table.tolist())


def _double(device: torch.device) -> torch.dtype:
    """Return float64, which holds large counts and squares; Apple's GPUs have float32 only."""
    return torch.float32 if device.type == "mps" else torch.float64


def _shards(split: SplitState) -> SplitState:
    return SplitState(local_shards(split.anchor), local_shards(split.support))
