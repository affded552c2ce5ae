"""Studies whose methods start from a trained dense network."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_core.study.runner import cells, parse_recipe, run_study
from safe_core.study.runner.dense_start import dense_start

FIRST = ", dense_epochs = 8, dense_learning_rate = 0.1"
SOURCE = """
title = "from a trained network"
sparsities = [0.9]
seeds = [0, 1]
frameworks = ["torch", "jax"]
data = {name = "digits", train_images = 256}
model = {name = "lenet-300-100", width = 0.1}
training = {epochs = 1, batch_size = 32, learning_rate = 1e-6, DENSE}
methods = [{method = "dense"}, {method = "gmp", label = "GMP"}, {method = "iht"}]
"""
RECIPE, COLD = SOURCE.replace(", DENSE", FIRST), SOURCE.replace(", DENSE", "")


def test_methods_start_from_one_trained_network(tmp_path: Path) -> None:
    found = run_study(RECIPE, tmp_path)
    cold = run_study(COLD, tmp_path / "cold")
    for cell, result in found.items():
        # At the learning rate of the methods, no network learns anything.
        if cell.method == "dense":
            assert result["dense_accuracy"] > cold[cell]["dense_accuracy"] + 40
    recipe = parse_recipe(RECIPE)
    for framework in recipe.frameworks:
        of = [c for c in cells(recipe) if c.framework == framework]
        starts = {(c.method, c.seed): dense_start(recipe, c, None, "cpu") for c in of}
        assert starts["dense", 0] is starts["GMP", 0] is starts["iht", 0]
        assert starts["dense", 0] is not starts["dense", 1]
    assert dense_start(parse_recipe(COLD), of[0], None, "cpu") is None


def test_dense_training_that_diverges_is_named() -> None:
    source = RECIPE.replace("dense_learning_rate = 0.1", "dense_learning_rate = 1e30")
    recipe = parse_recipe(source)
    with pytest.raises(ValueError, match=r"dense training for 8 epochs diverged.*1e\+30"):
        dense_start(recipe, cells(recipe)[0], None, "cpu")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("dense_learning_rate = 0.1", "must come with dense_epochs, got 0.1"),
        (
            'dense_epochs = 2, schedule = "step", milestones = [1], decay = 0.5',
            "must be 0 with milestones",
        ),
    ],
)
def test_dense_training_is_checked(keys: str, message: str) -> None:
    source = RECIPE.replace("epochs = 1", "epochs = 2").replace(FIRST, f", {keys}")
    with pytest.raises(ValueError, match=message):
        parse_recipe(source)


def test_results_from_before_dense_epochs_still_count() -> None:
    recipe = parse_recipe(COLD)
    assert not [name for name in recipe.settings("GMP", 0.9) if "dense" in name]
    assert parse_recipe(RECIPE).settings("GMP", 0.9)["training.dense_epochs"] == 8
