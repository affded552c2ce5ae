"""Recipes remove channels by AdaSAP, leave layers dense, and report robustness as a ratio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from short_runs import short_run
from small_recipe import TINY

import safe_core
from safe_core.study.runner import cells, in_jax, in_torch, parse_recipe
from safe_core.study.runner.in_jax import JaxLearner
from safe_core.study.runner.in_torch import TorchLearner
from safe_core.study.runner.plan import layer_of, plan
from safe_core.study.runner.train import run_cell

METHODS = (
    TINY.split("[[methods]]")[0]
    + """
[[methods]]
method = "adasap"
label = "AdaSAP"
scope = "tensor"
rho_max = 0.1

[[methods]]
method = "magnitude"
label = "one-shot"

[evaluation]
corruptions = [3]
corruption_ratio = true
"""
)
SOURCE = METHODS.replace("width = 0.05", 'width = 0.05\ndense_layers = ["dense3"]')


def made(source: str, method: str) -> Any:
    recipe = parse_recipe(source)
    return plan(recipe, next(cell for cell in cells(recipe) if cell.method == method))


@short_run
@pytest.mark.parametrize("learner", [TorchLearner, JaxLearner])
@pytest.mark.parametrize("method", ["AdaSAP", "one-shot"])
def test_a_layer_stays_dense_and_the_others_lose_channels(learner: Any, method: str) -> None:
    found = made(SOURCE, method)
    if method == "one-shot":  # which is trained as a dense network
        method, found = found.method, replace(found, method=None)
    else:
        method = found.method
    network = learner(found)
    for _ in range(found.training.epochs):
        for images, labels in found.batches(0):
            network.step(images, labels)
    kernels = {name: layer["kernel"] for name, layer in network.projected(method)["params"].items()}
    assert kernels["dense3"].all()
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels.values())
    assert zeros > 0.7 * (kernels["dense1"].size + kernels["dense2"].size)
    if isinstance(method.sparsity, safe_core.Channel):
        gone = [int((kernels[name] == 0).all(axis=0).sum()) for name in ("dense1", "dense2")]
        assert gone == [12, 4]


@pytest.mark.parametrize("learner", [TorchLearner, JaxLearner, in_torch.check, in_jax.check])
def test_an_unknown_layer_is_named_before_training(learner: Any) -> None:
    message = r"dense_layers must name layers with weights, dense1, dense2, dense3, got 'dense9'"
    with pytest.raises(ValueError, match=message):
        learner(made(SOURCE.replace('"dense3"', '"dense9"'), "AdaSAP"), "cpu")


def test_recipes_build_adasap_with_the_scope_of_channels() -> None:
    recipe = parse_recipe(SOURCE)
    built = recipe.methods[0].build(0.8, epochs=90, steps_per_epoch=10, seed=0)
    assert built == safe_core.adasap(safe_core.Channel(0.8, "tensor"), steps=900, rho_max=0.1)
    with pytest.raises(ValueError, match=r"methods\[0\]\.ragged is not a parameter of adasap"):
        parse_recipe(SOURCE.replace('scope = "tensor"', 'ragged = "dense"'))
    with pytest.raises(ValueError, match="scope must be one of"):
        parse_recipe(SOURCE.replace('scope = "tensor"', 'scope = "row"'))


def test_the_ratio_is_the_accuracy_on_corruptions_over_the_clean_one() -> None:
    recipe = parse_recipe(SOURCE)
    found = run_cell(recipe, cells(recipe)[0])
    assert found["corruption_ratio_3"] == pytest.approx(found["corruption_3"] / found["accuracy"])
    assert 0 < found["corruption_ratio_3"] < 1.5


def test_results_from_before_these_keys_count() -> None:
    settings = parse_recipe(SOURCE).settings("AdaSAP", 0.8)
    assert settings["model.dense_layers"] == ["dense3"]
    assert settings["evaluation.corruption_ratio"] is True
    plain = parse_recipe(TINY).settings("SAFE", 0.8)
    assert not {"model.dense_layers", "evaluation.corruption_ratio"} & set(plain)


def test_layers_are_named_alike_in_both_frameworks() -> None:
    assert layer_of("a.b.weight") == layer_of("a/b/kernel") == "a/b"
    assert np.unique([layer_of("dense3.weight"), layer_of("dense3/kernel")]).tolist() == ["dense3"]
