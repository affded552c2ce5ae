"""The report of sparse parameters, which may be sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_core import Method, SplitState
from safe_core.backends.torch_shards import summed
from safe_core.report import TensorReport, outlook, sums

from .kernels import at_hand
from .state import HeldSplit

__all__ = ["tensor_reports"]


def tensor_reports(
    held: HeldSplit, method: Method, params: Sequence[Tensor], step: int, penalties: Sequence[float]
) -> list[TensorReport]:
    """The figures of parameters that are projected together; reads once."""
    values, targets = [p.detach() for p in params], held.targets(params)
    metric = method.metric(held.importance(params))
    split, update, final = outlook(method, values, held.split(params), step, targets, metric)
    parts = sums(at_hand(values), _shards(split), _shards(update), at_hand(final))
    table = torch.stack([part.to(parts[0].device, torch.float32) for part in parts])
    rows = zip(targets.names, values, penalties, summed(table, values).tolist(), strict=True)
    return [
        TensorReport.of(name, x.numel(), method.sparsity, found, penalty)
        for name, x, penalty, found in rows
    ]


def _shards(split: SplitState) -> SplitState:
    return SplitState(at_hand(split.anchor), at_hand(split.support))
