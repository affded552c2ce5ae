"""Constructors of the named methods; each composes a `Method` from parts."""

from __future__ import annotations

from typing import Any

from . import _checks
from .constraints import ADMM, AtEnd, HardThreshold, Mask
from .importance import Importance
from .method import Method
from .perturbations import ASAM, SAM, GradientAscent, Perturbation
from .schedules import Schedule
from .step import Evaluation, Point

__all__ = ["admm", "cram", "gmp", "iht", "imp_sam", "magnitude", "safe"]


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
    """Return SAFE, which finds sparse and flat minima by ADMM; with an importance it is SAFE+.

    SAFE solves ``min_{x in C} max_{|e| <= rho} f(x + e)``; see `Method` for the iteration.
    For SAFE-Multi pass a `safe_core.schedules.random_sparsity` as the sparsity.

    Parameters
    ----------
    sparsity : float, str or pattern
        A fraction of zeros in [0, 1), ``"N:M"``, or `Unstructured`, `NM`, `Block` or
        `Channel`.
    rho : float or schedule
        Perturbation radius. The paper uses 0.1 for vision and 2e-4 for language models.
    penalty : float or schedule
        Penalty parameter lambda. The paper uses 1e-4 to 1e-1, with a cosine schedule for
        vision and constant for language models. Higher sparsity needs a higher penalty.
    dual_update_interval : int
        Steps K between two dual updates. The paper uses 32.
    importance : Importance, optional
        Source of P, for SAFE+.
    adaptive : bool
        Whether the perturbation scales with each weight, as in `ASAM`.
    relaxation : float
        Over-relaxation alpha in (0, 2); 1 is plain ADMM.
    rescale_dual : bool
        Whether u is rescaled when the penalty changes, see `ADMM`.
    perturbation_interval, reuse : int, float
        ``interval`` and ``reuse`` of `SAM`: take the second gradient at every n-th step only,
        and reuse part of it at the others.
    state_dtype : {None, "bfloat16"}
        "bfloat16" needs 3 bytes of state per sparse parameter instead of 5, see `ADMM`.
    decoupled : bool
        Whether the penalty is a step of its own, as decoupled weight decay is, instead of
        part of the gradient.
    projected_gradient : bool
        Whether every step adds ``grad f(C(x))``, a third gradient (SAFE+SG).

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
    Unstructured(sparsity=0.95, scope='global', distribution=None)
    """
    _checks.integer("perturbation_interval", perturbation_interval, low=1)
    points = [Point.X, Point.PERTURBED]
    return Method(
        sparsity,
        ADMM(
            penalty,  # type: ignore[arg-type]
            dual_update_interval,
            relaxation=relaxation,
            rescale_dual=rescale_dual,
            state_dtype=state_dtype,
            decoupled=decoupled,
        ),
        perturbation=_ball(rho, adaptive, interval=perturbation_interval, reuse=reuse),
        importance=importance,
        evaluations=_evaluations(points, projected_gradient),
    )


def _ball(rho: Any, adaptive: Any, **options: Any) -> Perturbation:
    return (ASAM if _checks.flag("adaptive", adaptive) else SAM)(rho, **options)


def _evaluations(points: list[Point], projected_gradient: Any) -> tuple[Evaluation, ...] | None:
    """Return evaluations that each replace the one before, and one at C(x) that is added."""
    if not _checks.flag("projected_gradient", projected_gradient):
        # Method derives the same points from the perturbation. With None the result equals a
        # Method that is composed by hand.
        return None
    return (*map(Evaluation, points), Evaluation(Point.PROJECTED, "add"))


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
    """Return ADMM pruning, which is SAFE without a perturbation.

    ADMM solves ``min_{x in C} f(x)``; see `Method` for the iteration.

    Parameters
    ----------
    sparsity, penalty, dual_update_interval, importance, relaxation
        See `safe`.
    rescale_dual, state_dtype, decoupled, projected_gradient
        See `safe`.

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
    >>> admm("2:4", penalty=1e-2).plan().perturbs
    False
    """
    return Method(
        sparsity,
        ADMM(
            penalty,  # type: ignore[arg-type]
            dual_update_interval,
            relaxation=relaxation,
            rescale_dual=rescale_dual,
            state_dtype=state_dtype,
            decoupled=decoupled,
        ),
        importance=importance,
        evaluations=_evaluations([Point.X], projected_gradient),
    )


def magnitude(
    sparsity: Any, *, importance: Importance | None = None, importance_interval: int = 32
) -> Method:
    """Return one-shot magnitude pruning: train densely and project at the end.

    Parameters
    ----------
    sparsity, importance
        See `safe`. Without an importance the entries of largest magnitude are kept.
    importance_interval : int
        Base steps between two refreshes of the importance.

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
    >>> magnitude(0.9).constraint
    AtEnd(importance_interval=32)
    """
    return Method(sparsity, AtEnd(importance_interval), importance=importance)


def gmp(sparsity: Any, *, importance: Importance | None = None) -> Method:
    """Return gradual magnitude pruning (GMP), which masks more weights as training goes on.

    The mask is recomputed at the steps where the sparsity changes. A masked weight never
    comes back.

    Parameters
    ----------
    sparsity : Cubic, or pattern with one
        Schedule from `safe_core.schedules.cubic` or `safe_core.schedules.linear_sparsity`.
    importance : Importance, optional
        See `safe`.

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
    >>> [step for step in range(200) if method.is_due(step)]
    [49, 99, 149, 199]
    """
    return _gradual(Method(sparsity, Mask(), importance=importance))


def imp_sam(
    sparsity: Any,
    *,
    rho: float | Schedule = 0.1,
    importance: Importance | None = None,
    adaptive: bool = False,
) -> Method:
    """Return iterative magnitude pruning with SAM steps, which is `gmp` with a perturbation.

    Parameters
    ----------
    sparsity : Cubic, or pattern with one
        Schedule whose ``every`` is the number of steps between two prunings. The paper uses
        `safe_core.schedules.linear_sparsity`; `safe_core.schedules.cubic` does better.
    rho, importance, adaptive
        See `safe`.

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
    >>> imp_sam(schedules.linear_sparsity(0.9, steps=1000, every=250), rho=0.05).plan().perturbs
    True
    """
    return _gradual(
        Method(sparsity, Mask(), perturbation=_ball(rho, adaptive), importance=importance)
    )


def _gradual(method: Method) -> Method:
    if method.sparsity.schedule is None:
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
    """Return iterative hard thresholding, ``x <- proj(x)`` after every ``interval`` base steps.

    Parameters
    ----------
    sparsity, importance
        See `safe`.
    interval : int
        Base steps between two projections.

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
    >>> iht(0.9, interval=8).is_due(7)
    True
    """
    return Method(sparsity, HardThreshold(interval), importance=importance)


def cram(
    sparsity: Any,
    *,
    rho: float | Schedule = 0.05,
    plus: bool = False,
    importance: Importance | None = None,
    importance_interval: int = 32,
) -> Method:
    """Return CrAM, which trains weights that stay accurate when pruned in one shot.

    Every step uses ``g = grad f(C(x + rho * grad f(x)))``; CrAM+ adds ``grad f(x)``. With a
    `safe_core.schedules.random_sparsity` every step draws the sparsity of C, which is
    CrAM-Multi or CrAM+-Multi.

    Parameters
    ----------
    sparsity : float, str or pattern
        See `safe`.
    rho : float or schedule
        Step size of the ascent. The gradient is not normalised, unlike in SAM.
    plus : bool
        Whether the gradient at x is added (CrAM+).
    importance : Importance, optional
        See `safe`.
    importance_interval : int
        Base steps between two refreshes of the importance.

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
    >>> method = cram(schedules.random_sparsity((0.5, 0.7, 0.9)), plus=True)
    >>> [(str(e.point), e.combine) for e in method.plan().evaluations]
    [('x', 'replace'), ('C(x + e)', 'add')]
    """
    second = Evaluation(
        Point.PROJECTED_PERTURBED, "add" if _checks.flag("plus", plus) else "replace"
    )
    return Method(
        sparsity,
        AtEnd(importance_interval),
        perturbation=GradientAscent(rho),
        importance=importance,
        evaluations=(Evaluation(Point.X), second),
    )
