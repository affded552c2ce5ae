"""Select the sparse parameters of an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core import Layout, Method, Pattern
from safe_core.layout import chosen_layout

from .groups import GroupRules, pattern_of, settings_of
from .weights import prunable_weights

__all__ = ["Selected", "refuse_flat_parameters", "select_parameters"]


class Selected(NamedTuple):
    """Name, axis roles and pattern of one sparse parameter."""

    name: str
    layout: Layout | None
    pattern: Pattern


def select_parameters(
    base: Optimizer,
    method: Method,
    model: nn.Module | None,
    where: Any,
    layout: Any,
) -> dict[Tensor, Selected]:
    """Return the parameters to make sparse, in the order of the groups."""
    groups = base.param_groups
    weights = {} if model is None else prunable_weights(model)
    known = {} if model is None else {p: name for name, p in model.named_parameters()}
    if model is None and where is None and not any(group.get("sparsify") for group in groups):
        raise ValueError(
            "sparse parameters must be selected: pass model= (selects its linear and convolution "
            "weights) or where= (a function of name and parameter), or set "
            '"sparsify": True on a param group, got none of them'
        )
    selected: dict[Tensor, Selected] = {}
    names_seen = set(known.values())
    for g, group in enumerate(groups):
        settings = settings_of(group, base)
        GroupRules.read(settings, method)
        if method.plan().needs_learning_rate and "lr" not in group:
            raise ValueError(
                "base must have a learning rate, 'lr', in its param groups for a decoupled "
                f"penalty, got {type(base).__qualname__} without one"
            )
        sparsify = settings.get("sparsify")
        if sparsify is not None and not isinstance(sparsify, bool):
            raise TypeError(f"sparsify of a param group must be True or False, got {sparsify!r}")
        pattern = pattern_of(settings, method)
        placeholders = [f"param_groups[{g}][{i}]" for i in range(len(group["params"]))]
        names = group.get("param_names", placeholders)
        for p, given in zip(group["params"], names, strict=True):
            name = known.get(p, given)
            names_seen.add(name)
            if p.is_complex():
                raise TypeError(
                    f"{name} must be real, because the norm is over all parameters, got {p.dtype}"
                )
            # An option of the group wins over `where`, and `where` over the model.
            if sparsify is False:
                chosen = False
            elif where is not None:
                chosen = bool(where(name, p))
            else:
                chosen = p in weights if model is not None else bool(sparsify)
            if chosen:
                if not p.is_floating_point():
                    raise TypeError(f"{name} must be real floating to be sparse, got {p.dtype}")
                found = chosen_layout(name, p, layout, weights.get(p))
                selected[p] = Selected(name, found, pattern)
    if isinstance(layout, Mapping) and not set(layout) <= names_seen:
        strange = sorted(set(layout) - names_seen)[0]
        raise ValueError(f"layout names {strange!r}, which is no parameter of base or model")
    if not selected:
        raise ValueError(
            f"no parameter of base is sparse: model= and where= selected none of its "
            f"{sum(len(group['params']) for group in groups)}; does base hold the parameters of "
            "this model?"
        )
    return selected


def refuse_flat_parameters(model: nn.Module | None) -> None:
    """Raise for a model under the first version of FSDP.

    It flattens and concatenates parameters, so their axes and names are lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None:
        return
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model must be sharded by torch.distributed.fsdp.fully_shard, got one of "
            "FullyShardedDataParallel, whose parameters have lost their axes"
        )
