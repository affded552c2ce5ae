"""The solvers of blocks by name, from Python and on the command line."""

from __future__ import annotations

from typing import Any, Literal

from safe_core.reconstruction import Reconstruction
from safe_core.solvers import FunctionSolver, LayerSolver, named_solvers

from .reconstruction import SafeReconstruction

__all__ = ["SOLVERS", "as_solver", "default_scope"]

SOLVERS: dict[str, Any] = {
    "safe+": SafeReconstruction(importance="wanda"),
    "safe": SafeReconstruction(),
    **named_solvers(),
}


def as_solver(solver: Any) -> Any:
    """Return a solver from its name, a recipe, a function, or a solver.

    Raises
    ------
    TypeError, ValueError
        If there is no solver of this name, or the argument is a class or cannot be called.

    Examples
    --------
    >>> as_solver("alps").iterations, as_solver(Reconstruction(epochs=3)).epochs
    (300, 3)
    >>> from safe_core.solvers import Wanda
    >>> as_solver(Wanda)
    Traceback (most recent call last):
    TypeError: solver must be an instance, Wanda(), got the class Wanda
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(
                f"solver must be one of {', '.join(map(repr, SOLVERS))} if a name, got {solver!r}"
            )
        return SOLVERS[solver]
    if isinstance(solver, type):
        name = solver.__name__
        raise TypeError(f"solver must be an instance, {name}(), got the class {name}")
    if type(solver) is Reconstruction:
        return SafeReconstruction(**vars(solver))
    if isinstance(solver, (SafeReconstruction, LayerSolver)):
        return solver
    if not callable(solver):
        raise TypeError(
            "solver must be a SafeReconstruction, a function of a weight and its Gram matrix such "
            f"as ALPS(), or one of {', '.join(map(repr, SOLVERS))}, got {solver!r}"
        )
    return FunctionSolver(solver)


def default_scope(solver: Any) -> Literal["tensor", "row"]:
    """Return where entries compete under a number: for a name, as the solver was published.

    Examples
    --------
    >>> from safe_core.solvers import Wanda
    >>> default_scope("wanda"), default_scope(Wanda())
    ('row', 'tensor')
    """
    named = SOLVERS.get(solver) if isinstance(solver, str) else None
    return "tensor" if named is None else named.default_scope
