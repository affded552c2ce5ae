"""Share out the samples, the batches and the layers of a run over its processes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["SampleShares", "rounds"]

_Unit = TypeVar("_Unit", bound=Hashable)


class SampleShares(NamedTuple):
    """Which process holds the hidden states of each sample.

    Attributes
    ----------
    owners : tuple of int
        The process of each sample.
    size : int
        Number of processes.
    """

    owners: tuple[int, ...]
    size: int

    @classmethod
    def dealt(cls, groups: Sequence[Sequence[int]], size: int) -> SampleShares:
        """Deal samples to processes in turn, so that each gets its share of every group.

        Examples
        --------
        >>> SampleShares.dealt([[0, 2, 4], [1, 3]], 2).owners
        (0, 1, 1, 0, 0)
        """
        order = [sample for group in groups for sample in group]
        owners = {sample: place % size for place, sample in enumerate(order)}
        return cls(tuple(owners[sample] for sample in range(len(order))), size)

    def held(self, rank: int, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the samples of each group that a process holds."""
        return [[s for s in group if self.owners[s] == rank] for group in groups]

    def parts(self, batch: Sequence[int]) -> list[list[int]]:
        """Return the samples of a batch that each process computes.

        No part is larger than an equal share, rounded up. A process computes samples that it
        holds, as far as its part has room, and receives others.

        Examples
        --------
        >>> SampleShares((0, 1, 0, 1, 0, 0), 2).parts([0, 5, 2, 4, 1])
        [[0, 5, 2], [1, 4]]
        """
        size = -(-len(batch) // self.size)
        parts: list[list[int]] = [[] for _ in range(self.size)]
        left: list[int] = []
        for sample in batch:
            part = parts[self.owners[sample]]
            (part if len(part) < size else left).append(sample)
        for sample in left:
            min(parts, key=len).append(sample)
        return parts

    def largest_part(self, batch_size: int) -> int:
        """Return the most samples that a process computes of a batch."""
        return -(-min(batch_size, len(self.owners)) // self.size)


def rounds(costs: Mapping[_Unit, float], size: int) -> list[list[list[_Unit]]]:
    """Return rounds of work, and in each round the units of every process.

    In a round, one process takes the most costly unit that is left, and the others as many as
    cost no more together. One process takes the units in their order.

    Examples
    --------
    >>> rounds({"q": 1.0, "k": 1.0, "down": 4.0}, 2)
    [[['down'], ['q', 'k']]]
    >>> rounds({"q": 1.0, "k": 1.0, "down": 4.0}, 1)
    [[['q']], [['k']], [['down']]]
    """
    left = sorted(costs, key=lambda unit: -costs[unit])
    found = []
    while left:
        parts: list[list[_Unit]] = [[] for _ in range(size)]
        loads, later = [0.0] * size, []
        for unit in left:
            rank = loads.index(min(loads))
            if parts[rank] and loads[rank] + costs[unit] > costs[left[0]]:
                later.append(unit)
            else:
                parts[rank].append(unit)
                loads[rank] += costs[unit]
        found.append(parts)
        left = later
    places = {unit: place for place, unit in enumerate(costs)}
    return sorted(found, key=lambda parts: places[parts[0][0]])
