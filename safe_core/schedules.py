"""Schedules map a step, counted from 0, to a value.

Each schedule is a frozen dataclass, so that a method that holds one is hashable and compares
by value. A schedule takes a Python integer and returns a Python float, or takes an integer
array, traced or not, and returns a scalar array. After its end it returns its last value.

Schedules of a sparsity are exact tables instead. The numbers of zeros are static integers
then, which a compiled program looks up; floats would round them differently per library.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar

from array_api_compat import array_namespace

from . import _checks

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Linear",
    "LinearSparsity",
    "RandomSparsity",
    "constant",
    "cosine",
    "cubic",
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
        return self.initial + (self.value - self.initial) * self._rise(step)

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
class Cubic:
    """Sparsity that rises as a cubic, as a static table, for gradual pruning."""

    value: float
    steps: int
    initial: float = 0.0
    start: int = 0
    every: int = 1

    is_random: ClassVar[bool] = False
    """Whether the stage is drawn at random at every step."""

    _power: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _checks.sparsity("value", self.value)
        _checks.integer("steps", self.steps, low=1)
        _checks.sparsity("initial", self.initial)
        _checks.integer("start", self.start, low=0)
        _checks.integer("every", self.every, low=1)
        if self.steps % self.every:
            raise ValueError(
                f"every must divide steps, got every={self.every!r} and steps={self.steps!r}"
            )

    @cached_property
    def table(self) -> tuple[Fraction, ...]:
        """The exact sparsity of every stage. The last one holds after the end."""
        initial, final = map(_checks.decimal_fraction, (self.initial, self.value))
        stages = self.steps // self.every
        return tuple(
            final + (initial - final) * (1 - Fraction(stage, stages)) ** self._power
            for stage in range(stages + 1)
        )

    def stage(self, step: int | Array) -> int | Array:
        """Return the index into `table` at a step."""
        stage = (step - self.start) // self.every
        last = self.steps // self.every
        if isinstance(step, int):
            return min(max(stage, 0), last)
        return array_namespace(step).clip(stage, 0, last)

    def __call__(self, step: int) -> float:
        return float(self.table[self.stage(step)])


@dataclass(frozen=True)
class LinearSparsity(Cubic):
    """Sparsity that rises in equal steps, as a static table."""

    _power: ClassVar[int] = 1


@dataclass(frozen=True)
class RandomSparsity:
    """Sparsity that every step draws at random from a static table."""

    values: tuple[float, ...]
    seed: int = 0

    is_random: ClassVar[bool] = True
    """Whether the stage is drawn at random at every step."""

    def __post_init__(self) -> None:
        if not isinstance(self.values, (tuple, list)):
            raise TypeError(f"values must be a tuple of sparsities, got {self.values!r}")
        if not 0 < len(self.values) < 2**15:
            raise ValueError(f"values must be 1 to 32767 sparsities, got {len(self.values)}")
        for value in self.values:
            _checks.sparsity("values", value)
        object.__setattr__(self, "values", tuple(self.values))
        _checks.integer("seed", self.seed, low=0)

    @property
    def value(self) -> float:
        """The largest sparsity, which holds at the end."""
        return max(self.values)

    @cached_property
    def table(self) -> tuple[Fraction, ...]:
        """The exact sparsities to draw from, followed by the final one, the largest."""
        return tuple(map(_checks.decimal_fraction, (*self.values, self.value)))

    def stage(self, step: int | Array) -> int | Array:
        """Return the index into `table` at a step."""
        # Scale 16 random bits to 0 .. n - 1, so the final entry of the table is never drawn.
        # The product stays below 2**31, because n is below 2**15.
        return (self._bits(step) * len(self.values)) >> 16

    def _bits(self, step: int | Array) -> int | Array:
        """Return 16 pseudorandom bits, a function of the step and the seed alone.

        The bits are the same in every library and after a run is resumed. A Feistel network
        needs only products below 2**31, so int32 is wide enough, the widest of JAX by default.
        """
        left, right = (step >> 16) & 0x7FFF, step & 0xFFFF
        for added, factor in self._keys:
            left, right = right, left ^ ((((right ^ added) * factor) >> 11) & 0xFFFF)
        return right

    @cached_property
    def _keys(self) -> tuple[tuple[int, int], ...]:
        """A 16-bit number and an odd 15-bit factor for every round, from a hash of the seed."""
        digest = hashlib.sha256(str(self.seed).encode()).digest()
        words = [int.from_bytes(digest[i : i + 2], "big") for i in range(0, 32, 2)]
        return tuple((a, b >> 1 | 0x4001) for a, b in zip(words[::2], words[1::2], strict=True))

    def __call__(self, step: int) -> float:
        return float(self.table[self.stage(step)])


SparsityTable = Cubic | RandomSparsity
"""Types of a sparsity schedule, which a pattern takes as its ``sparsity``."""


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


def cubic(
    value: float, steps: int, initial: float = 0.0, start: int = 0, every: int | None = None
) -> Cubic:
    """Return the sparsity ``value + (initial - value) * (1 - j / n)**3`` at stage ``j`` of ``n``.

    This is the gradual schedule of Zhu and Gupta 2017, as a static table: stage
    ``j = (t - start) // every`` of ``n = steps / every``. Every entry is an exact fraction,
    so the number of zeros of every stage is an exact integer. A compiled program looks it up
    and does not recompile when the sparsity changes.

    Parameters
    ----------
    value : float
        Final sparsity, a fraction of zeros in [0, 1).
    steps : int
        Length of the ramp, in optimizer steps.
    initial : float
        Sparsity before ``start``.
    start : int
        Step at which the ramp starts.
    every : int, optional
        Steps between two changes. It must divide ``steps``. The default is the smallest
        divisor that gives at most 100 stages.

    Returns
    -------
    Cubic
        A frozen dataclass that a pattern takes as its ``sparsity``.

    Raises
    ------
    TypeError, ValueError
        If a sparsity is outside [0, 1), a count is not a positive integer, or ``every`` does
        not divide ``steps``.

    Examples
    --------
    >>> sparsity = cubic(0.8, steps=4)
    >>> [sparsity(step) for step in range(6)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    if every is None:
        _checks.integer("steps", steps, low=1)
        every = _finest(steps)
    return Cubic(value, steps, initial, start, every)


def linear_sparsity(
    value: float, steps: int, initial: float = 0.0, start: int = 0, every: int | None = None
) -> LinearSparsity:
    """Return the sparsity ``initial + (value - initial) * j / n`` at stage ``j`` of ``n``.

    Like `cubic`, it is a static table of exact fractions.

    Parameters
    ----------
    value, steps, initial, start, every
        See `cubic`.

    Returns
    -------
    LinearSparsity
        A frozen dataclass that a pattern takes as its ``sparsity``.

    Raises
    ------
    TypeError, ValueError
        See `cubic`.

    Examples
    --------
    >>> sparsity = linear_sparsity(0.8, steps=4)
    >>> [sparsity(step) for step in range(6)]
    [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    """
    if every is None:
        _checks.integer("steps", steps, low=1)
        every = _finest(steps)
    return LinearSparsity(value, steps, initial, start, every)


def _finest(steps: int) -> int:
    """Return the smallest divisor of ``steps`` that gives at most 100 stages.

    Each stage costs one projection count per pool, so a table of every step would be long.
    """
    return next(k for k in range(-(-steps // 100), steps + 1) if steps % k == 0)


def random_sparsity(values: tuple[float, ...], seed: int = 0) -> RandomSparsity:
    """Return a sparsity that is drawn from ``values`` at every step, and the largest at the end.

    The draw depends on step and seed alone. It is the same in every library, and in a run
    that is resumed.

    Parameters
    ----------
    values : tuple of float
        Fractions of zeros in [0, 1). A value that is listed twice is drawn twice as often.
    seed : int
        Non-negative seed of the draws.

    Returns
    -------
    RandomSparsity
        A frozen dataclass that a pattern takes as its ``sparsity``.

    Raises
    ------
    TypeError, ValueError
        If ``values`` is not a tuple of sparsities, or ``seed`` is not a non-negative integer.

    References
    ----------
    Peste et al. 2023, "CrAM: A Compression-Aware Minimizer", ICLR (CrAM-Multi).

    Examples
    --------
    >>> sparsity = random_sparsity((0.5, 0.7, 0.9))
    >>> [sparsity(step) for step in range(6)]
    [0.7, 0.9, 0.7, 0.9, 0.5, 0.7]
    """
    return RandomSparsity(values, seed)


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
