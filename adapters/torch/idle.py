"""Record which sparse parameters get gradients, so that reports can name the others."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["GradientRecord"]

_ENOUGH_STEPS = 10  # to tell that a parameter has no gradient


class GradientRecord:
    """Count the steps in which parameters had no gradient.

    A gradient of zeros is a gradient. A checkpoint does not hold the count.
    """

    def __init__(self) -> None:
        self._stepped: list[Tensor] | None = None  # by the last step
        self._waited: dict[Tensor, int] = {}
        self._reached: set[Tensor] = set()

    def note(self, stepped: list[Tensor]) -> None:
        """Take note of the gradients of the parameters that a step changes."""
        self._stepped = stepped
        for p in stepped:
            if p.grad is not None:
                self._reached.add(p)
            elif p not in self._reached:
                self._waited[p] = self._waited.get(p, 0) + 1

    def idle(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that had no gradient so far, in ten or more steps.

        It waits for ten, because experts and networks that take turns have no gradient in some.
        """
        waiting = (p for p in params if p not in self._reached)
        return [p for p in waiting if self._waited.get(p, 0) >= _ENOUGH_STEPS]

    def halted(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that the last step did not change, because they were frozen."""
        if self._stepped is None:
            return []
        stepped = set(self._stepped)
        return [p for p in params if p not in stepped]
