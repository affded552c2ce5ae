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

__all__ = ["alike", "apart", "stacked", "with_batch_axis", "without_batch_axis"]

# Larger arrays keep an accelerator busy by themselves for the time that several kernels take to
# start, and a stack is a copy.
_SMALL = 2**22
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


def apart(stacks: Sequence[Array], groups: Sequence[Sequence[int]]) -> list[Array]:
    """Return the arrays of the stacks that `stacked` makes of lists from `alike`.

    Examples
    --------
    >>> import numpy
    >>> apart([numpy.asarray([[1, 2], [3, 4]]), numpy.asarray([5])], [[0, 2], [1]])
    [array([1, 2]), array([5]), array([3, 4])]
    """
    found: dict[int, Array] = {}
    for stack, members in zip(stacks, groups, strict=True):
        for j, i in enumerate(members):
            found[i] = stack if len(members) == 1 else stack[j, ...]
    return [found[i] for i in range(len(found))]


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


def without_batch_axis(layout: Layout | None) -> Layout | None:
    """Return the layout of one array of a stack, from that of the stack.

    Examples
    --------
    >>> without_batch_axis(with_batch_axis(Layout((1,), (0,))))
    Layout(input_axes=(1,), output_axes=(0,), batch_axes=())
    """
    if layout is None:
        return None
    axes = (layout.input_axes, layout.output_axes, layout.batch_axes)
    return Layout(*(tuple(axis - 1 for axis in role if axis) for role in axes))
