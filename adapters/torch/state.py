"""Read and write anchors, supports and importances in the state of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core import ArrayInfo, Pattern, SplitState, _checks
from safe_core._dtypes import wide_dtype
from safe_core.arguments import check_importance
from safe_core.backends.torch_sharding import is_sharded, sharded_like, stacked
from safe_core.constraints.float8 import dequantised
from safe_core.layout import place_importance
from safe_core.packing import packed, unpacked

from .selection import Selected

__all__ = ["ParameterState"]


class ParameterState(NamedTuple):
    """A view of the state that an optimizer holds for its sparse parameters.

    Attributes
    ----------
    state : dict of parameter to entries
        ``anchor``, ``support``, ``scale``, ``importance`` and ``motion``, changed in-place.
    selected : mapping of parameter to Selected
    support_dtype : str
        See `safe_core.constraints.Constraint.support_dtype`.

    Examples
    --------
    >>> p = torch.ones(2)
    >>> held = ParameterState({p: {}}, {p: Selected("weight", None, None)})
    >>> held.store([p], SplitState([torch.zeros(2)], [torch.tensor([True, False])]))
    >>> held.has(p), held.split([p]).anchor
    (True, [tensor([0., 0.])])
    """

    state: dict[Tensor, dict[str, Any]]
    selected: Mapping[Tensor, Selected]
    support_dtype: str = "bool"

    def has(self, p: Tensor) -> bool:
        """Return whether z and u of a parameter are initialised."""
        return p in self.state and "support" in self.state[p]

    def split(self, params: Sequence[Tensor]) -> SplitState:
        """Return anchors and supports of ``params``; no anchors if the method has none."""
        held = self._held(params)
        if self.packs:
            supports = zip(held.support, params, strict=True)
            return held._replace(support=[_unpacked(s, p.detach()) for s, p in supports])
        return dequantised(held)

    def anchors(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of ``params``, as `split` does, without reading packed supports."""
        return dequantised(self._held(params)).anchor

    def portions(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield lists of parameters whose anchors may be read at once.

        Anchors that are stored in float8 are copies when they are read, so one at a time.
        """
        if any("scale" in self.state[p] for p in params):
            yield from ([p] for p in params)
        elif params:
            yield list(params)

    def store(self, params: Sequence[Tensor], split: SplitState) -> None:
        """Store anchors and supports of ``params``."""
        for p, support in zip(params, split.support, strict=True):
            self.state[p]["support"] = packed(support) if self.packs else support
        for key, tensors in (("anchor", split.anchor), ("scale", split.scale)):
            for p, tensor in zip(params, tensors, strict=bool(tensors)):
                self.state[p][key] = tensor

    @property
    def packs(self) -> bool:
        """Whether supports are stored with one bit for each entry."""
        return self.support_dtype == "uint8"

    def _held(self, params: Sequence[Tensor]) -> SplitState:
        entries = [self.state[p] for p in params]
        keys = ("anchor", "support", "scale")
        return SplitState(*([e[key] for e in entries if key in e] for key in keys))

    def importance(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the state of the importance for ``params``; None where P = 1."""
        found = [self.state[p]["importance"] for p in params if "importance" in self.state[p]]
        return found if len(found) == len(params) else None

    def store_importance(self, params: Sequence[Tensor], found: Sequence[Tensor] | None) -> None:
        """Store the state of the importance, as `importance` returns it."""
        if found is not None:
            for p, importance in zip(params, found, strict=True):
                self.state[p]["importance"] = importance

    def motions(self, params: Sequence[Tensor]) -> Tensor:
        """Return the states of `safe_core.motion` as rows, 0 before the first step.

        They lie on the device of the first state, in the widest of their dtypes.
        """

        def held(p: Tensor) -> Tensor:
            found = self.state.get(p, {}).get("motion")
            if found is None:
                return torch.zeros(3, dtype=wide_dtype(torch, [p]), device=p.device)
            return found

        return stacked([held(p) for p in params]) if params else torch.zeros(0, 3)

    def store_motions(self, params: Sequence[Tensor], motions: Tensor) -> None:
        """Store the state of each parameter, as `motions` returns it.

        Each lies on the device of its parameter, in float32 or the wider dtype of the parameter.
        """
        rows = motions.unbind()
        if len({(p.dtype, p.device) for p in params}) > 1:
            pairs = zip(params, rows, strict=True)
            rows = tuple(row.to(p.device, wide_dtype(torch, [p])) for p, row in pairs)
        for p, row in zip(params, rows, strict=True):
            self.state[p]["motion"] = row

    def info(self, params: Sequence[Tensor]) -> ArrayInfo:
        """Return names and layouts of ``params``."""
        chosen = [self.selected[p] for p in params]
        return ArrayInfo(tuple(s.name for s in chosen), tuple(s.layout for s in chosen))

    def pools(self, params: Sequence[Tensor]) -> Iterator[tuple[Pattern, list[Tensor]]]:
        """Yield the parameters that are projected together, with their pattern."""
        pools: dict[Pattern, list[Tensor]] = {}
        for p in params:
            pools.setdefault(self.selected[p].pattern, []).append(p)
        yield from pools.items()

    def placed(self, importance: Any, params: Sequence[Tensor]) -> list[Tensor]:
        """Return P of each parameter, checked, with its axes and sharded like it."""
        if not isinstance(importance, Mapping):
            raise TypeError(
                f"importance must be a mapping of name to tensor, got {_checks.shown(importance)}"
            )
        placed = []
        for p in params:
            name, layout = self.selected[p].name, self.selected[p].layout
            if name not in importance:
                raise ValueError(f"importance must name every sparse parameter, it lacks {name!r}")
            try:
                given = importance[name]
                if not isinstance(given, (int, float)):
                    given = torch.as_tensor(given, device=p.device)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(
                    f"importance of {name} must be a tensor, got {_checks.shown(importance[name])}"
                ) from None
            placed.append(place_importance(given, p.detach(), layout, name).to(p.device))
        check_importance(placed, [self.selected[p].name for p in params])
        pairs = zip(params, placed, strict=True)
        # Copies: the caller may change its tensors in-place later.
        return [sharded_like(p.detach(), own).clone() for p, own in pairs]


def _unpacked(support: Tensor, p: Any) -> Tensor:
    found = unpacked(support, p)
    # Packing replicates an axis that is cut within a byte.
    return found.redistribute(p.device_mesh, p.placements) if is_sharded(p) else found
