"""What sparse means: patterns of allowed supports.

A pattern says which units (entries, groups, blocks, channels) may be zero and within
which pool they compete. It holds no arrays and knows no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    budget : None, "erdos_renyi_kernel", or mapping of str to float
        What each tensor has, where tensors do not compete. None: ``sparsity`` each.
        "erdos_renyi_kernel": densities in proportion to the sum of a tensor's axes by
        their product, such that all have ``sparsity`` together, exactly but for rounding
        down in each row or stacked tensor, see `safe_core.budgets.erdos_renyi_kernel`.
        A mapping: the sparsity of tensors by their names, as in reports, and ``sparsity``
        for the rest; where ``sparsity`` changes over time, these change in proportion.

    Raises
    ------
    TypeError, ValueError
        If ``sparsity`` is not a number in [0, 1), ``scope`` or ``budget`` is unknown, or a
        budget is given in the scope "global".

    Examples
    --------
    >>> Unstructured(0.9, scope="row")
    Unstructured(sparsity=0.9, scope='row', budget=None)
    """

    sparsity: float | SparsityTable
    scope: Literal["global", "tensor", "row"] = "global"
    budget: str | Mapping[str, float] | tuple[tuple[str, float], ...] | None = None

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("global", "tensor", "row"))
        if self.budget is None:
            return
        if self.scope == "global":
            raise ValueError(
                "budget must be None in scope 'global', where tensors compete, got "
                f"{_checks.shown(self.budget)}"
            )
        object.__setattr__(self, "budget", _frozen_budget(self.budget))


def _frozen_budget(given: Any) -> str | tuple[tuple[str, Any], ...]:
    """A budget as a value that is hashable."""
    if isinstance(given, str):
        _checks.choice("budget", given, (None, "erdos_renyi_kernel"))
        return given
    try:
        pairs = dict(given)
    except (TypeError, ValueError):
        pairs = {}
    if not pairs or not all(isinstance(name, str) for name in pairs):
        raise TypeError(
            "budget must be None, 'erdos_renyi_kernel' or a mapping of names to sparsities, got "
            f"{_checks.shown(given)}"
        )
    return tuple((name, _checks.sparsity(f"budget of {name}", x)) for name, x in pairs.items())


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


def fractions(pattern: Pattern) -> tuple[Fraction, ...]:
    """The fraction of zeros at every stage of a pattern that has one."""
    if isinstance(pattern, NM):
        return (1 - Fraction(pattern.n, pattern.m),)
    if isinstance(pattern.sparsity, SparsityTable):
        return tuple(pattern.sparsity.table)
    return (_checks.decimal_fraction(pattern.sparsity),)


def kept_counts(stages: Sequence[Fraction], units: int) -> tuple[int, ...]:
    """How many of ``units`` are kept at every stage: ``units - floor(fraction * units)``."""
    return tuple(units - int(Fraction(units) * fraction) for fraction in stages)


def stage(pattern: Pattern, step: Any) -> Any:
    """The index into `kept_counts` at a step; None asks for the final one."""
    if isinstance(pattern, NM) or not isinstance(pattern.sparsity, SparsityTable):
        return 0
    return len(pattern.sparsity.table) - 1 if step is None else pattern.sparsity.stage(step)
