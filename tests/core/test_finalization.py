"""Check what `finalize` records, and what it warns about."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from array_backends import Backend

import safe_core
from safe_core import ADMM, AtEnd, Constraint, HardThreshold, Mask, SquaredGradient, Unstructured
from safe_core.finalization import Finalized, FinalizedTensor, describe, measure, warn

HALF = Unstructured(0.5)
RISING = Unstructured(safe_core.schedules.linear_sparsity(0.5, steps=10))
NEARLY = Unstructured(safe_core.schedules.cubic(0.9, steps=100))
DRAWN = Unstructured(safe_core.schedules.random_sparsity((0.3, 0.5)))


def removed(part: float = 0.01, *, emptied: bool = False) -> Finalized:
    return Finalized(8, [FinalizedTensor("w", 4, 2, 2, 1.0, part, emptied)])


def messages(*arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn(*arguments)
    assert all(w.category is safe_core.FinalizeWarning for w in found)
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def test_the_numbers_are_those_of_the_arrays(xp: Backend) -> None:
    x = np.asarray([[3.0, -4.0, 0.0], [1.0, 0.0, -2.0]], np.float32)
    kept = np.asarray([[False, True, True], [True, False, False]])
    found = [float(number) for number in xp.run(measure, x, kept)]
    np.testing.assert_allclose(found[:2], [13**0.5, 30**0.5], rtol=1e-6)
    assert found[2:] == [2, 2, 3, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_are_counted(xp: Backend, bad: float) -> None:
    found = xp.run(measure, np.asarray([1.0, bad, bad]), np.asarray([True, True, False]))
    assert int(found[5]) == 2
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in b \(2 of 3"):
        describe(3, ["a", "b"], [1, 3], [(0, 1, 0, 1, 1, 0), found])


def test_an_array_without_entries_is_described(xp: Backend) -> None:
    found = xp.run(measure, np.zeros((0, 3)), np.zeros((0, 3), bool))
    (row,) = describe(0, ["w"], [0], [found]).tensors
    assert (row.distance, row.emptied) == (0.0, False)


def test_the_total_is_that_of_all_arrays_together() -> None:
    found = describe(5, ["a", "b"], [9, 9], [(3.0, 12.0, 4, 5, 5, 0), (4.0, 5.0, 1, 8, 8, 0)])
    assert found.distance == 5 / 13
    assert found.zeroed == 5
    assert [row.distance for row in found.tensors] == [0.25, 0.8]


@pytest.mark.parametrize(
    ("numbers", "emptied"),
    [
        ((2.0, 2.0, 3, 0, 0, 0), True),  # nothing is kept
        ((2.0, 2.0, 3, 0, 2, 0), True),  # only zeros are kept
        ((0.0, 0.0, 0, 0, 0, 0), True),  # the mask of a GMP run was empty before
        ((0.0, 0.0, 0, 0, 2, 0), False),  # a head that starts at zero
        ((1.0, 2.0, 3, 1, 1, 0), False),
    ],
)
def test_a_tensor_of_which_nothing_is_left_is_named(numbers: Any, emptied: bool) -> None:
    found = describe(8, ["head"], [4], [numbers])
    assert found.emptied == ["head"] * emptied
    texts = [text for text in messages(found, AtEnd(), [HALF]) if "all entries to zero" in text]
    assert ["in head" in text for text in texts] == [True] * emptied


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (ADMM(dual_update_interval=9), "no dual update happened in 8 steps, fewer than dual_upda"),
        (HardThreshold(interval=9), "never projected in 8 steps, fewer than interval=9"),
        (ADMM(dual_update_interval=8), ""),
        (HardThreshold(interval=8), ""),
        (Mask(), ""),
        (AtEnd(), ""),
        (Constraint(), ""),
    ],
)
def test_a_run_that_was_too_short_is_reported(constraint: Constraint, text: str) -> None:
    found = messages(removed(), constraint, [HALF])
    assert len(found) == bool(text)
    assert text in "".join(found)


def test_a_constraint_of_a_user_must_have_been_updated() -> None:
    @dataclass(frozen=True)
    class Rare(Constraint):
        def is_due(self, pattern: Any, step: Any) -> Any:
            return step == 8

    assert "state of Rare was never updated in 8 steps" in messages(removed(), Rare(), [HALF])[0]
    assert not messages(removed()._replace(steps=9), Rare(), [HALF])


def test_a_run_that_was_too_short_gets_no_other_remedy() -> None:
    """The schedule is why the weights are far, so a higher penalty would not be the answer."""
    far = removed(0.5)._replace(steps=9)
    (text,) = messages(far, ADMM(dual_update_interval=1), [RISING])
    (whole,) = messages(far._replace(steps=10), ADMM(dual_update_interval=1), [RISING])
    for found in (text, whole):
        assert "so x was far from the sparse weights" in found
    assert ("raise the penalty" in text, "raise the penalty" in whole) == (False, True)


def test_weights_that_were_sparse_already_need_no_training() -> None:
    there = Finalized(0, [FinalizedTensor("w", 4, 0, 2, 1.0, 0.0, False)])
    assert not messages(there, ADMM(), [RISING])


@pytest.mark.parametrize("constraint", [ADMM(dual_update_interval=1), Mask(), AtEnd()])
@pytest.mark.parametrize(
    ("pattern", "steps", "text"),
    [
        (RISING, 9, "the sparsity was at 0.45 of 0.5 after 9 steps"),
        (NEARLY, 99, "the sparsity was at 0.899999 of 0.9 after 99 steps"),
        (RISING, 10, ""),
        (DRAWN, 9, ""),
    ],
)
def test_a_schedule_that_has_not_ended_is_reported(
    constraint: Constraint, pattern: Any, steps: int, text: str
) -> None:
    if constraint == Mask() and pattern is DRAWN:
        return  # no such method exists
    found = messages(removed()._replace(steps=steps), constraint, [pattern])
    assert len(found) == bool(text)
    assert text in "".join(found)


@pytest.mark.parametrize("constraint", [ADMM(dual_update_interval=1), AtEnd()])
def test_a_schedule_of_one_array_that_has_not_ended_is_reported_once(
    constraint: Constraint,
) -> None:
    named = {"a": 0.5, "b": RISING, "c": safe_core.Channel(RISING.sparsity)}
    pattern = safe_core.ByName(named, default="2:4")
    (text,) = messages(removed()._replace(steps=9), constraint, [pattern])
    assert text == (
        "finalize: the sparsity was at 0.45 of 0.5 after 9 steps, because its schedule has 10 "
        "(train to its end, or give the method the steps of the run)"
    )
    assert not messages(removed()._replace(steps=10), constraint, [pattern])


@pytest.mark.parametrize("steps", [3, 4])
def test_an_importance_that_saw_nothing_is_reported(steps: int) -> None:
    source, found = SquaredGradient(), removed(0.5)._replace(steps=steps)
    texts = messages(found, AtEnd(importance_interval=4), [HALF], source)
    assert texts == ["finalize: the importance was never refreshed in 3 steps, so P is 1"] * (
        steps < 4
    )


@pytest.mark.parametrize(
    ("constraint", "warns"),
    [(ADMM(dual_update_interval=1), True), (Mask(), True), (AtEnd(), False)],
)
def test_a_large_removal_is_reported_unless_the_method_prunes_at_the_end(
    constraint: Constraint, warns: bool
) -> None:
    assert not messages(removed(0.1), constraint, [HALF])
    texts = messages(removed(0.234), constraint, [HALF])
    assert len(texts) == warns
    assert not warns or "|x - proj(x)| / |x| = 0.23 of the weights (w 0.23)" in texts[0]


def test_everything_is_said_in_one_warning() -> None:
    (text,) = messages(removed(0.9, emptied=True), ADMM(), [HALF])
    assert text.startswith("finalize: no dual update")
    assert "|x - proj(x)| / |x| = 0.90" in text
    assert "zero in w" in text


def test_a_run_much_longer_than_its_method_is_named() -> None:
    pull = safe_core.admm(0.5, steps=10).constraint
    rows = [FinalizedTensor("w", 4, 0, 2, 1.0, 0.0, False)]  # nothing is left to remove
    (text,) = messages(Finalized(16, rows), pull, [HALF])
    assert text.startswith("finalize: the run takes 16 steps, and the method was made for 10 (give")
    assert messages(Finalized(15, rows), pull, [HALF]) == []
    # The penalty of ADMM may stay at its last value for as long as the user likes.
    warm = ADMM(safe_core.schedules.linear(0.1, steps=10), dual_update_interval=2)
    for constraint in (warm, ADMM(), Mask(), AtEnd(), HardThreshold()):
        assert messages(Finalized(1000, rows), constraint, [HALF]) == []


def test_the_result_prints_as_totals() -> None:
    rows = [FinalizedTensor(n, 1000, 500, 100, 5.0, 3.0, n == "b") for n in ("a", "b")]
    assert str(Finalized(1234, rows)) == (
        "finalized after 1,234 steps: 2 sparse parameters with 1,800 zeros in 2,000 entries "
        "(1,000 set to zero now), 0.6 of the norm removed; all zero: b"
    )


def test_long_lists_of_names_are_cut() -> None:
    rows = [FinalizedTensor(f"w{i}", 1, 1, 0, 1.0, 1.0, True) for i in range(8)]
    (text,) = messages(Finalized(0, rows), AtEnd(), [HALF])
    assert text.endswith("in w0, w1, w2, w3, w4 and 3 more")
