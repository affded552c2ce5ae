"""Base class of constraints, and their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from safe_core.backends import Array
from safe_core.layout import Layout
from safe_core.patterns import Pattern
from safe_core.projection import select
from safe_core.step import Operation

__all__ = ["ArrayInfo", "Constraint", "SplitState", "select_support"]


class SplitState(NamedTuple):
    """State of a constraint for a list of arrays. With ADMM it holds both z and u.

    Attributes
    ----------
    anchor : list of arrays
        Points that the penalty pulls x towards, ``z - u`` of ADMM. Each is shaped as its
        parameter, in float32 or the dtype of the parameter if that is wider, or in bfloat16
        by request. Rounding bfloat16 to nearest would lose small increments of u, so it is
        rounded stochastically. Empty for a constraint without a penalty.
    support : list of bool arrays
        Support of the last projection. With ADMM z may be non-zero only on it, and u only off
        it; see `safe_core.constraints.splitting`.
    scale : sequence of float32 scalars
        Empty, unless z is stored in float8. ``support`` then holds ``z / scale``, and ``anchor``
        holds ``z - u`` off the support; see `safe_core.constraints.float8`.

    Examples
    --------
    >>> import numpy
    >>> from safe_core.constraints.splitting import recover
    >>> state = SplitState([numpy.asarray([2.0, 3.0])], [numpy.asarray([True, False])])
    >>> recover(state)  # z = (2, 0) and u = (0, -3)
    ([array([2., 0.])], [array([ 0., -3.])])
    """

    anchor: list[Array]
    support: list[Array]
    scale: Sequence[Array] = ()


class ArrayInfo(NamedTuple):
    """Static facts about arrays that a projection needs besides their values.

    Attributes
    ----------
    names : tuple of str
        Names, one per array, for messages and for distributions by name.
    layouts : tuple of Layout or None
        Axis roles, one per array, or None where they are unknown.

    Examples
    --------
    >>> ArrayInfo(names=("dense.weight",), layouts=(Layout((1,), (0,)),)).names
    ('dense.weight',)
    """

    names: tuple[str, ...]
    layouts: tuple[Layout | None, ...]


@dataclass(frozen=True)
class Constraint:
    """Base class of constraints.

    The defaults leave x alone during training. A subclass overrides what it does differently;
    adapters rely on this interface only.
    """

    penalty: ClassVar[Any] = None
    """The penalty parameter by step, or None. A constraint with a penalty makes it a field."""

    has_anchor: ClassVar[bool] = False
    """Whether the state holds anchors."""

    anchor_dtype: ClassVar[str | None] = None
    """The dtype of anchors; None is float32, or the parameter's dtype if that is wider."""

    support_dtype: ClassVar[str] = "bool"
    """The dtype of supports that adapters store: "bool", "uint8" for one bit per entry, or the
    float8 in which z shows the support."""

    allows_other_penalty: ClassVar[bool] = True
    """Whether an adapter may override the penalty, for example for one param group."""

    prunes_at_end: ClassVar[bool] = False
    """Whether the projection after training is where the weights are removed, by definition."""

    update_interval: ClassVar[int | None] = None
    """Steps between two dual updates, or None for a constraint without z and u."""

    penalty_spans_run: ClassVar[bool] = False
    """Whether a schedule of the penalty is as long as the run. It may end earlier otherwise."""

    if_far: ClassVar[str] = "train longer, or project at shorter intervals"
    """What to change if a run ends far from the constraint, for reports."""

    @property
    def before_base(self) -> tuple[Operation, ...]:
        """Operations between the gradients and the step of the base optimizer."""
        return ()

    @property
    def after_base(self) -> tuple[Operation, ...]:
        """Operations between the base step and the update of the state."""
        return ()

    @property
    def after_update(self) -> tuple[Operation, ...]:
        """Operations after the update of the state."""
        return ()

    @property
    def masks_gradients(self) -> bool:
        """Whether every gradient is zeroed off the support."""
        return False

    def check(self, pattern: Pattern) -> None:
        """Raise ValueError if the constraint does not work with ``pattern``."""
        fixed = [part for part in pattern.parts if part.only_masks]
        if fixed and not self.masks_gradients:
            raise ValueError(
                "sparsity must ask for zeros where the constraint lets weights come back, got "
                f"{fixed[0]!r} for {type(self).__name__}: give a sparsity, or keep zeros with Mask"
            )

    def is_due(self, pattern: Pattern, step: int | Array) -> bool | Array:
        """Return whether the state and the importance are updated after ``step``."""
        return False

    def has_updated(self, patterns: Sequence[Pattern], steps: int) -> bool:
        """Return whether an update of the state was due for one of the patterns in ``steps``."""
        return any(self.is_due(pattern, t) for pattern in patterns for t in range(steps))

    def unfinished(self, pattern: Pattern, steps: int) -> str:
        """Return why ``steps`` are too few for the constraint to have acted, or an empty string.

        `finalize` warns with this text. By default a constraint whose state is updated at some
        steps must have been updated once.
        """
        never = type(self).is_due is Constraint.is_due
        if never or self.has_updated([pattern], steps):
            return ""
        return f"the state of {type(self).__name__} was never updated in {steps} steps"

    def init(
        self,
        params: Sequence[Array],
        pattern: Pattern,
        info: ArrayInfo,
        importance: Sequence[Array | None] | None = None,
    ) -> SplitState:
        """Return the state before step 0; by default the support of ``proj(x_0)``."""
        return SplitState([], select_support(params, pattern, info, importance, step=0))

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
        """Return the state after ``step``; by default the support of ``proj(x)``.

        ``importance`` is P; None is P = 1. ``workspace`` holds arrays of the shapes and
        dtypes of the parameters that may be overwritten to save memory.
        """
        # The state serves the next step, so it has the sparsity of that step.
        return SplitState([], select_support(params, pattern, info, importance, step=step + 1))

    def exact(self) -> Constraint:
        """Return the constraint with anchors that are not rounded, for reports."""
        return self

    def rescale(self, split: SplitState, step: int | Array) -> SplitState:
        """Return the state for the penalty of ``step``; see `Operation.RESCALE_DUAL`."""
        return split

    def dual_ratio(self, step: int | Array) -> float | Array:
        """Return the factor by which `rescale` multiplies u."""
        return 1.0


def select_support(
    params: Sequence[Array],
    pattern: Pattern,
    info: ArrayInfo,
    importance: Sequence[Array | None] | None,
    *,
    step: int | Array | None,
) -> list[Array]:
    """Return the support of ``proj(params)`` at ``step``, or at the final sparsity if None."""
    return select(
        params,
        pattern,
        importance=[None] * len(params) if importance is None else importance,
        layouts=info.layouts,
        names=info.names,
        step=step,
    )
