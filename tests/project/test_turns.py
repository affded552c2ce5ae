"""The cases that wait for the long tests are those that others repeat."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from array_backends import Backend
from turns import waits

PARAMETRIZE = pytest.mark.parametrize
NAN = float("nan")


def item(marks: list[pytest.MarkDecorator], params: dict[str, Any], *others: str) -> Any:
    """Return what `waits` reads of an item of pytest."""
    return SimpleNamespace(
        callspec=SimpleNamespace(params=params),
        name="test_of_turns",
        iter_markers=lambda name: [decorator.mark for decorator in marks],
        get_closest_marker=lambda name: name in others,
    )


def waiting(marks: list[pytest.MarkDecorator], params: dict[str, Any], *others: str) -> list[bool]:
    """Return whether a case waits on each backend."""
    return [waits(item(marks, {"xp": xp, **params}, *others)) for xp in Backend]


ONLY_EAGER = [xp is Backend.JAX_JIT for xp in Backend]
ONLY_COMPILED = [xp is Backend.JAX for xp in Backend]
NEVER = [False] * len(Backend)


def test_each_case_runs_in_jax_eagerly_or_compiled() -> None:
    marks = [PARAMETRIZE("a", [1, NAN, "x"]), PARAMETRIZE("b, c", [(1, 2), (1, 3)])]
    found = {
        (i, j): waiting(marks, {"a": a, "b": b, "c": c})
        for (i, a), (j, (b, c)) in itertools.product(
            enumerate(marks[0].args[1]), enumerate(marks[1].args[1])
        )
    }
    wanted = {(i, j): ONLY_COMPILED if (i + j) % 2 else ONLY_EAGER for i, j in found}
    assert found == wanted
    entry = PARAMETRIZE(("a", "b"), [pytest.param(1, 2, id="first"), (3, {"values": 4})])
    assert waiting([entry], {"a": 1, "b": 2}) == ONLY_EAGER
    assert waiting([entry], {"a": 3, "b": entry.args[1][1][1]}) == ONLY_COMPILED


def test_tests_whose_outcome_differs_take_no_turns() -> None:
    marks = [PARAMETRIZE("a", [1, 2])]
    assert waiting(marks, {"a": 2}) == ONLY_COMPILED
    assert waiting(marks, {"a": 2}, "every_backend") == NEVER
    assert waiting([], {}) == NEVER
    assert waiting([*marks, PARAMETRIZE("xp", list(Backend))], {"a": 2}) == NEVER
    bare = SimpleNamespace(iter_markers=lambda name: [], get_closest_marker=lambda name: None)
    assert not waits(bare)  # without a table, pytest gives an item no callspec


def test_cells_alternate_as_on_a_checkerboard() -> None:
    marks = [PARAMETRIZE("a", "ab"), PARAMETRIZE("b", [1, 2, 3, 4])]
    cells = itertools.product("ab", [1, 2, 3, 4])
    runs = [(a, b) for a, b in cells if not waits(item(marks, {"a": a, "b": b}, "every_second"))]
    assert runs == [("a", 1), ("a", 3), ("b", 2), ("b", 4)]
    marks = [PARAMETRIZE("a", "ab"), PARAMETRIZE("b", [1, 2, 3])]
    cells = itertools.product("ab", [1, 2, 3])
    runs = [(a, b) for a, b in cells if not waits(item(marks, {"a": a, "b": b}, "every_second"))]
    assert runs == [("a", 1), ("a", 3), ("b", 2)]


def test_the_cases_that_remain_take_turns() -> None:
    marks = [PARAMETRIZE("a", [1, 2, 3, 4])]
    found = [waiting(marks, {"a": a}, "every_second") for a in (1, 2, 3, 4)]
    always = [True] * len(Backend)
    assert found == [ONLY_EAGER, always, ONLY_COMPILED, always]
    found = [waiting(marks, {"a": a}, "every_second", "every_backend") for a in (1, 2, 3, 4)]
    assert found == [NEVER, always, NEVER, always]
    tables = [*marks, PARAMETRIZE("xp", list(Backend))]
    found = [waiting(tables, {"a": a}, "every_second") for a in (1, 2)]
    assert found == [[bool((a + x) % 2) for x in range(len(Backend))] for a in (0, 1)]


def test_every_second_needs_a_table() -> None:
    with pytest.raises(ValueError, match="every_second needs a table of cases, which test_of_tur"):
        waits(item([], {}, "every_second"))


def test_a_table_that_can_be_read_once_is_refused() -> None:
    with pytest.raises(ValueError, match="pass a list, no generator"):
        waiting([PARAMETRIZE("a", iter([]))], {"a": 1})
