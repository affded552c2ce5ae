"""Mark as long the cases of a table that repeat others."""

from __future__ import annotations

from typing import Any

import pytest

# JAX runs nearly the same code eagerly and compiled, and compiling takes most of the time.
TURNS = {"jax": 0, "jax-jit": 1}


def waits(item: Any) -> bool:
    """Return whether a case is left to the long tests.

    With the marker ``every_second``, every second case is left. With two parameters or more, the
    cells alternate as on a checkerboard, so that each value still runs.

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
    every_second = item.get_closest_marker("every_second")
    if every_second and not marks:
        raise ValueError(f"every_second needs a table of cases, which {item.name} has not")
    by_turns = turn is not None and not item.get_closest_marker("every_backend")
    by_turns = by_turns and not any("xp" in _names(mark) for mark in marks)
    if not marks or not (every_second or by_turns):
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
