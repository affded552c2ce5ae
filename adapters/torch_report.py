"""The report of sparse parameters, which may be sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safe_core import Method, SplitState
from safe_core.backends.torch_shards import local, summed
from safe_core.report import TensorReport, sums

from .torch_lists import widened
from .torch_split import HeldSplit

__all__ = ["tensor_reports"]


def tensor_reports(
    held: HeldSplit, method: Method, params: Sequence[Tensor], step: int, penalties: Sequence[float]
) -> list[TensorReport]:
    """The figures of parameters that are projected together; reads once."""
    values, targets = [p.detach() for p in params], held.targets(params)
    metric = method.metric(held.importance(params))
    anchor, support = held.split(params)
    split = SplitState([widened(a) for a in anchor], support)
    update = replace(method, state_dtype=None).dual_update(values, split, step, targets, metric)
    final = method.final_support(values, targets, metric)
    parts = sums(_at_hand(values), _shards(split), _shards(update), _at_hand(final))
    table = torch.stack([part.to(parts[0].device, torch.float32) for part in parts])
    rows = zip(targets.names, values, penalties, summed(table, values).tolist(), strict=True)
    return [
        TensorReport.of(name, x.numel(), method.sparsity, found, penalty)
        for name, x, penalty, found in rows
    ]


def _at_hand(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local(x) for x in tensors]


def _shards(split: SplitState) -> SplitState:
    return SplitState(_at_hand(split.anchor), _at_hand(split.support))
