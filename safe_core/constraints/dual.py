"""Base class of constraints that keep a sparse copy z and a dual variable u."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

from safe_core import _checks
from safe_core.backends import Array
from safe_core.patterns import Pattern
from safe_core.schedules import Schedule, as_schedule

from . import splitting
from .base import ArrayInfo, Constraint, SplitState

__all__ = ["DualUpdates", "every"]


class DualUpdates(Constraint):
    """Constraint that starts at ``z = proj(x_0)``, ``u = 0`` and updates both every K steps.

    A subclass is a dataclass with the fields below, and adds the operations that bring x to z.
    """

    penalty: Schedule  # type: ignore[misc]
    dual_update_interval: int
    state_dtype: str | None
    relaxation: float = 1.0

    has_anchor: ClassVar[bool] = True
    state_dtypes: ClassVar[tuple[str | None, ...]] = (None, "bfloat16")
    if_far: ClassVar[str] = "raise the penalty, or give the method steps= and no penalty"

    def check_fields(self) -> None:
        """Check the fields that every subclass has, and read the penalty as a schedule."""
        object.__setattr__(self, "penalty", as_schedule("penalty", self.penalty))
        _checks.integer("dual_update_interval", self.dual_update_interval, low=1)
        _checks.choice("state_dtype", self.state_dtype, self.state_dtypes)

    @property
    def anchor_dtype(self) -> str | None:  # type: ignore[override]
        """The dtype of anchors."""
        return self.state_dtype and "bfloat16"

    @property
    def update_interval(self) -> int:  # type: ignore[override]
        """Steps between two dual updates."""
        return self.dual_update_interval

    @property
    def steps_before_update(self) -> int:
        """Steps before the first dual update."""
        return self.dual_update_interval

    def is_due(self, pattern: Pattern, step: int | Array) -> bool | Array:
        """Return whether a dual update follows ``step``."""
        return every(self.dual_update_interval, step - self.steps_before_update)

    def unfinished(self, pattern: Pattern, steps: int) -> str:
        """Return a text if no dual update has happened, else an empty string."""
        if steps >= self.steps_before_update:
            return ""
        return (
            f"no dual update happened in {steps} steps, fewer than dual_update_interval="
            f"{self.dual_update_interval}, so the penalty pulled only towards the support of the "
            "first weights (train longer or choose a smaller interval)"
        )

    def init(
        self,
        params: Sequence[Array],
        pattern: Pattern,
        info: ArrayInfo,
        importance: Sequence[Array | None] | None = None,
    ) -> SplitState:
        """Return the state with ``z = proj(x_0)`` and ``u = 0``."""
        return splitting.init(
            params, pattern, info, importance=importance, state_dtype=self.state_dtype
        )

    def update(
        self,
        params: Sequence[Array],
        split: SplitState,
        pattern: Pattern,
        info: ArrayInfo,
        step: int | Array,
        importance: Sequence[Array | None] | None = None,
        *,
        workspace: Sequence[Array] | None = None,
    ) -> SplitState:
        """Return the state after the dual update that follows ``step``."""
        return splitting.dual_update(
            params,
            split,
            pattern,
            info,
            importance=importance,
            relaxation=self.relaxation,
            step=step + 1,
            state_dtype=self.state_dtype,
            workspace=workspace,
        )

    def exact(self) -> Self:
        """Return the constraint with anchors that are not rounded, for reports."""
        return replace(self, state_dtype=None)  # type: ignore[call-arg]


def every(interval: int, step: int | Array) -> bool | Array:
    """Return whether ``step`` is the last of ``interval`` steps, as steps K - 1, 2 K - 1, ..."""
    return interval == 1 or (step + 1) % interval == 0
