"""A sparsification method, composed of parts.

`Method` holds configuration and no arrays. One object therefore serves every framework: it
is hashable, compares by value, pickles, and can be a static argument of `jax.jit`. The
adapters bind it to a training loop; `safe_core.functional` runs its steps on plain arrays.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from safe_core.backends import Array

from . import _checks
from .constraints import ADMM, ArrayInfo, Constraint, SplitState
from .constraints.base import select_support
from .direction import Direction
from .importance import Importance
from .layout import Layout
from .patterns import Pattern, as_pattern
from .perturbations import Perturbation
from .projection import apply_support
from .reuse import flat_direction, reused
from .step import Evaluation, Operation, Point, StepPlan

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """Method of training under a sparsity constraint, composed of parts.

    One step ``t = 0, 1, ...`` of SAFE is::

        g0 = grad f(x)
        e  = perturbation(g0)                            norm over all parameters
        g  = grad f(x + e) + penalty(t) * (x - z + u)    penalty on sparse parameters
        x  = base optimizer step with g
        if (t + 1) % dual_update_interval == 0:
            v = x + u
            z = proj_C^P(v);  u = v - z

    SAFE starts at ``z = proj(x_0)``, ``u = 0`` and ends with ``proj(x_T)``, which makes the
    weights exactly sparse (Lee et al. 2025, Algorithm 1). Both published implementations use
    this order. Other methods combine other parts; `plan` returns the order of their steps.

    Attributes
    ----------
    sparsity : pattern
        Pattern that x must have at the end. It defines the set C of sparse points. A fraction
        of zeros or ``"N:M"`` is accepted.
    constraint : Constraint
        How training brings x to C: `ADMM`, `Pull`, `HardThreshold`, `Mask` or `AtEnd`.
    perturbation : Perturbation or None
        How e follows from the gradient, and at which steps. None takes no second gradient.
    importance : Importance or None
        Source of P; None is P = 1. Pass arrays of P to the adapter instead, because a method
        holds no arrays.
    evaluations : tuple of Evaluation, optional
        Gradients of a step, in order; the first is at x. By default the only gradient is at
        x, or, with a perturbation, the gradient at x + e replaces it.

    Raises
    ------
    TypeError, ValueError
        If a part is not of its kind, or the parts do not fit together.

    Examples
    --------
    >>> from safe_core import ADMM, SAM, Method, schedules
    >>> penalty = schedules.cosine(1e-3, steps=500)
    >>> method = Method(0.9, ADMM(penalty), perturbation=SAM(0.1))
    >>> method.constraint.penalty(500), method.is_due(31)
    (0.001, True)
    """

    sparsity: Pattern
    constraint: Constraint = ADMM()  # noqa: RUF009  # frozen, so sharing it is safe
    perturbation: Perturbation | None = None
    importance: Importance | None = None
    evaluations: tuple[Evaluation, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", as_pattern(self.sparsity))
        if not isinstance(self.constraint, Constraint):
            raise TypeError(
                "constraint must be ADMM(), Pull(), HardThreshold(), Mask(), AtEnd() or another "
                f"Constraint, got {_checks.shown(self.constraint)}"
            )
        if self.perturbation is not None and not isinstance(self.perturbation, Perturbation):
            raise TypeError(
                "perturbation must be SAM(), ASAM(), GradientAscent(), another Perturbation or "
                f"None, got {_checks.shown(self.perturbation)}"
            )
        if self.importance is not None and not _is_importance(self.importance):
            raise TypeError(
                "importance must be None or a hashable importance such as SquaredGradient(), got "
                f"{_checks.shown(self.importance)}; arrays and functions go to the adapter's "
                "importance="
            )
        self.constraint.check(self.sparsity)
        self._check_evaluations()

    def _check_evaluations(self) -> None:
        if self.evaluations is None:
            return
        object.__setattr__(self, "evaluations", tuple(self.evaluations))
        if not all(isinstance(e, Evaluation) for e in self.evaluations):
            raise TypeError(
                f"evaluations must be a tuple of Evaluation, got {_checks.shown(self.evaluations)}"
            )
        points = [e.point for e in self.evaluations]
        if points[:1] != [Point.X] or len(set(points)) != len(points):
            raise ValueError(
                f"evaluations must start at x and take each point once, got {self.evaluations!r}"
            )
        if self.perturbation is None and any(point.is_perturbed for point in points):
            raise ValueError(
                "perturbation must not be None for a gradient at a perturbed point, got None"
            )
        growth = 0.0 if self.perturbation is None else self.perturbation.max_growth
        if growth and Point.PROJECTED_PERTURBED in points:
            raise ValueError(
                "max_growth must be 0 for a gradient at C(x + e), which differs from that at x by "
                f"the projection, too, got {growth!r}"
            )
        # LookSAM's direction is defined by the gradients at x and x + e alone. With a third
        # gradient in the sum it would be the direction of something else.
        reuses = self.perturbation is not None and self.perturbation.reuse > 0
        if reuses and self.evaluations != _evaluations(self.perturbation):
            raise ValueError(
                "reuse must be 0 if evaluations add a gradient or take one at a projected "
                f"point, got {self.perturbation!r}"
            )

    def plan(self, *, has_radius: bool | None = None) -> StepPlan:
        """Return the order of one step, as data.

        ``has_radius`` says whether e can differ from zero. By default it does, unless rho is
        the constant 0. An adapter whose param groups override rho passes it explicitly.
        """
        constraint, perturbation = self.constraint, self.perturbation
        evaluations = self.evaluations
        plan = StepPlan(
            evaluations=_evaluations(perturbation) if evaluations is None else evaluations,
            operations=(
                Operation.OBSERVE_GRADIENTS,
                *constraint.before_base,
                Operation.BASE_STEP,
                *((Operation.MEASURE_STEP,) if self.measures_steps else ()),
                *constraint.after_base,
                Operation.UPDATE_STATE,
                *constraint.after_update,
            ),
            masks_gradients=constraint.masks_gradients,
            reuses=perturbation is not None and perturbation.reuse > 0,
        )
        if has_radius is None:
            has_radius = perturbation is not None and not perturbation.is_zero
        return plan if has_radius else plan.without_radius()

    # The perturbation

    @property
    def measures_steps(self) -> bool:
        """Whether the radius needs the length of the base optimizer's steps."""
        return self.perturbation is not None and self.perturbation.in_steps

    def radius(self, step: int | Array) -> float | Array:
        """Return rho at ``step``, or 0 without a perturbation."""
        return 0.0 if self.perturbation is None else self.perturbation.rho(step)  # type: ignore[operator]

    def perturb(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        step: int | Array,
        *,
        rho: float | Array | None = None,
        layouts: Sequence[Layout | None] | None = None,
        motion: Array | None = None,
    ) -> list[Array]:
        """Return the perturbation e of all trainable parameters.

        ``rho`` overrides the method's. A radius ``in_steps`` needs ``motion``, see
        `safe_core.motion`.
        """
        found = self.direction(params, gradients, step, rho=rho, layouts=layouts, motion=motion)
        return found.perturbation()

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        step: int | Array,
        *,
        rho: float | Array | None = None,
        layouts: Sequence[Layout | None] | None = None,
        motion: Array | None = None,
    ) -> Direction:
        """Return e of `perturb` as a factor and vectors, for an adapter that adds in place."""
        if self.perturbation is None:
            raise ValueError(f"perturbation must not be None to perturb, got {self!r}")
        if rho is None:
            rho = self.radius(step)
        found = self.perturbation.direction_at(step, params, gradients, rho=rho, layouts=layouts)
        if not self.perturbation.in_steps:
            return found
        if motion is None:
            raise ValueError(
                f"motion must be given for a radius in steps, {self.perturbation!r}, got None"
            )
        if motion.shape != (3,):
            raise ValueError(f"motion must have shape (3,), got {tuple(motion.shape)}")
        return found.in_steps(motion, self.perturbation.full_step)

    def flat_direction(self, first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
        """Return the direction to reuse, from the gradients at x and at x + e.

        Both are gradients of all trainable parameters, at a step that perturbs. See
        `safe_core.reuse.flat_direction`.
        """
        return flat_direction(first, second)

    def reuse(self, gradients: Sequence[Array], flat: Sequence[Array]) -> list[Array]:
        """Return the gradients of a step that reuses the direction ``flat``.

        Call it at steps that do not perturb. See `safe_core.reuse.reused`.
        """
        if self.perturbation is None:
            raise ValueError(f"perturbation must not be None to reuse a direction, got {self!r}")
        return reused(gradients, flat, self.perturbation.reuse)

    def refuse_averaging(self, base: str) -> None:
        """Raise if the method moves parameters after the step of a base that averages them.

        A schedule-free ``base`` evaluates an average of its iterates and does not know of the
        move. A mask is harmless, because it also masks the gradients.

        Parameters
        ----------
        base : str
            What the message calls the base optimizer.

        Raises
        ------
        ValueError
            If the method has a decoupled penalty or a `Pull`.

        Examples
        --------
        >>> from safe_core import admm
        >>> admm(0.5, penalty=0.1).refuse_averaging("SGDScheduleFree")
        >>> admm(0.5, steps=100).refuse_averaging("SGDScheduleFree")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: method must add its penalty to the gradient with SGDScheduleFree, which ...
        """
        if self.plan().moves_after_base:
            raise ValueError(
                f"method must add its penalty to the gradient with {base}, which evaluates other "
                "parameters than it trains (give penalty= and leave decoupled=False), got "
                f"{self!r}"
            )

    # The importance

    def init_importance(self, params: Sequence[Array]) -> list[Array] | None:
        """Return the state of the importance before step 0, or None if P = 1."""
        return None if self.importance is None else self.importance.init(params)

    def metric(
        self, state: Sequence[Array] | None, *, source: Importance | None = None
    ) -> Sequence[Array] | None:
        """Return P from the state of an importance, or None if P = 1.

        ``source`` is the importance that the state belongs to, by default the method's.
        """
        source = self.importance if source is None else source
        if source is None or state is None:
            return None
        return source.metric(state, joint=self.sparsity.joint)

    # The constraint

    def is_due(self, step: int | Array) -> bool | Array:
        """Return whether the state of the constraint is updated after ``step``."""
        return self.constraint.is_due(self.sparsity, step)

    def init(
        self,
        params: Sequence[Array],
        info: ArrayInfo,
        importance: Sequence[Array | None] | None = None,
    ) -> SplitState:
        """Return the state of the constraint before step 0, for the sparse parameters.

        ``importance`` is P if it is known from the start; None is P = 1.
        """
        return self.constraint.init(params, self.sparsity, info, importance)

    def update(
        self,
        params: Sequence[Array],
        split: SplitState,
        step: int | Array,
        info: ArrayInfo,
        importance: Sequence[Array | None] | None = None,
        *,
        workspace: Sequence[Array] | None = None,
    ) -> SplitState:
        """Return the state of the constraint after the update that follows ``step``.

        ``importance`` is P itself, such as ``method.metric(state)``; None is P = 1.
        """
        return self.constraint.update(
            params, split, self.sparsity, info, step, importance, workspace=workspace
        )

    # The projection

    def support_at(
        self,
        params: Sequence[Array],
        info: ArrayInfo,
        step: int | Array | None,
        importance: Sequence[Array | None] | None = None,
    ) -> list[Array]:
        """Return the support of ``C(params)`` at ``step``, or at the final sparsity if None."""
        return select_support(params, self.sparsity, info, importance, step=step)

    def finalize(
        self,
        params: Sequence[Array],
        info: ArrayInfo,
        importance: Sequence[Array | None] | None = None,
    ) -> list[Array]:
        """Return ``proj(params)``, exactly sparse, in the dtypes of ``params``.

        ``importance`` is P itself, such as ``method.metric(state)``; None is P = 1.
        """
        return apply_support(params, self.support_at(params, info, None, importance))


def _evaluations(perturbation: Perturbation | None) -> tuple[Evaluation, ...]:
    """Return the default gradients of a step."""
    at_x = Evaluation(Point.X)
    return (at_x,) if perturbation is None else (at_x, Evaluation(Point.PERTURBED))


def _is_importance(importance: Any) -> bool:
    return isinstance(importance, Importance) and isinstance(importance, Hashable)
