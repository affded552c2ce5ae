"""The estimate of the time of a run: one block of each kind is pruned and restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from residual_chain import chain, samples
from short_runs import short_run
from torch import Tensor

from safe_core.adapters.torch.blocks.pruning import (
    SafeReconstruction,
    plan_pruning,
    prune_blocks,
)

pytestmark = short_run

SAFE = SafeReconstruction(epochs=2, batch_size=4)


DATA = samples(6)


@pytest.mark.parametrize("solver", [SAFE, "sparsegpt"])
@pytest.mark.parametrize("changes", [{}, {"propagate": "dense"}, {"target_inputs": "dense"}])
def test_the_model_is_restored_and_can_be_pruned(solver: Any, changes: dict[str, Any]) -> None:
    model, other = chain(6, 8, 8, 12), chain(6, 8, 8, 12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = plan_pruning(model, DATA, solver, 0.5, blocks="", **changes)
    found = plan.measure_time()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert model.training
    assert [block.name for block in found.measured] == ["0", "2"]
    first, last = (block.seconds for block in found.measured)
    assert found.blocks == (first, first, last)
    assert found.after(2) == found.recording + last
    assert found.seconds == pytest.approx(found.recording + 2 * first + last)
    assert min(first, last, found.recording) > 0
    # The first block is pruned as in a run, which is not changed by the measurement.
    report = plan.apply()
    assert report.blocks[0].loss == found.measured[0].loss
    prune_blocks(other, DATA, solver, 0.5, blocks="", **changes)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_blocks_whose_weights_differ_are_of_other_kinds() -> None:
    where = lambda name, p: name != "1.up.weight"  # noqa: E731
    found = plan_pruning(chain(6, 8, 8, 8), DATA, "wanda", 0.5, blocks="", where=where)
    assert [block.name for block in found.measure_time().measured] == ["0", "1"]


def test_no_file_stays(tmp_path: Path) -> None:
    plan = plan_pruning(
        chain(6, 8, 8), DATA, "wanda", 0.5, blocks="", offload="disk", work_dir=tmp_path / "a" / "b"
    )
    assert plan.measure_time().seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_restores_the_model() -> None:
    model, calls = chain(6, 8, 8), []

    def fails(weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Any) -> Any:
        calls.append(weight)
        raise ValueError("stop")

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="stop"):
        plan_pruning(model, DATA, fails, 0.5, blocks="").measure_time()
    assert len(calls) == 1
    assert all(map(torch.equal, model.parameters(), before))


def test_the_plan_counts_blocks_and_steps() -> None:
    plan = plan_pruning(chain(6, 8, 8), DATA, SAFE, 0.5, blocks="")
    assert (plan.blocks, plan.steps) == (2, 2 * 3)
    ragged = [DATA[:5], DATA[5:, :2]]
    assert plan_pruning(chain(6, 8, 8), ragged, SAFE, 0.5, blocks="").steps == 2 * (2 + 2)
    assert plan_pruning(chain(6, 8, 8), DATA, "alps", 0.5, blocks="").steps == 0
    where = lambda name, p: "up" in name  # noqa: E731
    plan = plan_pruning(chain(6, 8, 8), DATA, "wanda", "2:6", blocks="", where=where)
    assert list(plan.patterns) == ["0.up.weight", "1.up.weight"]
    assert plan.dense == dict.fromkeys(["0.down.weight", "1.down.weight"], "where= leaves it out")
