"""Projected gradient ascent (PGD) in a ball around each input, in the array API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_core import _checks

__all__ = ["PGD", "check_inputs", "start", "step", "within"]


@dataclass(frozen=True)
class PGD:
    """An attack on inputs by projected gradient ascent.

    Starting in a ball of the given ``radius`` around each input, repeat
    ``x <- proj(x + step_size * direction)``. The direction is ``sign(g)`` for ``linf`` and
    ``g / |g|_2`` for ``l2``, where g is the gradient of the loss of that input. The projection
    goes to the ball and then to ``[low, high]``. The result stays in the ball, because the input
    is in the range.

    Attributes
    ----------
    norm : {"linf", "l2"}
    radius : float
        In the units of the inputs: for pixels in [0, 1], 1/255 for ``linf`` and 3/255 for
        ``l2`` in the SAFE paper.
    steps : int
    step_share : float
        Step size as a fraction of the radius; a quarter in the paper.
    random_start : bool
        Whether to start at a uniform draw from the ball instead of at the input.
    low, high : float
        The range of the inputs. The model must normalise them itself.

    References
    ----------
    Madry et al. 2018; Lee et al. 2025, section 4.4.

    Examples
    --------
    >>> PGD("l2", radius=1.0).step_size
    0.25
    """

    norm: str
    radius: float
    steps: int = 10
    step_share: float = 0.25
    random_start: bool = True
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _checks.choice("norm", self.norm, ("linf", "l2"))
        _checks.real("radius", self.radius, low=0)
        _checks.integer("steps", self.steps, low=1)
        _checks.real("step_share", self.step_share, low=0)
        if _checks.real("low", self.low) >= _checks.real("high", self.high):
            raise ValueError(f"low must be below high, got {self.low!r} and {self.high!r}")

    @property
    def step_size(self) -> float:
        """``step_share * radius``."""
        return self.step_share * self.radius


def start(attack: PGD, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Return the initial perturbations: uniform in the ball of each input, or zero.

    They are the same for all frameworks.

    Examples
    --------
    >>> start(PGD("l2", 0.5, random_start=False), (1, 3), seed=0).tolist()
    [[0.0, 0.0, 0.0]]
    """
    if not attack.random_start:
        return np.zeros(shape)
    rng = np.random.default_rng(_checks.integer("seed", seed, low=0))
    if attack.norm == "linf":
        return rng.uniform(-attack.radius, attack.radius, shape)
    direction = rng.standard_normal(shape)
    flat = direction.reshape(len(direction), -1)
    share = rng.random((len(flat), 1)) ** (1 / flat.shape[1])
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    return (flat * (attack.radius * share / lengths)).reshape(shape)


def step(attack: PGD, x: Any, origin: Any, gradient: Any, *, xp: Any) -> Any:
    """Return the point after one step.

    Parameters
    ----------
    attack : PGD
    x, origin, gradient : (n, ...) arrays
        The current point, the original inputs, and the gradient of each input's loss. A zero
        gradient moves nothing.
    xp : namespace
        The array API namespace of the arrays.

    Examples
    --------
    >>> origin, gradient = np.full((1, 2), 0.5), np.asarray([[3.0, -4.0]])
    >>> step(PGD("l2", 0.4), origin, origin, gradient, xp=np).tolist()
    [[0.56, 0.42]]
    """
    if attack.norm == "linf":
        direction = xp.sign(gradient)
    else:
        # Divide by the largest entry first, because squares of small entries underflow.
        axes = tuple(range(1, gradient.ndim))
        largest = xp.max(xp.abs(gradient), axis=axes, keepdims=True)
        scaled = gradient / xp.where(largest > 0, largest, xp.ones_like(largest))
        length = _length(scaled, xp)
        direction = scaled / xp.where(length > 0, length, xp.ones_like(length))
    return within(attack, x + attack.step_size * direction, origin, xp=xp)


def within(attack: PGD, x: Any, origin: Any, *, xp: Any) -> Any:
    """Return ``x`` projected onto the ball around ``origin``, then onto the range.

    Examples
    --------
    >>> x, origin = np.asarray([[4.0, 4.0]]), np.asarray([[1.0, 0.0]])
    >>> within(PGD("l2", 1.0, high=9), x, origin, xp=np).tolist()
    [[1.6, 0.8]]
    >>> within(PGD("linf", 0.5, high=1.2), x, origin, xp=np).tolist()
    [[1.2, 0.5]]
    """
    change = x - origin
    if attack.norm == "linf":
        change = xp.clip(change, -attack.radius, attack.radius)
    else:
        length = _length(change, xp)
        outside = length > attack.radius
        scale = attack.radius / xp.where(outside, length, xp.ones_like(length))
        change = xp.where(outside, change * scale, change)
    return xp.clip(origin + change, attack.low, attack.high)


def check_inputs(attack: PGD, low: float, high: float) -> None:
    """Raise an error unless inputs from ``low`` to ``high`` are in the range of the attack.

    Examples
    --------
    >>> check_inputs(PGD("linf", 0.1), -2.1, 2.2)
    Traceback (most recent call last):
        ...
    ValueError: inputs must be in [0.0, 1.0] and not be normalised, got -2.1 to 2.2
    """
    if not attack.low <= low <= high <= attack.high:
        raise ValueError(
            f"inputs must be in [{attack.low}, {attack.high}] and not be normalised, got {low:g} "
            f"to {high:g}"
        )


def _length(x: Any, xp: Any) -> Any:
    """Return the Euclidean length of each input."""
    return xp.sqrt(xp.sum(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))
