"""What differs between two runs is named by the setting and the argument."""

from __future__ import annotations

import json
from typing import Any

import pytest

import safe_core
from safe_core import NM, ByName, Unstructured, schedules
from safe_core.adapters.torch.blocks.changed_settings import changed_settings
from safe_core.adapters.torch.blocks.fingerprints import identity


def told(was: Any, got: Any) -> str:
    """Describe the change of a solver, as it is read from a manifest."""
    then, now = ({"solver": json.loads(json.dumps(identity(x)))} for x in (was, got))
    return changed_settings(then, now)


@pytest.mark.parametrize(
    ("was", "got", "text"),
    [
        (Unstructured(0.5, "row"), Unstructured(0.25, "row"), "sparsity was 0.5, now 0.25"),
        (NM(2, 4), NM(1, 4), "n was 2, now 1"),
        # The value of a schedule is that of the argument that holds it.
        (safe_core.admm(0.5, penalty=0.1), safe_core.admm(0.5, penalty=0.2),
         "penalty was 0.1, now 0.2"),
        (NM(2, 4), "magnitude", "solver was NM(n=2, m=4, ragged='error'), now 'magnitude'"),
        ([1, 2], [1, 3], "solver was 2, now 3"),
        ([1, 2], [1], "solver was list(1, 2), now list(1)"),
    ],
)  # fmt: skip
def test_the_argument_that_differs_is_named(was: Any, got: Any, text: str) -> None:
    assert told(was, got) == text


def test_long_values_are_shortened() -> None:
    rows = {f"layers.{i}.weight": NM(2, 4) for i in range(20)}
    text = told(ByName(rows), Unstructured(0.5, "row"))
    assert text.startswith("solver was ByName(")
    assert "..." in text
    assert ", now Unstructured(sparsity=0.5, scope='row', " in text
    assert len(text) < 200


def test_classes_of_one_name_are_told_apart() -> None:
    then, now = {"a.Solver": {}}, {"b.Solver": {}}
    text = changed_settings({"solver": then}, {"solver": now})
    assert text == "solver was a.Solver(), now b.Solver()"


def test_what_a_manifest_lacks_is_not_set() -> None:
    assert changed_settings({}, {"peak": "0.01"}) == "peak was not set, now 0.01"
    # A manifest that was changed by hand may hold anything.
    assert changed_settings({"solver": {"a": 1, "b": 2}}, {"solver": "x"}).endswith(", now x")
    assert changed_settings({"weights": 3}, {"weights": [["a"]]}) == "the pruned weights differ"


def test_a_table_that_was_read_changes_nothing() -> None:
    read, new = (schedules.cubic(0.5, steps=100, every=10) for _ in range(2))
    assert read.table
    assert "table" in vars(read)
    assert identity(read) == identity(new)
