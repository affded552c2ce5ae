"""How a sparsity is spread over tensors that do not compete with one another.

Everything here is exact arithmetic on shapes, done before any array is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from . import _checks
from .layout import Layout
from .sparsity import Pattern, Unstructured, fractions

__all__ = ["erdos_renyi_kernel", "layer_fractions"]

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


def layer_fractions(
    pattern: Pattern,
    shapes: Sequence[Shape],
    layouts: Sequence[Layout | None],
    names: Sequence[str],
) -> list[tuple[Fraction, ...]]:
    """The fraction of zeros of every tensor, at every stage of the sparsity.

    Parameters
    ----------
    pattern : pattern
        Other than N:M; its scope is not "global".
    shapes, layouts, names : sequences
        Of the tensors, layouts with non-negative axes.

    Returns
    -------
    list of tuples of Fraction

    Raises
    ------
    ValueError
        If a budget names what is not among ``names``.

    Examples
    --------
    >>> pattern = Unstructured(0.5, scope="tensor", budget={"b": 0.9})
    >>> layer_fractions(pattern, [(4, 4), (4, 4)], [None, None], ["a", "b"])
    [(Fraction(1, 2),), (Fraction(9, 10),)]
    """
    budget = pattern.budget if isinstance(pattern, Unstructured) else None
    stages = fractions(pattern)
    if budget is None:
        return [stages] * len(names)
    if isinstance(budget, str):
        return list(_by_rule(stages, tuple(map(_sizes, shapes, layouts))))
    named = dict(budget)
    unknown = [name for name in named if name not in names]
    if unknown:
        raise ValueError(
            f"budget must name sparse tensors, {', '.join(names)}, got {', '.join(unknown)}"
        )
    final = {name: _checks.decimal_fraction(value) for name, value in named.items()}
    rise = [stage / stages[-1] if stages[-1] else Fraction(1) for stage in stages]
    return [
        tuple(final[name] * share for share in rise) if name in final else stages for name in names
    ]


@lru_cache(maxsize=64)
def _by_rule(
    stages: tuple[Fraction, ...], sizes: tuple[tuple[Shape, int], ...]
) -> tuple[tuple[Fraction, ...], ...]:
    """Fractions by Erdos-Renyi-Kernel; of stacked tensors each counts."""
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
    """The lengths of the axes, those of one role as one, and how many are stacked."""
    roles = layout or Layout()
    named = [axes for axes in (roles.output_axes, roles.input_axes) if axes]
    used = {*roles.output_axes, *roles.input_axes, *roles.batch_axes}
    window = [n for axis, n in enumerate(shape) if axis not in used]
    merged = [math.prod(shape[axis] for axis in axes) for axes in named]
    return (*merged, *window), math.prod(shape[axis] for axis in roles.batch_axes)
