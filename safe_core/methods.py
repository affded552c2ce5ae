"""The named methods: each a constructor that composes a `Method` of parts."""

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
    """Return gradients at ``points``, each in the place of the last, and one at C(x) added."""
    if not _checks.flag("projected_gradient", projected_gradient):
        return None  # the default of these points
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
    """One-shot pruning: train freely, and project at the end.

    Parameters
    ----------
    sparsity, importance
        As for `safe`. Without an importance the entries of largest magnitude are kept.
    importance_interval : int
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
    >>> magnitude(0.9).constraint
    AtEnd(importance_interval=32)
    """
    return Method(sparsity, AtEnd(importance_interval), importance=importance)


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
    importance_interval : int
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
