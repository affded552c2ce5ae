"""Derive the numbers of SAFE from the number of steps.

The constants below were chosen on scikit-learn's digits with LeNet-300-100, with clean labels and
with half of them random, by SGD and Adam at two rates each, and MAX_GROWTH also on a small GPT-2.
They are meant for every network, base optimizer and length of a run.
"""

from __future__ import annotations

import math

from .constraints import Pull
from .patterns import Pattern
from .perturbations import SAM
from .schedules import cosine, linear

__all__ = ["ball", "interval", "penalty_interval", "pull", "rise", "rising"]

UPDATES = 140
"""Dual updates of a run. Fewer leave too little time to replace a weight."""

LONGEST_INTERVAL = 32
"""Steps between two dual updates at most, as in the paper."""

CONTRACTION = 200.0
"""Sum of the rates of the pull: the gap shrinks by exp(-200) in all, most of it in the second half,
after the sparsity has risen. From 100 to 800 the accuracy hardly changes."""

RISE = 0.5
"""Fraction of the run over which the sparsity rises. A short run needs the time to choose its
weights."""

RISE_STEPS = 1200
"""Steps of the longest run with that fraction. A dense network that is trained for long memorises
noise, which a sparse one does not unlearn, so the fraction falls in longer runs."""

SHORTEST_RISE = 0.2
"""The smallest fraction of a run over which the sparsity rises."""

RADIUS = 2.0
"""Radius of the perturbation at its fullest, in steps of the base optimizer."""

TRAVEL = 5.0
"""The radius is full if all steps of the run, end to end, are this many times as long as the
weights. A run that travels less has less time to move, and a perturbation slows it further, so its
radius shrinks with the square of the travel."""

MAX_GROWTH = 1.4
"""Growth of the gradient's norm from x to x + e beyond which the radius shrinks. A network that is
far from fitting its data, such as a language model trained from scratch, learns more slowly under
such a radius."""

WARM_UP = 0.2
"""Fraction of the run over which the radius rises from 0. A full radius from the start can keep
a network from learning anything."""


def interval(steps: int) -> int:
    """Return the steps between two dual updates."""
    return min(max(round(steps / UPDATES), 1), LONGEST_INTERVAL)


def penalty_interval(steps: int) -> int:
    """Return the steps between two dual updates under a penalty of `ADMM` instead of the pull.

    The gradient of a penalty moves the weights slowly. If updates follow one another meanwhile, u
    grows until the weights overshoot. The paper updates every 32 steps; 20 updates serve a short
    run.
    """
    return min(max(round(steps / 20), 1), LONGEST_INTERVAL)


def pull(steps: int, every: int, state_dtype: str | None = None) -> Pull:
    """Return the pull with the rate ``CONTRACTION / T * (1 - cos(pi t / T))``."""
    return Pull(cosine(2 * CONTRACTION / steps, steps), every, state_dtype)


def ball(steps: int, **options: float) -> SAM:
    """Return the perturbation, whose radius in steps rises linearly at first.

    The radius is ``RADIUS * l * min(1, (T l / (TRAVEL |x|))^2)`` for steps of length l, and shrinks
    where the gradient's norm grows by more than MAX_GROWTH from x to x + e.
    """
    radius = linear(RADIUS, steps=max(round(WARM_UP * steps), 1))
    return SAM(
        radius,
        in_steps=True,
        full_step=TRAVEL / steps,
        max_growth=MAX_GROWTH,
        **options,  # type: ignore[arg-type]
    )


def rise(steps: int) -> float:
    """Return the fraction of the run over which the sparsity rises.

    ``RISE * sqrt(RISE_STEPS / T)``, at most ``RISE`` and at least ``SHORTEST_RISE``.
    """
    return max(RISE * min(math.sqrt(RISE_STEPS / steps), 1.0), SHORTEST_RISE)


def rising(pattern: Pattern, steps: int, every: int) -> Pattern:
    """Return the pattern with a sparsity that rises along a cubic, see `rise`.

    Its stages change at dual updates. A pattern whose sparsity changes already, and an N:M
    pattern, which has no sparsity in between, stay as they are.
    """
    stages = max(round(rise(steps) * steps / every), 1)
    # At most 100 stages: every stage costs a count per pool.
    together = -(-stages // 100)
    length = every * together * max(round(stages / together), 1)
    return pattern.rising(length, every * together)
