"""Read the options of param groups that override those of the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from safe_core import Method, Pattern, _checks, untuned
from safe_core.finalization import planned_steps
from safe_core.patterns import as_pattern
from safe_core.schedules import Constant, Cubic, Schedule, as_schedule, cubic, is_zero

__all__ = ["GroupRules", "numbered", "pattern_of", "settings_of"]

_SETTINGS = ("rho", "penalty", "sparsity", "sparsify")


def settings_of(group: Mapping[str, Any], base: Optimizer) -> dict[str, Any]:
    """Return the options of a param group that are ours.

    An option of the base with the same name is not ours: Adadelta has its own ``rho``.
    """
    return {key: group[key] for key in _SETTINGS if key in group and key not in base.defaults}


class GroupRules(NamedTuple):
    """Radius and penalty of a param group; the default is the method's.

    Examples
    --------
    >>> import safe_core
    >>> GroupRules.read({"rho": 0.0}, safe_core.safe(0.9, penalty=0.1)).perturbs
    False
    """

    rho: Schedule
    penalty: Schedule
    own: frozenset[str] = frozenset()
    """The settings that the group overrides."""

    @property
    def perturbs(self) -> bool:
        """Whether the radius may be non-zero at some step."""
        return not is_zero(self.rho)

    def at(self, setting: str, step: int) -> float:
        """Return the radius or the penalty at a step."""
        value = getattr(self, setting)(step)
        name = f"{setting} of a param group" if setting in self.own else setting
        return _checks.real(f"{name} at step {step}", value, low=0.0)

    @classmethod
    def read(cls, settings: Mapping[str, Any], method: Method) -> GroupRules:
        """Read the result of `settings_of`; call it at every step, as options may change."""
        if "rho" in settings and method.perturbation is None:
            raise ValueError(
                "rho of a param group must be left out for a method without perturbation, got "
                f"{settings['rho']!r}"
            )
        radius = Constant(0.0) if method.perturbation is None else method.perturbation.rho
        own = method.constraint.penalty
        if "penalty" in settings and own is None:
            raise ValueError(
                "penalty of a param group must be left out for a method without z and u, got "
                f"{settings['penalty']!r}"
            )
        if "penalty" in settings and not method.constraint.allows_other_penalty:
            raise ValueError(
                "penalty of a param group must be left out under rescale_dual, got "
                f"{settings['penalty']!r}"
            )
        return cls(
            as_schedule("rho of a param group", settings.get("rho", radius)),
            as_schedule("penalty of a param group", settings.get("penalty", own or Constant(0.0))),
            frozenset(settings),
        )


def pattern_of(settings: Mapping[str, Any], method: Method) -> Pattern:
    """Return the pattern of a param group; the default is the method's.

    Where the method was made for a number of steps, or its sparsity rises along a cubic from 0, a
    number as the sparsity of a group rises over the same steps.
    """
    if "sparsity" not in settings:
        return method.sparsity
    try:
        found = as_pattern(settings["sparsity"])
        found = _with_rise_of(method, found)
        method.constraint.check(found)
        return found
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("sparsity", "sparsity of a param group", 1)) from None


def _with_rise_of(method: Method, pattern: Pattern) -> Pattern:
    """Return a pattern that rises as that of the method does."""
    schedules = [part.schedule for part in method.sparsity.parts]
    for found in schedules:
        if isinstance(found, Cubic) and found == cubic(found.value, found.steps, every=found.every):
            return pattern.rising(found.steps, found.every)
    # The pattern of the method may have no sparsity in between, such as 2:4.
    constraint = method.constraint
    steps, every = planned_steps(constraint, constraint.penalty), constraint.update_interval
    if steps is None or every is None or any(found is not None for found in schedules):
        return pattern
    return untuned.rising(pattern, steps, every)


def numbered(
    packed: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[Any, Tensor]]:
    """Yield each parameter after its index in a packed state dict."""
    for saved, group in zip(packed, groups, strict=True):
        yield from zip(saved["params"], group["params"], strict=True)
