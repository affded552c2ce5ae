"""SAFE and SAFE+ as solvers of whole blocks: the recipe, without the training loop."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .. import _checks
from ..method import Method
from ..methods import safe
from ..patterns import Pattern
from ..schedules import Constant
from .base import Needs, Solver

__all__ = ["Reconstruction"]

_RADIUS = 2e-4  # of the paper for language models
_OPTIONS = ("rho", "penalty", "dual_update_interval")


@dataclass(frozen=True)
class Reconstruction(Solver):
    """Minimise the reconstruction error of a block under a sparsity constraint, by SAFE.

    ``f(x) = mean((block_x(inputs) - targets)**2)`` over all parameters x of the block. Its
    weights become sparse; biases and norms are trained too. The defaults are those of the paper:
    Adam, a linear warm-up and a linear decay of the learning rate, rho 2e-4, K = 32 and a
    constant penalty of 1e-3.

    Attributes
    ----------
    method : Method, optional
        Replaces ``safe_core.safe(sparsity, rho=2e-4)``, for example by ADMM. Its sparsity is
        replaced by the requested one, which must be a schedule for `safe_core.gmp` and
        `safe_core.imp_sam`.
    learning_rate : float
        The peak learning rate.
    betas : pair of float
        The betas of Adam.
    epochs : int
        Passes over the samples.
    warmup_epochs : int, optional
        Epochs of warm-up; ``min(2, epochs // 2)`` by default.
    batch_size : int
        Samples in a step.
    importance : {None, "wanda"}
        P of the projection: 1 (SAFE), or the mean square of each input feature in the dense
        block (SAFE+).
    rho, penalty, dual_update_interval : optional
        Arguments of `safe_core.safe`, if ``method`` is None.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", section 4.3,
    appendix B.4 and table 5.

    Examples
    --------
    >>> safe_plus = Reconstruction(importance="wanda")
    >>> safe_plus.rate(0, 16), safe_plus.rate(32, 16), safe_plus.rate(256, 16)
    (6.25e-06, 0.0002, 0.0001)
    >>> safe_plus.name, safe_plus.needs
    ('safe+', 'squares')
    """

    method: Method | None = None
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epochs: int = 30
    warmup_epochs: int | None = None
    batch_size: int = 8
    importance: Literal["wanda"] | None = None
    rho: Any = None
    penalty: Any = None
    dual_update_interval: int | None = None

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, Method):
            raise TypeError(
                f"method must be a safe_core.Method or None, got {_checks.shown(self.method)}"
            )
        _checks.real("learning_rate", self.learning_rate, low=0.0)
        if not isinstance(self.betas, tuple | list):
            raise TypeError(f"betas must be a pair of numbers, got {_checks.shown(self.betas)}")
        if len(self.betas) != 2 or not all(0 <= _checks.real("betas", b) < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        _checks.integer("epochs", self.epochs, low=1)
        if _checks.integer("warmup_epochs", self.warmup, low=0) > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs={self.epochs}, got {self.warmup_epochs!r}"
            )
        _checks.integer("batch_size", self.batch_size, low=1)
        _checks.choice("importance", self.importance, (None, "wanda"))
        if self.importance is not None and self.method is not None and self.method.importance:
            raise ValueError(
                f"importance must be None where the method has {self.method.importance!r}, got "
                f"{self.importance!r}"
            )
        if self.method is None:
            safe(0.5, **self._options())  # checks them
            return
        for name in _OPTIONS:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None if a method is given, which has its own, got "
                    f"{getattr(self, name)!r}"
                )

    def _options(self) -> dict[str, Any]:
        """Return the arguments of `safe_core.safe`."""
        given = {name: getattr(self, name) for name in _OPTIONS}
        return {"rho": _RADIUS} | {name: x for name, x in given.items() if x is not None}

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name on the command line: "safe" or "safe+"."""
        return "safe+" if self.importance else "safe"

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Which statistics of inputs are needed: none, or their squares for SAFE+."""
        return "squares" if self.importance else "nothing"

    @classmethod
    def named(cls) -> tuple[Solver, ...]:
        """Return SAFE and SAFE+ with their default settings."""
        return cls(), cls(importance="wanda")

    @property
    def warmup(self) -> int:
        """The number of warm-up epochs."""
        return min(2, self.epochs // 2) if self.warmup_epochs is None else self.warmup_epochs

    def configured(self, *, batch_size: int, **training: Any) -> Reconstruction:
        """Return this solver with other settings of its training, see `Solver.configured`."""
        known = {field.name for field in fields(self)}
        given = {name: value for name, value in training.items() if value is not None}
        for name in given:
            if name not in known:
                raise ValueError(f"{name} must be left out for {self.name}, got {given[name]!r}")
        return replace(self, batch_size=batch_size, **given)

    def describe(self, pattern: Pattern) -> list[tuple[str, str]]:
        """Return names and values of the settings under a pattern, for reports."""
        method, (first, second) = self.bound(pattern), self.betas
        radius = "none" if method.perturbation is None else _value(method.perturbation.rho)
        if method.perturbation is not None and method.perturbation.in_steps:
            radius += " mean steps of the optimizer"
        ranked = "magnitude times norm of input" if self.importance else "magnitude"
        return [
            ("solver", f"{type(self).__name__}, trained on the reconstruction error of each block"),
            (
                "weights ranked by",
                ranked if method.importance is None else f"`{method.importance!r}`",
            ),
            ("perturbation radius (rho)", radius),
            *_constraint_settings(method.constraint),
            ("optimizer", f"Adam, betas {first:g} and {second:g}"),
            ("peak learning rate", f"{self.learning_rate:g}"),
            ("epochs", str(self.epochs)),
            ("warm-up epochs", str(self.warmup)),
        ]

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at a step: up to the peak, then down to 0 after the last."""
        rising, steps = (n * steps_per_epoch for n in (self.warmup, self.epochs))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        falling = self.learning_rate * (steps - step) / max(1, steps - rising)
        return min(self.learning_rate, falling)

    def bound(self, sparsity: Pattern) -> Method:
        """Return the method with a sparsity."""
        if self.method is None:
            return safe(sparsity, **self._options())
        if self.method.constraint.masks_gradients and sparsity.schedule is None:
            raise ValueError(
                "sparsity must change over time for a method of masks, such as "
                f"schedules.cubic(0.5, steps=1000), got {sparsity!r}"
            )
        return replace(self.method, sparsity=sparsity)


_SYMBOLS = {"penalty": "penalty (lambda)", "dual_update_interval": "dual update interval (K)"}


def _constraint_settings(constraint: Any) -> list[tuple[str, str]]:
    """Return the settings of a constraint that are not the default."""
    rows = [("constraint", type(constraint).__name__)]
    for f in fields(constraint):
        value = getattr(constraint, f.name)
        if f.name in _SYMBOLS or value != f.default:
            rows.append((_SYMBOLS.get(f.name, f.name.replace("_", " ")), _value(value)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, (int, str)):
        return str(value)
    return f"{value.value:g}" if isinstance(value, Constant) else f"`{value!r}`"
