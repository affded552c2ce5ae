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
from .schedules import Schedule, as_schedule
from .sharpness import ASAM, SAM, Direction, flat_direction, reused
from .sparsity import Pattern, as_pattern
from .splitting import SplitState, Targets

__all__ = ["Method", "admm", "safe"]


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
    published implementations).

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", as_pattern(self.sparsity))
        object.__setattr__(self, "penalty", as_schedule("penalty", self.penalty))
        if self.perturbation is not None and not isinstance(self.perturbation, SAM):
            raise TypeError(f"perturbation must be SAM, ASAM or None, got {self.perturbation!r}")
        _checks.integer("dual_update_interval", self.dual_update_interval, low=1)
        if self.importance is not None and not _is_source(self.importance):
            raise TypeError(
                "importance must be None or a hashable source such as SquaredGradient(), got "
                f"{_checks.shown(self.importance)}; arrays and functions go to the adapter's "
                "importance="
            )
        if not 0 < _checks.real("relaxation", self.relaxation) < 2:
            raise ValueError(f"relaxation must be in (0, 2), got {self.relaxation!r}")
        if not isinstance(self.rescale_dual, bool):
            raise TypeError(f"rescale_dual must be True or False, got {self.rescale_dual!r}")
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

    @property
    def perturbs(self) -> bool:
        """Whether some step takes a second gradient, at the perturbed point."""
        return self.perturbation is not None and not self.perturbation.is_zero

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
        """Whether z and u are updated after the base step number ``step``."""
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
        ``workspace``, arrays like v to write over, updates the split in place.
        """
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
) -> Method:
    """SAFE, and SAFE+ when given an importance: sparse and flat minima by ADMM.

    ``min_{x in C} max_{|e| <= rho} f(x + e)``, see `Method` for the iteration.

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
    Unstructured(sparsity=0.95, scope='global')
    """
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive must be True or False, got {adaptive!r}")
    _checks.integer("perturbation_interval", perturbation_interval, low=1)
    kind = ASAM if adaptive else SAM
    return Method(
        sparsity=sparsity,
        perturbation=kind(rho, interval=perturbation_interval, reuse=reuse),
        penalty=penalty,  # type: ignore[arg-type]
        dual_update_interval=dual_update_interval,
        importance=importance,
        relaxation=relaxation,
        rescale_dual=rescale_dual,
        state_dtype=state_dtype,
    )


def admm(
    sparsity: Any,
    *,
    penalty: float | Schedule = 1e-3,
    dual_update_interval: int = 32,
    importance: Importance | None = None,
    relaxation: float = 1.0,
    rescale_dual: bool = False,
    state_dtype: str | None = None,
) -> Method:
    """Plain ADMM pruning: SAFE without a perturbation.

    ``min_{x in C} f(x)``, see `Method` for the iteration.

    Parameters
    ----------
    sparsity, penalty, dual_update_interval, importance, relaxation, rescale_dual, state_dtype
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
    )
