"""Perturbations: the step from x to the worst nearby point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array

from . import _checks
from ._dtypes import wide_dtype
from .schedules import Constant, Schedule, as_schedule

__all__ = ["ASAM", "SAM", "norm"]


def norm(arrays: Sequence[Array]) -> Array:
    """Euclidean norm of all entries of all arrays together.

    ``sqrt(sum_i |a_i|^2)``, accumulated in float32 or wider. Squares are not scaled, so in
    float32 a norm below about 1e-19 counts as zero and one above 1e19 as infinite.

    Parameters
    ----------
    arrays : sequence of arrays
        At least one real floating array, of any shapes.

    Returns
    -------
    array
        A scalar, float64 if an array is, else float32.

    Examples
    --------
    >>> import numpy
    >>> float(norm([numpy.asarray([3.0]), numpy.asarray([[4.0]])]))
    5.0
    """
    xp = array_namespace(*arrays)
    dtype = wide_dtype(xp, arrays)
    norms = [xp.linalg.vector_norm(xp.astype(a, dtype)) for a in arrays]
    return xp.linalg.vector_norm(xp.stack(norms))


def _scaled(direction: Sequence[Array], length: Array, rho: float | Array) -> list[Array]:
    """``rho * direction / length``, and zero where the length is zero or not finite.

    The guard is a `where`, not an added epsilon: e must not change when the loss is
    multiplied by a constant, as a loss scaler does. NaN times zero would be NaN.
    """
    xp = array_namespace(length)
    usable = (length > 0) & xp.isfinite(length)
    factor = rho / xp.where(usable, length, xp.ones_like(length))
    return [xp.where(usable, factor * d, xp.zeros_like(d)) for d in direction]


@dataclass(frozen=True)
class SAM:
    """The ball of radius ``rho``: ``e = rho * g / |g|_2``, the norm over all parameters.

    Attributes
    ----------
    rho : float or schedule
        Perturbation radius, in the unit of the parameters.

    Raises
    ------
    TypeError, ValueError
        If ``rho`` is not a non-negative number or a schedule.

    References
    ----------
    Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization"; Lee et al. 2025, equation 4.

    Examples
    --------
    >>> import numpy
    >>> SAM(0.1).perturbation([numpy.zeros(2)], [numpy.asarray([3.0, 4.0])], rho=0.1)
    [array([0.06, 0.08])]
    """

    rho: Schedule | float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", as_schedule("rho", self.rho))

    @property
    def is_zero(self) -> bool:
        """Whether the radius is known to be 0 at every step."""
        return isinstance(self.rho, Constant) and self.rho.value == 0

    def perturbation(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
    ) -> list[Array]:
        """Return ``e`` for every parameter, in float32 or wider.

        A gradient whose norm is zero or not finite gives zero. ``params`` is read by
        adaptive perturbations only.
        """
        xp = array_namespace(*gradients)
        wide = [xp.astype(g, wide_dtype(xp, [g])) for g in gradients]
        return _scaled(wide, norm(wide), rho)


@dataclass(frozen=True)
class ASAM(SAM):
    """An ellipsoid that follows the scale of each weight: ``e = rho * T^2 g / |T g|_2``.

    ``T = |x| + eta`` on weights (arrays of two or more axes) and 1 elsewhere, so that
    ``|T^-1 e|_2 = rho``.

    Attributes
    ----------
    rho : float or schedule
        Perturbation radius in the metric of T, without unit on weights.
    eta : float
        Keeps T positive where a weight is zero.

    Raises
    ------
    TypeError, ValueError
        If ``rho`` is not a non-negative number or a schedule, or ``eta`` is negative.

    References
    ----------
    Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks".

    Examples
    --------
    >>> import numpy
    >>> x, g = numpy.asarray([[0.99]]), numpy.asarray([[2.0]])
    >>> ASAM(0.5).perturbation([x], [g], rho=0.5)
    [array([[0.5]])]
    """

    rho: Schedule | float = 0.5
    eta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.real("eta", self.eta, low=0.0)

    def perturbation(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
    ) -> list[Array]:
        """Return ``e`` for every parameter, in float32 or wider.

        A gradient whose norm is zero or not finite gives zero.
        """
        xp = array_namespace(*gradients)
        scaled, twice = [], []
        for x, g in zip(params, gradients, strict=True):
            wide = xp.astype(g, wide_dtype(xp, [g]))
            t: Any = xp.abs(xp.astype(x, wide.dtype)) + self.eta if x.ndim >= 2 else 1.0
            scaled.append(t * wide)
            twice.append(t * (t * wide))
        return _scaled(twice, norm(scaled), rho)
