"""Calibration on too little text is told, before pruning, in the plan and in the model card."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from command_line import byte_tokenizer, run

from safe_core.adapters.transformers import calibration_batches

FAST = ["--length", "32", "--method", "magnitude", "--device", "cpu"]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text("abcdefgh" * 8)
    return path


def test_windows_that_repeat_the_text_are_told(folder: Path, short: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("prune", folder, "--calibration", short, "--out", out, *FAST, "--samples", 4)
    assert found.exit_code == 0, found.output
    assert (
        "warning: calibration texts hold 64 tokens, and 4 windows of 32 tokens use each token "
        "2.0 times on average: give 128 tokens or more, or fewer samples"
    ) in found.stderr
    card = (out / "README.md").read_text()
    assert "4 windows of 32 tokens, drawn from the 64 tokens of" in card


def test_the_plan_counts_the_text(folder: Path, short: Path, tmp_path: Path) -> None:
    arguments = ("prune", folder, "--calibration", short, "--out", tmp_path / "out", *FAST)
    found = run(*arguments, "--samples", 2, "--dry-run")
    assert "calibration: 2 samples, 64 tokens, from 64 tokens of text" in found.stdout
    assert "warning: calibration" not in found.stderr
    found = run(*arguments, "--samples", 3, "--dry-run")
    assert "calibration: 3 samples, 96 tokens, from 64 tokens of text" in found.stdout
    assert "warning: calibration texts hold 64 tokens" in found.stderr


def test_python_warns(short: Path) -> None:
    sizes = {"length": 32, "seed": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration_batches(byte_tokenizer(), [short], samples=2, **sizes)
    with pytest.warns(UserWarning, match="texts hold 64 tokens, and 3 windows of 32") as seen:
        calibration_batches(byte_tokenizer(), [short], samples=3, **sizes)
    assert seen[0].filename == __file__
