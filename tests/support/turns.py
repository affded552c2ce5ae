"""Mark as long the cases of a table that repeat others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def in_turns(*axes: Iterable[Any]) -> list[Any]:
    """Return the product of some axes for `pytest.mark.parametrize`; every second cell is long.

    The cells alternate as on a checkerboard. With two axes or more, each value still runs. With one
    axis, every second value is long.
    """
    cells = itertools.product(*map(enumerate, axes))
    return [
        pytest.param(*values, marks=pytest.mark.long if sum(places) % 2 else ())
        for places, values in (zip(*cell, strict=True) for cell in cells)
    ]


# JAX runs nearly the same code eagerly and compiled, and compiling takes most of the time.
TURNS = {"jax": 0, "jax-jit": 1}


def waits(item: Any) -> bool:
    """Return whether a case is left to the long tests.

    With the marker ``every_second``, every second case is left to them, as in `in_turns`.

    In a test on every backend, each case that remains runs with JAX either eagerly or compiled, in
    turns, and the same case with the other is left. Without the marker, and with two parameters or
    more, each value of each runs with both. Tests with the marker ``every_backend`` take no turns,
    nor do those without parameters.

    Raises
    ------
    ValueError
        If a table can be read only once, or if a test with ``every_second`` has no table.
    """
    given = item.callspec.params if hasattr(item, "callspec") else {}
    turn = TURNS.get(given["xp"].value) if "xp" in given else None
    marks = list(item.iter_markers("parametrize"))
    by_turns = bool(marks) and turn is not None and not any("xp" in _names(m) for m in marks)
    by_turns = by_turns and not item.get_closest_marker("every_backend")
    every_second = item.get_closest_marker("every_second")
    if every_second and not marks:
        raise ValueError(f"every_second needs a table of cases, which {item.name} has not")
    if not (every_second or by_turns):
        return False
    place = sum(_place(mark, given) for mark in marks)
    if every_second:
        if place % 2:
            return True
        place //= 2  # among the cases that remain
    return by_turns and place % 2 != turn


def _names(mark: pytest.Mark) -> list[str]:
    """Return the names that a mark gives parameters to."""
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _place(mark: pytest.Mark, given: dict[str, Any]) -> int:
    """Return the place of the given parameters in the table of a mark."""
    names = _names(mark)
    for place, case in enumerate(mark.args[1]):
        values = getattr(case, "values", None)  # of `pytest.param`; a mapping has a method
        if not isinstance(values, tuple):
            values = (case,) if len(names) == 1 else case
        if all(given[name] is value for name, value in zip(names, values, strict=True)):
            return place
    raise ValueError(f"no case of {names} is the one that runs: pass a list, no generator")
