"""Stack small arrays that are alike, so that an accelerator starts few kernels for all of them.

Stacked arrays have one more axis, a batch axis, along which every pattern treats each slice as an
array of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from array_api_compat import array_namespace

from .backends import Array
from .layout import Layout

__all__ = ["alike", "stacked", "with_batch_axis"]

# Larger arrays keep an accelerator busy by themselves, and a stack is a copy.
_SMALL = 2**18
# Entries of a stack at most.
_TOGETHER = 2**25


def alike(
    arrays: Sequence[Array],
    importance: Sequence[Array | None],
    layouts: Sequence[Layout | None],
) -> list[list[int]]:
    """Return lists of the positions of arrays that can be stacked.

    They agree in shape, dtype and layout, and so do their importances. A large array is alone.

    Examples
    --------
    >>> import numpy
    >>> alike([numpy.ones(2), numpy.ones(3), numpy.ones(2)], [None] * 3, [None] * 3)
    [[0, 2], [1]]
    """
    found: dict[object, list[int]] = {}
    for i, (x, p, layout) in enumerate(zip(arrays, importance, layouts, strict=True)):
        size = math.prod(x.shape)
        key: object = (x.shape, x.dtype, layout, p if p is None else (p.shape, p.dtype))
        # A scalar importance broadcasts to its array. A stack of scalars has too few axes.
        if size > _SMALL or (p is not None and p.ndim == 0):
            key = i
        while key in found and (len(found[key]) + 1) * size > _TOGETHER:
            key = (key, "next")
        found.setdefault(key, []).append(i)
    return list(found.values())


def stacked(arrays: Sequence[Array | None], members: Sequence[int]) -> Array | None:
    """Return members of a list from `alike` as one array; a single one, or None, as it is.

    Examples
    --------
    >>> import numpy
    >>> stacked([numpy.ones(2), numpy.ones(3), numpy.ones(2)], [0, 2]).shape
    (2, 2)
    """
    first = arrays[members[0]]
    if first is None or len(members) == 1:
        return first
    return array_namespace(first).stack([arrays[i] for i in members])


def with_batch_axis(layout: Layout | None) -> Layout:
    """Return the layout of stacked arrays, from that of one with non-negative axes.

    Examples
    --------
    >>> with_batch_axis(Layout((1,), (0,)))
    Layout(input_axes=(2,), output_axes=(1,), batch_axes=(0,))
    """
    roles = layout or Layout()
    moved = [
        tuple(axis + 1 for axis in axes)
        for axes in (roles.input_axes, roles.output_axes, roles.batch_axes)
    ]
    return Layout(moved[0], moved[1], (0, *moved[2]))
