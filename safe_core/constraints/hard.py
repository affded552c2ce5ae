"""Project x itself during training (iterative hard thresholding)."""

from __future__ import annotations

from dataclasses import dataclass

from safe_core import _checks
from safe_core.backends import Array
from safe_core.patterns import Pattern
from safe_core.step import Operation

from .base import Constraint
from .dual import every

__all__ = ["HardThreshold"]


@dataclass(frozen=True)
class HardThreshold(Constraint):
    """Constraint that projects x itself, ``x <- proj(x)``, after every ``interval`` base steps.

    Attributes
    ----------
    interval : int
        Base steps between two projections. In between, x may be dense.

    Raises
    ------
    TypeError, ValueError
        If ``interval`` is not a positive integer.

    References
    ----------
    Blumensath and Davies 2009, "Iterative Hard Thresholding for Compressed Sensing".

    Examples
    --------
    >>> from safe_core import Unstructured
    >>> HardThreshold(interval=8).is_due(Unstructured(0.5), 7)
    True
    """

    interval: int = 1

    def __post_init__(self) -> None:
        _checks.integer("interval", self.interval, low=1)

    @property
    def after_update(self) -> tuple[Operation, ...]:
        """Operations after the update of the state: zero x off the new support."""
        return (Operation.PROJECT_PARAMETERS,)

    def is_due(self, pattern: Pattern, step: int | Array) -> bool | Array:
        """Return whether x is projected after ``step``."""
        return every(self.interval, step)

    def unfinished(self, pattern: Pattern, steps: int) -> str:
        """Return a text if x was never projected, else an empty string."""
        if steps >= self.interval:
            return ""
        return (
            f"x was never projected in {steps} steps, fewer than interval={self.interval} (train "
            "longer or choose a smaller interval)"
        )
