"""The reconstruction error of a pruned layer."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array

from .._dtypes import wide_dtype, widened
from ..layout import Layout
from .problem import read_matrices, rescaled, unit_scaled

__all__ = ["reconstruction_error"]


def reconstruction_error(
    weight: Array, values: Array, gram: Any, *, layout: Layout | None = None
) -> Array:
    """Return the squared change of a layer's outputs, ``|X W^T - X V^T|_F^2``.

    It is computed as ``tr((W - V) H (W - V)^T)``.

    Parameters
    ----------
    weight, values : array
        The layer ``W`` before and ``V`` after pruning, of one shape.
    gram : Gram or array
        ``H = X^T X``, shape (inputs, inputs).
    layout : Layout, optional
        Roles of the axes; (output, input) by default.

    Returns
    -------
    array
        A scalar, float32 or wider. Divide it by the error of ``values = 0`` for the relative
        error.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or values do not match, as for the solvers.

    Examples
    --------
    >>> import numpy
    >>> weight, inputs = numpy.asarray([[1.0, 2.0]]), numpy.asarray([[1.0, 1.0], [1.0, -1.0]])
    >>> float(reconstruction_error(weight, numpy.asarray([[1.0, 0.0]]), inputs.T @ inputs))
    8.0
    """
    after, h, _ = read_matrices(values, gram, layout, name="values")
    before, h, _ = read_matrices(weight, gram, layout)
    if before.shape != after.shape:
        raise ValueError(
            f"values must have the shape of weight {tuple(weight.shape)}, got {tuple(values.shape)}"
        )
    xp = array_namespace(before, after)
    dtype = wide_dtype(xp, [before, after, h])
    before, after, h = (widened(xp, x, dtype) for x in (before, after, h))
    # After scaling no term overflows, so the result is infinite only if it is too large itself.
    change, of_change = unit_scaled(xp, before - after)
    h, of_h = unit_scaled(xp, h)
    return rescaled(xp, xp.sum((change @ h) * change), 2 * of_change + of_h)
