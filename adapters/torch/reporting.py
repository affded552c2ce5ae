"""Report on sparse parameters, which may be sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_core import Importance, Method, Pattern, SplitState
from safe_core.backends.torch_sharding import summed
from safe_core.report import TensorReport, outlook, sums

from .kernels import local_shards
from .state import ParameterState

__all__ = ["tensor_reports"]


def tensor_reports(
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


def _shards(split: SplitState) -> SplitState:
    return SplitState(local_shards(split.anchor), local_shards(split.support))
