"""Prune the weights that a run starts from."""

from __future__ import annotations

from dataclasses import replace

from .cells import Cell
from .plan import Learner, Plan
from .units import part

__all__ = ["with_pruned_start"]


def with_pruned_start(made: Plan, cell: Cell, device: str) -> Plan:
    """Return the plan with its initial weights pruned, if its method prunes them.

    The gradient of the score "snip" is that on the first batch of the first epoch, as in Lee et
    al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity".
    """
    if made.pruning is None:
        return made
    learner: Learner = part(cell.framework, "Learner")(replace(made, method=None), device)
    if made.pruning.score == "snip":
        batch = next(iter(made.batches(0)))
        return replace(made, start=learner.kept_by_gradient(made.pruning.method, *batch))
    return replace(made, start=learner.projected(made.pruning.method))
