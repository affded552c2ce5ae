"""Perturbations: the step from x to the worst nearby point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import wide_dtype
from .schedules import Constant, Schedule, as_schedule

__all__ = ["ASAM", "SAM", "Direction", "norm"]


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
    norms = backend_of(arrays[0]).norms(arrays, wide_dtype(xp, arrays))
    return xp.linalg.vector_norm(norms)


class Direction(NamedTuple):
    """A perturbation, ``e = factor * vectors``, before it is written out.

    Attributes
    ----------
    vectors : list of arrays
        Shaped as the parameters.
    length : array
        A scalar: the norm that the radius is divided by.
    rho : float or scalar array
        Perturbation radius.

    Examples
    --------
    >>> import numpy
    >>> float(Direction([numpy.asarray([3.0])], numpy.asarray(3.0), 0.5).factor) * 3
    0.5
    """

    vectors: Sequence[Array]
    length: Array
    rho: float | Array

    @property
    def usable(self) -> Array:
        """Whether the length is positive and finite; e is zero otherwise."""
        return (self.length > 0) & array_namespace(self.length).isfinite(self.length)

    @property
    def factor(self) -> Array:
        """``rho / length``, and 0 where that is not usable.

        The guard is a `where`, not an added epsilon: e must not change when the loss is
        multiplied by a constant, as a loss scaler does.
        """
        xp = array_namespace(self.length)
        return xp.where(self.usable, self._quotient, xp.zeros_like(self.length))

    @property
    def _quotient(self) -> Array:
        xp = array_namespace(self.length)
        return self.rho / xp.where(self.usable, self.length, xp.ones_like(self.length))

    def perturbation(self) -> list[Array]:
        """Return ``e``. NaN times zero would be NaN, so the guard is a `where` here too."""
        xp = array_namespace(self.length)
        usable, quotient = self.usable, self._quotient
        wide = [xp.astype(d, wide_dtype(xp, [d])) for d in self.vectors]
        return [xp.where(usable, quotient * d, xp.zeros_like(d)) for d in wide]


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
        return self.direction(params, gradients, rho=rho).perturbation()

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
    ) -> Direction:
        """Return `perturbation` before it is written out."""
        return Direction(gradients, norm(gradients), rho)


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

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
    ) -> Direction:
        """Return `perturbation` before it is written out."""
        xp = array_namespace(*gradients)
        scaled, twice = [], []
        for x, g in zip(params, gradients, strict=True):
            wide = xp.astype(g, wide_dtype(xp, [g]))
            t: Any = xp.abs(xp.astype(x, wide.dtype)) + self.eta if x.ndim >= 2 else 1.0
            scaled.append(t * wide)
            twice.append(t * (t * wide))
        return Direction(twice, norm(scaled), rho)
