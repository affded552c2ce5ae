"""Which parameters of an optimizer are sparse, and what their param group asks of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core import Method, _checks
from safe_core.layout import Layout, chosen_layout
from safe_core.schedules import Constant, Schedule, as_schedule
from safe_core.sparsity import Pattern, as_pattern

from .weights import prunable_weights

__all__ = [
    "GroupRules",
    "Target",
    "described",
    "numbered",
    "pattern_of",
    "refuse_flat_parameters",
    "select_parameters",
    "settings_of",
]

_SETTINGS = ("rho", "penalty", "sparsity", "sparsify")


def settings_of(group: Mapping[str, Any], base: Optimizer) -> dict[str, Any]:
    """The options of a param group that are ours: Adadelta has a ``rho`` of its own."""
    return {key: group[key] for key in _SETTINGS if key in group and key not in base.defaults}


class Target(NamedTuple):
    """What the projection must know of one selected parameter."""

    name: str
    layout: Layout | None
    sparsity: Pattern


class GroupRules(NamedTuple):
    """Radius and penalty by the settings of a param group, or else by the method; checked.

    Examples
    --------
    >>> import safe_core
    >>> GroupRules.read({"rho": 0.0}, safe_core.safe(0.9, penalty=0.1)).perturbs
    False
    """

    rho: Schedule
    penalty: Schedule

    @property
    def perturbs(self) -> bool:
        """Whether the radius is not known to be 0 at every step."""
        return not (isinstance(self.rho, Constant) and self.rho.value == 0)

    def at(self, setting: str, step: int) -> float:
        """The radius or the penalty at a step."""
        value = getattr(self, setting)(step)
        return _checks.real(f"{setting} of a param group at step {step}", value, low=0.0)

    @classmethod
    def read(cls, settings: Mapping[str, Any], method: Method) -> GroupRules:
        """Read what `settings_of` finds now: options may be changed between steps."""
        if "rho" in settings and method.perturbation is None:
            raise ValueError(
                "rho of a param group must be left out for a method without perturbation, got "
                f"{settings['rho']!r}"
            )
        radius = Constant(0.0) if method.perturbation is None else method.perturbation.rho
        if "penalty" in settings and not method.splits:
            raise ValueError(
                "penalty of a param group must be left out for a method without z and u, got "
                f"{settings['penalty']!r}"
            )
        if "penalty" in settings and method.rescale_dual:
            raise ValueError(
                "penalty of a param group must be left out under rescale_dual, got "
                f"{settings['penalty']!r}"
            )
        return cls(
            as_schedule("rho of a param group", settings.get("rho", radius)),
            as_schedule("penalty of a param group", settings.get("penalty", method.penalty)),
        )


def select_parameters(
    base: Optimizer,
    method: Method,
    model: nn.Module | None,
    where: Any,
    layout: Any,
) -> dict[Tensor, Target]:
    """The parameters to make sparse, in the order of the groups."""
    groups = base.param_groups
    weights = {} if model is None else prunable_weights(model)
    known = {} if model is None else {p: name for name, p in model.named_parameters()}
    if model is None and where is None and not any(group.get("sparsify") for group in groups):
        raise ValueError(
            "which parameters are sparse is unknown: pass model= (its linear and convolution "
            "weights are taken) or where= (a function of name and parameter), or set "
            '"sparsify": True on a param group'
        )
    selected: dict[Tensor, Target] = {}
    names_seen = set(known.values())
    for g, group in enumerate(groups):
        settings = settings_of(group, base)
        GroupRules.read(settings, method)
        if method.decoupled and "lr" not in group:
            raise ValueError(
                "base must have a learning rate, 'lr', in its param groups for a decoupled "
                f"penalty, got {type(base).__qualname__} without"
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
                raise TypeError(f"{name} must be real, for the norm is over all, got {p.dtype}")
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
                selected[p] = Target(name, found, pattern)
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


def pattern_of(settings: Mapping[str, Any], method: Method) -> Pattern:
    """The constraint by the settings of a param group, or else by the method."""
    if "sparsity" not in settings:
        return method.sparsity
    try:
        return as_pattern(settings["sparsity"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"of a param group, {error}") from None


def refuse_flat_parameters(model: nn.Module | None) -> None:
    """Raise for a model under the first FSDP, whose parameters are flat pieces."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None:
        return
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model must be sharded by torch.distributed.fsdp.fully_shard, got one of "
            "FullyShardedDataParallel, whose parameters have lost their axes"
        )


def described(value: Any) -> str:
    """What a method says of itself, the same in every process.

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
        # Defaults go unsaid: what a later release adds must not change it.
        changed = [f for f in fields(value) if getattr(value, f.name) != f.default]
        parts = [f"{f.name}={described(getattr(value, f.name))}" for f in changed]
        return f"{type(value).__name__}({', '.join(parts)})"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    if type(value).__repr__ == object.__repr__:  # type: ignore[comparison-overlap]
        return type(value).__qualname__
    return repr(value)


def numbered(
    packed: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[Any, Tensor]]:
    """Pairs of the number that a packed state gives a parameter, and the parameter."""
    for saved, group in zip(packed, groups, strict=True):
        yield from zip(saved["params"], group["params"], strict=True)
