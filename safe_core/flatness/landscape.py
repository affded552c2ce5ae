"""Evaluate the loss along lines and planes, with filter-normalised directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from safe_core import _checks
from safe_core.backends import Array
from safe_core.layout import Layout, resolve
from safe_core.random_numbers import check_seed

from .ascent import moved
from .vectors import Coordinates

__all__ = ["Landscape", "filter_direction", "landscape"]


class Landscape(NamedTuple):
    """Loss on a grid, as NumPy arrays on the host.

    Attributes
    ----------
    coordinates : float64 array, (points,)
        Steps along each direction, ``a`` and ``b`` in ``x + a * d1 + b * d2``.
    values : float64 array, (points,) or (points, points)
        Losses, where ``values[i, j]`` is at ``a = coordinates[i]`` and ``b = coordinates[j]``.
    """

    coordinates: NDArray[np.float64]
    values: NDArray[np.float64]


def filter_direction(
    arrays: Sequence[Array],
    layouts: Sequence[Layout | None],
    *,
    seed: int = 0,
    index: int = 0,
    vectors: bool = False,
    support: Sequence[Array | None] | None = None,
) -> list[Array]:
    """Return a random filter-normalised direction.

    d is drawn from a normal distribution and scaled as ``d_f <- d_f * |w_f| / |d_f|`` for
    every filter f, the weights of one output unit. Networks that differ only in the scale of
    their weights, which normalisation layers undo, then show the same landscape.

    Parameters
    ----------
    arrays : list of arrays
        Parameters of the network, real floating.
    layouts : list of Layout or None
        Axis roles: output and batch axes define the filters. None for arrays without filters,
        such as biases and the parameters of normalisation layers.
    seed, index : int
        Identify the direction. The two directions of a plane share a seed in ``[0, 2**32)``
        and differ in index.
    vectors : bool
        Whether arrays without filters move too, each as one filter. By default they stay,
        because few entries of biases and norms have a large effect on the loss.
    support : list of bool arrays or None, optional
        Entries that may move. None for an array lets all its entries move. Norms run over
        the support.

    Returns
    -------
    list of arrays
        Direction, in float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, or nothing would move.

    References
    ----------
    Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", section 4.

    Examples
    --------
    >>> import numpy
    >>> weight, bias = numpy.asarray([[3.0, 4.0], [0.0, 0.0]]), numpy.ones(2)
    >>> d, zero = filter_direction([weight, bias], [Layout((1,), (0,)), None])
    >>> numpy.linalg.norm(d, axis=1).round(6), zero
    (array([5., 0.]), array([0., 0.]))
    """
    if len(layouts) != len(arrays):
        raise ValueError(
            f"layouts must have one entry per array ({len(arrays)}), got {len(layouts)}"
        )
    _checks.integer("index", index, low=0)
    check_seed(seed)
    if not vectors and all(layout is None for layout in layouts):
        raise ValueError(
            "layouts must name the filters of an array unless vectors are moved, got None for all"
        )
    coordinates = Coordinates.of(arrays, support)
    drawn = coordinates.unpack(coordinates.normal(seed, index))
    kept = coordinates.unpack(coordinates.pack(arrays))
    return [
        _scaled(d, x, layout, f"arrays[{i}]")
        if layout is not None or vectors
        else array_namespace(d).zeros_like(d)
        for i, (d, x, layout) in enumerate(zip(drawn, kept, layouts, strict=True))
    ]


def landscape(
    value: Callable[[Sequence[Array]], Any],
    arrays: Sequence[Array],
    directions: Sequence[Sequence[Array]],
    *,
    radius: float = 1.0,
    points: int = 51,
) -> Landscape:
    """Evaluate the loss at ``x + a d1``, or at ``x + a d1 + b d2``, on a grid.

    Parameters
    ----------
    value : callable
        ``value(arrays) -> loss``, a scalar. It is called once per grid point.
    arrays : list of arrays
        Point x in the middle of the grid.
    directions : list of one or two lists of arrays
        Directions shaped as ``arrays``, for example from `filter_direction`.
    radius : float
        Positive half-width of the grid: a and b run from ``-radius`` to ``radius``.
    points : int
        Grid points along each direction, at least 2. If odd, one lies exactly at x.

    Returns
    -------
    Landscape

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> import numpy
    >>> x, d = [numpy.asarray([1.0])], [numpy.asarray([2.0])]
    >>> landscape(lambda arrays: arrays[0][0] ** 2, x, [d], points=3).values
    array([1., 1., 9.])
    """
    if _checks.real("radius", radius, low=0.0) == 0:
        raise ValueError(f"radius must be positive, got {radius!r}")
    _checks.integer("points", points, low=2)
    if len(directions) not in (1, 2):
        raise ValueError(f"directions must be one or two, got {len(directions)}")
    coordinates = Coordinates.of(arrays)
    first, *others = [coordinates.pack(d, "direction") for d in directions]
    # With linspace the middle point may miss 0 by rounding.
    places = radius * (2 * np.arange(points) - (points - 1)) / (points - 1)

    def loss(a: float, b: float = 0.0) -> float:
        step = a * first + b * others[0] if others else a * first
        return float(value(moved(arrays, coordinates.unpack(step))))

    if not others:
        return Landscape(places, np.asarray([loss(a) for a in places.tolist()]))
    rows = [[loss(a, b) for b in places.tolist()] for a in places.tolist()]
    return Landscape(places, np.asarray(rows))


def _scaled(d: Array, x: Array, layout: Layout | None, name: str) -> Array:
    """Return ``d`` with the norm of ``x`` in every filter, and zero where either norm is."""
    xp = array_namespace(d)
    roles = resolve(layout or Layout(), x.ndim, name)
    unit = roles.batch_axes + roles.output_axes
    axes = tuple(axis for axis in range(x.ndim) if axis not in unit)
    of_x, of_d = (_norms(xp, a, axes) for a in (x, d))
    drawn = of_d > 0
    return d * xp.where(drawn, of_x / xp.where(drawn, of_d, xp.ones_like(of_d)), of_d)


def _norms(xp: Any, x: Array, axes: tuple[int, ...]) -> Array:
    # Some libraries read an empty tuple of axes as all axes.
    return xp.linalg.vector_norm(x, axis=axes, keepdims=True) if axes else xp.abs(x)
