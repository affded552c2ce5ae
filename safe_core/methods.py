"""Constructors of the methods of this library; each composes a `Method` from parts."""

from __future__ import annotations

from typing import Any, Literal

from . import _checks, untuned
from .constraints import ADMM, Constraint, Mask
from .importance import Importance, SecondMoment
from .method import Method
from .patterns import FixedZeros, Pattern, as_pattern
from .perturbations import Perturbation, ball
from .schedules import Constant, Cubic, Schedule, as_schedule
from .step import Evaluation, Point

__all__ = ["admm", "elsa", "keep_zeros", "safe"]


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
        perturbation = ball(0.1 if rho is None else rho, adaptive, **ball_options)
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
    asked = as_pattern(sparsity)
    _check_length(asked, steps)
    pattern = untuned.rising(asked, steps, interval)
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


def _check_length(pattern: Pattern, steps: int) -> None:
    """Raise if a sparsity schedule would end after the run."""
    for part in pattern.parts:
        schedule = part.schedule
        if isinstance(schedule, Cubic) and schedule.start + schedule.steps > steps:
            raise ValueError(
                f"the schedule of sparsity must end by step {steps}, the end of the run, got one "
                f"that ends at step {schedule.start + schedule.steps}"
            )


def _positive(steps: Any) -> int:
    return _checks.integer("steps", steps, low=1)


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


def elsa(
    sparsity: Any,
    *,
    penalty: float | Schedule = 1e-2,
    dual_update_interval: int = 32,
    score: Literal["objective", "magnitude"] = "objective",
    scope: Literal["global", "tensor", "row"] = "tensor",
    rescale_dual: bool = True,
    state_dtype: str | None = None,
    packed_support: bool = False,
    first_dual_update: int | None = None,
) -> Method:
    """Return ELSA, which prunes a trained language model by ADMM through Adam, with one gradient.

    Every step adds ``penalty(t) * (x - z + u)`` to the gradient of the loss. After every
    ``dual_update_interval`` steps ``z = proj(x + u)`` keeps the entries with the largest
    ``v (x + u)^2``, where v is the base optimizer's second moment, and ``u += x - z``. The base
    must be Adam or another optimizer with second moments.

    Clip the gradient of the loss to a norm of 1 before the step, as trainers do. Then the penalty
    is not clipped. The paper uses betas (0.9, 0.95), no weight decay, a learning rate of 2e-4 at
    50% for 7B parameters that falls linearly to 0, and 4096 steps of 8 x 2048 tokens.

    Parameters
    ----------
    sparsity : float, str, pattern or mapping
        See `safe`. A fraction or a schedule has the ``scope``, a pattern its own.
    penalty : float or schedule
        Penalty parameter lambda, constant or from `safe_core.schedules`.
    dual_update_interval : int
        Steps K between two dual updates.
    score : {"objective", "magnitude"}
        "objective" is ``v (x + u)^2``, and "magnitude" ``|x + u|``, for any base optimizer.
    scope : {"global", "tensor", "row"}
        See `Unstructured`.
    rescale_dual : bool
        Whether u is rescaled when the penalty changes, see `ADMM`. False with a ``state_dtype``.
    state_dtype, packed_support : {None, "bfloat16", "float8_e4m3fn"}, bool
        See `ADMM`. "bfloat16" and True are ELSA-L in 2.125 bytes for z and u of a parameter.
        "float8_e4m3fn" and False are the published ELSA-L, in 3 bytes.
    first_dual_update : int, optional
        See `ADMM`. The published code updates after the first step, ``first_dual_update=1``.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`.

    References
    ----------
    ELSA, arXiv 2510.01650.

    Examples
    --------
    >>> method = elsa(0.9)
    >>> method.sparsity, method.constraint.penalty, method.plan().perturbs
    (Unstructured(sparsity=0.9, scope='tensor', distribution=None), Constant(value=0.01), False)
    """
    _checks.choice("score", score, ("objective", "magnitude"))
    lam = as_schedule("penalty", penalty)
    constraint = ADMM(
        lam,
        dual_update_interval,
        # A constant needs no rescaling, which would cost a pass over u.
        rescale_dual=_checks.flag("rescale_dual", rescale_dual)
        and state_dtype is None
        and not isinstance(lam, Constant),
        state_dtype=state_dtype,
        packed_support=packed_support,
        first_dual_update=first_dual_update,
    )
    importance = SecondMoment() if score == "objective" else None
    return Method(as_pattern(sparsity, scope), constraint, importance=importance)


def keep_zeros(*, rho: float | Schedule = 0.0, adaptive: bool = False) -> Method:
    """Return training that keeps the zeros of the weights, to fine-tune a sparse network.

    The mask ``M = (x_0 != 0)`` is that of the weights at the start, whatever pattern they were
    pruned to. At every step the base optimizer gets the gradient ``M * g``, and ``x <- M * x``
    follows.

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
        As `Method`. Training raises ValueError if no weight has a zero: in PyTorch at the first
        step, elsewhere where the state is made. With a radius it warns.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import ArrayInfo
    >>> keep_zeros().init([numpy.asarray([0.0, 3.0])], ArrayInfo(("w",), (None,))).support
    [array([False,  True])]
    """
    return Method(FixedZeros(), Mask(), perturbation=ball(rho, adaptive))
