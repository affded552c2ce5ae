"""The distribution of a sparsity over tensors that do not compete with one another.

Everything here is exact arithmetic on shapes, done before any array is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from safe_core import _checks
from safe_core.layout import Layout

__all__ = ["by_names", "by_rule", "erdos_renyi_kernel"]

Shape = tuple[int, ...]


def erdos_renyi_kernel(sizes: Sequence[Shape], zeros: int) -> list[int]:
    """Spread zeros over tensors by the Erdos-Renyi-Kernel rule.

    The density of a tensor whose axes are ``n_1, ..., n_k`` long is::

        min(1, c * (n_1 + ... + n_k) / (n_1 * ... * n_k))

    where c is such that the tensors together have ``zeros`` zeros. So inputs, outputs and
    the axes of a convolution's window count alike, and small tensors stay denser. Fractions
    of an entry go to the tensors where they are largest, the earlier one of two equals.

    Parameters
    ----------
    sizes : sequence of tuples of int
        The lengths of the axes of each tensor.
    zeros : int
        From 0 to the number of all entries.

    Returns
    -------
    list of int
        Zeros of each tensor; they sum to ``zeros``.

    Raises
    ------
    TypeError, ValueError
        If ``zeros`` is no integer within its bounds.

    References
    ----------
    Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3 (1).

    Examples
    --------
    >>> erdos_renyi_kernel([(3, 10), (10, 100), (10,)], 900)
    [16, 884, 0]
    """
    entries = [math.prod(size) for size in sizes]
    kept = sum(entries) - _checks.integer("zeros", zeros, low=0)
    if kept < 0:
        raise ValueError(f"zeros must be at most the {sum(entries)} entries, got {zeros!r}")
    # Entries kept in a tensor are c * (n_1 + ... + n_k), up to all of them.
    open_ = {i for i, n in enumerate(entries) if n}
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
    found = [math.floor(z) for z in exact]
    by_remainder = sorted(open_, key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: zeros - sum(found)]:
        found[i] += 1
    return found


def by_names(
    stages: tuple[Fraction, ...], named: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[Fraction, ...]]:
    """Return the fractions of every array, of some by name and of the others ``stages``.

    Where the sparsity changes over time, those by name change in proportion.

    Raises
    ------
    ValueError
        If ``named`` has a name that is not among ``names``.

    Examples
    --------
    >>> by_names((Fraction(1, 2),), {"b": 0.9}, ["a", "b"])
    [(Fraction(1, 2),), (Fraction(9, 10),)]
    """
    unknown = [name for name in named if name not in names]
    if unknown:
        raise ValueError(
            f"distribution must name sparse tensors, {', '.join(names)}, got {', '.join(unknown)}"
        )
    final = {name: _checks.decimal_fraction(value) for name, value in named.items()}
    rise = [stage / stages[-1] if stages[-1] else Fraction(1) for stage in stages]
    return [
        tuple(final[name] * share for share in rise) if name in final else stages for name in names
    ]


def by_rule(
    stages: tuple[Fraction, ...], shapes: Sequence[Shape], layouts: Sequence[Layout | None]
) -> list[tuple[Fraction, ...]]:
    """Return the fractions of every array by `erdos_renyi_kernel`; layouts are resolved.

    Examples
    --------
    >>> by_rule((Fraction(1, 2),), [(2, 2), (6, 6)], [None, None])
    [(Fraction(0, 1),), (Fraction(5, 9),)]
    """
    return list(_by_rule(stages, tuple(map(_sizes, shapes, layouts))))


@lru_cache(maxsize=64)
def _by_rule(
    stages: tuple[Fraction, ...], sizes: tuple[tuple[Shape, int], ...]
) -> tuple[tuple[Fraction, ...], ...]:
    """Return fractions by Erdos-Renyi-Kernel; each of stacked tensors counts."""
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
    """Return the lengths of the axes, one per role, and how many tensors are stacked."""
    roles = layout or Layout()
    named = [axes for axes in (roles.output_axes, roles.input_axes) if axes]
    used = {*roles.output_axes, *roles.input_axes, *roles.batch_axes}
    window = [n for axis, n in enumerate(shape) if axis not in used]
    merged = [math.prod(shape[axis] for axis in axes) for axes in named]
    return (*merged, *window), math.prod(shape[axis] for axis in roles.batch_axes)
