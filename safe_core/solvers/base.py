"""What every solver says of itself, and the registry of those that have a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

from safe_core.backends import Array

from ..layout import Layout

__all__ = [
    "LayerSolver",
    "Needs",
    "Solver",
    "as_solver",
    "named_solver",
    "register",
    "solver_names",
]

Needs = Literal["nothing", "squares", "gram"]
"""Statistics of a layer's inputs: none, each input's sum of squares, or the Gram matrix."""

_REGISTRY: dict[str, Any] = {}


class Solver:
    """What `prune_blocks` and the command line know of a solver, whatever it prunes.

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

    @property
    def origin(self) -> Any:
        """The solver as it was given: itself, or the function that it wraps."""
        return self

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

    Subclass it as a frozen dataclass in one file and export it: `register` makes its ``name``
    known to `prune_blocks` in PyTorch and in JAX and to ``safe-core prune --method``.

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


class _Function(LayerSolver):
    """A plain function of a weight and its Gram matrix as a solver."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    @property
    def origin(self) -> Any:
        """The function."""
        return self.function

    def __call__(
        self, weight: Array, statistics: Any, sparsity: Any, /, *, layout: Layout | None = None
    ) -> Any:
        return self.function(weight, statistics, sparsity, layout=layout)


S = TypeVar("S")


def register(solver: S) -> S:
    """Make a solver known by its name, and return it; usable as a decorator.

    Parameters
    ----------
    solver : Solver, or subclass that can be made without arguments

    Raises
    ------
    ValueError
        If it has no name, or another solver has the same one.

    Examples
    --------
    >>> from safe_core.solvers import ALPS
    >>> register(ALPS) is ALPS
    True
    """
    name = getattr(solver, "name", "")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a string that is not empty, got {name!r} of {solver!r}")
    known = _REGISTRY.setdefault(name, solver)
    if _path(known) != _path(solver):
        raise ValueError(
            f"name must be that of one solver, got {name!r} of {solver!r} and {known!r}"
        )
    _REGISTRY[name] = solver
    return solver


def _path(solver: Any) -> tuple[str, str]:
    kind = solver if isinstance(solver, type) else type(solver)
    return kind.__module__, kind.__qualname__


def solver_names() -> tuple[str, ...]:
    """Return the names of all registered solvers, sorted.

    Examples
    --------
    >>> "alps" in solver_names()
    True
    """
    return tuple(sorted(_REGISTRY))


def named_solver(name: str) -> Solver:
    """Return the registered solver of a name, with its default settings.

    Raises
    ------
    ValueError
        If no solver has this name.

    Examples
    --------
    >>> named_solver("alps").iterations
    300
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"solver must be one of {', '.join(map(repr, solver_names()))} if a name, got {name!r}"
        )
    return as_solver(_REGISTRY[name])


def as_solver(solver: Any) -> Solver:
    """Return the solver that an argument stands for.

    Parameters
    ----------
    solver : str, Solver, subclass of it, or callable
        A registered name, a solver, a class that can be made without arguments, or a function
        ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``.

    Raises
    ------
    TypeError, ValueError
        If no solver has this name, or the argument is of another kind.

    Examples
    --------
    >>> from safe_core.solvers import ALPS
    >>> as_solver("alps") == as_solver(ALPS) == as_solver(ALPS()) == ALPS()
    True
    >>> as_solver(lambda weight, gram, sparsity, *, layout: None).needs
    'gram'
    """
    if isinstance(solver, str):
        return named_solver(solver)
    if isinstance(solver, type):
        solver = _made(solver)
    if isinstance(solver, Solver):
        return solver
    if not callable(solver):
        raise TypeError(
            "solver must be a name, a solver such as ALPS(), or a function of a weight and its "
            f"Gram matrix, got {solver!r}"
        )
    return _Function(solver)


def _made(kind: type) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise TypeError(
            f"solver must be an instance of {kind.__name__}, which cannot be made without "
            f"arguments, got the class: {error}"
        ) from None
