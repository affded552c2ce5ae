"""Keep sets of positions along axes that can only be removed together."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ANY", "STAYS", "ChannelSets", "Labels", "constant"]

ANY, STAYS = -1, -2
"""Labels of positions of an array that is repeated there, and of those that must stay."""

Labels = np.ndarray[Any, Any]
"""Numbers of the channels that the positions along an axis belong to, or `ANY`, or `STAYS`."""

_MIXED = "they are combined with an array that must keep its length, such as an input"


def constant(label: int, size: int) -> Labels:
    """Return the labels of an axis of which all positions have the same one."""
    return np.full(size, label)


class ChannelSets:
    """Sets of numbered channels that can only be removed together, as union-find.

    Examples
    --------
    >>> sets = ChannelSets()
    >>> a, b = sets.new(2), sets.new(2)
    >>> sets.join(a, b).tolist(), sets.roots().tolist()
    ([0, 1], [0, 1, 0, 1])
    >>> sets.keep(b[1:], "they are outputs")
    >>> sets.reasons()
    {1: 'they are outputs'}
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}

    def new(self, count: int) -> Labels:
        """Return the numbers of new channels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, channel: int) -> int:
        """Return the number that stands for the set of a channel."""
        parents = self._parents
        while parents[channel] != channel:
            parents[channel] = parents[parents[channel]]
            channel = parents[channel]
        return channel

    def roots(self) -> Labels:
        """Return the root of each channel."""
        return np.array([self.root(i) for i in range(len(self._parents))], dtype=int)

    def reasons(self) -> dict[int, str]:
        """Return why sets must stay, by their roots."""
        return dict(self._reasons)

    def join(self, a: Labels, b: Labels) -> Labels:
        """Return the labels of an axis at which two arrays meet, position by position."""
        both = (a >= 0) & (b >= 0) & (a != b)
        for first, second in np.unique(np.stack([a[both], b[both]], 1), axis=0).tolist():
            self._unite(first, second)
        self.keep(a[b == STAYS], _MIXED)
        self.keep(b[a == STAYS], _MIXED)
        return np.where((a == ANY) | (b == STAYS), b, a)

    def keep(self, labels: Labels, reason: str) -> None:
        """Let channels stay; the first reason counts."""
        for channel in np.unique(labels[labels >= 0]).tolist():
            self._reasons.setdefault(self.root(channel), reason)

    def _unite(self, a: int, b: int) -> None:
        first, second = sorted((self.root(a), self.root(b)))
        if first == second:
            return
        self._parents[second] = first
        reason = self._reasons.pop(second, None)
        if reason is not None:
            self._reasons.setdefault(first, reason)
