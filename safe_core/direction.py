"""Directions of perturbations, and the norm that scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from ._dtypes import scalar_like, wide_dtype

__all__ = ["Direction", "norm"]


def norm(arrays: Sequence[Array]) -> Array:
    """Return the Euclidean norm over all entries of all arrays.

    ``sqrt(sum_i |a_i|^2)``, accumulated in float32 or wider. Squares are not scaled, because
    that would take a second pass over all gradients at every step. So in float32 a norm
    below about 1e-19 counts as zero and one above 1e19 as infinite.

    Parameters
    ----------
    arrays : sequence of arrays
        One or more real floating arrays, of any shapes.

    Returns
    -------
    array
        A scalar in float64 if any array is float64, else in float32.

    Examples
    --------
    >>> import numpy
    >>> float(norm([numpy.asarray([3.0]), numpy.asarray([[4.0]])]))
    5.0
    """
    xp = array_namespace(*arrays)
    norms = backend_of(arrays[0]).norms(arrays, dtype=wide_dtype(xp, arrays))
    return xp.linalg.vector_norm(norms)


class Direction(NamedTuple):
    """Perturbation ``e = rho * unit / length * vectors`` that is not multiplied out yet.

    An adapter that updates in place adds ``factor * vectors`` to x without allocating e.

    Attributes
    ----------
    vectors : list of arrays
        Direction of e, shaped as the parameters.
    length : array
        Scalar norm that the radius is divided by.
    rho : float or scalar array
        Perturbation radius.
    unit : float or scalar array
        Length that the radius counts, 1 unless it is in steps.

    Examples
    --------
    >>> import numpy
    >>> float(Direction([numpy.asarray([3.0])], numpy.asarray(3.0), 0.5).factor) * 3
    0.5
    """

    vectors: Sequence[Array]
    length: Array
    rho: float | Array
    unit: float | Array = 1.0

    @property
    def usable(self) -> Array:
        """Whether unit and length are positive and the length is finite; e is zero otherwise."""
        finite = array_namespace(self.length).isfinite(self.length)
        return (self.length > 0) & finite & (self.unit > 0)

    @property
    def factor(self) -> Array:
        """The quotient ``rho * unit / length``, or 0 if the length is not usable.

        The guard is a `where` and not an added epsilon. With an epsilon, e would change when
        the loss is multiplied by a constant, as a loss scaler does.
        """
        xp, usable = array_namespace(self.length), self.usable
        return xp.where(usable, self._quotient(usable), xp.zeros_like(self.length))

    def _quotient(self, usable: Array) -> Array:
        xp = array_namespace(self.length)
        # Replace bad values before dividing, so that no warning or trap is raised.
        one = xp.ones_like(self.length)
        length = xp.where(usable, self.length, one)
        unit = xp.where(usable, scalar_like(self.unit, one), one)
        return scalar_like(self.rho, length) * unit / length

    def in_steps(self, motion: Array, full_step: float = 0.0) -> Direction:
        """Return the direction with a radius of rho steps of the base optimizer.

        ``motion`` is described in `safe_core.motion`. e is zero as long as no step was measured.
        `SAM` describes ``full_step``.
        """
        xp = array_namespace(self.length)
        of_step, of_x, shrinkage = (xp.astype(motion[i], self.length.dtype) for i in range(3))
        step, size = xp.sqrt(of_step), xp.sqrt(of_x)
        zero, one = xp.zeros_like(step), xp.ones_like(step)
        known = (step > 0) & xp.isfinite(step) & xp.isfinite(size)
        radius = xp.where(known, step, zero)
        if full_step:
            # Parameters that are all zero have no length to compare with.
            compared = known & (size > 0)
            full = full_step * xp.where(compared, size, one)
            share = xp.where(compared, xp.minimum(radius / full, one), one)
            radius = radius * share**2
        return self._replace(unit=radius * xp.exp(-shrinkage))

    def perturbation(self) -> list[Array]:
        """Return ``e``, which is zero if the length is not usable."""
        # A factor of 0 is not enough: 0 times NaN is NaN.
        xp = array_namespace(self.length)
        usable = self.usable
        quotient = self._quotient(usable)

        def multiplied(d: Array) -> Array:
            return xp.where(usable, quotient * d, xp.zeros_like(d))

        if not self.vectors:
            return []
        backend = backend_of(self.vectors[0])
        return backend.blockwise(multiplied, backend.widened(self.vectors))
