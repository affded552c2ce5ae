"""The recipe for a block, and the order in which it sees samples."""

from __future__ import annotations

from typing import Any

import pytest

from safe_core.patterns import Unstructured
from safe_core.reconstruction import (
    Reconstruction,
    batches_at_random,
    batches_in_order,
    block_pattern,
)

GROUPS = [[0, 2, 4, 6, 8], [1, 3, 5]]


def test_batches_are_of_one_group_and_hold_every_sample_once() -> None:
    assert batches_in_order(GROUPS, 2) == [[0, 2], [4, 6], [8], [1, 3], [5]]
    drawn = batches_at_random(GROUPS, 2, seed=0)
    assert sorted(map(len, drawn)) == [1, 1, 2, 2, 2]
    assert sorted(sum(drawn, [])) == [0, 1, 2, 3, 4, 5, 6, 8]  # noqa: RUF017
    assert all({k % 2 for k in batch} in ({0}, {1}) for batch in drawn)


def test_the_order_follows_from_seed_block_and_epoch_alone() -> None:
    def order(**given: int) -> list[list[int]]:
        return batches_at_random([range(32)], 8, **{"seed": 0, "block": 0, "epoch": 0, **given})

    orders = [order(), order(seed=1), order(block=1), order(epoch=1), order(seed=1, epoch=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert orders == [
        order(),
        order(seed=1),
        order(block=1),
        order(epoch=1),
        order(seed=1, epoch=1),
    ]


def test_a_pattern_over_several_blocks_is_refused() -> None:
    assert block_pattern(0.5) == Unstructured(0.5, scope="tensor")
    with pytest.raises(ValueError, match=r"sparsity must not compare .* got Unstructured"):
        block_pattern(Unstructured(0.5, scope="global"))


@pytest.mark.parametrize(
    ("betas", "error"), [(0.9, TypeError), ((0.9,), ValueError), ((0.9, 1.0), ValueError)]
)
def test_betas_are_a_pair_below_one(betas: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"betas must be .* got"):
        Reconstruction(betas=betas)
