"""Distribute a sparsity over tensors that do not compete with one another.

All arithmetic is on shapes and exact, so that the counts are static and tensors together
have exactly the zeros asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from safe_core import _checks
from safe_core.layout import Layout

__all__ = ["by_names", "by_rule", "erdos_renyi_kernel", "round_to_sum"]

Shape = tuple[int, ...]


def erdos_renyi_kernel(sizes: Sequence[Shape], zeros: int) -> list[int]:
    """Distribute zeros over tensors by the Erdos-Renyi-Kernel rule.

    The density of a tensor with axes of lengths ``n_1, ..., n_k`` is::

        min(1, c * (n_1 + ... + n_k) / (n_1 * ... * n_k))

    where c is chosen such that the tensors together have ``zeros`` zeros. Inputs, outputs and
    the axes of a convolution window count alike, and small tensors are pruned less. A tensor
    of one axis has the density ``min(1, c)``. A scalar has no axes, so the rule gives it no
    density, and it stays dense. Counts are rounded by largest remainder; of equal remainders
    the earlier tensor gets the zero.

    Parameters
    ----------
    sizes : sequence of tuples of int
        Lengths of the axes of each tensor.
    zeros : int
        Total number of zeros, from 0 to the number of entries of tensors with an axis.

    Returns
    -------
    list of int
        Number of zeros of each tensor. They sum to ``zeros``.

    Raises
    ------
    TypeError, ValueError
        If ``zeros`` is not an integer within these bounds.

    References
    ----------
    Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3 (1).

    Examples
    --------
    >>> erdos_renyi_kernel([(3, 10), (10, 100), (10,)], 900)
    [16, 884, 0]
    >>> erdos_renyi_kernel([(), (2, 2)], 3)
    [0, 3]
    """
    entries = [math.prod(size) for size in sizes]
    # An empty tensor has nothing to prune, and the rule says nothing about a scalar.
    open_ = {i for i, (n, size) in enumerate(zip(entries, sizes, strict=True)) if n and size}
    most = sum(entries[i] for i in open_)
    kept = sum(entries) - _checks.integer("zeros", zeros, low=0)
    if zeros > most:
        raise ValueError(
            f"zeros must be at most the {most} entries of tensors with an axis, as the "
            f"Erdos-Renyi-Kernel rule keeps scalars dense, got {zeros!r}"
        )
    # A tensor keeps c * (n_1 + ... + n_k) entries, at most all of them. Fill up tensors that
    # c would overfill and solve for c again: it only grows, so full tensors stay full.
    share = Fraction(0)
    while open_:
        weight = sum(sum(sizes[i]) for i in open_)
        full = sum(n for i, n in enumerate(entries) if i not in open_)
        share = Fraction(kept - full, weight)
        filled = {i for i in open_ if share * sum(sizes[i]) > entries[i]}
        if not filled:
            break
        open_ -= filled
    exact = [
        n - share * sum(size) if i in open_ else Fraction(0)
        for i, (n, size) in enumerate(zip(entries, sizes, strict=True))
    ]
    return round_to_sum(exact, zeros)


def round_to_sum(
    exact: Sequence[Fraction], total: int, units: Sequence[int] | None = None
) -> list[int]:
    """Round numbers by largest remainder to multiples of units, to a sum of at most ``total``.

    Parameters
    ----------
    exact : sequence of Fraction
        Numbers whose sum is at least ``total``, and less than ``total + 1``.
    total : int
    units : sequence of int, optional
        Each number is rounded to a multiple of its unit; 1 by default.

    Returns
    -------
    list of int
        Their sum is ``total`` for units of 1, and otherwise less than the largest unit below it.
        Of equal remainders the earlier number is rounded up.

    Examples
    --------
    >>> round_to_sum([Fraction(5, 2), Fraction(5, 2)], 5)
    [3, 2]
    >>> round_to_sum([Fraction(5, 2), Fraction(5, 2)], 5, [2, 1])
    [2, 3]
    """
    steps = [1] * len(exact) if units is None else units
    found = [math.floor(x / unit) * unit for x, unit in zip(exact, steps, strict=True)]
    left = total - sum(found)
    for i in sorted(range(len(found)), key=lambda i: ((found[i] - exact[i]) / steps[i], i)):
        if steps[i] <= left:
            found[i] += steps[i]
            left -= steps[i]
    return found


def by_names(
    stages: tuple[Fraction, ...], named: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[Fraction, ...]]:
    """Return the fractions of every array: those in ``named``, and ``stages`` for the others.

    Under a sparsity schedule, fractions by name rise in proportion to it.

    Examples
    --------
    >>> by_names((Fraction(1, 2),), {"b": 0.9}, ["a", "b"])
    [(Fraction(1, 2),), (Fraction(9, 10),)]
    """
    final = {name: _checks.decimal_fraction(value) for name, value in named.items()}
    rise = [stage / stages[-1] if stages[-1] else Fraction(1) for stage in stages]
    return [
        tuple(final[name] * share for share in rise) if name in final else stages for name in names
    ]


def by_rule(
    stages: tuple[Fraction, ...], shapes: Sequence[Shape], layouts: Sequence[Layout | None]
) -> list[tuple[Fraction, ...]]:
    """Return the fractions of every array by `erdos_renyi_kernel`.

    ``layouts`` have non-negative axes.

    Examples
    --------
    >>> by_rule((Fraction(1, 2),), [(2, 2), (6, 6)], [None, None])
    [(Fraction(0, 1),), (Fraction(5, 9),)]
    """
    return list(_by_rule(stages, tuple(map(_sizes, shapes, layouts))))


# Cached, because the shapes are those of the model and the same at every projection.
@lru_cache(maxsize=64)
def _by_rule(
    stages: tuple[Fraction, ...], sizes: tuple[tuple[Shape, int], ...]
) -> tuple[tuple[Fraction, ...], ...]:
    """Return fractions by Erdos-Renyi-Kernel.

    ``sizes`` pairs the axes of a tensor with the number of tensors that an array stacks. Each
    stacked tensor counts in the rule, but the array gets one fraction for all of them.
    """
    apart = [size for size, count in sizes for _ in range(count)]
    entries = [math.prod(size) for size in apart]
    zeros = [erdos_renyi_kernel(apart, int(stage * sum(entries))) for stage in stages]
    found, start = [], 0
    for size, count in sizes:
        n = count * math.prod(size)
        found.append(
            tuple(Fraction(sum(z[start : start + count]), n) if n else Fraction(0) for z in zeros)
        )
        start += count
    return tuple(found)


def _sizes(shape: Shape, layout: Layout | None) -> tuple[Shape, int]:
    """Return the lengths of the axes, one per role, and the number of stacked tensors."""
    roles = layout or Layout()
    named = [axes for axes in (roles.output_axes, roles.input_axes) if axes]
    used = {*roles.output_axes, *roles.input_axes, *roles.batch_axes}
    window = [n for axis, n in enumerate(shape) if axis not in used]
    merged = [math.prod(shape[axis] for axis in axes) for axes in named]
    return (*merged, *window), math.prod(shape[axis] for axis in roles.batch_axes)
