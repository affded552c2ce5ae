"""Solvers by name: those that `safe_core.solvers` exports."""

from __future__ import annotations

from typing import Any

from .base import FunctionSolver, Solver

__all__ = ["as_solver", "named_solver", "named_solvers"]


def named_solvers(kind: type[Solver] = Solver) -> dict[str, Solver]:
    """Return every exported solver of a kind with its default settings, by name.

    Parameters
    ----------
    kind : subclass of Solver
        The base class of the solvers to return, such as `LayerSolver`.

    Examples
    --------
    >>> from safe_core.solvers import LayerSolver
    >>> list(named_solvers(LayerSolver))
    ['alps', 'magnitude', 'sparsegpt', 'wanda']
    >>> list(named_solvers())  # doctest: +NORMALIZE_WHITESPACE
    ['alps', 'magnitude', 'safe', 'safe+', 'safe+-published', 'safe-published', 'sparsegpt',
     'wanda']
    """
    from safe_core import solvers  # which imports this module

    exported = [getattr(solvers, name) for name in solvers.__all__]
    kinds = [x for x in exported if isinstance(x, type) and issubclass(x, kind)]
    found = {solver.name: solver for kind in kinds for solver in kind.named()}
    return dict(sorted(found.items()))


def named_solver(name: str) -> Solver:
    """Return the exported solver of a name, with its default settings.

    Raises
    ------
    ValueError
        If no solver has this name.

    Examples
    --------
    >>> named_solver("alps").iterations
    300
    """
    known = named_solvers()
    if name not in known:
        raise ValueError(
            f"solver must be one of {', '.join(map(repr, known))} if a name, got {name!r}"
        )
    return known[name]


def as_solver(solver: Any) -> Solver:
    """Return the solver that an argument stands for.

    Parameters
    ----------
    solver : str, Solver, subclass of it, or callable
        The name of an exported solver, a solver, a class that can be made without arguments, or
        a function ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``.

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
    return FunctionSolver(solver)


def _made(kind: type) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise TypeError(
            f"solver must be an instance of {kind.__name__}, which cannot be made without "
            f"arguments, got the class: {error}"
        ) from None
