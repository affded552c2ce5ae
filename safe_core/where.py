"""Read the argument ``where`` of the adapters, which selects the sparse parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from ._calls import level_of_caller
from .finalization import listed
from .layout import Layout

__all__ = ["as_names", "refuse_unknown", "warn_of_vectors"]


def as_names(where: Any) -> tuple[str, ...] | None:
    """Return the names that ``where`` lists, or None if it selects in another way.

    Examples
    --------
    >>> as_names(["0.weight", "2.weight"]), as_names([True, False]), as_names([])
    (('0.weight', '2.weight'), None, None)
    """
    if not isinstance(where, (list, tuple, set, frozenset)) or not where:
        return None
    return tuple(where) if all(isinstance(name, str) for name in where) else None


def refuse_unknown(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError if ``where`` lists a name that no parameter has.

    Examples
    --------
    >>> refuse_unknown(["1.weight"], ["0.weight", "0.bias"])
    Traceback (most recent call last):
    ValueError: where must list names of parameters, such as 0.weight, 0.bias, got '1.weight'
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"where must list names of parameters, such as {listed(known)}, got {unknown[0]!r}"
        )


def warn_of_vectors(selected: Iterable[tuple[str, Any, Layout | None]], example: str) -> None:
    """Warn if a function selects biases or norms beside weights, which it seldom means to.

    A given layout is the choice of a single parameter, so it does not warn. Nor does a function
    that selects nothing but parameters of one axis.

    Parameters
    ----------
    selected : iterable of (str, array, Layout or None)
        Name, array and layout of each parameter that it selects.
    example : str
        A function that leaves them out.
    """
    selected = list(selected)
    vectors = [name for name, x, layout in selected if x.ndim < 2 and layout is None]
    if not vectors or all(x.ndim < 2 for _, x, _ in selected):
        return
    warnings.warn(
        f"where= makes parameters of fewer than two axes sparse, as a bias is: {listed(vectors)}. "
        f"To leave them out, pass {example}; to make them sparse without this warning, pass a "
        "list of names as where=",
        stacklevel=level_of_caller(),
    )
