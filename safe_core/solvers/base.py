"""What every layer-wise solver says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from safe_core.layout import Layout
from safe_core.projection import Projection

__all__ = ["FunctionSolver", "LayerSolver"]


@dataclass(frozen=True)
class LayerSolver:
    """Base class of solvers that prune one linear layer at a time.

    A subclass overrides `__call__`. Block-wise pruning in both frameworks, the command line
    and reports need to know nothing more of it.
    """

    name: ClassVar[str] = ""
    """What the solver is called on the command line."""

    default_scope: ClassVar[Literal["tensor", "row"]] = "tensor"
    """Where entries compete under a number, if the solver is asked for by its name."""

    needs: ClassVar[Literal["roles", "diagonal", "gram"]] = "gram"
    """What must be known of a layer: roles of axes, mean squares of inputs, or their products."""

    trains: ClassVar[bool] = False
    """Whether the solver trains a whole block, and not one layer at a time."""

    matrices: ClassVar[int] = 3
    """Matrices of (inputs, inputs) that exist at the same time, for predictions of memory."""

    def __call__(
        self, weight: Any, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Projection:
        """Return sparse weights that keep the outputs of a layer, and their support.

        Parameters
        ----------
        weight : array
            (output, input, ...) unless ``layout`` says otherwise.
        gram : Gram or array
            ``X^T X`` of the inputs X, of shape (inputs, inputs).
        sparsity : float, str or pattern
        layout : Layout, optional
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionSolver(LayerSolver):
    """A function ``fn(weight, gram, sparsity, *, layout)`` as a solver.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import project
    >>> solver = FunctionSolver(lambda weight, gram, sparsity, *, layout: project(weight, sparsity))
    >>> solver(numpy.asarray([[3.0, 1.0]]), numpy.eye(2), 0.5).values
    array([[3., 0.]])
    """

    fn: Callable[..., Any]

    def __call__(
        self, weight: Any, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Any:
        """Return what the function returns."""
        return self.fn(weight, gram, sparsity, layout=layout)
