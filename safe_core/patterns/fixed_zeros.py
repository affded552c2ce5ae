"""Keep the zeros that an array has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from safe_core.backends import Array

from .base import Pattern, Units

__all__ = ["FixedZeros"]


@dataclass(frozen=True)
class FixedZeros(Pattern):
    """Pattern whose support is where an array is not zero.

    With `Mask` it trains a network that is sparse already: the mask is that of the weights at the
    start, whatever pattern they were pruned to. An array without zeros stays dense.

    See Also
    --------
    safe_core.keep_zeros : The method with this pattern.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import project
    >>> project(numpy.asarray([0.0, -2.0, 1e-30]), FixedZeros()).support
    array([False,  True,  True])
    """

    only_masks: ClassVar[bool] = True

    @property
    def counts_in_tensors(self) -> bool:
        """Whether it matters which axes stack several tensors: no, since nothing is counted."""
        return False

    def fractions(self) -> tuple[Fraction, ...]:
        """Return 0 as the only stage: the pattern asks for no zero that is not there."""
        return (Fraction(0),)

    def describe(self) -> str:
        """Return a short text for tables."""
        return "its own zeros"

    def keep(
        self, units: Sequence[Units], names: Sequence[str], stage: int | Array, *, xp: Any
    ) -> list[Array]:
        """Return masks of the scores that are not zero."""
        return [unit.scores != 0 for unit in units]
