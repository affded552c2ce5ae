"""Follow channels through a reshape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .sets import ANY, STAYS, ChannelSets, Labels, constant

__all__ = ["RESHAPED", "reshaped"]

RESHAPED = "a reshape splits their axis, as GroupNorm does"


def reshaped(sets: ChannelSets, labels: Sequence[Labels], shape: Sequence[int]) -> list[Labels]:
    """Return the labels of the axes of an array that takes another shape.

    Examples
    --------
    >>> sets = ChannelSets()
    >>> pixels, channels = constant(STAYS, 2), sets.new(3)
    >>> flat = reshaped(sets, [pixels, channels], (6,))
    >>> flat[0].tolist(), reshaped(sets, flat, (2, 3))[1].tolist()
    ([0, 1, 2, 0, 1, 2], [0, 1, 2])
    """
    if 0 in shape:  # an array without entries has no channels to follow
        for own in labels:
            sets.keep(own, RESHAPED)
        return [constant(STAYS, size) for size in shape]
    found = [constant(ANY, size) for size in shape]
    for old, new in _blocks([len(own) for own in labels], shape):
        flat = _flattened(sets, [labels[axis] for axis in old])
        split = _split(sets, flat, [shape[axis] for axis in new])
        for axis, own in zip(new, split, strict=True):
            found[axis] = own
    return found


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of axes, without those of size 1, that have equal products."""
    olds, news = ([i for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    while olds:
        a, b = [olds.pop(0)], [news.pop(0)]
        while (left := math.prod(old[i] for i in a)) != (right := math.prod(new[i] for i in b)):
            if left < right:
                a.append(olds.pop(0))
            else:
                b.append(news.pop(0))
        yield a, b


def _flattened(sets: ChannelSets, labels: list[Labels]) -> Labels:
    """Return the labels of axes that become one."""
    shape = [len(own) for own in labels]
    named = [axis for axis, own in enumerate(labels) if (own >= 0).any()]
    if len(named) > 1:
        for axis in named:
            sets.keep(labels[axis], RESHAPED)
    if len(named) != 1:
        free = all((own == ANY).all() for own in labels)
        return constant(ANY if free else STAYS, math.prod(shape))
    sides = [-1 if axis == named[0] else 1 for axis in range(len(shape))]
    return np.broadcast_to(labels[named[0]].reshape(sides), shape).reshape(-1)


def _split(sets: ChannelSets, flat: Labels, sizes: list[int]) -> list[Labels]:
    """Return the labels of the axes that one axis becomes."""
    if (flat == flat[0]).all() and flat[0] < 0:
        return [constant(int(flat[0]), size) for size in sizes]
    labels = [constant(STAYS, size) for size in sizes]
    for axis, size in enumerate(sizes):
        lines = np.moveaxis(flat.reshape(sizes), axis, 0).reshape(size, -1)
        if (lines == lines[:, :1]).all():
            labels[axis] = lines[:, 0]
            return labels
    sets.keep(flat, RESHAPED)
    return labels
