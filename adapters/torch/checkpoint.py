"""Our entries in the state dict of an optimizer, beside those of the base."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from safe_core import Importance, Method
from safe_core._dtypes import wide_dtype
from safe_core.layout import broadcasts

from .groups import numbered, pattern_of, settings_of
from .selection import Selected

__all__ = ["Unpacked", "described", "pack", "unpack"]

_PREFIX = "safe_"
_STEPS = _PREFIX + "steps"
_FROZEN = _PREFIX + "frozen"
_STARTED = _PREFIX + "started"
_METHOD = _PREFIX + "method"
_BASE = _PREFIX + "base"

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
    base: Optimizer,
    own: Mapping[Tensor, Mapping[str, Tensor]],
    method: Method,
    *,
    steps: int,
    frozen: bool,
    started: bool,
) -> dict[str, Any]:
    """Return the state dict of ``base`` with our entries in it, each named ``safe_...``.

    Step count, method and the like go into every group. Before z and u have ``started``
    their entries only show what will be there.
    """
    packed = base.state_dict()
    state = {index: dict(entry) for index, entry in packed["state"].items()}
    for index, parameter in numbered(packed["param_groups"], base.param_groups):
        named = {_PREFIX + key: value for key, value in own.get(parameter, {}).items()}
        if parameter in own:
            state.setdefault(index, {}).update(named)
    ours = {_STEPS: steps, _FROZEN: frozen, _STARTED: started, _BASE: type(base).__qualname__}
    groups = [
        {**_plain_options(saved, base), **ours, _METHOD: _method_of(group, base, method)}
        for saved, group in zip(packed["param_groups"], base.param_groups, strict=True)
    ]
    return {**packed, "state": state, "param_groups": groups}


def _method_of(group: Mapping[str, Any], base: Optimizer, method: Method) -> str:
    return described(replace(method, sparsity=pattern_of(settings_of(group, base), method)))


def unpack(
    loaded: dict[str, Any],
    base: Optimizer,
    selected: Mapping[Tensor, Selected],
    method: Method,
    importance: Importance | None,
) -> Unpacked:
    """Take a state dict of `pack` apart, or raise a ValueError that says what does not fit.

    ``importance`` is the one in use: the method's own, or what the user handed in.
    """
    groups, steps, frozen, started = _read_groups(loaded, base, method)
    theirs: dict[Any, Any] = {}
    ours: dict[Any, dict[str, Tensor]] = {}
    for index, entry in loaded["state"].items():
        mine = {k[len(_PREFIX) :]: v for k, v in entry.items() if k.startswith(_PREFIX)}
        rest = {k: v for k, v in entry.items() if not k.startswith(_PREFIX)}
        theirs |= {index: rest} if rest else {}
        ours |= {index: mine} if mine else {}
    own: State = {}
    for index, parameter in numbered(groups, base.param_groups):
        if not started:
            break
        entries = ours.get(index, {})
        flat = _read_direction(parameter, entries.pop("flat_direction", None), index)
        if parameter in selected and (parameter.requires_grad or index in ours):
            name = selected[parameter].name
            own[parameter] = _read_entries(name, parameter, entries, method, importance, frozen)
        elif entries:
            raise ValueError(
                f"state_dict makes parameter {index}, of shape {tuple(parameter.shape)}, sparse, "
                f"which is not here; sparse are {', '.join(t.name for t in selected.values())}"
            )
        if flat is not None and method.plan(has_radius=True).reuses and not frozen:
            own.setdefault(parameter, {})["flat_direction"] = flat
    return Unpacked({**loaded, "state": theirs, "param_groups": groups}, own, steps, frozen)


def _read_groups(
    loaded: dict[str, Any], base: Optimizer, method: Method
) -> tuple[list[dict[str, Any]], int, bool, bool]:
    """Param groups as the base has them, step count, whether supports are frozen and z began."""
    if not isinstance(loaded.get("param_groups"), list) or "state" not in loaded:
        raise ValueError(
            "state_dict must hold 'state' and 'param_groups', got the keys "
            f"{', '.join(map(repr, loaded)) or 'none'}"
        )
    groups = [dict(group) for group in loaded["param_groups"]]
    sizes, own = ([len(g["params"]) for g in found] for found in (groups, base.param_groups))
    if sizes != own:
        raise ValueError(
            "state_dict must have the param groups of this optimizer, with "
            f"{', '.join(map(str, own))} parameters, got {', '.join(map(str, sizes)) or 'none'}"
        )
    steps = [group.pop(_STEPS, None) for group in groups]
    if not steps or not isinstance(steps[0], int):
        raise ValueError(
            f"state_dict must be that of a SparseOptimizer, got no {_STEPS!r}, which a flattened "
            "state of torch.distributed.checkpoint loses"
        )
    frozen, started = (bool(groups[0].get(key, key == _STARTED)) for key in (_FROZEN, _STARTED))
    for group, current in zip(groups, base.param_groups, strict=True):
        for key in (_FROZEN, _STARTED):
            group.pop(key, None)
        same = {_METHOD: _method_of(current, base, method), _BASE: type(base).__qualname__}
        for key, wanted in same.items():
            found = group.pop(key, wanted)
            if found != wanted:
                raise ValueError(
                    f"state_dict must be that of an optimizer with the same "
                    f"{key.removeprefix(_PREFIX)}: this is {wanted}, got {found}. To go on with "
                    f"another on purpose, drop {key!r} from its param_groups"
                )
        group.update({k: v for k, v in settings_of(current, base).items() if k not in group})
    return groups, steps[0], frozen, started


def _read_entries(
    name: str,
    parameter: Tensor,
    entries: dict[str, Tensor],
    method: Method,
    importance: Importance | None,
    frozen: bool,
) -> dict[str, Tensor]:
    """The entries of one sparse parameter, checked and cast."""
    full = tuple(parameter.shape)
    has_anchor = method.constraint.has_anchor and not frozen
    for key in ("anchor", "support") if has_anchor else ("support",):
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
    # A user's function gives P from the first dual update on: there both are right.
    needed = importance is not None and not frozen
    starts_later = importance is not None and not importance.has_state_from_start
    if needed != ("importance" in entries) and not starts_later:
        raise ValueError(
            f"state_dict must {'' if needed else 'not '}hold {_PREFIX}importance for {name}: "
            f"this optimizer has {'an' if needed else 'no'} importance"
        )
    wide = wide_dtype(torch, [parameter])
    narrow = method.constraint.anchor_dtype is not None
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
    return flat.detach().to(parameter.device, wide_dtype(torch, [parameter]), copy=True)


def _plain_options(group: dict[str, Any], base: Optimizer) -> dict[str, Any]:
    """A packed param group without settings that are no numbers: they belong to the code."""
    ours = settings_of(group, base)
    return {
        key: value
        for key, value in group.items()
        if key not in ours or (key != "sparsity" and isinstance(value, (int, float)))
    }


def described(value: Any) -> str:
    """Return a text of a method that is the same in every process.

    Functions go by their names, for their addresses change.

    Examples
    --------
    >>> described(functools.partial(round, ndigits=2))
    'partial(round, ndigits=2)'
    """
    if isinstance(value, functools.partial):
        given = [described(x) for x in (value.func, *value.args)]
        named = [f"{key}={described(x)}" for key, x in sorted(value.keywords.items())]
        return f"partial({', '.join([*given, *named])})"
    if is_dataclass(value) and not isinstance(value, type):
        # Omit default fields, so that fields of a later release do not change the text.
        changed = [f for f in fields(value) if getattr(value, f.name) != f.default]
        parts = [f"{f.name}={described(getattr(value, f.name))}" for f in changed]
        return f"{type(value).__name__}({', '.join(parts)})"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    if type(value).__repr__ == object.__repr__:  # type: ignore[comparison-overlap]
        return type(value).__qualname__
    return repr(value)
