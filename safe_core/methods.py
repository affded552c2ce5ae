"""Constructors of the named methods; each composes a `Method` from parts."""

from __future__ import annotations

from typing import Any

from . import _checks, untuned
from .constraints import ADMM, AtEnd, Constraint, HardThreshold, Mask
from .importance import Importance
from .method import Method
from .patterns import FixedZeros, as_pattern
from .perturbations import ASAM, SAM, GradientAscent, Perturbation
from .schedules import Schedule
from .step import Evaluation, Point

__all__ = ["admm", "cram", "gmp", "iht", "imp_sam", "keep_zeros", "magnitude", "safe"]


def safe(
    sparsity: Any,
    *,
    steps: int | None = None,
    rho: float | Schedule | None = None,
    penalty: float | Schedule | None = None,
    dual_update_interval: int | None = None,
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

    SAFE solves ``min_{x in C} max_{|e| <= rho} f(x + e)``; see `Method` for the iteration. Give
    the number of optimizer steps T as ``steps``, and no other number is needed::

        dual updates  every T / 140 steps, at most 32 apart
        sparsity      rises along a cubic over half of the run, or over sqrt(300 T) steps of
                      more than 1200, but at least over T / 5
        weights       off the support are pulled, see `Pull`, at 200 / T * (1 - cos(pi t / T))
        radius        up to 2 mean steps of the base optimizer, rising from 0 over T / 5 steps,
                      times min(1, (T l / (5 |x|))^2) for steps of length l; it shrinks after
                      steps at which the gradient's norm at x + e is over 1.4 times that at x

    Every number that is given replaces its derivation, and so does a sparsity that is a
    schedule. Without ``steps`` the method is that of the paper, with its numbers. For SAFE-Multi
    pass a `safe_core.schedules.random_sparsity` as the sparsity.

    Parameters
    ----------
    sparsity : float, str or pattern
        A fraction of zeros in [0, 1), ``"N:M"``, or `Unstructured`, `NM`, `Block` or
        `Channel`.
    steps : int, optional
        Optimizer steps of the whole run, from which the numbers below are derived.
    rho : float or schedule, optional
        Perturbation radius; without ``steps``, 0.1 by default. The paper uses 0.1 for vision
        and 2e-4 for language models.
    penalty : float or schedule, optional
        Penalty parameter lambda of `ADMM`, which takes the place of the pull; dual updates are
        then T / 20 steps apart, at most 32. Without ``steps``, 1e-3 by default. The paper uses
        1e-4 to 1e-1, with a cosine schedule for vision and constant for language models. Higher
        sparsity needs a higher penalty.
    dual_update_interval : int, optional
        Steps K between two dual updates; without ``steps``, 32 by default.
    importance : Importance, optional
        Source of P, for SAFE+.
    adaptive : bool
        Whether the perturbation scales with each weight, as in `ASAM`. It needs ``rho``.
    relaxation : float
        Over-relaxation alpha in (0, 2); 1 is plain ADMM. Another value needs a penalty, like
        the next one.
    rescale_dual : bool
        Whether u is rescaled when the penalty changes, see `ADMM`.
    perturbation_interval, reuse : int, float
        ``interval`` and ``reuse`` of `SAM`: take the second gradient at every n-th step only,
        and reuse part of it at the others.
    state_dtype : {None, "bfloat16"}
        "bfloat16" needs 3 bytes of state per sparse parameter instead of 5, see `ADMM`.
    decoupled : bool
        Whether the penalty is a step of its own, as decoupled weight decay is, instead of
        part of the gradient. It needs a penalty.
    projected_gradient : bool
        Whether every step adds ``grad f(C(x))``, a third gradient (SAFE+SG).

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`, or if an argument needs another one that is not given.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", ICML.

    Examples
    --------
    >>> method = safe(sparsity=0.95, steps=14_000)
    >>> [method.sparsity.schedule(t) for t in (0, 14_000)], method.constraint.dual_update_interval
    ([0.0, 0.95], 32)
    >>> method = safe(sparsity=0.95, rho=0.1, penalty=1e-3)
    >>> method.sparsity
    Unstructured(sparsity=0.95, scope='global', distribution=None)
    """
    _checks.integer("perturbation_interval", perturbation_interval, low=1)
    ball_options = {"interval": perturbation_interval, "reuse": reuse}
    if steps is not None and rho is None:
        if _checks.flag("adaptive", adaptive):
            raise ValueError(f"rho must be given with adaptive={adaptive!r}, got None")
        perturbation: Perturbation = untuned.ball(_positive(steps), **ball_options)
    else:
        perturbation = _ball(0.1 if rho is None else rho, adaptive, **ball_options)
    pattern, constraint = _splitting(
        sparsity,
        steps,
        penalty,
        dual_update_interval,
        state_dtype,
        relaxation=relaxation,
        rescale_dual=rescale_dual,
        decoupled=decoupled,
    )
    return Method(
        pattern,
        constraint,
        perturbation=perturbation,
        importance=importance,
        evaluations=_evaluations([Point.X, Point.PERTURBED], projected_gradient),
    )


def _splitting(
    sparsity: Any,
    steps: int | None,
    penalty: float | Schedule | None,
    interval: int | None,
    state_dtype: str | None,
    **options: Any,
) -> tuple[Any, Constraint]:
    """Return the sparsity and the constraint, with what is not given derived from ``steps``."""
    if steps is None:
        penalty = 1e-3 if penalty is None else penalty
        interval = 32 if interval is None else interval
        return sparsity, ADMM(penalty, interval, state_dtype=state_dtype, **options)  # type: ignore[arg-type]
    steps = _positive(steps)
    if interval is None:
        derive = untuned.interval if penalty is None else untuned.penalty_interval
        interval = derive(steps)
    interval = _checks.integer("dual_update_interval", interval, low=1)
    pattern = untuned.rising(as_pattern(sparsity), steps, interval)
    if penalty is not None:
        return pattern, ADMM(penalty, interval, state_dtype=state_dtype, **options)  # type: ignore[arg-type]
    given, plain = ADMM(**options), ADMM()  # which checks their types
    for name, value in options.items():
        if getattr(given, name) != getattr(plain, name):
            raise ValueError(
                f"{name} must be left out unless penalty is given, because it belongs to the "
                f"penalty of ADMM and not to the pull, got {value!r}"
            )
    return pattern, untuned.pull(steps, interval, state_dtype)


def _positive(steps: Any) -> int:
    return _checks.integer("steps", steps, low=1)


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
    steps: int | None = None,
    penalty: float | Schedule | None = None,
    dual_update_interval: int | None = None,
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
    sparsity, steps, penalty, dual_update_interval, importance, relaxation
        See `safe`. With ``steps`` the same numbers are derived.
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
    pattern, constraint = _splitting(
        sparsity,
        steps,
        penalty,
        dual_update_interval,
        state_dtype,
        relaxation=relaxation,
        rescale_dual=rescale_dual,
        decoupled=decoupled,
    )
    return Method(
        pattern,
        constraint,
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


def keep_zeros(*, rho: float | Schedule = 0.0, adaptive: bool = False) -> Method:
    """Return training that keeps the zeros of the weights, to fine-tune a sparse network.

    The mask of every weight is where it is not zero at the start. Gradients and weights are zero
    off the mask at every step, whatever pattern the network was pruned to.

    Parameters
    ----------
    rho : float or schedule
        Radius of a perturbation as in `safe`, within the mask; 0 for none.
    adaptive : bool
        See `safe`.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import ArrayInfo
    >>> keep_zeros().init([numpy.asarray([0.0, 3.0])], ArrayInfo(("w",), (None,))).support
    [array([False,  True])]
    """
    return Method(FixedZeros(), Mask(), perturbation=_ball(rho, adaptive))


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
