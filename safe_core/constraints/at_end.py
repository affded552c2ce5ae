"""Train without a constraint and project at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safe_core import _checks
from safe_core.backends import Array
from safe_core.patterns import Pattern

from .base import Constraint
from .dual import every

__all__ = ["AtEnd"]


@dataclass(frozen=True)
class AtEnd(Constraint):
    """Constraint that leaves training alone and projects x once, at the end.

    Attributes
    ----------
    importance_interval : int
        Base steps between two refreshes of the importance and of the support. The support is
        only shown in reports until the end.

    Raises
    ------
    TypeError, ValueError
        If ``importance_interval`` is not a positive integer.

    References
    ----------
    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".

    Examples
    --------
    >>> from safe_core import Unstructured
    >>> AtEnd().is_due(Unstructured(0.5), 31)
    True
    """

    importance_interval: int = 32

    prunes_at_end: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.integer("importance_interval", self.importance_interval, low=1)

    def is_due(self, pattern: Pattern, step: int | Array) -> bool | Array:
        """Return whether the importance is refreshed after ``step``."""
        return every(self.importance_interval, step)

    def unfinished(self, pattern: Pattern, steps: int) -> str:
        """Return an empty string: the constraint acts only at the end."""
        return ""
