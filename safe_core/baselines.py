"""Constructors of the methods that SAFE is compared with; each composes a `Method` from parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from . import _checks, untuned
from .channel_sam import ChannelSAM
from .constraints import AtEnd, HardThreshold, Mask
from .importance import Importance
from .method import Method
from .patterns import Channel, FractionPattern, Pattern, as_pattern
from .perturbations import GradientAscent, ball
from .schedules import Schedule, exponential_sparsity
from .sparsity_tables import Cubic
from .staged import Staged
from .step import Evaluation, Point

__all__ = ["adasap", "cram", "gmp", "iht", "imp_sam", "magnitude"]

# The AdaSAP paper trains for 90 epochs. It removes channels in the eleventh, every 30 steps.
_EPOCHS = 90
_EPOCHS_BEFORE = 10
_LONGEST_INTERVAL = 30


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


def gmp(sparsity: Any, *, steps: int | None = None, importance: Importance | None = None) -> Method:
    """Return gradual magnitude pruning (GMP), which masks more weights as training goes on.

    The mask is recomputed at the steps where the sparsity changes. A masked weight never
    comes back.

    Parameters
    ----------
    sparsity : float or pattern, or Cubic or pattern with one
        Final sparsity, with ``steps``. Otherwise a schedule from `safe_core.schedules.cubic` or
        `safe_core.schedules.linear_sparsity`.
    steps : int, optional
        Number of steps of the run. The sparsity then rises along a cubic over the first half of
        it, and over a smaller part of a long run, in the same steps as that of ``safe(sparsity,
        steps=steps)``.
    importance : Importance, optional
        See `safe`.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`, or if ``sparsity`` does not change over time: without ``steps`` it must be a
        schedule, and with ``steps`` it must not.

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
    >>> gmp(0.9, steps=1000).sparsity.schedule.steps
    497
    """
    return Method(_gradual(sparsity, steps), Mask(), importance=importance)


def imp_sam(
    sparsity: Any,
    *,
    steps: int | None = None,
    rho: float | Schedule = 0.1,
    importance: Importance | None = None,
    adaptive: bool = False,
) -> Method:
    """Return iterative magnitude pruning with SAM steps, which is `gmp` with a perturbation.

    Parameters
    ----------
    sparsity : float or pattern, or Cubic or pattern with one
        Final sparsity, with ``steps``. Otherwise a schedule whose ``every`` is the number of steps
        between two prunings. The paper uses `safe_core.schedules.linear_sparsity`;
        `safe_core.schedules.cubic` does better.
    steps : int, optional
        As for `gmp`.
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
    rising = _gradual(sparsity, steps)
    return Method(rising, Mask(), perturbation=ball(rho, adaptive), importance=importance)


def _gradual(sparsity: Any, steps: int | None) -> Pattern:
    """Return a pattern whose sparsity rises, by itself or over a part of ``steps``."""
    pattern = as_pattern(sparsity)
    if steps is None:
        if not pattern.changes:
            raise ValueError(
                "sparsity must change over time, as with steps= of the run or "
                f"schedules.cubic(0.9, steps=1000), got {pattern!r}"
            )
        return pattern
    _checks.integer("steps", steps, low=1)
    if pattern.changes:
        raise ValueError(
            f"steps must be None for a sparsity that changes over time, got {steps} and {pattern!r}"
        )
    rising = untuned.rising(pattern, steps, untuned.interval(steps))
    if not rising.changes:
        raise ValueError(
            f"sparsity must be a positive fraction, which can rise from 0, got {pattern!r}"
        )
    return rising


def adasap(
    sparsity: Any,
    *,
    steps: int | None = None,
    adaptive: bool = True,
    rho_max: float | None = None,
    rho_min: float = 0.01,
    rho: float | Schedule | None = None,
    norm: Literal["channel", "global"] = "channel",
    importance: Importance | None = None,
) -> Method:
    """Return AdaSAP, which removes channels and makes the network robust to corrupted inputs.

    Training from a dense network has three stages. `ChannelSAM` perturbs channels of small norm
    most, so that the loss changes little when they go. Then channels are removed for good, the
    same fraction of what is left each time, under the same perturbation. From then on `ASAM` or
    `SAM` perturbs all weights alike. With the number of steps T and a fraction as the sparsity,
    the stages are those of the paper's 90 epochs::

        first stage    T / 9 steps
        second stage   about T / 90 steps, a removal every T / 900 steps, at most 30 apart
        third stage    the rest

    Start from a trained network, and exclude the last layer, whose channels are the classes.

    Parameters
    ----------
    sparsity : float, schedule or pattern
        Fraction of output channels to remove, among those of all layers, or a pattern of channels,
        such as ``Channel(0.5, scope="tensor")``. A schedule such as
        `safe_core.schedules.exponential_sparsity`, alone or in a pattern, sets the stages: its ramp
        is the second one.
    steps : int, optional
        Optimizer steps T of the whole run. Required, unless the sparsity is a schedule.
    adaptive : bool
        Whether perturbations scale with each weight, as in `ASAM`.
    rho_max, rho_min : float
        Largest and smallest radius of a channel in the first two stages. By default 2.0 and 0.01,
        and 0.1 and 0.01 if not adaptive. Equal ones with ``norm="global"`` give `ASAM` or `SAM`
        from the start.
    rho : float or schedule, optional
        Radius of the third stage, by default 2.0, and 0.05 if not adaptive.
    norm : {"channel", "global"}
        See `ChannelSAM`.
    importance : Importance, optional
        P in the score of a channel, the sum of ``P x^2``. Channels with the smallest scores are
        removed. The default score is the squared norm, and `SquaredGradient` gives Taylor's
        importance. The radii follow the norms in any case.

    Returns
    -------
    Method

    Raises
    ------
    TypeError, ValueError
        As `Method`, or if ``steps`` is missing, or given with a schedule, ``rho_min`` is above
        ``rho_max``, or the sparsity is not a fraction.

    References
    ----------
    Bair et al. 2023, "Adaptive Sharpness-Aware Pruning for Robust Sparse Networks" (AdaSAP).

    Examples
    --------
    >>> method = adasap(0.8, steps=90_000)
    >>> schedule, perturbation = method.sparsity.schedule, method.perturbation
    >>> schedule.start, schedule.every, perturbation.start
    (10000, 30, 10990)
    >>> perturbation.first.adaptive, perturbation.second.rho
    (True, Constant(value=2.0))
    """
    _checks.flag("adaptive", adaptive)
    if rho_max is None:
        rho_max = 2.0 if adaptive else 0.1
    if rho is None:
        rho = 2.0 if adaptive else 0.05
    largest = _checks.real("rho_max", rho_max, low=0.0)
    smallest = _checks.real("rho_min", rho_min, low=0.0)
    if smallest > largest:
        raise ValueError(f"rho_max must be at least rho_min, {smallest!r}, got {largest!r}")
    pattern, schedule = _removing(sparsity, steps)
    first = ChannelSAM(
        largest,
        smallest / largest if largest else 1.0,
        adaptive=adaptive,
        scope="global" if pattern.joint else "tensor",
        norm=norm,
    )
    perturbation = Staged(first, ball(rho, adaptive), schedule.start + schedule.steps)
    return Method(pattern, Mask(), perturbation=perturbation, importance=importance)


def _removing(sparsity: Any, steps: int | None) -> tuple[Pattern, Cubic]:
    """Return the pattern and its schedule, which is derived from ``steps`` for a fraction."""
    pattern = sparsity if isinstance(sparsity, Pattern) else Channel(sparsity, scope="global")
    if not isinstance(pattern, FractionPattern) or not isinstance(pattern.schedule, Cubic | None):
        raise TypeError(
            "sparsity must be a fraction of zeros, a schedule that rises, or a pattern with one of "
            f"these, got {sparsity!r}"
        )
    if pattern.schedule is not None:
        if steps is not None:
            raise ValueError(
                f"steps must be left out if the sparsity is a schedule, which sets the stages, got "
                f"{steps!r}"
            )
        return pattern, pattern.schedule
    if steps is None:
        raise ValueError("steps must be given unless the sparsity is a schedule, got None")
    total = _checks.integer("steps", steps, low=1)
    every = min(max(total // (10 * _EPOCHS), 1), _LONGEST_INTERVAL)
    length = max(total // _EPOCHS // every, 1) * every
    start = total * _EPOCHS_BEFORE // _EPOCHS
    schedule = exponential_sparsity(
        pattern.sparsity,  # type: ignore[attr-defined]
        length,
        start=start,
        every=every,
    )
    return replace(pattern, sparsity=schedule), schedule  # type: ignore[call-arg]


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
