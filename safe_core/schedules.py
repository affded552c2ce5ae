"""Schedules map a step, counted from 0, to a value.

Each schedule is a frozen dataclass, so that a method that holds one is hashable and compares
by value. A schedule takes a Python integer and returns a Python float, or takes an integer
array, traced or not, and returns a scalar array. After its end it returns its last value.

Schedules of a sparsity are exact tables instead. The numbers of zeros are static integers
then, which a compiled program looks up; floats would round them differently per library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from array_api_compat import array_namespace

from . import _checks
from .sparsity_tables import (
    Cubic,
    ExponentialSparsity,
    LinearSparsity,
    RandomSparsity,
    SparsityTable,
    cubic,
    exponential_sparsity,
    linear_sparsity,
    random_sparsity,
)

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "ExponentialSparsity",
    "Linear",
    "LinearSparsity",
    "RandomSparsity",
    "constant",
    "cosine",
    "cubic",
    "exponential",
    "exponential_sparsity",
    "linear",
    "linear_sparsity",
    "random_sparsity",
]

Array = Any
Schedule = Callable[[Any], Any]
"""A hashable callable ``step -> value``. You can pass your own."""


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        _checks.real("value", self.value)

    def __call__(self, step: int | Array) -> float | Array:
        return self.value

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value over all steps."""
        return self.value, self.value

    @property
    def has_zero_after_start(self) -> bool:
        """Whether the value is 0 at some step later than 0."""
        return self.value == 0


@dataclass(frozen=True)
class Linear:
    """A straight line from ``initial`` at step 0 to ``value`` at ``steps``."""

    value: float
    steps: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        _checks.real("value", self.value)
        _checks.integer("steps", self.steps, low=1)
        _checks.real("initial", self.initial)

    def __call__(self, step: int | Array) -> float | Array:
        found = self.initial + (self.value - self.initial) * self._rise(step)
        # At the end rounding would leave the last bits of the sum wrong.
        if isinstance(step, int):
            return self.value if step >= self.steps else found
        xp = array_namespace(found)
        return xp.where(step >= self.steps, xp.full_like(found, self.value), found)

    def _rise(self, step: int | Array) -> float | Array:
        if isinstance(step, int):
            return min(max(step / self.steps, 0.0), 1.0)
        # Divide in the default float dtype, which is float32 in JAX unless x64 is enabled.
        xp = array_namespace(step)
        floating = xp.__array_namespace_info__().default_dtypes()["real floating"]
        return xp.clip(xp.astype(step, floating) / self.steps, 0.0, 1.0)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value over all steps."""
        return min(self.initial, self.value), max(self.initial, self.value)

    @property
    def has_zero_after_start(self) -> bool:
        """Whether the value is 0 at some step later than 0."""
        # A line that changes sign may pass through 0 at a step.
        return self.value == 0 or self.initial * self.value < 0


@dataclass(frozen=True)
class Cosine(Linear):
    """Half a cosine wave from ``initial`` at step 0 to ``value`` at ``steps``."""

    def _rise(self, step: int | Array) -> float | Array:
        # (1 - cos a) / 2 equals sin(a / 2)^2, which does not cancel at small a.
        progress = super()._rise(step)
        if isinstance(step, int):
            return math.sin(0.5 * math.pi * progress) ** 2
        xp = array_namespace(step)
        return xp.sin(0.5 * math.pi * progress) ** 2


@dataclass(frozen=True)
class Exponential(Linear):
    """A geometric sequence from ``initial`` at step 0 to ``value`` at ``steps``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("value", "initial"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")

    def _rise(self, step: int | Array) -> float | Array:
        progress, growth = super()._rise(step), math.log(self.value / self.initial)
        if growth == 0:
            return progress
        if isinstance(step, int):
            return math.expm1(growth * progress) / math.expm1(growth)
        return array_namespace(step).expm1(growth * progress) / math.expm1(growth)


def constant(value: float) -> Constant:
    """Return the schedule with ``value`` at every step.

    Parameters
    ----------
    value : float
        Any finite number, in the unit of the scheduled quantity.

    Returns
    -------
    Constant
        A frozen dataclass, ``step -> value``.

    Raises
    ------
    TypeError, ValueError
        If ``value`` is not a finite Python number.

    Examples
    --------
    >>> constant(0.1)(1000)
    0.1
    """
    return Constant(value)


def linear(value: float, steps: int, initial: float = 0.0) -> Linear:
    """Return the schedule ``initial + (value - initial) * min(t / steps, 1)``.

    Parameters
    ----------
    value : float
        Value from step ``steps`` on.
    steps : int
        Length of the ramp, in optimizer steps.
    initial : float
        Value at step 0.

    Returns
    -------
    Linear
        A frozen dataclass, ``step -> value``.

    Raises
    ------
    TypeError, ValueError
        If a value is not a finite number, or ``steps`` is not a positive integer.

    Examples
    --------
    >>> linear(1.0, steps=4)(1), linear(0.0, steps=4, initial=0.1)(9)
    (0.25, 0.0)
    """
    return Linear(value, steps, initial)


def cosine(value: float, steps: int, initial: float = 0.0) -> Cosine:
    """Return the schedule ``initial + (value - initial) * (1 - cos(pi * min(t / steps, 1))) / 2``.

    The SAFE paper uses it for the penalty in vision (Lee et al. 2025, Table 5). The network
    trains almost freely at first and is pulled to the constraint at the end.

    Parameters
    ----------
    value, steps, initial
        See `linear`.

    Returns
    -------
    Cosine
        A frozen dataclass, ``step -> value``.

    Raises
    ------
    TypeError, ValueError
        If a value is not a finite number, or ``steps`` is not a positive integer.

    Examples
    --------
    >>> penalty = cosine(1e-3, steps=100)
    >>> penalty(0), round(penalty(50), 9), penalty(1000)
    (0.0, 0.0005, 0.001)
    """
    return Cosine(value, steps, initial)


def exponential(value: float, steps: int, initial: float) -> Exponential:
    """Return the schedule ``initial * (value / initial) ** min(t / steps, 1)``.

    Parameters
    ----------
    value, initial : float
        Value from step ``steps`` on, and at step 0. Both must be above 0.
    steps : int
        Length of the ramp, in optimizer steps.

    Returns
    -------
    Exponential
        A frozen dataclass, ``step -> value``.

    Raises
    ------
    TypeError, ValueError
        If a value is not a positive number, or ``steps`` is not a positive integer.

    Examples
    --------
    >>> [round(exponential(1e-1, steps=2, initial=1e-3)(t), 9) for t in range(4)]
    [0.001, 0.01, 0.1, 0.1]
    """
    return Exponential(value, steps, initial)


def as_schedule(name: str, value: Any) -> Schedule:
    """Return a non-negative schedule from a number or a schedule, or raise.

    Messages call the argument ``name``. The sign of a schedule of the user's own is not known
    before it is called, so only those defined here are checked.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        return Constant(_checks.real(name, value, low=0.0))
    if isinstance(value, SparsityTable) or not callable(value):
        raise TypeError(
            f"{name} must be a non-negative Python number or a schedule, got "
            f"{_checks.shown(value)}; an array goes to the adapter instead"
        )
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"{name} must be a hashable schedule, got {value!r}") from None
    if isinstance(value, (Constant, Linear)) and value.bounds[0] < 0:
        raise ValueError(f"{name} must never be negative, got {value!r}")
    return value


def is_zero(schedule: Schedule | float) -> bool:
    """Return whether a schedule is known to be 0 at every step."""
    return isinstance(schedule, Constant) and schedule.value == 0
