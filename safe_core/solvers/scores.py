"""Solvers that rank entries by one score and leave the kept ones unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from ..arguments import refuse
from ..layout import Layout
from ..patterns import Pattern
from ..projection import Projection, apply_support
from .base import LayerSolver
from .problem import Form, read_form, read_pattern, read_squares

__all__ = ["Magnitude", "Wanda"]


@dataclass(frozen=True)
class Magnitude(LayerSolver):
    """Keep the entries of largest magnitude: ``|W_ij|``.

    The baseline, `safe_core.project` with P = 1.

    References
    ----------
    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".

    Examples
    --------
    >>> import numpy
    >>> weight, gram = numpy.asarray([[3.0, 2.0, 1.0]]), numpy.diag([1.0, 1.0, 16.0])
    >>> Magnitude()(weight, gram, 0.5).values
    array([[3., 2., 0.]])
    """

    name, needs = "magnitude", "nothing"

    def __call__(
        self, weight: Array, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Projection:
        """Prune a layer.

        Parameters
        ----------
        weight : array
            ``W``, real floating, shape (output, input) unless ``layout`` says otherwise.
        gram : None, Gram or array
            Not read.
        sparsity : float, str or pattern
            Any pattern; under scope "global" the layer is the pool.
        layout : Layout, optional
            Roles of the axes, each an input or an output.

        Returns
        -------
        Projection
            ``values`` and ``support``, shaped as the weights. Kept entries keep their bits.

        Raises
        ------
        TypeError, ValueError
            As `safe_core.project`, and if an axis is neither an input nor an output.
        """
        form = read_form(weight, layout)
        xp = array_namespace(weight)
        refuse([(weight, ~xp.isfinite(weight))], ["weight must be finite"])
        return _pruned(weight, read_pattern(sparsity, self), form, None)


@dataclass(frozen=True)
class Wanda(LayerSolver):
    """Keep the entries of largest magnitude times norm of the input: ``|W_ij| sqrt(H_jj)``.

    This is `safe_core.project` with ``P = diag(H)``, the best support if inputs are not
    correlated.

    References
    ----------
    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models",
    eq. 1. It compares within each output: ``Unstructured(sparsity, scope="row")``.

    Examples
    --------
    >>> import numpy
    >>> weight, gram = numpy.asarray([[3.0, 2.0, 1.0]]), numpy.diag([1.0, 1.0, 16.0])
    >>> Wanda()(weight, gram, 0.5).values
    array([[3., 0., 1.]])
    """

    name, needs, default_scope = "wanda", "squares", "row"

    def __call__(
        self, weight: Array, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Projection:
        """Prune a layer.

        Parameters
        ----------
        weight : array
            ``W``, real floating, shape (output, input) unless ``layout`` says otherwise.
        gram : Gram or array
            ``H``, shape (inputs, inputs), or its diagonal alone, shape (inputs,).
        sparsity : float, str or pattern
            Any pattern; under scope "global" the layer is the pool.
        layout : Layout, optional
            Roles of the axes, each an input or an output.

        Returns
        -------
        Projection
            ``values`` and ``support``, shaped as the weights. Kept entries keep their bits.

        Raises
        ------
        TypeError, ValueError
            As `Magnitude`, or if ``gram`` does not belong to the layer's inputs: its shape
            differs, it is not finite, not symmetric, zero, or has a negative diagonal entry.
        """
        squares, form = read_squares(weight, gram, layout)
        return _pruned(weight, read_pattern(sparsity, self), form, squares)


def _pruned(weight: Array, pattern: Pattern, form: Form, importance: Array | None) -> Projection:
    weight = backend_of(weight).detached(weight)
    support = form.select(weight, pattern, importance)
    return Projection(apply_support([weight], [support])[0], support)
