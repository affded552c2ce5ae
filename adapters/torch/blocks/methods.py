"""The methods of pruning by name, from Python and on the command line."""

from __future__ import annotations

from typing import Any, Literal

from safe_core.reconstruction import Reconstruction
from safe_core.solvers import ALPS, Magnitude, SparseGPT, Wanda

from .reconstruction import SafeReconstruction

__all__ = ["METHODS", "as_solver", "default_scope"]

METHODS: dict[str, Any] = {
    "safe+": SafeReconstruction(importance="wanda"),
    "safe": SafeReconstruction(),
    "alps": ALPS(),
    "sparsegpt": SparseGPT(),
    "wanda": Wanda(),
    "magnitude": Magnitude(),
}


def as_solver(solver: Any) -> Any:
    """Return the solver that an argument stands for: itself, or that of a name or of a recipe.

    Raises
    ------
    TypeError, ValueError
        If it is a name of none, a class, or cannot be called.

    Examples
    --------
    >>> as_solver("alps").iterations, as_solver(Reconstruction(epochs=3)).epochs
    (300, 3)
    >>> as_solver(Wanda)
    Traceback (most recent call last):
    TypeError: solver must be an instance, Wanda(), got the class Wanda
    """
    if isinstance(solver, str):
        if solver not in METHODS:
            raise ValueError(
                f"solver must be one of {', '.join(map(repr, METHODS))} if a name, got {solver!r}"
            )
        return METHODS[solver]
    if isinstance(solver, type):
        name = solver.__name__
        raise TypeError(f"solver must be an instance, {name}(), got the class {name}")
    if type(solver) is Reconstruction:
        return SafeReconstruction(**vars(solver))
    if not callable(solver) and not isinstance(solver, SafeReconstruction):
        raise TypeError(
            "solver must be a SafeReconstruction, a function of a weight and its Gram matrix such "
            f"as ALPS(), or one of {', '.join(map(repr, METHODS))}, got {solver!r}"
        )
    return solver


def default_scope(solver: Any) -> Literal["tensor", "row"]:
    """Where entries compete under a number: in each output for "wanda", as it was published.

    Examples
    --------
    >>> default_scope("wanda"), default_scope(Wanda())
    ('row', 'tensor')
    """
    return "row" if isinstance(solver, str) and solver == "wanda" else "tensor"
