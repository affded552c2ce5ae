"""Run the steps of a method on immutable arrays of any array API library.

`FunctionalStep` walks the plan of a method over lists of arrays. The JAX adapter runs it on
the leaves of a pytree. Use it directly in a training loop of your own, with NumPy for example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from ._dtypes import scalar_like
from .constraints import ArrayInfo, SplitState
from .constraints.float8 import dequantised
from .constraints.pull import pulled
from .constraints.splitting import penalty_gradient
from .direction import norm
from .importance import Importance
from .layout import Layout
from .method import Method
from .motion import is_measured, next_shrinkage, with_lengths, with_shrinkage
from .projection import apply_support
from .step import Evaluation, StepPlan
from .step_state import StepState, check_sparse, start

__all__ = ["FunctionalStep", "StepState", "start"]

Gradients = Callable[[list[Array]], list[Array]]

_Evaluated = tuple[list[Array], list[Array], Array | None, list[Array]]


@dataclass
class FunctionalStep:
    """One step of a method; call `run` to take it.

    Attributes
    ----------
    method : Method
    params : list of arrays
        All trainable parameters x.
    sparse : sequence of int
        Positions of the sparse parameters in ``params``.
    info : ArrayInfo
        Names and layouts of the sparse parameters.
    step : int or integer array
        Step t, counted from 0. It may be traced.
    gradients_at : callable
        ``gradients_at(params) -> gradients`` of the loss. It is called for points other than
        x; the gradients at x are passed to `run`.
    base : callable
        ``base(gradients) -> updates`` of the base optimizer. The updates are added to x.
    plan : StepPlan, optional
        Overrides the plan of the method.
    importance : Importance, optional
        Overrides the importance of the method.
    rho, penalty, learning_rate : float or scalar array, optional
        Values at this step. The schedules of the method give rho and the penalty by default;
        a decoupled penalty needs the learning rate.
    second_moments : callable, optional
        Returns the base optimizer's second moments of the sparse parameters after its step.
    layouts : sequence of Layout or None, optional
        Axis roles of all parameters, for perturbations that read them.
    keeps_points : bool
        Whether ``points`` is kept, for a base that differentiates the gradient again.
    points : list of (list of arrays, bool or bool array)
        While ``base`` is called: the points whose gradients add up to that of the loss, each with
        a flag that is False for a point that does not count at this step.

    Raises
    ------
    ValueError
        By `run` and `updates`, if lists do not match in length, or the plan needs a learning
        rate or second moments that are not given.

    Examples
    --------
    >>> import numpy
    >>> import safe_core
    >>> method = safe_core.safe(0.5, steps=50)
    >>> x, info = [numpy.asarray([2.0, -1.0])], ArrayInfo(("x",), (None,))
    >>> state = start(method, x, [0], info)
    >>> gradient = lambda params: [x - numpy.asarray([3.0, 1.0]) for x in params]
    >>> base = lambda gradients: [-0.1 * g for g in gradients]
    >>> for t in range(50):
    ...     step = FunctionalStep(method, x, [0], info, t, gradient, base)
    ...     x, state = step.run(gradient(x), state)
    >>> method.finalize(x, info)[0].round(2)
    array([3., 0.])
    """

    method: Method
    params: list[Array]
    sparse: Sequence[int]
    info: ArrayInfo
    step: int | Array
    gradients_at: Gradients
    base: Callable[[list[Array]], list[Array]]
    plan: StepPlan | None = None
    importance: Importance | None = None
    rho: float | Array | None = None
    penalty: float | Array | None = None
    learning_rate: float | Array | None = None
    second_moments: Callable[[], list[Array]] | None = None
    layouts: Sequence[Layout | None] | None = None
    keeps_points: bool = False
    points: list[tuple[list[Array], bool | Array]] = field(init=False, repr=False)

    # Working state. Operations take no arguments, so that the plan alone sets their order;
    # they read and write these fields.
    _g: list[Array] = field(init=False, repr=False)
    _observed: list[Array] = field(init=False, repr=False)
    _pulls: list[Array] = field(init=False, repr=False)
    _updates: list[Array] = field(init=False, repr=False)
    _split: SplitState = field(init=False, repr=False)
    _held: list[Array] | None = field(init=False, repr=False)
    _flat: list[Array] = field(init=False, repr=False)
    _motion: Array | None = field(init=False, repr=False)
    _plan: StepPlan = field(init=False, repr=False)
    _source: Importance | None = field(init=False, repr=False)

    def run(self, gradients: list[Array], state: StepState) -> tuple[list[Array], StepState]:
        """Take the step from the gradients at x; return the new x and the new state."""
        updates, state = self.updates(gradients, state)
        return self._applied(updates), state

    def updates(self, gradients: list[Array], state: StepState) -> tuple[list[Array], StepState]:
        """Take the step as `run` does, but return the updates to add to x, as optax does."""
        self._check(gradients)
        self._plan = self.method.plan() if self.plan is None else self.plan
        self._source = self.method.importance if self.importance is None else self.importance
        self._split, self._held = state.split, state.importance
        self._flat, self._motion = list(state.flat), state.motion
        self._g = self._masked(gradients)
        self.points = [(self.params, True)]
        # The first evaluation is the gradient at x, which the caller has computed already.
        for evaluation in self._plan.evaluations[1:]:
            self._evaluate(evaluation)
        for operation in self._plan.operations:
            getattr(self, f"_{operation.name.lower()}")()
        return self._updates, StepState(self._split, self._held, self._flat, self._motion)

    def _check(self, gradients: Sequence[Array]) -> None:
        """Refuse lists that do not match, which would fail later without a name."""
        check_sparse(self.params, self.sparse, self.info)
        if len(gradients) != len(self.params):
            raise ValueError(
                f"gradients must hold one array per parameter, {len(self.params)}, got "
                f"{len(gradients)}"
            )

    # Gradients

    def _evaluate(self, evaluation: Evaluation) -> None:
        if not evaluation.point.is_perturbed:
            point = self._projected(self.params)
            self._g = _combined(self._at(point), self._g, evaluation)
            self._visit(point, evaluation, True)
            return
        perturbation = self.method.perturbation
        due = perturbation.is_due(self.step)  # type: ignore[union-attr]

        def ascend(first: list[Array], flat: list[Array], motion: Array | None) -> _Evaluated:
            direction = self.method.direction(
                self.params,
                first,
                self.step,
                rho=self.rho,
                layouts=self.layouts,
                motion=motion,
            )
            e = direction.perturbation()
            moved = [_added(x, e_i) for x, e_i in zip(self.params, e, strict=True)]
            point = self._projected(moved) if evaluation.point.is_projected else moved
            second = self._at(point)
            if motion is not None:
                motion = self._shrunk(motion, direction.length, second)
            second = _combined(second, first, evaluation)
            if self._plan.reuses:
                flat = _cast(self.method.flat_direction(first, second), flat)
            return second, flat, motion, point if self.keeps_points else []

        def stay(first: list[Array], flat: list[Array], motion: Array | None) -> _Evaluated:
            found = self.method.reuse(first, flat) if self._plan.reuses else first
            return found, flat, motion, self.params if self.keeps_points else []

        # Under jit this is lax.cond, so steps that do not perturb skip the second gradient.
        cond = backend_of(self.step).cond
        found = cond(due, ascend, stay, self._g, self._flat, self._motion)
        self._g, self._flat, self._motion, point = found
        self._visit(point, evaluation, due)

    def _visit(self, point: list[Array], evaluation: Evaluation, due: bool | Array) -> None:
        # On a step that does not perturb, a point that replaces x is x itself.
        added = evaluation.combine == "add"
        self.points = [*self.points, (point, due)] if added else [(point, True)]

    def _shrunk(self, motion: Array, first: Array, second: list[Array]) -> Array:
        growth = self.method.perturbation.max_growth  # type: ignore[union-attr]
        if not growth:
            return motion
        return with_shrinkage(motion, next_shrinkage(motion[2], first, norm(second), growth))

    def _at(self, params: list[Array]) -> list[Array]:
        return self._masked(_cast(self.gradients_at(params), self._g))

    def _projected(self, params: list[Array]) -> list[Array]:
        """Return C(params), the projection at the sparsity of this step."""
        values = self._of(params)
        metric = self.method.metric(self._held, source=self._source)
        kept = self.method.support_at(values, self.info, self.step, metric)
        return self._replaced(params, apply_support(values, kept))

    def _masked(self, gradients: list[Array]) -> list[Array]:
        if not self._plan.masks_gradients:
            return gradients
        return self._replaced(gradients, apply_support(self._of(gradients), self._split.support))

    # Operations, named after the members of `Operation`

    def _observe_gradients(self) -> None:
        self._observed = self._of(self._g)

    def _rescale_dual(self) -> None:
        self._split = self.method.constraint.rescale(self._split, self.step)

    def _add_penalty(self) -> None:
        pulled = []
        for i, pull in zip(self.sparse, self._penalty_gradients(), strict=True):
            xp, g = array_namespace(pull), self._g[i]
            # Add in the wide dtype: a small pull would round away beside a 16-bit gradient.
            total = xp.astype(g, pull.dtype, copy=False) + pull
            pulled.append(xp.astype(total, g.dtype, copy=False))
        self._g = self._replaced(self._g, pulled)

    def _measure_pull(self) -> None:
        if self.learning_rate is None:
            raise ValueError("learning_rate must be given for a decoupled penalty, got None")
        # Measured before the base step, because the pull is that at x_t and not at x_{t+1}.
        self._pulls = [
            scalar_like(self.learning_rate, pull) * pull for pull in self._penalty_gradients()
        ]

    def _penalty_now(self) -> float | Array:
        return self.method.constraint.penalty(self.step) if self.penalty is None else self.penalty

    def _penalty_gradients(self) -> list[Array]:
        weight = self._penalty_now()
        # SAFE perturbs the loss and not the penalty (Lee et al. 2025, Algorithm 1), so x is
        # unperturbed here. The penalty's curvature is lambda everywhere: e would only shift
        # the pull, and nothing about flatness is learnt from it.
        pairs = zip(self._of(self.params), dequantised(self._split).anchor, strict=True)
        return [penalty_gradient(x, anchor, weight) for x, anchor in pairs]

    def _base_step(self) -> None:
        self._updates = self.base(self._g)

    def _measure_step(self) -> None:
        def measure(motion: Array) -> Array:
            xp = array_namespace(motion)
            found = (norm(self._of(arrays)) for arrays in (self._updates, self.params))
            lengths = [xp.astype(length, motion.dtype, copy=False) for length in found]
            return with_lengths(motion, xp.stack(lengths), self.step)

        cond = backend_of(self.step).cond
        self._motion = cond(is_measured(self.step), measure, lambda motion: motion, self._motion)

    def _apply_pull(self) -> None:
        moved = []
        for i, pull in zip(self.sparse, self._pulls, strict=True):
            xp, update = array_namespace(pull), self._updates[i]
            total = xp.astype(update, pull.dtype, copy=False) - pull
            moved.append(xp.astype(total, update.dtype, copy=False))
        self._updates = self._replaced(self._updates, moved)

    def _pull(self) -> None:
        weight = self._penalty_now()
        states = zip(self.sparse, self._split.anchor, self._split.support, strict=True)
        moved = []
        for i, anchor, support in states:
            x, update = self.params[i], self._updates[i]
            xp, wide = array_namespace(x), _wider(x, update)
            after = xp.astype(x, wide, copy=False) + xp.astype(update, wide, copy=False)
            found = pulled(after, anchor, support, weight)
            change = found - xp.astype(x, found.dtype, copy=False)
            # On the support the update stays as it is, bit for bit.
            moved.append(xp.where(support, update, xp.astype(change, update.dtype, copy=False)))
        self._updates = self._replaced(self._updates, moved)

    def _mask_parameters(self) -> None:
        self._zero_off(self._split.support)

    def _update_state(self) -> None:
        constraint, pattern = self.method.constraint, self.method.sparsity
        params = self._applied(self._updates)
        due = self._is_due

        # Importance comes first: the projection of this update already uses the new P.
        def update(
            split: SplitState, held: list[Array] | None
        ) -> tuple[SplitState, list[Array] | None]:
            values = self._of(params)
            held = self._refreshed(held, params)
            metric = self.method.metric(held, source=self._source)
            return constraint.update(values, split, pattern, self.info, self.step, metric), held

        def keep(
            split: SplitState, held: list[Array] | None
        ) -> tuple[SplitState, list[Array] | None]:
            return split, held

        cond = backend_of(self.step).cond
        self._split, self._held = cond(due, update, keep, self._split, self._held)

    def _refreshed(self, held: list[Array] | None, params: list[Array]) -> list[Array] | None:
        source = self._source
        if source is None or source.reads is None:
            return held
        if source.reads == "gradients":
            return source.refresh(held or [], self._observed)
        if source.reads == "params":
            return source.refresh(held or [], self._of(params))
        if source.reads == "model":
            return source.refresh(held or [], params)
        if self.second_moments is None:
            raise ValueError(
                f"second_moments must be given for an importance that reads them, {source!r}, got "
                "None"
            )
        return source.refresh(held or [], self.second_moments())

    def _project_parameters(self) -> None:
        due = self._is_due
        support = self._split.support
        if not isinstance(due, bool):
            # No `if` on a traced value: a step that is not due keeps every entry instead.
            support = [mask | ~array_namespace(mask).asarray(due) for mask in support]
        elif not due:
            return
        self._zero_off(support)

    @property
    def _is_due(self) -> bool | Array:
        return self.method.constraint.is_due(self.method.sparsity, self.step)

    # Lists

    def _zero_off(self, support: Sequence[Array]) -> None:
        """Set the updates off a support to -x, so that adding them gives exactly +0."""
        emptied = []
        for i, mask in zip(self.sparse, support, strict=True):
            x, update = self.params[i], self._updates[i]
            xp = array_namespace(x)
            dtype = _wider(x, update)  # -x is exact in it; in a narrower dtype it might round
            kept, back = (xp.astype(a, dtype, copy=False) for a in (update, x))
            emptied.append(xp.where(mask, kept, -back))
        self._updates = self._replaced(self._updates, emptied)

    def _applied(self, updates: list[Array]) -> list[Array]:
        return [_added(x, update) for x, update in zip(self.params, updates, strict=True)]

    def _of(self, arrays: Sequence[Array]) -> list[Array]:
        return [arrays[i] for i in self.sparse]

    def _replaced(self, arrays: Sequence[Array], sparse: Sequence[Array]) -> list[Array]:
        found = list(arrays)
        for i, array in zip(self.sparse, sparse, strict=True):
            found[i] = array
        return found


def _combined(new: list[Array], before: list[Array], evaluation: Evaluation) -> list[Array]:
    if evaluation.combine == "replace":
        return new
    return [a + b for a, b in zip(before, new, strict=True)]


def _added(x: Array, step: Array) -> Array:
    """Return ``x + step`` in the dtype of x, computed in the wider of the two."""
    xp, wide = array_namespace(x), _wider(x, step)
    total = xp.astype(x, wide, copy=False) + xp.astype(step, wide, copy=False)
    return xp.astype(total, x.dtype, copy=False)


def _wider(a: Array, b: Array) -> Any:
    """Return the dtype that represents both exactly.

    Promotion rules differ between libraries, so the result must not depend on them.
    """
    if a.dtype == b.dtype:
        return a.dtype
    xp = array_namespace(a)
    sizes = [xp.finfo(x.dtype).bits for x in (a, b)]
    if sizes[0] == sizes[1]:  # float16 and bfloat16: neither holds the other
        return xp.float32
    return a.dtype if sizes[0] > sizes[1] else b.dtype


def _cast(arrays: Sequence[Array], like: Sequence[Array]) -> list[Array]:
    return [
        array_namespace(a).astype(a, b.dtype, copy=False) for a, b in zip(arrays, like, strict=True)
    ]
