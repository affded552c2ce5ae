"""Our entries in the state dict of an optimizer, beside those of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core import Method
from safe_core.layout import broadcasts

from .torch_groups import SETTINGS, Target, described, numbered

__all__ = ["Unpacked", "pack", "unpack"]

_PREFIX = "safe_"
_STEPS = _PREFIX + "steps"
_FROZEN = _PREFIX + "frozen"
_METHOD = _PREFIX + "method"

State = dict[Tensor, dict[str, Tensor]]


class Unpacked(NamedTuple):
    """What `unpack` finds.

    Attributes
    ----------
    base : dict
        The state dict of the base optimizer.
    own : dict of parameter to entries
        Ours, on the devices of the parameters and in dtypes of their own.
    steps : int
        Base steps taken.
    frozen : bool
        Whether the support is.
    """

    base: dict[str, Any]
    own: State
    steps: int
    frozen: bool


def pack(
    base: dict[str, Any],
    param_groups: list[dict[str, Any]],
    own: Mapping[Tensor, Mapping[str, Tensor]],
    method: Method,
    *,
    steps: int,
    frozen: bool,
) -> dict[str, Any]:
    """Return the state dict ``base`` with our entries in it, each named ``safe_...``.

    Step count and method go into every group.
    """
    state = {index: dict(entry) for index, entry in base["state"].items()}
    for index, parameter in numbered(base["param_groups"], param_groups):
        named = {_PREFIX + key: value for key, value in own.get(parameter, {}).items()}
        if named:
            state.setdefault(index, {}).update(named)
    ours = {_STEPS: steps, _METHOD: described(method), **({_FROZEN: True} if frozen else {})}
    groups = [{**_plain_options(group), **ours} for group in base["param_groups"]]
    return {**base, "state": state, "param_groups": groups}


def unpack(
    loaded: dict[str, Any],
    param_groups: list[dict[str, Any]],
    targets: Mapping[Tensor, Target],
    method: Method,
    importance: Any,
) -> Unpacked:
    """Take a state dict of `pack` apart, or raise a ValueError that says what does not fit.

    ``importance`` is what the optimizer was given as such: a mapping, a function or None.
    """
    groups, steps, frozen = _read_groups(loaded, param_groups, method)
    theirs: dict[Any, Any] = {}
    ours: dict[Any, dict[str, Tensor]] = {}
    for index, entry in loaded["state"].items():
        mine = {k[len(_PREFIX) :]: v for k, v in entry.items() if k.startswith(_PREFIX)}
        rest = {k: v for k, v in entry.items() if not k.startswith(_PREFIX)}
        theirs |= {index: rest} if rest else {}
        ours |= {index: mine} if mine else {}
    own: State = {}
    for index, parameter in numbered(groups, param_groups):
        entries = ours.get(index, {})
        flat = _read_direction(parameter, entries.pop("flat_direction", None), index)
        if parameter in targets and (parameter.requires_grad or index in ours):
            name = targets[parameter].name
            own[parameter] = _read_entries(name, parameter, entries, method, importance, frozen)
        elif entries:
            raise ValueError(f"state_dict makes parameter {index} sparse, which is not here")
        reuses = method.perturbation is not None and method.perturbation.reuse > 0
        if flat is not None and reuses and not frozen:
            own.setdefault(parameter, {})["flat_direction"] = flat
    return Unpacked({**loaded, "state": theirs, "param_groups": groups}, own, steps, frozen)


def _read_groups(
    loaded: dict[str, Any], param_groups: list[dict[str, Any]], method: Method
) -> tuple[list[dict[str, Any]], int, bool]:
    """Param groups as the base has them, the step count and whether supports are frozen."""
    if not isinstance(loaded.get("param_groups"), list) or "state" not in loaded:
        raise ValueError(
            "state_dict must hold 'state' and 'param_groups', got the keys "
            f"{', '.join(map(repr, loaded)) or 'none'}"
        )
    groups = [dict(group) for group in loaded["param_groups"]]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in param_groups]:
        raise ValueError("state_dict must have the parameter groups of this optimizer")
    steps = [group.pop(_STEPS, None) for group in groups]
    if not steps or not isinstance(steps[0], int):
        raise ValueError(f"state_dict must be that of a SparseOptimizer, got no {_STEPS!r}")
    for group in groups:
        found, wanted = group.pop(_METHOD, None), described(method)
        if found not in (None, wanted):
            raise ValueError(
                "state_dict must be that of an optimizer with the same method: this is "
                f"{wanted}, got {found}. To go on with another on purpose, drop "
                f"{_METHOD!r} from its param_groups"
            )
    frozen = bool(groups[0].get(_FROZEN, False))
    groups = [{k: v for k, v in group.items() if k != _FROZEN} for group in groups]
    for group, current in zip(groups, param_groups, strict=True):
        left = {k: current[k] for k in SETTINGS if k in current and k not in group}
        group.update(left)
    return groups, steps[0], frozen


def _read_entries(
    name: str,
    parameter: Tensor,
    entries: dict[str, Tensor],
    method: Method,
    importance: Any,
    frozen: bool,
) -> dict[str, Tensor]:
    """The entries of one sparse parameter, checked and cast."""
    full = tuple(parameter.shape)
    for key in ("support",) if frozen else ("anchor", "support"):
        shape = tuple(entries[key].shape) if key in entries else None
        if shape != full:
            raise ValueError(
                f"state_dict must hold {_PREFIX}{key} of shape {full} for {name}, got {shape}"
            )
    if "importance" in entries and not broadcasts(entries["importance"].shape, full):
        raise ValueError(
            f"state_dict must hold {_PREFIX}importance that broadcasts to {full} for {name}, "
            f"got shape {tuple(entries['importance'].shape)}"
        )
    # A function gives P from the first dual update on: there both are right.
    needed = (method.importance is not None or importance is not None) and not frozen
    if needed != ("importance" in entries) and not callable(importance):
        raise ValueError(
            f"state_dict must {'' if needed else 'not '}hold {_PREFIX}importance for {name}: "
            f"this optimizer has {'an' if needed else 'no'} importance"
        )
    wide = torch.promote_types(parameter.dtype, torch.float32)
    narrow = method.state_dtype is not None
    dtypes = {"anchor": torch.bfloat16 if narrow else wide, "support": torch.bool}
    return {
        key: value.detach().to(parameter.device, dtypes.get(key, value.dtype), copy=True)
        for key, value in entries.items()
    }


def _read_direction(parameter: Tensor, flat: Tensor | None, index: Any) -> Tensor | None:
    """A direction to reuse, on the device of its parameter."""
    if flat is None:
        return None
    if flat.shape != parameter.shape:
        raise ValueError(
            f"state_dict must hold {_PREFIX}flat_direction of shape {tuple(parameter.shape)} for "
            f"parameter {index}, got {tuple(flat.shape)}"
        )
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return flat.detach().to(parameter.device, wide, copy=True)


def _plain_options(group: dict[str, Any]) -> dict[str, Any]:
    """A packed param group without settings that are no numbers: they belong to the code."""
    return {
        key: value
        for key, value in group.items()
        if key not in SETTINGS or (key != "sparsity" and isinstance(value, (int, float)))
    }
