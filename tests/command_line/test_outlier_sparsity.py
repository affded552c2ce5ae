"""The command `prune` with a sparsity for each block by its outliers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from command_line import SHORT, failed, refused, run

from safe_core import Unstructured
from safe_core.command_line.pruning import PruningJob
from safe_core.command_line.sparsities import OutlierRule, parse_rules


@pytest.fixture
def planted(folder: Path, tmp_path: Path) -> Path:
    """The model with outliers in its second block."""
    path = Path(shutil.copytree(folder, tmp_path / "planted"))
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:6] *= 15
    model.save_pretrained(path)
    return path


def zeros(out: Path) -> dict[str, tuple[int, int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    return {
        name: (int((p == 0).sum()), p.numel())
        for name, p in model.named_parameters()
        if "_proj" in name
    }


def test_blocks_with_outliers_are_pruned_less(planted: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune = ["prune", planted, "--calibration", text, *SHORT, "--method", "sparsegpt",
             "--sparsity", "owl:0.7", "--work-dir", tmp_path / "work"]  # fmt: skip
    result = run(*prune, "--out", out)
    assert result.exit_code == 0, result.output
    found = zeros(out)
    assert sum(z for z, _ in found.values()) == 7 * sum(n for _, n in found.values()) // 10
    shares = []
    for i in range(2):
        rows = [row for name, row in found.items() if f"layers.{i}." in name]
        shares.append(sum(z for z, _ in rows) / sum(n for _, n in rows))
    assert shares == pytest.approx([0.78, 0.62], abs=0.002)
    assert f"sparsity by outliers: from {shares[1]:.2%} in model.layers.1 (" in result.stderr
    assert f"to {shares[0]:.2%} in model.layers.0 (" in result.stderr
    card = (out / "README.md").read_text()
    assert "| requested sparsity | 0.7 by outliers (M 5, lambda 0.08) |" in card
    again = run(*prune, "--out", tmp_path / "again")  # resumes with the same sparsities
    assert "resuming after 2 finished blocks" in again.stderr
    assert zeros(tmp_path / "again") == found


def test_other_weights_keep_their_own_sparsity(planted: Path, text: Path, tmp_path: Path) -> None:
    prune = ["prune", planted, "--calibration", text, *SHORT, "--method", "magnitude",
             "--sparsity", "owl:0.6:3:0.2", "--sparsity", "down=2:4", "--ignore", "q_proj",
             "--out", tmp_path / "out"]  # fmt: skip
    dry = run(*prune, "--dry-run")
    assert dry.exit_code == 0, dry.output
    rows = [" ".join(line.split()) for line in dry.stdout.splitlines()]
    first, second = (next(r for r in rows if f"layers.{i}.mlp.up_proj" in r) for i in (0, 1))
    assert re.search(r"weight 1 32 x 16 512 8\d\.\d+% 0\.8\d*, scope tensor$", first)
    assert re.search(r"weight 1 32 x 16 512 4\d\.\d+% 0\.4\d*, scope tensor$", second)
    assert run(*prune).exit_code == 0
    found = zeros(tmp_path / "out")
    assert all(z == n // 2 for name, (z, n) in found.items() if "down" in name)
    assert all(z == 0 for name, (z, _) in found.items() if "q_proj" in name)
    others = [row for name, row in found.items() if "down" not in name and "q_proj" not in name]
    assert sum(z for z, _ in others) == 6 * sum(n for _, n in others) // 10


def test_texts_of_outlier_sparsities() -> None:
    rules = parse_rules(["owl:0.29", "up=2:4"], "row")
    assert rules.default == Unstructured(0.29, scope="row")
    assert rules.outliers == OutlierRule(0.29)
    assert rules.describe() == "0.29 by outliers (M 5, lambda 0.08); 2:4 for up"
    PruningJob("model", ["text.txt"], "owl:0.5", scope="tensor")
    for text in ("owl:", "owl:half", "owl:1.5", "owl:0.5:-1", "owl:0.5:5:0.1:3", "owl:nan"):
        with pytest.raises(ValueError, match="sparsity by outliers must be owl:SPARSITY, owl:"):
            parse_rules([text])
    with pytest.raises(ValueError, match="must leave every block a sparsity"):
        parse_rules(["owl:0.95"])
    with pytest.raises(ValueError, match="must be the default for all weights, got 'up=owl"):
        parse_rules(["up=owl:0.5"])


def test_errors_end_in_one_line(folder: Path, text: Path, tmp_path: Path) -> None:
    prune = ["prune", folder, "--calibration", text, "--out", tmp_path / "out", *SHORT]
    assert "owl:SPARSITY:M:LAMBDA" in refused(*prune, "--sparsity", "owl:2")
    message = failed(*prune, "--sparsity", "owl:0.5", "--only", "nothing")
    assert "only must match the name of a weight" in message
    message = failed(*prune, "--sparsity", "owl:0.5", "--only", "lm_head")
    assert "blocks must hold weights to prune, got none" in message
    assert "because --only or --ignore leaves it out" in message
    message = refused(*prune, "--sparsity", "owl:1:4")
    assert "got 'owl:1:4': an N:M pattern cannot differ by block" in message
    assert "write 0.7 for 70 percent" in refused(*prune, "--sparsity", "owl:70:5")
