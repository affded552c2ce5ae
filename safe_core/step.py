"""Describe the order of one training step as data.

`Method.plan` makes a `StepPlan` from the parts of a method. The plan lists the points at
which gradients are taken, how they are combined, and the operations that follow. Two runners
walk the plan: `safe_core.functional` for immutable arrays (NumPy, JAX), and the PyTorch
adapter in place. The plan is the only place that fixes the order, so the two cannot differ.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

__all__ = ["Evaluation", "Operation", "Point", "StepPlan"]


class Point(enum.StrEnum):
    """Point at which a gradient of the loss is taken.

    C is the projection at the sparsity of the step.
    """

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
        """Whether the sparse parameters are projected at this point."""
        return self in (Point.PROJECTED, Point.PROJECTED_PERTURBED)


class Evaluation(NamedTuple):
    """One gradient of a step.

    Attributes
    ----------
    point : Point
        Point at which the gradient is taken.
    combine : {"replace", "add"}
        Whether the gradient replaces the result of the evaluations before, or is added to it.
    """

    point: Point
    combine: Literal["replace", "add"] = "replace"


class Operation(enum.Enum):
    """Operation of a step, after its gradients are known. The value is its formula.

    Operations marked "where due" do nothing at steps for which `Constraint.is_due` is False.
    """

    OBSERVE_GRADIENTS = "keep g for the importance, which is refreshed where it is due"
    RESCALE_DUAL = "u <- u * penalty(t - 1) / penalty(t)"
    ADD_PENALTY = "g <- g + penalty(t) * (x - anchor)"
    MEASURE_PULL = "p <- learning rate * penalty(t) * (x - anchor)"
    BASE_STEP = "x <- base optimizer step with g"
    MEASURE_STEP = "at every eighth step: average |x_{t+1} - x_t|^2 and |x_t|^2 so far"
    APPLY_PULL = "x <- x - p"
    PULL = "off the support: x <- x - (1 - exp(-penalty(t))) * (x - anchor)"
    MASK_PARAMETERS = "x <- x on the support, 0 off it"
    UPDATE_STATE = "where due: refresh the importance, then update anchor and support"
    PROJECT_PARAMETERS = "where due: x <- x on the support, 0 off it"


@dataclass(frozen=True)
class StepPlan:
    """Plan of one step: its gradients in order, then its operations in order.

    Attributes
    ----------
    evaluations : tuple of Evaluation
        Gradients of the step. The first is at x.
    operations : tuple of Operation
        Operations that follow the gradients.
    masks_gradients : bool
        Whether every gradient is zeroed off the support right after it is computed.
    reuses : bool
        Whether steps that do not perturb reuse the direction of an earlier perturbed
        gradient, see `safe_core.SAM`.

    Examples
    --------
    >>> import safe_core
    >>> plan = safe_core.safe(0.9, steps=1000).plan()
    >>> [str(evaluation.point) for evaluation in plan.evaluations]
    ['x', 'x + e']
    >>> [operation.name for operation in plan.operations]
    ['OBSERVE_GRADIENTS', 'BASE_STEP', 'MEASURE_STEP', 'PULL', 'UPDATE_STATE']
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
        """The evaluation at a perturbed point, or None."""
        return next((e for e in self.evaluations if e.point.is_perturbed), None)

    @property
    def projected(self) -> Evaluation | None:
        """The evaluation at C(x), or None."""
        return next((e for e in self.evaluations if e.point is Point.PROJECTED), None)

    @property
    def needs_learning_rate(self) -> bool:
        """Whether an operation reads the learning rate of the base optimizer."""
        return Operation.MEASURE_PULL in self.operations

    @property
    def moves_after_base(self) -> bool:
        """Whether an operation moves parameters off the path of the base optimizer."""
        return not {Operation.APPLY_PULL, Operation.PULL}.isdisjoint(self.operations)

    def without_radius(self) -> StepPlan:
        """Return the plan for a radius of 0, without the gradient at x + e.

        With e = 0 that gradient would repeat the first one. One at C(x + e) stays, because
        C(x) differs from x.
        """
        kept = tuple(e for e in self.evaluations if e.point is not Point.PERTURBED)
        return replace(self, evaluations=kept, reuses=False)

    def frozen(self) -> StepPlan:
        """Return the plan for a final support, which trains the kept weights under a mask.

        There is nothing left to pull towards, so the penalty and the updates of the state are
        gone. x lies on the support already and C(x) is x, so the gradient at C(x) is dropped
        and C(x + e) becomes x + e.
        """
        points = {Point.PROJECTED_PERTURBED: Point.PERTURBED}
        kept = tuple(
            e._replace(point=points.get(e.point, e.point))
            for e in self.evaluations
            if e.point is not Point.PROJECTED
        )
        left = (Operation.BASE_STEP, Operation.MEASURE_STEP)
        operations = tuple(operation for operation in self.operations if operation in left)
        return StepPlan(kept, (*operations, Operation.MASK_PARAMETERS), masks_gradients=True)
