"""Merge our entries into the state dict of a base optimizer, and take them out again."""

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
from safe_core._readable import excerpt
from safe_core.constraints.float8 import FLOAT8
from safe_core.layout import broadcasts
from safe_core.packing import packed_shape

from .groups import numbered, pattern_of, settings_of
from .selection import Selected

__all__ = ["Unpacked", "described", "pack", "unpack"]

_PREFIX = "safe_"
_STEPS = _PREFIX + "steps"
_FROZEN = _PREFIX + "frozen"
_STARTED = _PREFIX + "started"
_METHOD = _PREFIX + "method"
_BASE = _PREFIX + "base"
_FINALIZED = _PREFIX + "finalized_at"
_NEVER = -1  # not None, because a checkpoint of tensors and numbers loads into the same types

_FACTS = (_STEPS, _FROZEN, _STARTED, _FINALIZED)

State = dict[Tensor, dict[str, Tensor]]


class Unpacked(NamedTuple):
    """The result of `unpack`.

    Attributes
    ----------
    base : dict
        The state dict of the base optimizer.
    own : dict of parameter to entries
        Our tensors, on the devices of the parameters. Their dtypes may differ from them.
    steps : int
        Number of base steps taken.
    frozen : bool
        Whether the support is final.
    finalized_at : int or None
        The step count at the last call of `SparseOptimizer.finalize`.
    """

    base: dict[str, Any]
    own: State
    steps: int
    frozen: bool
    finalized_at: int | None


def pack(
    base: Optimizer,
    own: Mapping[Tensor, Mapping[str, Tensor]],
    method: Method,
    *,
    steps: int,
    frozen: bool,
    started: bool,
    finalized_at: int | None,
) -> dict[str, Any]:
    """Return the state dict of ``base`` with our entries added, each named ``safe_...``.

    Every group holds the step count, the method and the flags. Before z and u have ``started``,
    their entries are placeholders with the right shapes, and `unpack` ignores them.
    """
    packed = base.state_dict()
    state = {index: dict(entry) for index, entry in packed["state"].items()}
    for index, parameter in numbered(packed["param_groups"], base.param_groups):
        named = {_PREFIX + key: value for key, value in own.get(parameter, {}).items()}
        if parameter in own:
            state.setdefault(index, {}).update(named)
    # In the groups, because torch.distributed.checkpoint keeps only "state" and "param_groups".
    ours = {
        _STEPS: steps,
        _FROZEN: frozen,
        _STARTED: started,
        _FINALIZED: _NEVER if finalized_at is None else finalized_at,
        _BASE: type(base).__qualname__,
    }
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
    """Split a state dict of `pack`, or raise a ValueError that names what does not fit.

    ``importance`` is the method's own, or the one that the user passed.
    """
    groups, facts = _read_groups(loaded, base, method)
    frozen = bool(facts.get(_FROZEN, False))
    finalized_at = facts.get(_FINALIZED, _NEVER)
    theirs: dict[Any, Any] = {}
    ours: dict[Any, dict[str, Tensor]] = {}
    for index, entry in loaded["state"].items():
        mine = {k[len(_PREFIX) :]: v for k, v in entry.items() if k.startswith(_PREFIX)}
        rest = {k: v for k, v in entry.items() if not k.startswith(_PREFIX)}
        theirs |= {index: rest} if rest else {}
        ours |= {index: mine} if mine else {}
    own: State = {}
    for index, parameter in numbered(groups, base.param_groups):
        if not facts.get(_STARTED, True):
            break
        entries = ours.get(index, {})
        flat = _read_direction(parameter, entries.pop("flat_direction", None), index)
        if parameter in selected and (parameter.requires_grad or index in ours):
            name = selected[parameter].name
            own[parameter] = _read_entries(name, parameter, entries, method, importance, frozen)
        elif entries:
            raise ValueError(
                f"state_dict makes parameter {index}, of shape {tuple(parameter.shape)}, sparse, "
                "which this optimizer keeps dense. Create the optimizer with the model=, where= "
                "and param groups of the saved run. Its sparse parameters are "
                f"{', '.join(t.name for t in selected.values())}"
            )
        if flat is not None and method.plan(has_radius=True).reuses and not frozen:
            own.setdefault(parameter, {})["flat_direction"] = flat
    return Unpacked(
        {**loaded, "state": theirs, "param_groups": groups},
        own,
        facts[_STEPS],
        frozen,
        None if finalized_at == _NEVER else finalized_at,
    )


def _read_groups(
    loaded: dict[str, Any], base: Optimizer, method: Method
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the base's param groups, and our entries in them."""
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
    if not groups or not isinstance(groups[0].get(_STEPS), int):
        raise ValueError(
            f"state_dict must be that of a SparseOptimizer, got no {_STEPS!r}. Load the state of "
            "a plain optimizer into base before this optimizer is made. A state that was saved "
            "with flatten_optimizer_state_dict=True has lost it, so save without that option"
        )
    facts = {key: groups[0][key] for key in _FACTS if key in groups[0]}
    for group, current in zip(groups, base.param_groups, strict=True):
        for key in _FACTS:
            group.pop(key, None)
        same = {_METHOD: _method_of(current, base, method), _BASE: type(base).__qualname__}
        for key, wanted in same.items():
            found = group.pop(key, wanted)
            if found != wanted:
                name = key.removeprefix(_PREFIX)
                raise ValueError(
                    f"state_dict must be that of an optimizer with the same {name}: this is "
                    f"{excerpt(wanted, found)}, got {excerpt(str(found), wanted)}. To continue "
                    f"with another on purpose, delete {key!r} from its param_groups"
                )
        group.update({k: v for k, v in settings_of(current, base).items() if k not in group})
    return groups, facts


def _read_entries(
    name: str,
    parameter: Tensor,
    entries: dict[str, Tensor],
    method: Method,
    importance: Importance | None,
    frozen: bool,
) -> dict[str, Tensor]:
    """Return the entries of one sparse parameter, checked and cast."""
    full = tuple(parameter.shape)
    has_anchor = method.constraint.has_anchor and not frozen
    held = "bool" if frozen else method.constraint.support_dtype
    shapes = {"support": packed_shape(full) if held == "uint8" else full}
    if has_anchor:
        shapes["anchor"] = full
    if held == FLOAT8:
        shapes["scale"] = ()
    for key, wanted in shapes.items():
        shape = tuple(entries[key].shape) if key in entries else None
        if shape != wanted:
            raise ValueError(
                f"state_dict must hold {_PREFIX}{key} of shape {wanted} for {name}, got {shape}"
            )
    if "scale" in entries and "scale" not in shapes:
        raise ValueError(
            f"state_dict must hold no {_PREFIX}scale for {name}: this optimizer stores no z in "
            f"{FLOAT8}"
        )
    if "importance" in entries and not broadcasts(entries["importance"].shape, full):
        raise ValueError(
            f"state_dict must hold {_PREFIX}importance that broadcasts to {full} for {name}, "
            f"got shape {tuple(entries['importance'].shape)}"
        )
    # A user's function returns P from the first dual update on, so a state may lack it.
    needed = importance is not None and not frozen
    starts_later = importance is not None and not importance.has_state_from_start
    if needed != ("importance" in entries) and not starts_later:
        raise ValueError(
            f"state_dict must {'' if needed else 'not '}hold {_PREFIX}importance for {name}: "
            f"this optimizer has {'an' if needed else 'no'} importance"
        )
    _check_motion(name, entries.get("motion"), method)
    wide = wide_dtype(torch, [parameter])
    # Not the parameter's dtype, which may be too narrow for the anchor.
    narrow = method.constraint.anchor_dtype is not None
    dtypes = {
        "anchor": torch.bfloat16 if narrow else wide,
        "support": getattr(torch, held),
        "motion": wide,
    }
    return {
        key: value.detach().to(parameter.device, dtypes.get(key, value.dtype), copy=True)
        for key, value in entries.items()
    }


def _check_motion(name: str, motion: Tensor | None, method: Method) -> None:
    """Raise unless ``motion`` is there exactly if the method needs it."""
    measures = method.measures_steps
    shape = None if motion is None else tuple(motion.shape)
    if shape != ((3,) if measures else None):
        raise ValueError(
            f"state_dict must hold {'three numbers as' if measures else 'no'} {_PREFIX}motion for "
            f"{name}, got {'none' if shape is None else f'shape {shape}'}"
        )


def _read_direction(parameter: Tensor, flat: Tensor | None, index: Any) -> Tensor | None:
    """Return a direction to reuse, on the device of its parameter."""
    if flat is None:
        return None
    if flat.shape != parameter.shape:
        raise ValueError(
            f"state_dict must hold {_PREFIX}flat_direction of shape {tuple(parameter.shape)} for "
            f"parameter {index}, got {tuple(flat.shape)}"
        )
    return flat.detach().to(parameter.device, wide_dtype(torch, [parameter]), copy=True)


def _plain_options(group: dict[str, Any], base: Optimizer) -> dict[str, Any]:
    """Return a packed param group without our options that are not numbers.

    Schedules and patterns are objects of the user's code. They would not survive
    ``torch.load(weights_only=True)``, and on loading the current group supplies them.
    """
    ours = settings_of(group, base)
    return {
        key: value
        for key, value in group.items()
        if key not in ours or (key != "sparsity" and isinstance(value, (int, float)))
    }


def described(value: Any) -> str:
    """Return a description of a method that is the same in every process.

    It shows functions by name, because their ``repr`` contains an address.

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
