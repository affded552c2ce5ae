"""Mask weights permanently, more of them as training goes on (gradual pruning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from array_api_compat import array_namespace

from safe_core.backends import Array
from safe_core.patterns import Pattern
from safe_core.projection import apply_support
from safe_core.scores import positive
from safe_core.step import Operation

from .base import ArrayInfo, Constraint, SplitState, select_support

__all__ = ["Mask"]


@dataclass(frozen=True)
class Mask(Constraint):
    """Constraint that keeps x and its gradients zero off a mask. No weight ever comes back.

    The mask is recomputed after steps at which the sparsity changes, among the weights that
    it has kept so far. With a fixed sparsity it stays that of ``proj(x_0)``.

    Raises
    ------
    ValueError
        If the sparsity of the pattern is drawn at random, or is a schedule by name.

    References
    ----------
    Zhu and Gupta 2017, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for
    Model Compression".

    Examples
    --------
    >>> from safe_core import Unstructured, schedules
    >>> pattern = Unstructured(schedules.cubic(0.9, steps=100, every=50))
    >>> [step for step in range(200) if Mask().is_due(pattern, step)]
    [49, 99]
    """

    @property
    def masks_gradients(self) -> bool:
        """True: gradients are zeroed off the mask."""
        return True

    @property
    def after_base(self) -> tuple[Operation, ...]:
        """Operations after the base step: zero masked weights, which momentum can move."""
        return (Operation.MASK_PARAMETERS,)

    @property
    def after_update(self) -> tuple[Operation, ...]:
        """Operations after the update of the state: zero what a new mask removes."""
        return (Operation.PROJECT_PARAMETERS,)

    def check(self, pattern: Pattern) -> None:
        """Raise ValueError if the sparsity is drawn at random, or changes for each array apart.

        A mask must never lose a zero, and all masks change at the same steps.
        """
        if pattern.changes and pattern.schedule is None:
            raise ValueError(f"sparsity must not change by name for a mask, got {pattern!r}")
        if pattern.schedule is not None and pattern.schedule.is_random:
            raise ValueError(
                "sparsity must not be drawn at random for a mask, which never lets a weight come "
                f"back, got {pattern!r}"
            )

    def is_due(self, pattern: Pattern, step: int | Array) -> bool | Array:
        """Return whether the sparsity changes after ``step``."""
        if pattern.schedule is None:
            return False
        return pattern.stage(step + 1) != pattern.stage(step)

    def unfinished(self, pattern: Pattern, steps: int) -> str:
        """Return an empty string: under a fixed sparsity the first mask is the last."""
        return ""

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
        """Return the mask after ``step``, a subset of the mask before."""
        # Zeroed weights score 0 and rank last, so no masked weight is selected again.
        kept = apply_support(params, split.support)
        known = [p for p in importance or () if p is not None]
        if importance is None or not known:
            importance = None
        else:
            # A kept weight with P = 0 must still rank above masked ones, whose score is 0 too.
            raised = iter(positive(known, pattern, xp=array_namespace(*known)))
            importance = [None if p is None else next(raised) for p in importance]
        return SplitState([], select_support(kept, pattern, info, importance, step=step + 1))
