"""Define the base classes of solvers: name, needed statistics, memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from safe_core.backends import Array

from ..layout import Layout
from ..patterns import Pattern

__all__ = ["FunctionSolver", "LayerSolver", "Needs", "Solver"]

Needs = Literal["nothing", "squares", "gram"]
"""Statistics of a layer's inputs: none, each input's sum of squares, or the Gram matrix."""


class Solver:
    """Base class of solvers, with all that `prune_blocks` and the command line need to know.

    A solver is a `LayerSolver`, which prunes one layer at a time, or prunes a whole block, as
    `safe_core.reconstruction.Reconstruction` does.

    Attributes
    ----------
    name : str
        What the solver is called on the command line and in reports.
    needs : {"nothing", "squares", "gram"}
        Which statistics of the inputs of each layer the solver needs.
    default_scope : {"tensor", "row"}
        Where entries compete under a plain number, if the solver is asked for by its name.

    Examples
    --------
    >>> from safe_core.solvers import Wanda
    >>> Wanda.name, Wanda.needs, Wanda.default_scope
    ('wanda', 'squares', 'row')
    """

    name: str = ""
    needs: Needs = "gram"
    default_scope: Literal["tensor", "row"] = "tensor"

    @classmethod
    def named(cls) -> tuple[Solver, ...]:
        """Return the solvers of this class that have a name, with their default settings."""
        return (cls(),) if cls.name else ()

    @property
    def origin(self) -> Any:
        """The solver as it was given: itself, or the function that it wraps."""
        return self

    def describe(self, pattern: Pattern, steps: int | None = None) -> list[tuple[str, str]]:
        """Return names and values of the settings under a pattern, for reports.

        ``steps`` is the number of training steps in a block, from which a solver that trains
        derives settings; they are named as derived if it is None.
        """
        origin = self.origin
        title = getattr(origin, "__name__", type(origin).__name__)
        named = fields(origin) if is_dataclass(origin) else ()
        rows = [(f.name.replace("_", " "), str(getattr(origin, f.name))) for f in named]
        return [("solver", title), *rows]

    def configured(self, *, batch_size: int, **training: Any) -> Solver:
        """Return this solver with other settings of its training.

        Parameters
        ----------
        batch_size : int
            Samples in a training step; ignored by a solver that does not train.
        **training
            Settings by name, such as ``epochs``; those that are None keep their defaults.

        Raises
        ------
        ValueError
            If a setting is given and the solver does not train.
        """
        for name, value in training.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be left out for {self.name}, which does not train, got {value!r}"
                )
        return self


class LayerSolver(Solver, ABC):
    """A solver that prunes one layer at a time, from its weights and statistics of its inputs.

    Subclass it as a frozen dataclass. Exported by `safe_core.solvers`, it is known by its
    ``name`` to `prune_blocks` in PyTorch and in JAX and to ``safe-core prune --method``.

    Examples
    --------
    >>> import numpy, safe_core
    >>> class Smallest(LayerSolver):
    ...     name, needs = "smallest", "nothing"
    ...     def __call__(self, weight, statistics, sparsity, /, *, layout=None):
    ...         return safe_core.project(-1 / weight, sparsity, layout=layout)
    >>> Smallest()(numpy.asarray([[1.0, 2.0]]), None, 0.5).support
    array([[ True, False]])
    """

    @abstractmethod
    def __call__(
        self, weight: Array, statistics: Any, sparsity: Any, /, *, layout: Layout | None = None
    ) -> Any:
        """Return the values and the support of a pruned layer.

        Parameters
        ----------
        weight : array
            Real floating, shape (output, input) unless ``layout`` says otherwise.
        statistics : None or array
            What ``needs`` says: None, the sum of squares of each input, shape (inputs,), or the
            Gram matrix ``X^T X``, shape (inputs, inputs). Scaling it must not matter.
        sparsity : float, str or pattern
        layout : Layout, optional
            Roles of the axes.

        Returns
        -------
        (values, support)
            Shaped as the weights; values are zero where the boolean support is False.
        """

    def memory(self, outputs: int, inputs: int, itemsize: int = 4) -> int:
        """Return the bytes that one layer needs, beside its weights and its statistics.

        The default allows for five arrays of the weights' shape and one support and, for a
        solver that needs the Gram matrix, three of its size.
        """
        matrices = 3 if self.needs == "gram" else 0
        return self._bytes(matrices, outputs, inputs, itemsize)

    @staticmethod
    def _bytes(matrices: int, outputs: int, inputs: int, itemsize: int) -> int:
        entries = outputs * inputs
        return itemsize * (matrices * inputs**2 + 5 * entries) + entries


@dataclass(frozen=True)
class FunctionSolver(LayerSolver):
    """A function ``fn(weight, gram, sparsity, *, layout)`` as a layer-wise solver.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import project
    >>> solver = FunctionSolver(lambda weight, gram, sparsity, *, layout: project(weight, sparsity))
    >>> solver(numpy.asarray([[3.0, 1.0]]), numpy.eye(2), 0.5).values
    array([[3., 0.]])
    """

    fn: Callable[..., Any]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the function, or of its class."""
        return str(getattr(self.fn, "__name__", type(self.fn).__name__))

    @property
    def origin(self) -> Any:
        """The function."""
        return self.fn

    @classmethod
    def named(cls) -> tuple[Solver, ...]:
        """Return no solver: the name is that of the function."""
        return ()

    def __call__(
        self, weight: Array, statistics: Any, sparsity: Any, /, *, layout: Layout | None = None
    ) -> Any:
        """Return what the function returns."""
        return self.fn(weight, statistics, sparsity, layout=layout)
