"""Anchors, supports and importance of the sparse parameters, held in an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core import Method, SplitState, Targets, _checks
from safe_core.arguments import check_importance
from safe_core.backends.torch_shards import sharded_like
from safe_core.layout import place_importance

from .groups import Target

__all__ = ["HeldSplit"]


class HeldSplit(NamedTuple):
    """A view of what an optimizer holds of its sparse parameters.

    Attributes
    ----------
    state : dict of parameter to entries
        ``anchor``, ``support`` and ``importance``, changed in place.
    selected : mapping of parameter to Target

    Examples
    --------
    >>> p = torch.ones(2)
    >>> held = HeldSplit({p: {}}, {p: Target("weight", None, None)})
    >>> held.store([p], SplitState([torch.zeros(2)], [torch.tensor([True, False])]))
    >>> held.has(p), held.split([p]).anchor
    (True, [tensor([0., 0.])])
    """

    state: dict[Tensor, dict[str, Any]]
    selected: Mapping[Tensor, Target]

    def has(self, p: Tensor) -> bool:
        """Whether z and u of a parameter are there."""
        return p in self.state and "support" in self.state[p]

    def split(self, params: Sequence[Tensor]) -> SplitState:
        """Return the split of ``params``, without anchors where there are none."""
        entries = [self.state[p] for p in params]
        anchors = [e["anchor"] for e in entries if "anchor" in e]
        return SplitState(anchors, [e["support"] for e in entries])

    def store(self, params: Sequence[Tensor], split: SplitState) -> None:
        """Keep the split of ``params``."""
        for p, support in zip(params, split.support, strict=True):
            self.state[p]["support"] = support
        for p, anchor in zip(params, split.anchor, strict=bool(split.anchor)):
            self.state[p]["anchor"] = anchor

    def importance(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """Return P of ``params``, or what it is derived from; None where P = 1."""
        found = [self.state[p]["importance"] for p in params if "importance" in self.state[p]]
        return found if len(found) == len(params) else None

    def store_importance(self, params: Sequence[Tensor], found: Sequence[Tensor] | None) -> None:
        """Keep what `importance` returns."""
        if found is not None:
            for p, importance in zip(params, found, strict=True):
                self.state[p]["importance"] = importance

    def targets(self, params: Sequence[Tensor]) -> Targets:
        """Return what the projection must know of ``params``."""
        targets = [self.selected[p] for p in params]
        return Targets(tuple(t.name for t in targets), tuple(t.layout for t in targets))

    def by_pattern(
        self, method: Method, params: Sequence[Tensor]
    ) -> Iterator[tuple[Method, list[Tensor]]]:
        """Yield the parameters that are projected together, and ``method`` with their sparsity."""
        pools: dict[Any, list[Tensor]] = {}
        for p in params:
            pools.setdefault(self.selected[p].sparsity, []).append(p)
        for pattern, members in pools.items():
            own = pattern == method.sparsity
            yield method if own else replace(method, sparsity=pattern), members

    def placed(self, importance: Any, params: Sequence[Tensor]) -> list[Tensor]:
        """Return P of each parameter, checked, given its axes and sharded like it."""
        if not isinstance(importance, Mapping):
            raise TypeError(
                f"importance must be a mapping of name to tensor, got {_checks.shown(importance)}"
            )
        placed = []
        for p in params:
            name, layout, _ = self.selected[p]
            if name not in importance:
                raise ValueError(f"importance must name every sparse parameter, it lacks {name!r}")
            try:
                given = torch.as_tensor(importance[name], device=p.device)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(
                    f"importance of {name} must be a tensor, got {_checks.shown(importance[name])}"
                ) from None
            placed.append(place_importance(given, p.detach(), layout, name))
        check_importance(placed, [self.selected[p].name for p in params])
        pairs = zip(params, placed, strict=True)
        return [sharded_like(p.detach(), own).clone() for p, own in pairs]
