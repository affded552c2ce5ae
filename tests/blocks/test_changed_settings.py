"""Name the setting and the argument in which two runs differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import safe_core
from safe_core import NM, Block, ByName, Unstructured, schedules
from safe_core.adapters.torch.blocks.changed_settings import changed_settings
from safe_core.adapters.torch.blocks.fingerprints import identity


class Share(float):
    """A number with a type of its own."""


class Placed:
    """A solver whose repr shows where it lies in memory."""

    def __repr__(self) -> str:
        return f"<Placed at {id(self):#x}>"


class Kind(Enum):
    """Something to choose."""

    FIRST = 1


@dataclass(frozen=True)
class Counted:
    """A solver that counts its calls, which are no setting of it."""

    rate: float
    seen: dict[int, int] = field(default_factory=dict, repr=False, compare=False)


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
        ([1, 2], [1, 3], "solver was [1, 2], now [1, 3]"),
        (Block((2, 4), 0.5), Block((4, 4), 0.5), "shape was (2, 4), now (4, 4)"),
        (ByName({"a": NM(2, 4), "b": NM(2, 4)}), ByName({"a": NM(2, 4), "b": NM(1, 4)}),
         "b was NM(n=2, m=4, ragged='error'), now NM(n=1, m=4, ragged='error')"),
        (Share(0.5), Share(0.75), "solver was 0.5, now 0.75"),
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
    # A manifest may be of an earlier version, or changed by hand.
    assert changed_settings({"solver": {"a": 1, "b": 2}}, {"solver": "x"}).endswith(", now x")
    for weights in (3, "[['a']]", [[1]], [1]):
        found = changed_settings({"weights": weights}, {"weights": [["b"]]})
        assert found == "the pruned weights differ"
    was, got = ({"weights": [["a", "b"], rows]} for rows in (["a"], ["a", "b"]))
    assert changed_settings(was, got) == "b of block 1 was dense, and is pruned now"


def test_a_table_that_was_read_changes_nothing() -> None:
    read, new = (schedules.cubic(0.5, steps=100, every=10) for _ in range(2))
    assert read.table
    assert "table" in vars(read)
    assert identity(read) == identity(new)


def test_what_does_not_count_for_equality_changes_nothing() -> None:
    assert identity(Counted(0.5, {1: 2})) == identity(Counted(0.5))
    assert identity(Counted(0.5)) != identity(Counted(0.25))


@pytest.mark.parametrize(
    "value",
    [
        Unstructured(0.5), Share(0.5), Kind.FIRST, {"a": {1: {2.5, 3.5}}}, np.float32(0.5),
        np.array(["a", "b"]), jnp.arange(3), schedules.cubic(0.5, steps=100, every=10),
        ByName({"a": NM(2, 4)}),
    ],
    ids=repr,
)  # fmt: skip
def test_a_description_is_the_same_when_read_from_a_file(value: Any) -> None:
    found = identity(value)
    assert json.loads(json.dumps(found)) == found
    assert " at 0x" not in str(found)


def test_arrays_differ_by_their_entries() -> None:
    arrays = (jnp.arange(3), jnp.arange(1, 4), np.array(["a"]), np.array(["b"]))
    found = [json.dumps(identity(x)) for x in arrays]
    assert len(set(found)) == len(found)


def test_a_value_that_shows_its_address_is_refused() -> None:
    for value in (np.random.default_rng(0), Placed()):
        kind = type(value).__name__
        with pytest.raises(ValueError, match=rf"solver must be of functions .*, got .* {kind}"):
            identity(value)
