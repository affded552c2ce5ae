"""Reuse a part of the perturbed gradient at later steps (LookSAM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from .direction import Direction, norm

__all__ = ["flat_direction", "reused"]


def flat_direction(first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
    """Return the unit direction in which the perturbed gradient differs from the gradient.

    The result is ``h / |h|`` with ``h = g_s - (g_s . g_0) / |g_0|^2 * g_0``, the component of
    ``g_s = grad f(x + e)`` orthogonal to ``g_0 = grad f(x)``. Products and norms run over all
    arrays together. The result is zero if a norm is zero or not finite, or if the gradients
    differ in direction by no more than rounding.

    Parameters
    ----------
    first, second : sequences of arrays
        Gradients ``g_0`` and ``g_s``, of the same shapes.

    Returns
    -------
    list of arrays
        Unit direction, in float32 or wider.

    References
    ----------
    Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR
    (LookSAM), Algorithm 1, where h is ``g_v``.

    Examples
    --------
    >>> import numpy
    >>> (h,) = flat_direction([numpy.asarray([2.0, 0.0])], [numpy.asarray([3.0, 4.0])])
    >>> h.round(6)
    array([0., 1.])
    """
    lines = [Direction(arrays, norm(arrays), 1.0) for arrays in (first, second)]
    a, b = (line.perturbation() for line in lines)
    # The two gradients are nearly parallel, so subtracting the projection would cancel. For
    # unit vectors a . b = 1 - |b - a|^2 / 2, hence h = (b - a) + |b - a|^2 / 2 * a, which
    # only subtracts neighbouring numbers.
    blockwise = backend_of(a[0]).blockwise
    between = blockwise(lambda b_i, a_i: b_i - a_i, b, a)
    gap = norm(between)
    xp = array_namespace(gap)
    h = blockwise(lambda d, a_i: d + _as(gap * gap / 2, d.dtype) * a_i, between, a)
    # Rounding moves each entry by at most half a spacing in either gradient, and the
    # arithmetic adds a little. A gap of that size is noise, which h / |h| would blow up.
    spacing = max(float(xp.finfo(g.dtype).eps) for g in (*first, *second))
    rounding = max(spacing, 4 * float(xp.finfo(gap.dtype).eps))
    differ = lines[0].usable & lines[1].usable & (gap > rounding)
    return Direction(h, xp.where(differ, norm(h), xp.zeros_like(gap)), 1.0).perturbation()


def reused(gradients: Sequence[Array], flat: Sequence[Array], weight: float) -> list[Array]:
    """Return ``g_0 + weight * |g_0| * h / |h|``, the gradient of a step that does not perturb.

    The norm runs over all arrays together. If it is not finite, g_0 is returned unchanged.

    Parameters
    ----------
    gradients : sequence of arrays
        Gradients ``g_0`` at x.
    flat : sequence of arrays
        Direction ``h / |h|`` of the last step that perturbed, from `flat_direction`.
    weight : float
        Weight of the direction, alpha in the paper.

    Returns
    -------
    list of arrays
        Gradients in the dtypes of ``gradients``.

    References
    ----------
    Liu et al. 2022, Algorithm 1.

    Examples
    --------
    >>> import numpy
    >>> reused([numpy.asarray([3.0, 4.0])], [numpy.asarray([0.0, 1.0])], 0.5)
    [array([3. , 6.5])]
    """
    length = norm(gradients)
    xp = array_namespace(length)
    scale = xp.where(xp.isfinite(length), weight * length, xp.zeros_like(length))

    def added(g: Array, h: Array) -> Array:
        return _as(_as(g, h.dtype) + _as(scale, h.dtype) * h, g.dtype)

    return backend_of(gradients[0]).blockwise(added, gradients, flat)


def _as(x: Array, dtype: Any) -> Array:
    return array_namespace(x).astype(x, dtype, copy=False)
