"""A sparsification method: the parts that it is composed of, in one value.

`Method` holds configuration and no arrays, so one object serves every framework, is
hashable, compares by value, pickles, and can be a static argument of `jax.jit`. The
adapters bind it to a training loop; a loop of one's own calls its functions directly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array

from . import _checks, splitting
from .importance import Importance
from .projection import apply_support
from .schedules import Constant, RandomSparsity, Schedule, SparsityTable, as_schedule
from .scores import positive
from .sharpness import ASAM, SAM, Direction, GradientAscent, flat_direction, reused
from .sparsity import Pattern, as_pattern
from .splitting import SplitState, Targets

__all__ = ["Method", "admm", "cram", "gmp", "iht", "imp_sam", "magnitude", "safe"]


@dataclass(frozen=True)
class Method:
    """Training under a sparsity constraint, composed of swappable parts.

    One step ``t = 0, 1, ...`` is::

        g0 = grad f(x)
        e  = perturbation(g0)                            norm over all parameters
        g  = grad f(x + e) + penalty(t) * (x - z + u)    penalty on sparse parameters
        x  = base optimizer step with g
        if (t + 1) % dual_update_interval == 0:
            v = relaxation * x + (1 - relaxation) * z + u
            z = proj_C^P(v);  u = v - z

    It starts at ``z = proj(x_0)``, ``u = 0`` and ends with ``proj(x_T)``, which makes
    the weights exactly sparse (Lee et al. 2025, Algorithm 1, in the order of both
    published implementations). Other methods are made of the same parts::

        g  = grad f(C(x + e))                            compressed
        g += grad f(x)  or  grad f(C(x))                 added_gradient
        x -= learning rate * penalty(t) * (x_t - z + u)  decoupled
        x  = proj(x), or under a mask, or left           projection

    where ``C`` is the projection at the sparsity of step t.

    Attributes
    ----------
    sparsity : pattern
        The constraint C. A fraction of zeros or ``"N:M"`` is accepted.
    perturbation : SAM or None
        How e follows from the gradient, and at which steps; None for plain ADMM.
    penalty : schedule
        The penalty parameter lambda by step. A non-negative number is accepted.
    dual_update_interval : int
        K, steps between two dual updates.
    importance : Importance or None
        Where P comes from; None is P = 1. Arrays of P go to the adapter.
    relaxation : float
        Over-relaxation alpha in (0, 2); 1 is plain ADMM.
    rescale_dual : bool
        Whether u is multiplied by ``penalty(t - 1) / penalty(t)`` as the penalty
        changes, which keeps the unscaled dual variable.
    state_dtype : {None, "bfloat16"}
        What ``z - u`` is stored in. None is float32, or the parameter's dtype if that is
        wider: with the support 5 bytes per sparse float32 parameter. "bfloat16" takes 3,
        rounds stochastically at dual updates, and computes as before. Not for NumPy,
        which lacks it, nor with ``rescale_dual``.
    decoupled : bool
        Whether the penalty acts beside the base step, times the learning rate, and not
        through the gradient: Algorithm 1, line 13.
    compressed : bool
        Whether the perturbed gradient is taken at C(x + e) and not at x + e.
    added_gradient : {None, "unperturbed", "projected"}
        A loss gradient to be added: ``grad f(x)`` where a step perturbs, or
        ``grad f(C(x))`` at every step.
    projection : {"dual", "hard", "masked", "final"}
        What brings x to C. "dual": z and u, as above. "hard": ``x <- proj(x)`` in the place
        of a dual update. "masked": a mask on x and its gradients that is drawn anew, among
        what it has kept, where a sparsity that changes over time does. "final": nothing
        before the end; in the place of a dual update the importance is refreshed. All but the
        first need a ``penalty`` of 0 and keep the support alone.

    Raises
    ------
    TypeError, ValueError
        If a part is not of its kind or out of its range.

    Examples
    --------
    >>> from safe_core import SAM, Method, schedules
    >>> method = Method(0.9, perturbation=SAM(0.1), penalty=schedules.cosine(1e-3, steps=500))
    >>> method.penalty(500), method.is_dual_update(31)
    (0.001, True)
    """

    sparsity: Pattern
    perturbation: SAM | None = None
    penalty: Schedule = 1e-3  # type: ignore[assignment]
    dual_update_interval: int = 32
    importance: Importance | None = None
    relaxation: float = 1.0
    rescale_dual: bool = False
    state_dtype: str | None = None
    decoupled: bool = False
    compressed: bool = False
    added_gradient: str | None = None
    projection: str = "dual"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", as_pattern(self.sparsity))
        object.__setattr__(self, "penalty", as_schedule("penalty", self.penalty))
        if self.perturbation is not None and not isinstance(self.perturbation, SAM):
            raise TypeError(
                f"perturbation must be SAM, ASAM, GradientAscent or None, got {self.perturbation!r}"
            )
        _checks.integer("dual_update_interval", self.dual_update_interval, low=1)
        if self.importance is not None and not _is_source(self.importance):
            raise TypeError(
                "importance must be None or a hashable source such as SquaredGradient(), got "
                f"{_checks.shown(self.importance)}; arrays and functions go to the adapter's "
                "importance="
            )
        if not 0 < _checks.real("relaxation", self.relaxation) < 2:
            raise ValueError(f"relaxation must be in (0, 2), got {self.relaxation!r}")
        for name in ("rescale_dual", "decoupled", "compressed"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.rescale_dual and getattr(self.penalty, "has_zero_after_start", True):
            raise ValueError(
                "rescale_dual divides by the penalty, which must be known to stay positive after "
                f"step 0, got penalty={self.penalty!r}"
            )
        if self.state_dtype is not None:
            _checks.choice("state_dtype", self.state_dtype, (None, "bfloat16"))
            if self.rescale_dual:
                raise ValueError(
                    "state_dtype must be None under rescale_dual, which changes the stored u at "
                    f"every step, got {self.state_dtype!r}"
                )
        self._check_gradients()
        self._check_projection()

    def _check_gradients(self) -> None:
        _checks.choice("added_gradient", self.added_gradient, (None, "unperturbed", "projected"))
        if self.perturbation is None and (self.compressed or self.added_gradient == "unperturbed"):
            raise ValueError(
                "perturbation must not be None for a gradient at C(x + e), or for one at x beside "
                "it, got None"
            )
        if self.reuses and (self.compressed or self.added_gradient is not None):
            raise ValueError(
                "reuse must be 0 beside a gradient at C(x + e) or an added one, got "
                f"{self.perturbation!r}"
            )

    def _check_projection(self) -> None:
        _checks.choice("projection", self.projection, ("dual", "hard", "masked", "final"))
        if self.projection == "masked" and isinstance(self._table, RandomSparsity):
            raise ValueError(
                "sparsity must not be drawn at random for a mask, of which nothing comes back, got "
                f"{self.sparsity!r}"
            )
        if self.splits:
            return
        of_dual = {
            "penalty": Constant(0.0),
            "relaxation": 1,
            "rescale_dual": False,
            "state_dtype": None,
            "decoupled": False,
        }
        for name, value in of_dual.items():
            if getattr(self, name) != value:
                shown = 0 if name == "penalty" else value
                raise ValueError(
                    f"{name} must be {shown!r} where projection is {self.projection!r}, for there "
                    f"is no z and u, got {getattr(self, name)!r}"
                )

    @property
    def _table(self) -> Any:
        """The sparsity within the pattern: a fraction, a table, or None for N:M."""
        return getattr(self.sparsity, "sparsity", None)

    @property
    def splits(self) -> bool:
        """Whether there are z and u: the penalty pulls x to them, and anchors are kept."""
        return self.projection == "dual"

    @property
    def masks(self) -> bool:
        """Whether x and its gradients are zero off the support at every step."""
        return self.projection == "masked"

    @property
    def prunes(self) -> bool:
        """Whether x itself is set to zero off the support as it is updated."""
        return self.projection in ("hard", "masked")

    @property
    def adds_projected(self) -> bool:
        """Whether every step takes a gradient at C(x) too."""
        return self.added_gradient == "projected"

    @property
    def adds_unperturbed(self) -> bool:
        """Whether the gradient at x is added to the perturbed one."""
        return self.added_gradient == "unperturbed"

    @property
    def perturbs(self) -> bool:
        """Whether some step takes a second gradient, at the perturbed point."""
        return self.perturbation is not None and (self.compressed or not self.perturbation.is_zero)

    @property
    def reuses(self) -> bool:
        """Whether other steps reuse a direction of the perturbed gradient, kept as state."""
        return self.perturbation is not None and self.perturbation.reuse > 0

    def flat_direction(self, first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
        """Return the direction to reuse, of the gradients at x and at x + e.

        See `safe_core.sharpness.flat_direction`; for all trainable parameters, at a step
        that perturbs.
        """
        return flat_direction(first, second)

    def reuse(self, gradients: Sequence[Array], flat: Sequence[Array]) -> list[Array]:
        """Return the gradients of a step that reuses the direction ``flat``.

        See `safe_core.sharpness.reused`; at a step that does not perturb.
        """
        if self.perturbation is None:
            raise ValueError(f"perturbation must not be None to be reused, got {self!r}")
        return reused(gradients, flat, self.perturbation.reuse)

    def is_dual_update(self, step: int | Array) -> bool | Array:
        """Whether the support, with z and u if any, is updated after the base step ``step``."""
        if self.masks:
            if not isinstance(self._table, SparsityTable):
                return False
            changed: bool | Array = self._table.stage(step + 1) != self._table.stage(step)
            return changed
        return self.dual_update_interval == 1 or (step + 1) % self.dual_update_interval == 0

    def radius(self, step: int | Array) -> float | Array:
        """Return rho at ``step``; 0 without a perturbation."""
        return 0.0 if self.perturbation is None else self.perturbation.rho(step)  # type: ignore[operator]

    def perturb(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        step: int | Array,
        *,
        rho: float | Array | None = None,
    ) -> list[Array]:
        """Return the perturbation e of all trainable parameters; ``rho`` overrides the method's."""
        return self.direction(params, gradients, step, rho=rho).perturbation()

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        step: int | Array,
        *,
        rho: float | Array | None = None,
    ) -> Direction:
        """Return `perturb` before it is written out, for an adapter that adds it in place."""
        if self.perturbation is None:
            raise ValueError(f"perturbation must not be None to perturb, got {self!r}")
        if rho is None:
            rho = self.radius(step)
        return self.perturbation.direction(params, gradients, rho=rho)

    def init(
        self,
        params: Sequence[Array],
        targets: Targets,
        importance: Sequence[Array | None] | None = None,
    ) -> SplitState:
        """Return the split of the sparse parameters before step 0.

        ``importance`` is P where it is known from the start.
        """
        if not self.splits:
            return SplitState([], self.compression(params, targets, 0, importance))
        return splitting.init(
            params,
            self.sparsity,
            targets,
            importance=importance,
            state_dtype=self.state_dtype,
        )

    def init_importance(self, params: Sequence[Array]) -> list[Array] | None:
        """Return the state of the method's own importance; None if P = 1."""
        return None if self.importance is None else self.importance.init(params)

    def refresh_importance(
        self, state: list[Array] | None, gradients: Sequence[Array]
    ) -> list[Array] | None:
        """Take in the loss gradients, at x + e and before the penalty, of a dual update."""
        if self.importance is None or state is None:
            return state
        return self.importance.refresh(state, gradients)

    def metric(self, state: Sequence[Array] | None) -> Sequence[Array] | None:
        """Return P: of the importance's state, or the arrays that a caller gave."""
        if self.importance is None or state is None:
            return state
        return self.importance.metric(state, joint=self.sparsity.scope == "global")

    def rescale(self, split: SplitState, step: int | Array) -> SplitState:
        """Return the split for the penalty of ``step``, before its penalty gradient."""
        if not self.rescale_dual:
            return split
        if isinstance(step, int):
            return split if step == 0 else splitting.rescale_dual(split, self._ratio(step))
        xp = array_namespace(step)
        ratio = self._ratio(step)
        return splitting.rescale_dual(split, xp.where(step > 0, ratio, xp.ones_like(ratio)))

    def _ratio(self, step: int | Array) -> float | Array:
        return self.penalty(step - 1) / self.penalty(step)

    def dual_update(
        self,
        params: Sequence[Array],
        split: SplitState,
        step: int | Array,
        targets: Targets,
        importance: Sequence[Array | None] | None = None,
        *,
        workspace: Sequence[Array] | None = None,
    ) -> SplitState:
        """Return the split after the dual update at the end of ``step``.

        ``importance`` is P itself, such as ``method.metric(state)``; None is P = 1.
        ``workspace``, arrays like v to write over, updates the split in place. Without z and
        u it is the support of x alone, or of x under its mask.
        """
        if not self.splits:
            if self.masks:
                params, importance = _under_mask(params, split.support, importance)
            return SplitState([], self.compression(params, targets, step + 1, importance))
        return splitting.dual_update(
            params,
            split,
            self.sparsity,
            targets,
            importance=importance,
            relaxation=self.relaxation,
            step=step + 1,
            state_dtype=self.state_dtype,
            workspace=workspace,
        )

    def compression(
        self,
        params: Sequence[Array],
        targets: Targets,
        step: int | Array,
        importance: Sequence[Array | None] | None = None,
    ) -> list[Array]:
        """Return where ``C(params)`` at ``step`` keeps entries."""
        return splitting.support_at(params, self.sparsity, targets, step, importance=importance)

    def finalize(
        self,
        params: Sequence[Array],
        targets: Targets,
        importance: Sequence[Array | None] | None = None,
    ) -> list[Array]:
        """Return ``proj(params)``, exactly sparse, in the dtypes of ``params``.

        ``importance`` is P itself, such as ``method.metric(state)``; None is P = 1.
        """
        return apply_support(params, self.final_support(params, targets, importance))

    def final_support(
        self,
        params: Sequence[Array],
        targets: Targets,
        importance: Sequence[Array | None] | None = None,
    ) -> list[Array]:
        """Return where `finalize` keeps entries."""
        return splitting.final_support(params, self.sparsity, targets, importance=importance)


def _under_mask(
    params: Sequence[Array], mask: Sequence[Array], importance: Sequence[Array | None] | None
) -> tuple[Sequence[Array], Sequence[Array | None] | None]:
    """Params and P by which what the mask has kept ranks above what is gone."""
    kept = apply_support(params, mask)
    known = [p for p in importance or () if p is not None]
    if importance is None or not known:
        return kept, None
    raised = iter(positive(array_namespace(*known), known))
    return kept, [None if p is None else next(raised) for p in importance]


def _is_source(importance: Any) -> bool:
    parts = ("init", "refresh", "metric")
    return (
        not isinstance(importance, type)
        and isinstance(importance, Hashable)
        and all(hasattr(importance, part) for part in parts)
    )


def safe(
    sparsity: Any,
    *,
    rho: float | Schedule = 0.1,
    penalty: float | Schedule = 1e-3,
    dual_update_interval: int = 32,
    importance: Importance | None = None,
    adaptive: bool = False,
    relaxation: float = 1.0,
    rescale_dual: bool = False,
    perturbation_interval: int = 1,
    reuse: float = 0.0,
    state_dtype: str | None = None,
    decoupled: bool = False,
    projected_gradient: bool = False,
) -> Method:
    """SAFE, and SAFE+ when given an importance: sparse and flat minima by ADMM.

    ``min_{x in C} max_{|e| <= rho} f(x + e)``, see `Method` for the iteration. SAFE-Multi is
    SAFE with a `safe_core.schedules.random_sparsity`.

    Parameters
    ----------
    sparsity : float, str or pattern
        A fraction of zeros in [0, 1), ``"N:M"``, or `Unstructured`, `NM`, `Block` or
        `Channel`.
    rho : float or schedule
        Perturbation radius; the paper uses 0.1 for vision and 2e-4 for language models.
    penalty : float or schedule
        lambda; the paper chooses it from 1e-4 to 1e-1, under a cosine schedule for
        vision and constant for language models. Higher sparsity wants a higher penalty.
    dual_update_interval : int
        K; 32 in the paper.
    importance : Importance, optional
        Where P comes from, for SAFE+.
    adaptive : bool
        Whether the radius follows the scale of each weight (ASAM).
    relaxation : float
        Over-relaxation alpha in (0, 2).
    rescale_dual : bool
        Whether u follows changes of the penalty.
    perturbation_interval, reuse : int, float
        Take the second gradient at every n-th step only, and reuse part of it at the
        others: ``interval`` and ``reuse`` of `SAM`.
    state_dtype : {None, "bfloat16"}
        "bfloat16" keeps 3 bytes per sparse parameter in place of 5, see `Method`.
    decoupled : bool
        Whether the penalty acts beside the base step and not through the gradient.
    projected_gradient : bool
        Whether every step adds ``grad f(C(x))``, a third gradient: SAFE+SG.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", ICML.

    Examples
    --------
    >>> method = safe(sparsity=0.95, rho=0.1, penalty=1e-3)
    >>> method.sparsity
    Unstructured(sparsity=0.95, scope='global', budget=None)
    """
    _checks.integer("perturbation_interval", perturbation_interval, low=1)
    return Method(
        sparsity=sparsity,
        perturbation=_ball(rho, adaptive, interval=perturbation_interval, reuse=reuse),
        penalty=penalty,  # type: ignore[arg-type]
        dual_update_interval=dual_update_interval,
        importance=importance,
        relaxation=relaxation,
        rescale_dual=rescale_dual,
        state_dtype=state_dtype,
        decoupled=decoupled,
        added_gradient=_projected(projected_gradient),
    )


def _ball(rho: Any, adaptive: Any, **options: Any) -> SAM:
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive must be True or False, got {adaptive!r}")
    return (ASAM if adaptive else SAM)(rho, **options)


def _projected(flag: Any) -> str | None:
    if not isinstance(flag, bool):
        raise TypeError(f"projected_gradient must be True or False, got {flag!r}")
    return "projected" if flag else None


def admm(
    sparsity: Any,
    *,
    penalty: float | Schedule = 1e-3,
    dual_update_interval: int = 32,
    importance: Importance | None = None,
    relaxation: float = 1.0,
    rescale_dual: bool = False,
    state_dtype: str | None = None,
    decoupled: bool = False,
    projected_gradient: bool = False,
) -> Method:
    """Plain ADMM pruning: SAFE without a perturbation.

    ``min_{x in C} f(x)``, see `Method` for the iteration.

    Parameters
    ----------
    sparsity, penalty, dual_update_interval, importance, relaxation
        As for `safe`.
    rescale_dual, state_dtype, decoupled, projected_gradient
        As for `safe`.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    References
    ----------
    Zhang et al. 2018, "A Systematic DNN Weight Pruning Framework using Alternating
    Direction Method of Multipliers", ECCV.

    Examples
    --------
    >>> admm("2:4", penalty=1e-2).perturbs
    False
    """
    return Method(
        sparsity=sparsity,
        penalty=penalty,  # type: ignore[arg-type]
        dual_update_interval=dual_update_interval,
        importance=importance,
        relaxation=relaxation,
        rescale_dual=rescale_dual,
        state_dtype=state_dtype,
        decoupled=decoupled,
        added_gradient=_projected(projected_gradient),
    )


def magnitude(sparsity: Any, *, importance: Importance | None = None, interval: int = 32) -> Method:
    """One-shot pruning: train freely, and project at the end.

    Parameters
    ----------
    sparsity, importance
        As for `safe`. Without an importance the entries of largest magnitude are kept.
    interval : int
        Base steps from one refresh of the importance to the next.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    References
    ----------
    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".

    Examples
    --------
    >>> magnitude(0.9).splits
    False
    """
    _checks.integer("interval", interval, low=1)
    return Method(
        sparsity,
        penalty=0.0,  # type: ignore[arg-type]
        dual_update_interval=interval,
        importance=importance,
        projection="final",
    )


def gmp(sparsity: Any, *, importance: Importance | None = None) -> Method:
    """Gradual magnitude pruning: a mask on the weights that grows while they train.

    At the steps where the sparsity changes the mask is drawn anew, among what it has kept,
    and holds until the next.

    Parameters
    ----------
    sparsity : Cubic, or pattern with one
        From `safe_core.schedules.cubic`, or `safe_core.schedules.linear_sparsity`.
    importance : Importance, optional
        As for `safe`.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`, or if ``sparsity`` does not change over time.

    References
    ----------
    Zhu and Gupta 2017, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for
    Model Compression".

    Examples
    --------
    >>> from safe_core import schedules
    >>> method = gmp(schedules.cubic(0.9, steps=1000, every=50))
    >>> [step for step in range(200) if method.is_dual_update(step)]
    [49, 99, 149, 199]
    """
    return _gradual(
        Method(sparsity, penalty=0.0, importance=importance, projection="masked")  # type: ignore[arg-type]
    )


def imp_sam(
    sparsity: Any,
    *,
    rho: float | Schedule = 0.1,
    importance: Importance | None = None,
    adaptive: bool = False,
) -> Method:
    """Iterative magnitude pruning with sharpness-aware steps in between: `gmp` under SAM.

    Parameters
    ----------
    sparsity : Cubic, or pattern with one
        Its ``every`` is the number of steps between two prunings. The published form rises
        by `safe_core.schedules.linear_sparsity`; `safe_core.schedules.cubic` does better.
    rho, importance, adaptive
        As for `safe`.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `gmp`.

    References
    ----------
    Na et al. 2022, "Train Flat, Then Compress: Sharpness-Aware Minimization Learns More
    Compressible Models"; Lee et al. 2025, section 4.5.

    Examples
    --------
    >>> from safe_core import schedules
    >>> imp_sam(schedules.linear_sparsity(0.9, steps=1000, every=250), rho=0.05).perturbs
    True
    """
    return _gradual(
        Method(
            sparsity,
            perturbation=_ball(rho, adaptive),
            penalty=0.0,  # type: ignore[arg-type]
            importance=importance,
            projection="masked",
        )
    )


def _gradual(method: Method) -> Method:
    if not isinstance(getattr(method.sparsity, "sparsity", None), SparsityTable):
        raise ValueError(
            "sparsity must change over time, such as schedules.cubic(0.9, steps=1000), got "
            f"{method.sparsity!r}"
        )
    return method


def iht(
    sparsity: Any,
    *,
    interval: int = 1,
    importance: Importance | None = None,
) -> Method:
    """Iterative hard thresholding: ``x <- proj(x)`` after every ``interval`` base steps.

    Parameters
    ----------
    sparsity, importance
        As for `safe`.
    interval : int
        Base steps from one projection to the next.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    References
    ----------
    Blumensath and Davies 2009, "Iterative Hard Thresholding for Compressed Sensing".

    Examples
    --------
    >>> iht(0.9, interval=8).is_dual_update(7)
    True
    """
    _checks.integer("interval", interval, low=1)
    return Method(
        sparsity,
        penalty=0.0,  # type: ignore[arg-type]
        dual_update_interval=interval,
        importance=importance,
        projection="hard",
    )


def cram(
    sparsity: Any,
    *,
    rho: float | Schedule = 0.05,
    plus: bool = False,
    importance: Importance | None = None,
    interval: int = 32,
) -> Method:
    """CrAM: train for what is left of the weights once they are pruned in one shot.

    ``g = grad f(C(x + rho * grad f(x)))``, and CrAM+ adds ``grad f(x)``. With a
    `safe_core.schedules.random_sparsity`, of which every step draws C, it is CrAM-Multi or
    CrAM+-Multi.

    Parameters
    ----------
    sparsity : float, str or pattern
        As for `safe`.
    rho : float or schedule
        Step size of the ascent, which is not normalised.
    plus : bool
        Whether the gradient at x is added.
    importance : Importance, optional
        As for `safe`.
    interval : int
        Base steps from one refresh of the importance to the next.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    References
    ----------
    Peste et al. 2023, "CrAM: A Compression-Aware Minimizer", ICLR.

    Examples
    --------
    >>> from safe_core import schedules
    >>> cram(schedules.random_sparsity((0.5, 0.7, 0.9)), plus=True).added_gradient
    'unperturbed'
    """
    if not isinstance(plus, bool):
        raise TypeError(f"plus must be True or False, got {plus!r}")
    _checks.integer("interval", interval, low=1)
    return Method(
        sparsity,
        perturbation=GradientAscent(rho),
        penalty=0.0,  # type: ignore[arg-type]
        dual_update_interval=interval,
        importance=importance,
        compressed=True,
        added_gradient="unperturbed" if plus else None,
        projection="final",
    )
