"""List the weights of a model that a method makes sparse, and why the others stay dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Coverage", "DenseWeightWarning", "WeightCoverage"]

_SHOWN = 3  # names per reason in one line
_LISTED = 20  # names in a list with one line for each


class DenseWeightWarning(UserWarning):
    """Warn about weights that stay dense although the user did not exclude them."""


class WeightCoverage(NamedTuple):
    """State whether one weight is sparse.

    Attributes
    ----------
    name : str
    shape : tuple of int
    reason : str
        Why the weight stays dense, as the end of "because ..."; empty if it is sparse.
    expected : bool
        True for a sparse weight, and for a dense one that the user or a documented rule
        excludes, so that no warning is due.
    """

    name: str
    shape: tuple[int, ...]
    reason: str = ""
    expected: bool = True

    @property
    def is_sparse(self) -> bool:
        """Whether the method makes this weight sparse."""
        return not self.reason

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class Coverage(NamedTuple):
    """The weights of a model, sparse and dense. A weight has two or more axes.

    ``str`` gives one line: how many weights and entries are sparse, and the dense weights
    by reason.

    Attributes
    ----------
    weights : tuple of WeightCoverage
        In the order of the model.

    Examples
    --------
    >>> head = WeightCoverage("head.weight", (4, 8), "its param group opts out")
    >>> print(Coverage((WeightCoverage("body.weight", (8, 8)), head)))
    sparse: 1 of 2 weights, 64 of 96 entries; dense: head.weight, because its param group opts out
    """

    weights: tuple[WeightCoverage, ...]

    @property
    def sparse(self) -> tuple[WeightCoverage, ...]:
        """The weights that the method makes sparse."""
        return tuple(w for w in self.weights if w.is_sparse)

    @property
    def dense(self) -> tuple[WeightCoverage, ...]:
        """The weights that stay dense."""
        return tuple(w for w in self.weights if not w.is_sparse)

    @property
    def unexpected(self) -> tuple[WeightCoverage, ...]:
        """The dense weights for which a warning is due."""
        return tuple(w for w in self.weights if not w.expected)

    def __str__(self) -> str:
        sparse = self.sparse
        line = (
            f"sparse: {len(sparse):,} of {len(self.weights):,} weights, "
            f"{_entries(sparse):,} of {_entries(self.weights):,} entries"
        )
        return f"{line}; dense: {by_reason(self.dense)}" if self.dense else line


def by_reason(weights: Iterable[WeightCoverage]) -> str:
    """Return dense weights in one line, grouped by reason, with a few names for each.

    Examples
    --------
    >>> rows = [WeightCoverage(f"{i}.weight", (2, 2), "it is frozen") for i in range(5)]
    >>> by_reason(rows)
    '0.weight, 1.weight, 2.weight and 2 more, because it is frozen'
    """
    groups: dict[str, list[str]] = {}
    for weight in weights:
        groups.setdefault(weight.reason, []).append(weight.name)
    parts = []
    for reason, names in groups.items():
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        parts.append(f"{', '.join(names[:_SHOWN])}{more}, because {reason}")
    return "; ".join(parts)


def listing(weights: Sequence[WeightCoverage], patterns: Mapping[str, str]) -> list[str]:
    """Return a line for each weight with its shape and pattern, for the first twenty weights.

    Examples
    --------
    >>> listing([WeightCoverage("0.weight", (4, 8))], {"0.weight": "2:4"})
    ['  0.weight (4, 8): 2:4']
    """
    lines = [f"  {w.name} {w.shape}: {patterns[w.name]}" for w in weights[:_LISTED]]
    more = len(weights) - _LISTED
    return [*lines, f"  and {more:,} more"] if more > 0 else lines


def _entries(weights: Iterable[WeightCoverage]) -> int:
    return sum(weight.entries for weight in weights)
