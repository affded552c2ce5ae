"""Exact tables of sparsities that change over time.

The numbers of zeros must be static integers, so a sparsity that changes is a table of exact
fractions, indexed by the step. `safe_core.schedules` exports the constructors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

from array_api_compat import array_namespace

from . import _checks

__all__ = [
    "Cubic",
    "ExponentialSparsity",
    "LinearSparsity",
    "RandomSparsity",
    "SparsityTable",
    "cubic",
    "exponential_sparsity",
    "linear_sparsity",
    "random_sparsity",
]

Array = Any


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
            self._between(initial, final, Fraction(stage, stages)) for stage in range(stages + 1)
        )

    def _between(self, initial: Fraction, final: Fraction, progress: Fraction) -> Fraction:
        return final + (initial - final) * (1 - progress) ** self._power

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
class ExponentialSparsity(Cubic):
    """Sparsity whose kept fraction falls exponentially, as a static table."""

    def _between(self, initial: Fraction, final: Fraction, progress: Fraction) -> Fraction:
        if progress in (0, 1):
            return final if progress else initial
        first, last = (_logarithm(1 - sparsity) for sparsity in (initial, final))
        rise = _PRECISE.multiply(_decimal(progress), _PRECISE.subtract(last, first))
        kept = Fraction(_PRECISE.exp(_PRECISE.add(first, rise)))
        # Of 4 channels, 1/4 to the power of 1/2 keeps 2. One digit less than that would keep 1.
        near = kept.limit_denominator(_LARGEST_DENOMINATOR)
        return 1 - (near if abs(near - kept) < _ROUNDING else kept)


# Decimals are rounded alike on every machine. Errors are far below the difference of fractions with
# denominators up to 10**9, and more channels than that no network has.
_PRECISE = Context(prec=50)
_LARGEST_DENOMINATOR = 10**9
_ROUNDING = Fraction(1, 10**40)


def _decimal(fraction: Fraction) -> Decimal:
    return _PRECISE.divide(Decimal(fraction.numerator), Decimal(fraction.denominator))


def _logarithm(fraction: Fraction) -> Decimal:
    return _PRECISE.ln(_decimal(fraction))


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
    every = _finest(steps) if every is None else every
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
    every = _finest(steps) if every is None else every
    return LinearSparsity(value, steps, initial, start, every)


def exponential_sparsity(
    value: float, steps: int, initial: float = 0.0, start: int = 0, every: int | None = None
) -> ExponentialSparsity:
    """Return the sparsity whose kept fraction falls exponentially, in n stages.

    At stage ``j`` of ``n`` the fraction ``(1 - initial)**(1 - j / n) * (1 - value)**(j / n)`` is
    kept, so every stage removes the same fraction of what is left. Like `cubic`, it is a static
    table of fractions. They are exact where the power is a fraction with a denominator up to 10**9,
    and within 1e-40 of it elsewhere.

    Parameters
    ----------
    value, steps, initial, start, every
        See `cubic`.

    Returns
    -------
    ExponentialSparsity
        A frozen dataclass that a pattern takes as its ``sparsity``.

    Raises
    ------
    TypeError, ValueError
        See `cubic`.

    References
    ----------
    de Jorge et al. 2020, "Progressive Skeletonization: Trimming more fat from a network at
    initialization"; Bair et al. 2023 (AdaSAP), section 4.1.

    Examples
    --------
    >>> sparsity = exponential_sparsity(0.9375, steps=4)
    >>> [sparsity(step) for step in range(6)]
    [0.0, 0.5, 0.75, 0.875, 0.9375, 0.9375]
    """
    every = _finest(steps) if every is None else every
    return ExponentialSparsity(value, steps, initial, start, every)


def _finest(steps: int) -> int:
    """Return the smallest divisor of ``steps`` that gives at most 100 stages.

    Each stage costs one projection count per pool, so a table of every step would be long.
    """
    _checks.integer("steps", steps, low=1)
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
