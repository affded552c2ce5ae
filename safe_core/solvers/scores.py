"""Solvers that choose a support by one score for each entry, and leave what they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from ..arguments import refuse
from ..layout import Layout
from ..patterns import Pattern
from ..projection import Projection, apply_support
from .base import LayerSolver
from .problem import Form, read_form, read_matrices, read_pattern

__all__ = ["Magnitude", "Wanda"]


@dataclass(frozen=True)
class Magnitude(LayerSolver):
    """Keep the entries of largest magnitude: ``|W_ij|``.

    The baseline: `safe_core.project` with P = 1.

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

    name: ClassVar[str] = "magnitude"

    def __call__(
        self, weight: Array, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Projection:
        """Prune a layer.

        Parameters
        ----------
        weight : array
            ``W``, real floating, shape (output, input) unless ``layout`` tells otherwise.
        gram : Gram or array
            Not read.
        sparsity : float, str or pattern
            Any pattern; in the scope "global" the layer is the pool.
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
    """Keep the entries of largest magnitude times norm of input: ``|W_ij| sqrt(H_jj)``.

    `safe_core.project` with ``P = diag(H)``: the best support if no two inputs were
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

    name: ClassVar[str] = "wanda"
    default_scope: ClassVar[Literal["tensor", "row"]] = "row"  # as published

    def __call__(
        self, weight: Array, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Projection:
        """Prune a layer.

        Parameters
        ----------
        weight : array
            ``W``, real floating, shape (output, input) unless ``layout`` tells otherwise.
        gram : Gram or array
            ``H``, shape (inputs, inputs), of which the diagonal is used.
        sparsity : float, str or pattern
            Any pattern; in the scope "global" the layer is the pool.
        layout : Layout, optional
            Roles of the axes, each an input or an output.

        Returns
        -------
        Projection
            ``values`` and ``support``, shaped as the weights. Kept entries keep their bits.

        Raises
        ------
        TypeError, ValueError
            As `Magnitude`, or if ``gram`` is not a Gram matrix of the layer's inputs: of
            another shape, not finite, not symmetric, zero or with a negative diagonal.
        """
        _, h, form = read_matrices(weight, gram, layout)
        return _pruned(
            weight, read_pattern(sparsity, self), form, array_namespace(h).linalg.diagonal(h)
        )


def _pruned(weight: Array, pattern: Pattern, form: Form, importance: Array | None) -> Projection:
    weight = backend_of(weight).detached(weight)
    support = form.select(weight, pattern, importance)
    return Projection(apply_support([weight], [support])[0], support)
