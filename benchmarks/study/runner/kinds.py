"""The kinds of methods that a recipe can name, with their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import safe_core
from safe_core import Channel, Method, Unstructured, _checks
from safe_core.patterns import Pattern

__all__ = ["OF_PATTERN", "OF_RUN", "RECIPE_METHODS", "Kind", "Pruning"]


class Pruning(NamedTuple):
    """Describe how the initial weights of a run are pruned.

    Attributes
    ----------
    method : Method
        Its final projection selects the weights to keep.
    score : {"random", "snip", "magnitude"}
        "snip" is ``|w g|`` with the gradient g on one batch.
    """

    method: Method
    score: str


class Kind(NamedTuple):
    """A method that a recipe can name: its constructor and the course of its sparsity.

    Attributes
    ----------
    constructor : callable or None
        None for dense training.
    fixed : dict
        Arguments that the name implies.
    course : {"fixed", "rising", "drawn"}
        The sparsity over time: constant, rising to its target, or drawn at random.
    derives : bool
        Whether the constructor derives its numbers from ``steps``. A recipe that gives a penalty
        means the method as published, which gets no ``steps``.
    pattern : callable
        The pattern of a fraction that comes with a scope.
    prunes_start : bool
        Whether the initial weights are pruned, by the key ``score``. The method keeps the zeros.

    Examples
    --------
    >>> RECIPE_METHODS["cram_plus"].fixed
    {'plus': True}
    """

    constructor: Callable[..., Method] | None
    fixed: dict[str, Any] = {}  # noqa: RUF012 - never written to
    course: str = "fixed"
    derives: bool = False
    pattern: Callable[..., Pattern] = Unstructured
    prunes_start: bool = False

    def parameters(self) -> tuple[str, ...]:
        """Return the parameters of the constructor after the first, which is the sparsity."""
        if self.constructor is None:
            return ()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = inspect.signature(self.constructor).parameters.values()
        return tuple(p.name for p in found if p.kind in kinds)[1:]

    def options(self) -> tuple[str, ...]:
        """Return the parameters that a recipe can set."""
        if self.constructor is None:
            return ("rho",)
        names = [n for n in self.parameters() if n not in (*self.fixed, *OF_RUN)]
        if "penalty" in names:
            names.append("penalty_schedule")
        of_pattern = OF_PATTERN if self.pattern is Unstructured else ("scope", "floor")
        return (*names, *of_pattern, *_OF_COURSE[self.course])


OF_PATTERN = ("scope", "distribution", "floor", "ragged")
# Parameters of a user's function that the runner fills in.
OF_RUN = ("steps", "epochs", "steps_per_epoch", "seed")
_OF_COURSE = {
    "fixed": (),
    "rising": ("rise", "rise_epochs", "prune_every_epochs"),
    "drawn": ("among",),
}
_SCORES = ("random", "snip", "magnitude")


def at_start(sparsity: Any, *, score: str, rho: float = 0.0, adaptive: bool = False) -> Method:
    """Return training under the zeros of the pruned start."""
    _checks.choice("score", score, _SCORES)
    return safe_core.keep_zeros(rho=rho, adaptive=adaptive)


_SG = {"projected_gradient": True}
RECIPE_METHODS = {
    "dense": Kind(None),
    "safe": Kind(safe_core.safe, derives=True),
    "safe_sg": Kind(safe_core.safe, _SG, derives=True),
    "safe_multi": Kind(safe_core.safe, {}, "drawn", derives=True),
    "safe_sg_multi": Kind(safe_core.safe, _SG, "drawn", derives=True),
    "admm": Kind(safe_core.admm, derives=True),
    "magnitude": Kind(safe_core.magnitude),
    "gmp": Kind(safe_core.gmp, {}, "rising"),
    "iht": Kind(safe_core.iht),
    "imp_sam": Kind(safe_core.imp_sam, {}, "rising"),
    "at_start": Kind(at_start, prunes_start=True),
    "elsa": Kind(safe_core.elsa, {"scope": "tensor"}),
    "adasap": Kind(safe_core.adasap, pattern=Channel),
    "cram": Kind(safe_core.cram, {"plus": False}),
    "cram_plus": Kind(safe_core.cram, {"plus": True}),
    "cram_multi": Kind(safe_core.cram, {"plus": False}, "drawn"),
    "cram_plus_multi": Kind(safe_core.cram, {"plus": True}, "drawn"),
}
