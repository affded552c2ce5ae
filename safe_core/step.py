"""The order of one training step, as data.

`Method.plan` makes a `StepPlan` from the parts of a method. The plan says at which points
gradients are taken, how each joins those before it, and which operations follow. Whoever
runs the steps walks the plan: `safe_core.functional` for immutable arrays (NumPy, JAX), the
PyTorch adapter in place. So the order is written here and nowhere else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

__all__ = ["Evaluation", "Operation", "Point", "StepPlan"]


class Point(enum.StrEnum):
    """Where a gradient of the loss is taken; C is the projection at the sparsity of the step."""

    X = "x"
    PERTURBED = "x + e"
    PROJECTED = "C(x)"
    PROJECTED_PERTURBED = "C(x + e)"

    @property
    def is_perturbed(self) -> bool:
        """Whether the point depends on the perturbation e."""
        return self in (Point.PERTURBED, Point.PROJECTED_PERTURBED)

    @property
    def is_projected(self) -> bool:
        """Whether the sparse parameters are projected there."""
        return self in (Point.PROJECTED, Point.PROJECTED_PERTURBED)


class Evaluation(NamedTuple):
    """One gradient of a step.

    Attributes
    ----------
    point : Point
        Where the gradient is taken.
    combine : {"replace", "add"}
        Whether it takes the place of the gradients before it, or is added to them.
    """

    point: Point
    combine: Literal["replace", "add"] = "replace"


class Operation(enum.Enum):
    """What a step does once it has its gradients. Values say it as a formula.

    Operations that are *due* run only after steps at which `Constraint.is_due` holds.
    """

    OBSERVE_GRADIENTS = "keep g for the importance, which is refreshed where it is due"
    RESCALE_DUAL = "u <- u * penalty(t - 1) / penalty(t)"
    ADD_PENALTY = "g <- g + penalty(t) * (x - anchor)"
    MEASURE_PULL = "p <- learning rate * penalty(t) * (x - anchor)"
    BASE_STEP = "x <- base optimizer step with g"
    APPLY_PULL = "x <- x - p"
    MASK_PARAMETERS = "x <- x on the support, 0 off it"
    UPDATE_STATE = "where due: refresh the importance, then update anchor and support"
    PROJECT_PARAMETERS = "where due: x <- x on the support, 0 off it"


@dataclass(frozen=True)
class StepPlan:
    """One step of a method: its gradients in order, then its operations in order.

    Attributes
    ----------
    evaluations : tuple of Evaluation
        The first is at x.
    operations : tuple of Operation
    masks_gradients : bool
        Whether every gradient is zeroed off the support as it is taken.
    reuses : bool
        Whether a step that does not perturb reuses a direction of an earlier perturbed
        gradient, see `safe_core.SAM`.

    Examples
    --------
    >>> import safe_core
    >>> plan = safe_core.safe(0.9).plan()
    >>> [str(evaluation.point) for evaluation in plan.evaluations]
    ['x', 'x + e']
    >>> [operation.name for operation in plan.operations]
    ['OBSERVE_GRADIENTS', 'ADD_PENALTY', 'BASE_STEP', 'UPDATE_STATE']
    """

    evaluations: tuple[Evaluation, ...]
    operations: tuple[Operation, ...]
    masks_gradients: bool = False
    reuses: bool = False

    @property
    def perturbs(self) -> bool:
        """Whether some step takes a gradient at a perturbed point."""
        return any(e.point.is_perturbed for e in self.evaluations)

    @property
    def perturbed(self) -> Evaluation | None:
        """The gradient at a perturbed point, if any."""
        return next((e for e in self.evaluations if e.point.is_perturbed), None)

    @property
    def projected(self) -> Evaluation | None:
        """The gradient at C(x), if any."""
        return next((e for e in self.evaluations if e.point is Point.PROJECTED), None)

    @property
    def needs_learning_rate(self) -> bool:
        """Whether an operation reads the learning rate of the base optimizer."""
        return Operation.MEASURE_PULL in self.operations

    def without_radius(self) -> StepPlan:
        """Return the plan where the radius is zero: a gradient at x + e would be the first."""
        kept = tuple(e for e in self.evaluations if e.point is not Point.PERTURBED)
        return replace(self, evaluations=kept, reuses=False)

    def frozen(self) -> StepPlan:
        """Return the plan once the support is final: train on it, under a mask."""
        points = {Point.PROJECTED_PERTURBED: Point.PERTURBED}
        kept = tuple(
            e._replace(point=points.get(e.point, e.point))
            for e in self.evaluations
            if e.point is not Point.PROJECTED
        )
        operations = (Operation.BASE_STEP, Operation.MASK_PARAMETERS)
        return StepPlan(kept, operations, masks_gradients=True)
