"""Measure sharpness, the largest rise of the loss within a ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace

from safe_core import _checks
from safe_core.backends import Array
from safe_core.direction import norm
from safe_core.perturbations import SAM
from safe_core.random_numbers import check_seed

from .vectors import Coordinates

__all__ = ["Sharpness", "ValueAndGradient", "moved", "sharpness"]

ValueAndGradient = Callable[[Sequence[Array]], tuple[Array, Sequence[Array]]]
"""Function from parameters to the scalar loss at them, and its gradient."""


class Sharpness(NamedTuple):
    """Sharpness on several batches, in the unit of the loss.

    Attributes
    ----------
    by_batch : list of float
        Approximation of ``max_{|e| <= rho} f_b(x + e) - f_b(x)`` for the loss f_b of each
        batch. Each batch has its own perturbation e.

    Examples
    --------
    >>> found = Sharpness([1.0, 3.0])
    >>> found.mean, found.worst
    (2.0, 3.0)
    """

    by_batch: list[float]

    @property
    def mean(self) -> float:
        """The mean, which is the m-sharpness of Foret et al. 2021 for batches of size m."""
        return float(np.mean(self.by_batch))

    @property
    def worst(self) -> float:
        """The largest value over the batches."""
        return float(np.max(self.by_batch))


def sharpness(
    value_and_gradient: ValueAndGradient,
    arrays: Sequence[Array],
    rho: float,
    *,
    steps: int = 1,
    seed: int = 0,
    support: Sequence[Array | None] | None = None,
) -> float:
    """Return the largest rise of the loss found within a distance rho of x.

    It approximates ``max_{|e| <= rho} f(x + e) - f(x)`` from below. The first step is that of
    SAM, ``e_1 = rho * g / |g|`` with the gradient g at x. Further steps are projected gradient
    ascent::

        e_t = proj(e_{t-1} + rho / sqrt(t) * g / |g|),    g = grad f(x + e_{t-1})

    The largest rise over all steps is returned, so that more steps never find less. If the
    gradient at x is zero, one step finds 0; several steps start from a random ``|e_1| = rho``.

    Parameters
    ----------
    value_and_gradient : callable
        ``value_and_gradient(arrays) -> (loss, gradient)``. It is called ``steps + 1`` times.
    arrays : list of arrays
        Point x, real floating.
    rho : float
        Positive radius, in the unit of the parameters. The norm runs over all arrays.
    steps : int
        Number of ascent steps, at least 1.
    seed : int
        Seed of the random start, in ``[0, 2**32)``.
    support : list of bool arrays or None, optional
        Entries that may move. None for an array lets all its entries move.

    Returns
    -------
    float
        Rise in the unit of the loss. NaN if the loss is NaN at any point visited, or if the
        norm of a gradient is not finite.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, or if rounding to the dtypes of
        the parameters removes more than half of the norm of the first step.

    References
    ----------
    Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", equation 2; Madry et al. 2018, "Towards Deep Learning Models Resistant to
    Adversarial Attacks" (projected gradient ascent).

    Examples
    --------
    >>> import numpy
    >>> curvature = numpy.asarray([1.0, 3.0])
    >>> def bowl(arrays):
    ...     return numpy.sum(curvature * arrays[0] ** 2) / 2, [curvature * arrays[0]]
    >>> minimum = [numpy.zeros(2)]
    >>> sharpness(bowl, minimum, 2.0), round(sharpness(bowl, minimum, 2.0, steps=50), 3)
    (0.0, 6.0)
    """
    if _checks.real("rho", rho, low=0.0) == 0:
        raise ValueError(f"rho must be positive, got {rho!r}")
    _checks.integer("steps", steps, low=1)
    check_seed(seed)
    coordinates = Coordinates.of(arrays, support)
    start, gradient = value_and_gradient(arrays)
    e = _ascent(coordinates, gradient, rho)
    if steps > 1 and float(norm([e])) == 0:
        e = _ascent(coordinates, coordinates.unpack(coordinates.normal(seed, 0)), rho)
    found = []
    for t in range(1, steps + 1):
        if not math.isfinite(float(norm([e]))):
            return math.nan
        at = moved(arrays, coordinates.unpack(e))
        if t == 1:
            _check_distance(coordinates, arrays, at, e, rho)
        value, gradient = value_and_gradient(at)
        found.append(float(value) - float(start))
        if t < steps:
            e = _into_ball(e + _ascent(coordinates, gradient, rho / math.sqrt(t + 1)), rho)
    return float(np.max(found))


def moved(arrays: Sequence[Array], steps: Sequence[Array]) -> list[Array]:
    """Return ``x + step``, added in the dtype of the steps and rounded to the dtype of x.

    Examples
    --------
    >>> import numpy
    >>> moved([numpy.ones(1, numpy.float32)], [numpy.ones(1)])
    [array([2.], dtype=float32)]
    """
    xp = array_namespace(*arrays)
    return [
        xp.astype(xp.astype(x, step.dtype) + step, x.dtype)
        for x, step in zip(arrays, steps, strict=True)
    ]


def _ascent(coordinates: Coordinates, gradient: Sequence[Array], length: float) -> Array:
    """Return the vector of norm ``length`` along the gradient.

    It is zero if the gradient is zero, and NaN if the norm of the gradient is not finite.
    """
    g = coordinates.pack(gradient, "gradient")
    direction = SAM().direction([g], [g], rho=length)
    (e,) = direction.perturbation()
    # In training SAM skips the perturbation if the norm is not finite. Here a zero step would
    # report a diverged network as flat.
    xp = array_namespace(e)
    return xp.where(xp.isfinite(direction.length), e, xp.full_like(e, math.nan))


def _check_distance(
    coordinates: Coordinates, arrays: Sequence[Array], at: Sequence[Array], e: Array, rho: float
) -> None:
    """Raise ValueError if rounding removes more than half of the norm of a step.

    In 16 bits a small rho moves few parameters or none, and the network would look flat.
    """
    wanted = float(norm([e]))
    reached = float(norm([coordinates.pack(at) - coordinates.pack(arrays)]))
    if reached < wanted / 2:
        raise ValueError(
            "rho must be large enough to move parameters in their dtypes, "
            f"{', '.join(sorted({str(x.dtype) for x in arrays}))}, got {rho!r}, which rounding "
            f"turns into {reached:g}"
        )


def _into_ball(e: Array, rho: float) -> Array:
    length = float(norm([e]))
    return e if length <= rho else rho / length * e
