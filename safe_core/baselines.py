"""Constructors of the methods that SAFE is compared with; each composes a `Method` from parts."""

from __future__ import annotations

from typing import Any

from . import _checks
from .constraints import AtEnd, HardThreshold, Mask
from .importance import Importance
from .method import Method
from .perturbations import GradientAscent, ball
from .schedules import Schedule
from .step import Evaluation, Point

__all__ = ["cram", "gmp", "iht", "imp_sam", "magnitude"]


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
        Method(sparsity, Mask(), perturbation=ball(rho, adaptive), importance=importance)
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
