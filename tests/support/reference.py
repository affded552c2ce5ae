"""Reference implementations in plain NumPy: independent of the library, and slow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from safe_core import NM, Block, Channel, Layout, Unstructured

Entry = tuple[int, int]
"""(position of the array in the list, row-major index)."""


class Pool(NamedTuple):
    """Units that compete with each other, in the order in which ties are kept."""

    units: list[list[Entry]]
    kept: int


def default_layout(ndim: int) -> Layout:
    """Return the layout (output, input, ...), or that of a vector of inputs."""
    return (Layout(), Layout((0,)), Layout((1,), (0,)))[min(ndim, 2)]


def pools(
    shapes: Sequence[tuple[int, ...]], pattern: Any, layouts: Sequence[Layout] | None = None
) -> list[Pool]:
    """Put every entry into its unit and every unit into its pool, one at a time.

    The tails of ragged arrays belong to no pool and stay dense.
    """
    if layouts is None:
        layouts = [default_layout(len(shape)) for shape in shapes]
    grouped: dict[Any, dict[Any, list[Entry]]] = {}
    for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True)):
        for flat, index in enumerate(np.ndindex(*shape)):
            place = _place(pattern, i, shape, index, layout)
            if place is not None:
                pool, unit = place
                grouped.setdefault(pool, {}).setdefault(unit, []).append((i, flat))
    return [Pool(list(units.values()), kept(pattern, len(units))) for units in grouped.values()]


def kept(pattern: Any, units: int) -> int:
    """Return ``units`` minus the number to prune, which is rounded down."""
    if isinstance(pattern, NM):
        return pattern.n
    return units - math.floor(Fraction(str(pattern.sparsity)) * units)


def _place(
    pattern: Any, i: int, shape: tuple[int, ...], index: tuple[int, ...], layout: Layout
) -> tuple[Any, Any] | None:
    """Return the keys of the pool and the unit of an entry, or None in a dense tail."""
    ndim = len(shape)
    inputs, outputs, batch = (
        [axis % ndim for axis in axes]
        for axes in (layout.input_axes, layout.output_axes, layout.batch_axes)
    )

    def at(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(index[axis] for axis in axes)

    def along(axes: Sequence[int]) -> tuple[int, int]:
        """Return the position on the merged axes, and their size."""
        sizes = [shape[axis] for axis in axes]
        return int(np.ravel_multi_index(at(axes), sizes)), math.prod(sizes)

    tensor = (i, at(batch))
    if isinstance(pattern, Unstructured):
        pool = {"global": (), "tensor": tensor, "row": (tensor, at(outputs))}[pattern.scope]
        return pool, (i, index)
    if isinstance(pattern, Channel):
        return () if pattern.scope == "global" else tensor, (tensor, at(outputs))
    position, size = along(inputs)
    if isinstance(pattern, NM):
        group = position // pattern.m
        others = at([axis for axis in range(ndim) if axis not in inputs])
        return ((i, others, group), index) if group < size // pattern.m else None
    assert isinstance(pattern, Block), pattern
    row, rows = along(outputs)
    block = row // pattern.shape[0], position // pattern.shape[1]
    if block[0] == rows // pattern.shape[0] or block[1] == size // pattern.shape[1]:
        return None
    others = at([axis for axis in range(ndim) if axis not in inputs + outputs])
    return () if pattern.scope == "global" else tensor, (i, others, block)


def floors(
    shapes: Sequence[tuple[int, ...]], pattern: Any, layouts: Sequence[Layout] | None = None
) -> list[Pool]:
    """Return the units of every tensor, with the number that its floor keeps."""
    if not getattr(pattern, "floor", 0):
        return []
    share = Fraction(str(pattern.floor)) * (1 - Fraction(str(pattern.sparsity)))
    tensors = pools(shapes, replace(pattern, scope="tensor", floor=0.0), layouts)
    found = [Pool(units, math.floor(share * len(units))) for units, _ in tensors]
    ((_, count),) = pools(shapes, pattern, layouts)
    at_least_one = [Pool(units, max(n, 1)) for units, n in found]
    return at_least_one if sum(n for _, n in at_least_one) <= count else found


def select(
    arrays: Sequence[np.ndarray],
    pattern: Any,
    importance: Sequence[Any] | None = None,
    layouts: Sequence[Layout] | None = None,
) -> list[np.ndarray]:
    """Return the support from a stable sort of the scores of every pool."""
    weights = [1.0] * len(arrays) if importance is None else importance
    single = isinstance(pattern, (Unstructured, NM))
    # Entries rank by sqrt(P) |v|, units by the sum of P v^2.
    scores = [
        (np.sqrt(p) * np.abs(v) if single else p * v * v).ravel()
        for p, v in zip(weights, [_wide(v) for v in arrays], strict=True)
    ]
    support = [np.ones(v.shape, bool) for v in arrays]
    shapes = [v.shape for v in arrays]

    def total(unit: list[Entry]) -> float:
        return float(sum(scores[i][flat] for i, flat in unit))

    first = [
        unit
        for units, count in floors(shapes, pattern, layouts)
        for unit in sorted(units, key=total, reverse=True)[:count]  # a stable sort, too
    ]
    for units, count in pools(shapes, pattern, layouts):
        totals = [math.inf if unit in first else total(unit) for unit in units]
        order = np.argsort(-np.asarray(totals), kind="stable")
        for loser in order[count:]:
            for i, flat in units[loser]:
                support[i].reshape(-1)[flat] = False
    return support


def nearest_distance(
    arrays: Sequence[np.ndarray],
    pattern: Any,
    importance: Sequence[Any] | None = None,
    layouts: Sequence[Layout] | None = None,
) -> float:
    """``min_z sum_i P_ii (z_i - v_i)^2`` over every support that the pattern allows.

    Exact where the terms are small multiples of a power of two.
    """
    terms = [t.ravel() for t in _terms(arrays, importance)]
    distance, shapes = 0.0, [v.shape for v in arrays]
    least = floors(shapes, pattern, layouts)
    for units, count in pools(shapes, pattern, layouts):
        cost = [sum(terms[i][flat] for i, flat in unit) for unit in units]
        best = max(
            sum(cost[unit] for unit in chosen)
            for chosen in itertools.combinations(range(len(units)), count)
            if all(sum(units[unit] in own for unit in chosen) >= n for own, n in least)
        )
        distance += sum(cost) - best
    return distance


def distance(
    values: Sequence[np.ndarray],
    arrays: Sequence[np.ndarray],
    importance: Sequence[Any] | None = None,
) -> float:
    """``sum_i P_ii (z_i - v_i)^2``."""
    differences = [_wide(z) - _wide(v) for z, v in zip(values, arrays, strict=True)]
    return float(sum(np.sum(t) for t in _terms(differences, importance)))


def _terms(arrays: Sequence[np.ndarray], importance: Sequence[Any] | None) -> list[np.ndarray]:
    weights = [1.0] * len(arrays) if importance is None else importance
    return [p * _wide(v) ** 2 for p, v in zip(weights, arrays, strict=True)]


def _wide(v: np.ndarray) -> np.ndarray:
    return np.asarray(v, np.float64)


Arrays = list[np.ndarray]
Select = Callable[[Arrays], Arrays]
"""``v -> support`` of ``proj(v)``."""


class TwoArrayADMM:
    """ADMM as textbooks write it, with z and u in arrays of their own."""

    def __init__(self, x: Arrays, support: Select) -> None:
        self.z = _keep(x, support(x))
        self.u = [np.zeros_like(v) for v in x]

    def penalty_gradient(self, x: Arrays, penalty: float) -> Arrays:
        """``lambda (x - z + u)``."""
        return [penalty * (x - z + u) for x, z, u in zip(x, self.z, self.u, strict=True)]

    def dual_update(self, x: Arrays, support: Select, relaxation: float = 1.0) -> None:
        """``v = alpha x + (1 - alpha) z + u``, ``z = proj(v)``, ``u = v - z``."""
        v = [
            (x if relaxation == 1 else relaxation * x + (1 - relaxation) * z) + u
            for x, z, u in zip(x, self.z, self.u, strict=True)
        ]
        self.z = _keep(v, support(v))
        self.u = [v - z for v, z in zip(v, self.z, strict=True)]

    def rescale(self, ratio: float) -> None:
        """``u <- u lambda_old / lambda_new``."""
        self.u = [ratio * u for u in self.u]


def _keep(arrays: Arrays, support: Arrays) -> Arrays:
    return [np.where(mask, v, np.zeros_like(v)) for v, mask in zip(arrays, support, strict=True)]
