"""Decide from the figures of a report whether a run ends at the constraint, and what to change.

The thresholds were chosen on scikit-learn's digits with LeNet-300-100, so that runs whose projected
network keeps its accuracy are on course at every tenth of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .constraints import Constraint
from .finalization import (
    LARGE_DISTANCE,
    listed,
    other_length,
    planned_steps,
    shortfalls,
    without_gradient,
)
from .patterns import Pattern
from .schedules import Schedule

__all__ = ["Advice", "Course", "Figures", "advise"]

LEAST_SHARE = 0.25
"""Part of the summed penalty from which on the distance shows where the run ends."""

LATE = 0.9
"""Part of the run from which on the mask should hardly change."""

LARGE_REPLACEMENT = 0.25
"""Part of the kept weights that one dual update may replace late in a run."""

FEWEST_UPDATES = 15
"""Dual updates of a run. Fewer leave the mask close to that of the first weights."""

FEWEST_STEPS = 140
"""Steps of a run that derives its numbers from them. In fewer, a network that starts from random
weights loses much of its accuracy: LeNet on digits 16 points at 90% zeros in 80 steps, and 2 in
160."""

OTHER_LENGTH = 0.1
"""Relative difference of two lengths of a run that is worth a word."""


class Advice(NamedTuple):
    """What keeps a run from its constraint, and what to change.

    Attributes
    ----------
    cause : str
        "diverged", "length", "interval", "penalty", "rounding", "mask", "tensor", "gradient" or
        "unknown".
    text : str
        A sentence with the numbers, for people.
    """

    cause: str
    text: str


class Figures(NamedTuple):
    """Totals of a report, as Python numbers.

    Attributes
    ----------
    step : int
    distance : float
        ``|x - proj(x)|_2 / |x|_2`` at the final sparsity.
    off_support : float
        Norm of the entries off the mask of this step, relative to ``|x|_2``.
    replaced : float
        Part of the weights on the mask that a dual update now would replace.
    emptied : sequence of str
        Names of the parameters that the final projection would make zero as a whole.
    """

    step: int
    distance: float
    off_support: float
    replaced: float
    emptied: Sequence[str] = ()


@dataclass(frozen=True)
class Course:
    """Facts about a run that its figures are judged by. It is hashable.

    Attributes
    ----------
    constraint : Constraint
    patterns : tuple of Pattern
        The patterns of the parameters.
    penalty : schedule, optional
        The penalty of the run, if it is known without reading an array.
    steps : int, optional
        Length of the run, if the user gave it.
    narrow : tuple of str
        Names of the parameters in 16 bits.
    idle : tuple of str
        Names of the parameters that had no gradient in ten or more steps.
    """

    constraint: Constraint
    patterns: tuple[Pattern, ...]
    penalty: Schedule | None = None
    steps: int | None = None
    narrow: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def planned(self) -> int | None:
        """Steps that the schedule of the penalty was made for; None if it is constant."""
        planned = getattr(self.penalty, "steps", None)
        return planned if isinstance(planned, int) else None

    @property
    def length(self) -> int | None:
        """Steps of the run, given or planned; None if unknown."""
        return self.planned if self.steps is None else self.steps

    def progress(self, step: int) -> float | None:
        """Return the part of the run that is over, from 0 to 1; None if the length is unknown."""
        return None if self.length is None else min(step / max(self.length, 1), 1.0)

    def share(self, step: int) -> float | None:
        """Return the part of the summed penalty that ``step`` steps have applied, from 0 to 1.

        None if the constraint has no penalty or the length of the run is unknown.
        """
        progress = self.progress(step)
        if progress is None or self.constraint.penalty is None:
            return None
        whole = 0.0 if self.penalty is None else _sum(self.penalty, self.length or 0)
        if self.penalty is None or whole == 0:
            return progress
        return min(_sum(self.penalty, min(step, self.length or 0)) / whole, 1.0)

    @property
    def draws(self) -> bool:
        """Whether sparsities are drawn at random, which changes the mask at every update."""
        schedules = [part.schedule for pattern in self.patterns for part in pattern.parts]
        return any(schedule is not None and schedule.is_random for schedule in schedules)


def advise(found: Figures, course: Course) -> list[Advice]:
    """Return what to change, or an empty list for a run on course.

    A penalty shrinks the distance geometrically, so a run that has come from 1 to d by a share s
    of its summed penalty is expected to end at ``d ** (1 / s)``. This is judged from a quarter of
    the sum on. While the sparsity rises, d is taken at the sparsity of the step.

    Examples
    --------
    >>> from safe_core import ADMM, Unstructured
    >>> course = Course(ADMM(1e-3), (Unstructured(0.95),), ADMM(1e-3).penalty, steps=1000)
    >>> [advice.cause for advice in advise(Figures(500, 0.6, 0.8, 0.9), course)]
    ['penalty']
    >>> advise(Figures(500, 0.2, 0.2, 0.1), course)
    []
    """
    if not math.isfinite(found.distance):
        # Nothing else can be told of such a run.
        text = (
            "the parameters or their norm are NaN or infinite (lower the learning rate or clip "
            "gradients)"
        )
        return [Advice("diverged", text)]
    rules: tuple[tuple[str, Callable[[Figures, Course], str]], ...] = (
        ("length", _length),
        ("interval", _interval),
        ("penalty", _penalty),
        ("rounding", _rounding),
        ("mask", _mask),
        ("tensor", _tensor),
        ("gradient", lambda _, course: without_gradient(course.idle)),
        ("unknown", _unknown),
    )
    texts = [(cause, rule(found, course)) for cause, rule in rules]
    # A run that is too short is far from the constraint for no other reason.
    hidden = {"penalty", "rounding", "mask"} if _shortfalls(course) else set()
    return [Advice(cause, text) for cause, text in texts if text and cause not in hidden]


def _length(found: Figures, course: Course) -> str:
    """Return a text if the run is not as long as its schedules."""
    short, planned = _shortfalls(course), planned_steps(course.constraint, course.penalty)
    if planned is not None:
        # A run of unknown length is known to be longer than planned once it is.
        known = max(found.step, planned if course.steps is None else course.steps)
        if abs(known - planned) > OTHER_LENGTH * planned:
            return other_length(known, planned)
    return f"at the end of the run {'; '.join(short)}" if short else ""


def _shortfalls(course: Course) -> list[str]:
    """Return what a run of the given or planned length leaves unfinished."""
    length = course.steps or planned_steps(course.constraint, course.penalty)
    if length is None:
        return []
    left = _penalty_left(course, length)
    return shortfalls(course.constraint, course.patterns, length) + ([left] if left else [])


def _penalty_left(course: Course, steps: int) -> str:
    """Return a text if the penalty ends below half of the value that its schedule ends with."""
    planned, penalty = course.planned, course.penalty
    if penalty is None or planned is None or not 0 < steps < planned:
        return ""
    last, end = float(penalty(steps - 1)), float(penalty(planned))
    if last >= end / 2:
        return ""
    return (
        f"the penalty has reached only {last:.3g} of {end:.3g} after {steps} steps, because its "
        f"schedule has {planned} steps (train longer or set its steps to {steps})"
    )


def _interval(found: Figures, course: Course) -> str:
    """Return a text if the run has too few dual updates to replace weights."""
    every, length = course.constraint.update_interval, course.length
    if every is None or length is None:
        return ""
    whole = max(length, found.step)
    if every == 1 and course.constraint.penalty_spans_run and whole < FEWEST_STEPS:
        return (
            f"the run has {whole} steps, and a network that starts from random weights needs "
            f"{FEWEST_STEPS} or more to adapt to zeros (one that is trained already may need fewer)"
        )
    if every == 1 or length // every >= FEWEST_UPDATES:
        return ""
    return (
        f"the run has {length // every} dual updates in {length} steps, too few to replace the "
        "weights that were large at first (choose a smaller dual_update_interval or train longer)"
    )


def _penalty(found: Figures, course: Course) -> str:
    """Return a text if the run is expected to end far from the constraint."""
    now = min(found.distance, found.off_support)
    end = _expected(found, course)
    if end is None or end <= LARGE_DISTANCE:
        return ""
    return (
        f"the distance is {now:.2g} of the norm of the weights and would end at {end:.2g}, above "
        f"{LARGE_DISTANCE:g} ({course.constraint.if_far})"
    )


def _expected(found: Figures, course: Course) -> float | None:
    """Return the relative distance that the run is expected to end at; None if it is too early."""
    if course.constraint.prunes_at_end:
        return None
    share, progress = course.share(found.step), course.progress(found.step)
    if share is None:
        return found.distance if progress is not None and progress >= LATE else None
    now = min(found.distance, found.off_support)
    return float(now ** (1 / share)) if share >= LEAST_SHARE else None


def _rounding(found: Figures, course: Course) -> str:
    """Return a text if 16-bit parameters may be what keeps a run from the constraint."""
    if not course.narrow or not _penalty(found, course):
        return ""
    return (
        "16 bits round away changes below a 500th of a weight (bfloat16) or a 4000th (float16), "
        f"which a small penalty makes, in {listed(course.narrow)} (keep parameters in float32 and "
        "compute in 16 bits)"
    )


def _mask(found: Figures, course: Course) -> str:
    """Return a text if late dual updates still replace many weights."""
    progress = course.progress(found.step)
    settled = progress is None or progress < LATE or found.replaced <= LARGE_REPLACEMENT
    if settled or course.draws or _penalty(found, course) or course.constraint.prunes_at_end:
        return ""
    return (
        f"a dual update would still replace {found.replaced:.0%} of the kept weights (train "
        "longer, choose a smaller dual_update_interval or a higher penalty)"
    )


def _tensor(found: Figures, course: Course) -> str:
    """Return a text if the final projection would empty a parameter.

    In the first half of a run the weights to prune are not yet small, so it is too early.
    """
    progress = course.progress(found.step)
    if not found.emptied or (progress is not None and progress < 0.5):
        return ""
    return (
        f"the final projection would set all entries to zero in {listed(found.emptied)} (give the "
        'pattern a floor, such as floor=0.25, or scope="tensor")'
    )


def _unknown(found: Figures, course: Course) -> str:
    """Return a text if a constant penalty leaves the length of the run unknown."""
    penalised = course.constraint.penalty is not None
    if not penalised or course.length is not None or found.distance <= LARGE_DISTANCE:
        return ""
    return (
        f"the distance is {found.distance:.2f} of the norm of the weights, and the length of the "
        "run is unknown (give report() steps= to learn whether the penalty is high enough)"
    )


def _sum(schedule: Schedule, steps: int) -> float:
    """Return the sum of a schedule over its first steps, by the trapezoidal rule on 64 points."""
    parts = 64
    points = [float(schedule(round(i * steps / parts))) for i in range(parts + 1)]
    return steps / parts * (sum(points) - (points[0] + points[-1]) / 2)
