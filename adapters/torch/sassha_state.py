"""The state that `Sassha` holds for each parameter, and how a step changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safe_core.random_numbers import rademacher
from safe_core.sassha import SasshaRule

from .products import HessianEstimates

__all__ = ["advance", "probes", "rate_of", "started"]

Groups = Sequence[Mapping[str, Any]]
States = Mapping[Tensor, dict[str, Any]]


def started(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Return the entries of a parameter, and create them where there are none.

    Every parameter counts its steps and its Hessian products, because some may join late.

    Examples
    --------
    >>> started({}, torch.ones(2))["exp_avg"]
    tensor([0., 0.])
    """
    if not state:
        state["step"] = state["hessian_count"] = 0
        for key in ("exp_avg", "hessian_diagonal"):
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return state


def rate_of(group: Mapping[str, Any]) -> float | Tensor:
    """Return the learning rate; torch accepts a tensor with one entry and any shape.

    Examples
    --------
    >>> rate_of({"lr": torch.tensor([0.5])})
    tensor(0.5000)
    """
    rate: float | Tensor = group["lr"]
    return rate.reshape(()) if isinstance(rate, Tensor) and rate.numel() == 1 else rate


def probes(groups: Groups, states: States, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the random signs of parameters for their next Hessian product.

    They depend on the seed, the number of the product and the place of the parameter among all
    of the groups. So a resumed run, and every process, draws the same.
    """
    numbered = enumerate((p, group["seed"]) for group in groups for p in group["params"])
    known = {p: (place, seed) for place, (p, seed) in numbered}
    found = []
    for p in params:
        place, seed = known[p]
        index = states.get(p, {}).get("hessian_count", 0)
        found += rademacher([p], seed, index, places=[place])
    return found


def advance(
    states: States,
    params: Sequence[Tensor],
    rule: SasshaRule,
    learning_rate: float | Tensor,
    estimates: HessianEstimates,
) -> None:
    """Take the step of parameters that share their counts, in place."""
    held = [states[p] for p in params]
    step, updates = held[0]["step"], held[0]["hessian_count"]
    diagonals = [state["hessian_diagonal"] for state in held]
    means = [state["exp_avg"] for state in held]
    if rule.needs_product(step):
        rule.average_curvatures(diagonals, estimates.of(params), out=diagonals)
        updates += 1
    gradients = [p.grad for p in params]
    rule.average_gradients(means, gradients, out=means)
    rule.moved(
        params,
        means,
        diagonals,
        learning_rate=learning_rate,
        step=step + 1,
        hessian_count=updates,
        out=params,
    )
    for state in held:
        state["step"], state["hessian_count"] = step + 1, updates
