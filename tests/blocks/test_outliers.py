"""Sparsities by outliers: found as the formula says, exact in total, and used by pruning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from residual_chain import chain, samples
from short_runs import short_run
from torch import nn

from safe_core.adapters.torch.blocks.outliers import outlier_sparsities
from safe_core.adapters.torch.blocks.pruning import prune_blocks

pytestmark = short_run


DATA = samples(7)


def planted(block: int = 1) -> nn.Module:
    model = chain(7, 9, 9, 13)
    with torch.no_grad():
        model[block].up.weight[2] *= 30
    return model


def formula(model: nn.Module, threshold: float) -> list[float]:
    """The fraction of outliers of every block, written out."""
    found, x = [], DATA
    for block in model:
        with torch.no_grad():
            inner = torch.tanh(block.up(x))
            parts = [(block.up.weight, x), (block.down.weight, inner)]
            a = np.concatenate(
                [
                    (w.abs() * h.reshape(-1, h.shape[-1]).norm(dim=0)).numpy().ravel()
                    for w, h in parts
                ]
            )
            x = block(x)
        found.append(float((a > threshold * a.mean()).mean()))
    return found


@pytest.mark.parametrize("threshold", [1.5, 5.0])
def test_outliers_are_those_of_the_formula(threshold: float) -> None:
    model = planted()
    before = [p.detach().clone() for p in model.parameters()]
    found = outlier_sparsities(model, DATA, 0.6, threshold=threshold, blocks="")
    assert [block.outliers for block in found.blocks] == pytest.approx(formula(model, threshold))
    assert all(map(torch.equal, model.parameters(), before))
    assert model.training
    # A batch size that cuts the samples differently changes nothing.
    again = outlier_sparsities(model, DATA, 0.6, threshold=threshold, blocks="", batch_size=3)
    assert again == found


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_with_planted_outliers_is_pruned_less(block: int) -> None:
    found = outlier_sparsities(planted(block), DATA, 0.6, reach=0.1, blocks="")
    sparsities = [row.sparsity for row in found.blocks]
    assert sparsities[block] == min(sparsities)
    assert sparsities[block] == pytest.approx(0.5, abs=0.01)
    others = [s for i, s in enumerate(sparsities) if i != block]
    assert all(0.6 < s <= 0.7 for s in others)


@pytest.mark.every_second
@pytest.mark.parametrize("sparsity", [0.5, 0.61, 0.7])
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt", "safe+"])
def test_the_total_is_exact(sparsity: float, solver: str) -> None:
    model = planted()
    found = outlier_sparsities(model, DATA, sparsity, blocks="")
    entries = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    wanted = round(100 * sparsity) * entries // 100
    prune_blocks(model, DATA, solver, found.patterns, blocks="")
    zeros = [int((p == 0).sum()) for p in model.parameters() if p.ndim == 2]
    assert sum(zeros) == wanted
    by_block = [sum(zeros[i : i + 2]) / (2 * 7 * n) for i, n in ((0, 9), (2, 9), (4, 13))]
    assert by_block == [row.sparsity for row in found.blocks]
    assert all(abs(s - sparsity) <= 0.08 + 2 / (14 * 9) for s in by_block)


def test_rows_have_as_many_zeros_each() -> None:
    model = planted()
    found = outlier_sparsities(model, DATA, 0.6, scope="row", blocks="")
    prune_blocks(model, DATA, "wanda", found.patterns, blocks="")
    weights = [p for p in model.parameters() if p.ndim == 2]
    for p in weights:
        assert len(set((p == 0).sum(dim=1).tolist())) == 1
    total = sum(int((p == 0).sum()) for p in weights)
    wanted = 6 * sum(p.numel() for p in weights) // 10
    assert wanted - 13 < total <= wanted


def test_selection_and_files(tmp_path: Any) -> None:
    where = lambda name, p: "up" in name  # noqa: E731
    work = {"offload": "disk", "work_dir": tmp_path / "work"}
    found = outlier_sparsities(planted(), DATA, 0.6, blocks="", where=where, **work)
    assert list(found.patterns) == [f"{i}.up.weight" for i in range(3)]
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused() -> None:
    for changes, message in (
        ({"threshold": -1.0}, "threshold must be a finite number of at least 0"),
        ({"reach": 0.5}, r"reach must leave every sparsity in \[0, 1\)"),
        ({"scope": "global"}, "sparsity must not compare entries of different weights"),
        ({"seeds": 1}, "settings must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            outlier_sparsities(chain(7, 8), DATA, 0.6, blocks="", **changes)
