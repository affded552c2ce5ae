"""Studies of several widths: runs, pruning at initialisation, gains, figures."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_recipe import TINY, changed
from torch.nn import functional

from safe_core.study.models import to_state_dict
from safe_core.study.runner import cells, parse_recipe, read_recipe, run_study, write_report
from safe_core.study.runner.cells import Cell
from safe_core.study.runner.gains import gain_tables, gains
from safe_core.study.runner.in_torch import TorchLearner
from safe_core.study.runner.plan import Plan, _sparsity_of, plan
from safe_core.study.runner.pruned_start import with_pruned_start
from safe_core.study.runner.results import append_line, read_results
from safe_core.study.runner.train import run_cell

FRAMEWORKS = ("torch", "jax")
BASE = changed("width = 0.05", "width = [0.05, 0.1]").split("[[methods]]")[0]
WIDE = (
    BASE
    + """
[[methods]]
method = "dense"
label = "SGD"

[[methods]]
method = "dense"
label = "SAM"
against = "SGD"
sweep = { rho = [0.05, 0.1] }

[[methods]]
method = "at_start"
label = "Random"
score = "random"
scope = "tensor"

[[methods]]
method = "at_start"
label = "SNIP"
score = "snip"
rho = 0.1
weights_of_width = 0.05

[report]
columns = "width"
"""
)


def started(method: str, framework: str, **changes: Any) -> tuple[Plan, dict[str, np.ndarray]]:
    """A plan at the larger width, and the kernels that it starts from."""
    recipe = parse_recipe(WIDE)
    recipe = replace(recipe, frameworks=(framework,), **changes)
    cell = next(c for c in cells(recipe) if (c.method, c.width) == (method, 0.1))
    made = with_pruned_start(plan(recipe, cell), cell, "cpu")
    assert made.start is not None
    return made, {name: np.asarray(x["kernel"]) for name, x in made.start["params"].items()}


def test_every_width_has_its_runs() -> None:
    recipe = parse_recipe(WIDE)
    found = [c for c in cells(recipe) if c.noise == 0 and c.seed == 0]
    dense = ["SGD", "SAM, rho = 0.05", "SAM, rho = 0.1"]
    both = [*dense, "Random", "Random"]
    assert [c.method for c in found] == [*both, *both, "SNIP"]
    assert [c.width for c in found] == [0.05] * 5 + [0.1] * 6
    assert [plan(recipe, c).architecture.hidden for c in found[::5]][:2] == [(15, 5), (30, 10)]
    assert found[-1] == Cell("torch", 0.0, "SNIP", None, 0, 0.1)
    assert found[-1].title == "SNIP, width 0.1, seed 0, torch"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_wide_network_keeps_the_weights_of_a_narrow_one(framework: str) -> None:
    """64 x 15 + 15 x 5 + 5 x 10 weights of 64 x 30 + 30 x 10 + 10 x 10."""
    recipe = replace(parse_recipe(WIDE), frameworks=(framework,))
    found = run_cell(recipe, next(c for c in cells(recipe) if c.method == "SNIP"))
    assert (found["weights"], found["weights"] - found["zeros"]) == (2320, 1085)
    assert found["distance"] == 0


def test_the_number_of_weights_is_exact() -> None:
    """The fraction is read as its printed decimal, which may lie below the quotient."""
    for whole in (3, 97, 1260, 88435):
        for kept in range(1, whole, 1 + whole // 500):
            narrow, wide = (SimpleNamespace(weights=lambda _, n=n: n) for n in (kept, whole))
            found = _sparsity_of(narrow, wide, ())
            assert int(Fraction(repr(found)) * whole) == whole - kept


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_snip_keeps_the_weights_of_largest_product_with_the_gradient(framework: str) -> None:
    made, kernels = started("SNIP", framework)
    images, labels = next(iter(made.batches(0)))
    whole = {
        name: torch.from_numpy(x).requires_grad_()
        for name, x in to_state_dict(made.architecture, made.initial_variables()).items()
    }
    mean, deviation = made.normalisation
    x = torch.from_numpy((images.reshape(len(images), -1) - mean[0]) / deviation[0]).float()
    for i in (1, 2, 3):
        x = functional.linear(x, whole[f"dense{i}.weight"], whole[f"dense{i}.bias"])
        x = x.relu() if i < 3 else x
    functional.cross_entropy(x, torch.from_numpy(labels)).backward()
    scores = {n: (p * p.grad).abs().detach().numpy().T for n, p in whole.items() if "weight" in n}
    cut = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-1085]
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(kernel != 0, scores[f"{name}.weight"] >= cut)
        kept = whole[f"{name}.weight"].detach().numpy().T[kernel != 0]
        np.testing.assert_array_equal(kernel[kernel != 0], kept)


@pytest.mark.every_second
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_random_weights_are_kept_in_every_layer_alike(framework: str) -> None:
    _, kernels = started("Random", framework, seeds=(0,))
    _, others = started("Random", framework, seeds=(1,))
    for name, kernel in kernels.items():
        assert np.sum(kernel == 0) == int(0.8 * kernel.size)
        assert np.any((kernel == 0) != (others[name] == 0))
    kept = np.abs(kernels["dense1"][kernels["dense1"] != 0])
    whole = np.abs(plan_weights())
    # A choice by magnitude would keep none of the smaller half.
    assert 0.35 < np.mean(kept < np.median(whole)) < 0.65


def plan_weights() -> np.ndarray:
    recipe = parse_recipe(WIDE)
    made = plan(recipe, next(c for c in cells(recipe) if c.width == 0.1))
    return np.asarray(made.initial_variables()["params"]["dense1"]["kernel"])


def test_dense_layers_and_statistics_survive_pruning() -> None:
    source = WIDE.replace("width = [", 'dense_layers = ["dense3"]\nwidth = [')
    recipe = parse_recipe(source)
    cell = next(c for c in cells(recipe) if c.method == "SNIP")
    made = with_pruned_start(plan(recipe, cell), cell, "cpu")
    params = made.start["params"]  # type: ignore[index]
    assert np.all(params["dense3"]["kernel"])
    kept = sum(np.sum(params[f"dense{i}"]["kernel"] != 0) for i in (1, 2))
    assert kept == 64 * 15 + 15 * 5


def test_training_starts_from_the_pruned_weights() -> None:
    made, kernels = started("SNIP", "torch")
    learner = TorchLearner(made)
    np.testing.assert_array_equal(
        learner.variables()["params"]["dense1"]["kernel"], kernels["dense1"]
    )
    learner.step(*next(iter(made.batches(0))))
    after = np.asarray(learner.variables()["params"]["dense1"]["kernel"])
    np.testing.assert_array_equal(after != 0, kernels["dense1"] != 0)
    assert np.any(after != kernels["dense1"])


def test_results_of_one_width_count_when_others_are_added(tmp_path: Path) -> None:
    one = parse_recipe(TINY)
    for cell in cells(one):
        append_line(tmp_path / "results.jsonl", one, cell, {"accuracy": 50.0})
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    older = [json.loads(line) for line in lines]
    for line in older:  # as studies wrote them before they had several widths
        del line["cell"]["width"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in older))
    assert len(read_results(tmp_path, one).results) == len(older)
    several = parse_recipe(changed("width = 0.05", "width = [0.1, 0.05]"))
    found = read_results(tmp_path, several)
    assert {cell.width for cell in found.results} == {0.05}
    assert (len(found.results), found.changed) == (len(older), {})
    other = read_results(tmp_path, parse_recipe(changed("0.05", "0.1")))
    assert (other.results, list(other.changed)) == ({}, ["model.width was 0.05 and is 0.1"])


@pytest.mark.long
def test_gains_by_width_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(WIDE)
    recipe = parse_recipe(WIDE)
    means = {"SGD": 80.0, "SAM, rho = 0.05": 81.0, "SAM, rho = 0.1": 79.0, "Random": 70, "SNIP": 75}
    for cell in cells(recipe):
        of_width = 5.0 if (cell.width, cell.method) == (0.1, "SAM, rho = 0.1") else 0.0
        result = {"accuracy": means[cell.method] + of_width + cell.seed}
        append_line(tmp_path / "results.jsonl", recipe, cell, result)
    results = read_results(tmp_path, recipe).results
    found = [g for g in gains(recipe, results) if g.noise == 0]
    assert [(g.title, g.width, g.values, g.best) for g in found] == [
        ("SAM over SGD", 0.05, (1, 1), 0.05),
        ("SAM over SGD", 0.1, (4, 4), 0.1),
    ]
    files_ = {file.name for file in write_report(tmp_path)}
    drawn = {f"{name}_by_width_noise_0.png" for name in ("accuracy", "gain", "best_rho")}
    assert drawn <= files_
    markdown = (tmp_path / "report.md").read_text()
    assert "| SAM over SGD | 0% label noise | 1.00 ± 0.00 | 4.00 ± 0.00 |" in markdown
    assert "| SAM over SGD | 50% label noise | 0.05 | 0.10 |" in markdown
    assert "| method | width 0.05 | width 0.1 |" in markdown
    head, first = (tmp_path / "results.csv").read_text().splitlines()[:2]
    assert dict(zip(head.split(","), first.split(","), strict=True))["width"] == "0.05"
    half = {c: r for c, r in results.items() if c.seed == 0 or c.method != "SGD"}
    assert gain_tables(recipe, half) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weights_of_width = 0.05", "weights_of_width = 0.1", r"\[3\]\.weights_of_width must be b"),
        ("weights_of_width = 0.05", "weights_of_width = 0", "weights_of_width must not be 0"),
        ('against = "SGD"', 'against = "SAM"', r"methods\[1\]\.against must be the label of a m"),
        (
            "rho = 0.1\nweights",
            'against = "Random"\nweights',
            r"\[3\].against must be a method that is trained at the same widths and .* 'Random'",
        ),
        ('score = "snip"', 'score = "snap"', r"SNIP.*score must be one of 'random', 'snip'"),
        ('label = "SGD"', "weights_of_width = 0.05", "weights_of_width must be left out for dense"),
        ("[0.05, 0.1]\n", "[0.1, 0.1]\n", r"model\.width must not repeat a value"),
        (
            "[report]",
            '[[quoted]]\nsource = "Lee"\nmethod = "SGD"\nvalues = {"0.9" = 1}\n[report]',
            "quoted must be left out with several widths",
        ),
    ],
)
def test_a_wrong_recipe_of_widths_names_the_key(old: str, new: str, message: str) -> None:
    assert old in WIDE
    with pytest.raises((TypeError, ValueError), match=message):
        parse_recipe(WIDE.replace(old, new, 1))


# JAX compiles a program for each width, which takes half a minute.
@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_the_study_of_overparameterisation_runs_for_an_epoch(framework: str) -> None:
    whole = read_recipe(files("safe_core.study") / "recipes" / "overparameterisation-digits.toml")
    recipe = replace(
        whole,
        data=replace(whole.data, train_images=128, label_noise=(0.5,)),
        training=replace(whole.training, epochs=1, batch_size=64, schedule="cosine", milestones=()),
        evaluation=replace(whole.evaluation, flatness_images=128),
        seeds=(0,),
        frameworks=(framework,),
    )
    kept = [c for c in cells(recipe) if c.width == 0.5 and "rho = 0.0" not in c.method]
    found = {cell.method: run_cell(recipe, cell) for cell in kept}
    counts = {name: r["weights"] - r["zeros"] for name, r in found.items()}
    assert counts["SGD"] == 64 * 150 + 150 * 50 + 50 * 10
    narrow = 64 * 45 + 45 * 15 + 15 * 10
    assert counts["SNIP, SGD"] == counts["SNIP, SAM"] == narrow
    assert narrow <= counts["Random, SGD"] == counts["Random, SAM"] < narrow + 3
    assert len({r["losses"][-1] for r in found.values()}) == len(found) == 8
    for result in found.values():
        assert result["moment_2"] > 0
        assert result["eigenvalue"] > 0


def test_a_study_of_widths_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    source = WIDE.split("[[methods]]")[0].replace("[0, 1]", "[0]").replace(", 0.5]", "]")
    source += '[[methods]]\nmethod = "dense"\n'
    assert [c.width for c in run_study(source, tmp_path)] == [0.05, 0.1]
