"""What sparse means: patterns of allowed supports.

A pattern says which units (entries, groups, blocks, channels) may be zero and within
which pool they compete. It holds no arrays and knows no framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any, Literal

from . import _checks
from .schedules import SparsityTable

__all__ = ["NM", "Block", "Channel", "Pattern", "Unstructured"]


def _check_fraction(name: str, value: Any) -> None:
    if not isinstance(value, SparsityTable):
        _checks.sparsity(name, value)


@dataclass(frozen=True)
class Unstructured:
    """Single entries: the ``floor(sparsity * n)`` lowest of each pool are zero.

    Attributes
    ----------
    sparsity : float or table of `safe_core.schedules`
        Fraction of zeros in [0, 1), taken as the decimal it prints as.
    scope : {"global", "tensor", "row"}
        The pool in which entries compete: all tensors together, each tensor, or the
        entries of each output of each tensor.

    Raises
    ------
    TypeError, ValueError
        If ``sparsity`` is not a number in [0, 1) or ``scope`` is unknown.

    Examples
    --------
    >>> Unstructured(0.9, scope="row")
    Unstructured(sparsity=0.9, scope='row')
    """

    sparsity: float | SparsityTable
    scope: Literal["global", "tensor", "row"] = "global"

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("global", "tensor", "row"))


@dataclass(frozen=True)
class NM:
    """Keep ``n`` of every ``m`` consecutive entries along the input axis.

    Attributes
    ----------
    n, m : int
        Entries kept, and entries in a group; ``1 <= n <= m``. 2:4 is what NVIDIA's
        sparse tensor cores run.
    ragged : {"error", "dense"}
        What to do where ``m`` does not divide the input axis: raise, or leave the last,
        shorter group dense.

    Raises
    ------
    TypeError, ValueError
        If ``n`` and ``m`` are not integers with ``1 <= n <= m``.

    Examples
    --------
    >>> NM(2, 4)
    NM(n=2, m=4, ragged='error')
    """

    n: int
    m: int
    ragged: Literal["error", "dense"] = "error"

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, low=1)
        _checks.integer("n", self.n, low=1)
        if self.n > self.m:
            raise ValueError(f"n must be at most m={self.m!r}, got {self.n!r}")
        _checks.choice("ragged", self.ragged, ("error", "dense"))

    @property
    def scope(self) -> str:
        """Groups never compete with one another."""
        return "group"


@dataclass(frozen=True)
class Block:
    """Blocks of ``shape`` (outputs, inputs), kept or zeroed whole.

    Blocks rank by the sum of ``P_ii * v_i**2`` over their entries.

    Attributes
    ----------
    shape : tuple of two int
        Size of a block along the output and the input axis.
    sparsity : float or table of `safe_core.schedules`
        Fraction of blocks that are zero, in [0, 1).
    scope : {"tensor", "global"}
        Whether blocks compete within each tensor or all together.
    ragged : {"error", "dense"}
        What to do where blocks do not divide an axis: raise, or leave the tail dense
        and count whole blocks only.

    Raises
    ------
    TypeError, ValueError
        If ``shape`` is not two positive integers or ``sparsity`` is not in [0, 1).

    Examples
    --------
    >>> Block((16, 16), 0.75)
    Block(shape=(16, 16), sparsity=0.75, scope='tensor', ragged='error')
    """

    shape: tuple[int, int]
    sparsity: float | SparsityTable
    scope: Literal["tensor", "global"] = "tensor"
    ragged: Literal["error", "dense"] = "error"

    def __post_init__(self) -> None:
        if not isinstance(self.shape, (tuple, list)) or len(self.shape) != 2:
            raise TypeError(f"shape must be two integers (outputs, inputs), got {self.shape!r}")
        for size in self.shape:
            _checks.integer("shape", size, low=1)
        object.__setattr__(self, "shape", tuple(self.shape))
        _check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("tensor", "global"))
        _checks.choice("ragged", self.ragged, ("error", "dense"))


@dataclass(frozen=True)
class Channel:
    """Whole output channels, kept or zeroed together.

    Channels rank by the sum of ``P_ii * v_i**2`` over their entries.

    Attributes
    ----------
    sparsity : float or table of `safe_core.schedules`
        Fraction of output channels that are zero, in [0, 1).
    scope : {"tensor", "global"}
        Whether channels compete within each tensor or all together.

    Raises
    ------
    TypeError, ValueError
        If ``sparsity`` is not in [0, 1) or ``scope`` is unknown.

    Examples
    --------
    >>> Channel(0.5)
    Channel(sparsity=0.5, scope='tensor')
    """

    sparsity: float | SparsityTable
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("tensor", "global"))


Pattern = Unstructured | NM | Block | Channel


def as_pattern(value: Any, scope: Literal["global", "tensor", "row"] = "global") -> Pattern:
    """Return the pattern that ``value`` stands for: itself, a fraction in a scope, or ``"N:M"``."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        n, colon, m = value.partition(":")
        if not (colon and n.strip().isdecimal() and m.strip().isdecimal()):
            raise ValueError(
                'sparsity must be a number such as 0.95, or of the form "N:M" if a string, got '
                f"{value!r}"
            )
        return NM(int(n), int(m))
    if isinstance(value, Real | Decimal | SparsityTable) and not isinstance(value, bool):
        return Unstructured(value, scope=scope)  # type: ignore[arg-type]
    raise TypeError(
        "sparsity must be a fraction in [0, 1), a string such as '2:4' or a pattern "
        f"(Unstructured, NM, Block, Channel), got {_checks.shown(value)}; an array or a traced "
        "value is refused because float32 arithmetic gets the number of zeros wrong"
    )


def kept_counts(pattern: Pattern, units: int) -> tuple[int, ...]:
    """How many of ``units`` are kept at every stage: ``units - floor(sparsity * units)``."""
    if isinstance(pattern, NM):
        return (pattern.n,)
    fractions = (
        pattern.sparsity.table
        if isinstance(pattern.sparsity, SparsityTable)
        else (_checks.decimal_fraction(pattern.sparsity),)
    )
    return tuple(units - int(Fraction(units) * fraction) for fraction in fractions)


def stage(pattern: Pattern, step: Any) -> Any:
    """The index into `kept_counts` at a step; None asks for the final one."""
    if isinstance(pattern, NM) or not isinstance(pattern.sparsity, SparsityTable):
        return 0
    return len(pattern.sparsity.table) - 1 if step is None else pattern.sparsity.stage(step)
