"""Studies from recipes: what is refused, run once, alike in both frameworks, and reported."""

from __future__ import annotations

import json
import pickle
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from importlib.resources import files
from io import StringIO
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import safe_core.study.runner.figures as figures
import safe_core.study.runner.measure as measuring
import safe_core.study.runner.run as runner
from safe_core import NM, Unstructured, schedules
from safe_core.command_line.app import app
from safe_core.study.data import Split
from safe_core.study.models import ResNet
from safe_core.study.runner import cells, parse_recipe, read_recipe, run_study, write_report
from safe_core.study.runner.cells import Cell, append_result, read_results
from safe_core.study.runner.in_jax import JaxLearner, JaxSubject
from safe_core.study.runner.in_torch import TorchLearner, TorchSubject
from safe_core.study.runner.measure import measure
from safe_core.study.runner.methods import read_entries
from safe_core.study.runner.plan import Plan, plan
from safe_core.study.runner.progress import StudyBar
from safe_core.study.runner.recipe import Attack
from safe_core.study.runner.statistics import agreement, tables
from safe_core.study.runner.train import run_cell
from safe_core.study.runner.training import Training

TINY = """
title = "Tiny"
frameworks = ["torch"]
sparsities = [0.8, 0.9]
seeds = [0, 1]

[data]
name = "digits"
train_images = 96
label_noise = [0.0, 0.5]

[model]
name = "lenet-300-100"
width = 0.05

[training]
epochs = 2
batch_size = 32
learning_rate = 0.1
weight_decay = 1e-4

[[methods]]
method = "dense"

[[methods]]
method = "safe"
label = "SAFE"
penalty = { "0.8" = 1e-2, default = 1e-1 }
penalty_schedule = "cosine"
dual_update_interval = 2
"""
OWN = TINY.replace("dual_update_interval = 2", "training = { epochs = 3, batch_size = 16 }")
RECIPES = sorted(p.name for p in (files("safe_core.study") / "recipes").iterdir())


def changed(old: str, new: str) -> str:
    assert old in TINY
    return TINY.replace(old, new)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("title =", "recipe must be TOML"),
        (changed('title = "Tiny"', ""), "title is missing in recipe"),
        ("colour = 3\n" + TINY, "colour is not a key of recipe, which takes: title, data, model"),
        (
            changed("width", "depth"),
            r"model\.depth is not a key of model, which takes: name, width",
        ),
        (changed('"digits"', '"svhn"'), r"data\.name must be one of 'digits', 'mnist'.*'svhn'"),
        (changed("[0.8, 0.9]", "[0.8, 1.0]"), r"sparsities\[1\] must be a fraction.*got 1\.0"),
        (changed("seeds = [0, 1]", "seeds = [0, 0]"), "seeds must not repeat a value"),
        (changed("epochs = 2", "epochs = 2.5"), r"training\.epochs must be an integer, got 2\.5"),
        (changed("epochs = 2", 'epochs = 2\nschedule = "step"'), r"training\.milestones must be"),
        (
            changed('"safe"', '"saef"'),
            r"methods\[1\]\.method must be one of 'dense', 'safe'.*'saef'",
        ),
        (
            changed("penalty_schedule", "rise"),
            r"methods\[1\]\.rise is not a parameter of safe, which",
        ),
        (changed("default", '"0.95"'), r'penalty must have a value for sparsity "0\.9"'),
        (changed("interval = 2", "interval = 0"), r"methods\[1\] \(SAFE\) at sparsity 0\.8: dual_"),
        (changed("[0.8, 0.9]", '[0.8, "4:2"]'), r"sparsities\[1\]: n must be at most m=2, got 4"),
        (changed('"0.8" = 1e-2', '"0.8x" = 1'), r"methods\[1\]\.penalty must have sparsities as k"),
        (
            TINY
            + '[[quoted]]\nsource = "Lee"\nmethod = "PBW"\nmetric = "acc"\nvalues = {"0.9" = 1}',
            r"quoted\[0\]\.metric must be measured: accuracy, .*; got 'acc'",
        ),
        (OWN.replace("epochs = 3", "epoch = 3"), r"methods\[1\]\.training\.epoch is not a key"),
        (
            OWN.replace("epochs = 3", "warmup_epochs = 2"),
            r"methods\[1\] \(SAFE\): training\.warmup_epochs must be below the 2 epochs, got 2",
        ),
        (changed("rate = 0.1", "rate = 0.1\nmomentum = 1"), r"training\.momentum must not be 1"),
        (changed("width = 0.05", "width = 0"), r"model\.width must not be 0, got 0"),
        (
            changed("epochs = 2", 'epochs = 2\nschedule = "step"\nmilestones = [1, 2]'),
            r"training\.milestones must be below the 2 epochs, got \[1, 2\]",
        ),
        (TINY + '[report]\nmetrics = ["trace"]', r"report\.metrics must be measured: accuracy,"),
        (TINY + "[evaluation]\nlandscape_points = 1", r"landscape_points must be 0, or at least 2"),
        (TINY + "[evaluation]\nflatness_rho = 0", r"evaluation\.flatness_rho must not be 0, got 0"),
        (
            TINY + '[evaluation]\ncorruption_folder = "c"',
            r"corruption_folder holds CIFAR-10-C, .* got 'c' for digits",
        ),
        (TINY + "[evaluation]\ncorruptions = [6]", r"evaluation\.corruptions must be from 1 to 5"),
        (
            TINY + '[[methods]]\nmethod = "gmp"\nrise_epochs = 3',
            "rise_epochs must be at most the 2",
        ),
    ],
)
def test_a_wrong_recipe_names_the_key(source: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        parse_recipe(source)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_recipes(name: str) -> None:
    recipe = read_recipe(files("safe_core.study") / "recipes" / name)
    digits = name.endswith("-digits.toml")
    assert digits == (recipe.data.name == "digits")
    assert digits or f"{name.removesuffix('.toml')}-digits.toml" in RECIPES or "cifar" in name
    labels = {entry.label for entry in recipe.methods}
    measured_elsewhere = {"PBW", "MLPrune", "LTH"}
    assert {quote.method for quote in recipe.quoted} <= labels | measured_elsewhere


@pytest.mark.parametrize("name", ["table-3", "table-7", "table-8", "figure-1", "figure-4"])
def test_studies_on_digits_run(name: str, tmp_path: Path) -> None:
    """As they are, but for a narrow network that sees one batch an epoch."""
    whole = read_recipe(files("safe_core.study") / "recipes" / f"{name}-digits.toml")
    recipe = replace(
        whole,
        data=replace(whole.data, train_images=64),
        model=replace(whole.model, width=0.1),
        evaluation=replace(whole.evaluation, flatness_images=64),
        sparsities=whole.sparsities[-1:],
        seeds=(0,),
        frameworks=("torch",),
    )
    results = {cell: run_cell(recipe, cell) for cell in cells(recipe)}
    assert len(results) == len(recipe.methods)
    for cell, found in results.items():
        assert set(recipe.evaluation.metrics()) <= found.keys()
        wanted = int(Fraction(str(cell.sparsity or 0)) * found["weights"])
        assert (cell.method, found["zeros"]) == (cell.method, wanted)
    (caption,) = {table.caption.split(":")[0] for table in tables(recipe, results)}
    assert caption == recipe.title
    drawn = {path.stem.split("_")[0] for path in figures.draw(recipe, results, tmp_path)}
    assert drawn >= {"figure-1": {"landscape", "weights"}, "figure-4": {"history"}}.get(name, set())


def test_every_part_is_attacked_from_a_start_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    class Fooled:
        def attacked(self, attack: Any, images: Any, labels: Any, seed: int) -> Any:
            starts.append(seed)
            return images

        def logits(self, images: Any) -> Any:
            return np.eye(10)[np.zeros(len(images), int)]

    recipe = parse_recipe(TINY)
    made = plan(recipe, cells(recipe)[0])
    monkeypatch.setattr(measuring, "_BATCH", 200)
    found = measuring._attacked(Attack("linf", 0.1), made, Fooled())
    assert found == 100 * float(np.mean(made.data.test.labels == 0))
    assert starts[0] == made.seed
    assert len(set(starts)) == 3


def test_methods_are_built_with_their_schedules() -> None:
    recipe = read_recipe(files("safe_core.study") / "recipes" / "table-8.toml")
    by_label = {entry.label: entry for entry in recipe.methods}
    size = {"epochs": 200, "steps_per_epoch": 390, "seed": 1}
    safe = by_label["SAFE+SG"].build(0.99, **size)
    assert safe.constraint.penalty == schedules.cosine(1e-2, steps=78000)
    assert [e.point for e in safe.evaluations] == ["x", "x + e", "C(x)"]
    assert safe.perturbation.rho(0) == 0.1
    multi = by_label["CrAM+ Multi"].build(0.95, **size)
    assert multi.sparsity.sparsity.values == (0.5, 0.7, 0.8, 0.9, 0.95)
    assert multi.evaluations == (("x", "replace"), ("C(x + e)", "add"))


def test_a_method_takes_where_weights_compete() -> None:
    tables = [{"method": "gmp", "scope": "tensor", "distribution": "erdos_renyi_kernel"}]
    pattern = read_entries(tables)[0].build(0.9, epochs=2, steps_per_epoch=4, seed=0).sparsity
    assert (pattern.scope, pattern.distribution) == ("tensor", "erdos_renyi_kernel")
    assert pattern.sparsity == schedules.cubic(0.9, steps=8, every=4)


METHODS = """
from safe_core import imp_sam, schedules

def in_rounds(sparsity, steps, epochs, steps_per_epoch, *, rounds=2, rho=0.1):
    every = epochs // rounds * steps_per_epoch
    return imp_sam(schedules.linear_sparsity(sparsity, steps=steps, every=every), rho=rho)

def nothing(sparsity):
    return None

def labelled(sparsity, label):
    return None
"""
BY_HAND = changed(
    '"dense"',
    '"sub/mine.py:in_rounds"\nrounds = 1\nrho = { "0.8" = 0.2, default = 0.3 }',
)


@pytest.fixture
def sub(tmp_path: Path) -> Path:
    """A folder with a file of methods."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(METHODS)
    return tmp_path / "sub"


def test_a_method_may_be_a_function_of_ones_own(
    tmp_path: Path, sub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(BY_HAND, tmp_path)
    entry = recipe.methods[0]
    assert entry.label == "in_rounds"
    found = entry.build(0.9, epochs=2, steps_per_epoch=3, seed=0)
    assert found.sparsity.sparsity == schedules.linear_sparsity(0.9, steps=6, every=6)
    assert found.perturbation.rho(0) == 0.3
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(BY_HAND).digest("in_rounds", 0.9) == recipe.digest("in_rounds", 0.9)
    monkeypatch.setattr(runner, "run_cell", lambda *_, **__: {"accuracy": 50.0, "losses": [1.0]})
    out = tmp_path / "out"
    run_study(BY_HAND, out, folder=tmp_path)
    (sub / "mine.py").write_text(METHODS + "# another line")
    assert parse_recipe(BY_HAND).digest("in_rounds", 0.9) != recipe.digest("in_rounds", 0.9)
    with pytest.raises(ValueError, match="and the method files of this"):
        run_study(BY_HAND, out)
    (sub / "mine.py").unlink()
    write_report(out)
    assert "| in_rounds | **50.00 ± 0.00** |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mine.py:other", r"method: .*mine\.py must have the function 'other', got: in_rounds, la"),
        ("mine.py:", r"methods\[0\]\.method must end in a function, .* got 'mine\.py:'"),
        ("yours.py:f", r"methods\[0\]\.method must name an existing file, got 'yours\.py:f'"),
        ("no.such:f", r"methods\[0\]\.method must name a file, .* got 'no\.such:f'"),
        ("mine.py:labelled", "must not have the parameter label, which is a key of every method"),
        (
            "mine.py:nothing",
            r"\(nothing\) at sparsity 0\.8: method must return a safe_core",
        ),
        (
            'mine.py:in_rounds"\nround = "3',
            "round is not a parameter of in_rounds, which takes: rounds, rho",
        ),
        ("broken.py:f", r"broken\.py must be importable, got NameError: .* \(line 2\)"),
    ],
)
def test_a_wrong_function_names_the_key(sub: Path, method: str, message: str) -> None:
    (sub / "broken.py").write_text("\nraise Undefined")
    with pytest.raises((TypeError, ValueError), match=message):
        parse_recipe(changed('"dense"', f'"{method}"'), sub)


def test_fractions_and_patterns_take_each_their_own_options() -> None:
    table = {"method": "admm", "scope": "row", "ragged": "dense", "penalty": {"0.90": 1, "2:4": 2}}
    (entry,) = read_entries([table])
    size = {"epochs": 2, "steps_per_epoch": 4, "seed": 0}
    built = entry.build(0.9, **size), entry.build("2:4", **size)
    assert [method.sparsity for method in built] == [
        Unstructured(0.9, "row"),
        NM(2, 4, ragged="dense"),
    ]
    assert [method.constraint.penalty(0) for method in built] == [1, 2]
    with pytest.raises(ValueError, match=r"admm\) at sparsity 0\.9: ragged must be one of 'error'"):
        read_entries([table | {"ragged": "no"}])[0].build(0.9, **size)


def test_parameters_are_chosen_on_training_images_that_are_not_trained_on() -> None:
    source = changed("train_images = 96", "train_images = 96\nvalidation = 0.25")
    recipe, whole = parse_recipe(source), parse_recipe(TINY)
    made, full = plan(recipe, cells(recipe)[0]), plan(whole, cells(whole)[0])
    np.testing.assert_array_equal(made.data.train.images, full.data.train.images[:72])
    np.testing.assert_array_equal(made.data.test.images, full.data.train.images[72:])
    assert made.steps_per_epoch == 2
    with pytest.raises(ValueError, match="batch_size must be at most the 0 training images"):
        plan(parse_recipe(source.replace("0.25", "1")), cells(recipe)[0])


def test_a_method_may_have_settings_of_training_of_its_own(tmp_path: Path) -> None:
    recipe = parse_recipe(OWN)
    dense, safe = (plan(recipe, cells(recipe)[i]) for i in (0, 2))
    assert (dense.training.epochs, dense.steps_per_epoch, len(dense.rates())) == (2, 3, 6)
    assert (safe.training.epochs, safe.steps_per_epoch, len(safe.rates())) == (3, 6, 18)
    assert safe.training.weight_decay == 1e-4
    assert safe.method.constraint.penalty == schedules.cosine(1e-2, steps=18)
    other = parse_recipe(OWN.replace("epochs = 3", "epochs = 4"))
    assert recipe.digest("SAFE", 0.8) != other.digest("SAFE", 0.8)
    assert recipe.digest("dense", None) == other.digest("dense", None)
    by_hand = {"accuracy": 50.0, "losses": [1.0]}
    for cell in cells(recipe):
        append_result(tmp_path / "results.jsonl", recipe, cell, by_hand)
    (tmp_path / "recipe.toml").write_text(OWN)
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "; SAFE trained with epochs = 3, batch_size = 16." in markdown


def test_progress_counts_the_epochs_of_each_method() -> None:
    recipe = parse_recipe(OWN)
    left = {cell: recipe.training_of(cell.method).epochs for cell in cells(recipe)}
    with Progress(console=Console(file=StringIO())) as progress:
        bar = StudyBar(progress, runs=14, left=left)
        assert (progress.tasks[0].total, bar.done) == (8 * 3 + 4 * 2, 2)
        bar.finished(cells(recipe)[2], {"diverged": True, "losses": [1.0]})
        assert (progress.tasks[0].completed, bar.done) == (2, 3)


def test_a_missing_folder_is_refused_before_training() -> None:
    source = changed('"digits"', '"cifar-10"') + '[evaluation]\ncorruption_folder = "none"\n'
    recipe = parse_recipe(source)
    with pytest.raises(ValueError, match=r"corruption_folder must exist, got 'none'"):
        plan(recipe, cells(recipe)[0])


def test_learning_rates() -> None:
    common = {"epochs": 4, "batch_size": 2, "learning_rate": 1.0}
    step = Training(**common, schedule="step", milestones=(2, 3), warmup_epochs=1)
    rates = [step.rate(t, steps_per_epoch=2) for t in range(8)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    line = Training(**common, schedule="linear")
    assert [line.rate(t, 1) for t in range(4)] == [1, 0.75, 0.5, 0.25]


class Killed(BaseException):
    """Not an error that a run may have."""


def test_no_run_is_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []

    def fake(recipe: Any, cell: Cell, **_: Any) -> dict[str, Any]:
        if len(ran) == 5:
            raise Killed
        ran.append(cell)
        return {"accuracy": 50.0, "losses": [1.0]}

    monkeypatch.setattr(runner, "run_cell", fake)
    with pytest.raises(Killed):
        run_study(TINY, tmp_path)
    file = tmp_path / "results.jsonl"
    with file.open("a") as out:
        out.write('{"recipe": "cut off by a k')
    first, ran[:] = list(ran), []
    with pytest.raises(Killed):
        run_study(TINY, tmp_path)
    second, ran[:] = list(ran), []
    run_study(changed('"Tiny"', '"A new title"'), tmp_path)
    planned = cells(parse_recipe(TINY))
    assert [*first, *second, *ran] == planned
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [Cell(**line["cell"]) for line in lines] == planned
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"results of dense, seed 0, torch with other settings"):
        run_study(changed("epochs = 2", "epochs = 3"), tmp_path)
    assert file.read_bytes() == before


def test_a_study_may_grow_and_shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []

    def fake(recipe: Any, cell: Cell, **_: Any) -> dict[str, Any]:
        ran.append(cell)
        return {"accuracy": 50.0, "losses": [1.0]}

    monkeypatch.setattr(runner, "run_cell", fake)
    run_study(TINY, tmp_path)
    planned, ran[:] = cells(parse_recipe(TINY)), []
    penalty = '"0.8" = 1e-2'
    grown = changed("[0, 1]", "[0, 2, 1]").replace("[0.8, 0.9]", "[0.8, 0.85, 0.9]")
    grown = grown.replace(penalty, f'{penalty}, "0.7" = 1.0') + '[[methods]]\nmethod = "admm"\n'
    found = run_study(grown, tmp_path)
    assert list(found) == cells(parse_recipe(grown))
    assert ran == [cell for cell in found if cell not in planned]
    ran.clear()
    assert list(run_study(TINY, tmp_path)) == planned
    assert ran == []
    with pytest.raises(ValueError, match=r"results of SAFE at 0\.8, seed 0, torch with other"):
        run_study(grown.replace(penalty, '"0.8" = 2e-2'), tmp_path)
    assert list(run_study(grown.replace('"0.7" = 1.0', '"0.7" = 2.0'), tmp_path)) == list(found)


def test_a_run_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(runner, "run_cell", fails)
    with pytest.raises(ValueError, match="no such thing") as caught:
        run_study(TINY, tmp_path)
    assert caught.value.__notes__ == ["in dense, seed 0, torch; the runs before it are kept"]


def test_a_run_that_fails_beside_others_costs_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, started = cells(parse_recipe(TINY)), Event()

    def work(_: Any, cell: Cell, __: Any) -> dict[str, Any]:
        if cell == planned[0]:
            started.wait(10)
            raise ValueError("no such thing")
        started.set()
        sleep(0.4 if cell == planned[1] else 0.1)
        return {"accuracy": 50.0, "losses": [1.0]}

    monkeypatch.setattr(runner, "_work", work)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    with pytest.raises(ValueError, match="no such thing") as caught:
        run_study(TINY, tmp_path, jobs=2)
    assert caught.value.__notes__ == ["in dense, seed 0, torch; the runs before it are kept"]
    found = read_results(tmp_path / "results.jsonl", parse_recipe(TINY))
    assert planned[1] in found
    assert len(found) < 4


def test_a_study_that_is_stopped_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_cell", stopped)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    result = CliRunner().invoke(app, ["study", str(path), "--out", str(tmp_path)])
    assert (result.exit_code, "run the same command to continue" in result.stderr) == (130, True)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert "must hold at least one finished run, got none" in result.stderr


def test_a_report_leaves_a_line_that_is_being_written(tmp_path: Path) -> None:
    made_results(tmp_path)
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes() + b'{"recipe": "be')
    before = file.read_bytes()
    write_report(tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_unknown_device_is_refused(framework: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be available to \w+, got 'abacus'"):
        run_study(changed('"torch"', f'"{framework}"'), tmp_path, device="abacus")


def leaves(tree: Any) -> list[np.ndarray]:
    return [x for k in sorted(tree) for x in leaves(tree[k])] if isinstance(tree, dict) else [tree]


def small_plan(method: str, network: Any, evaluation: str = "") -> tuple[Any, Plan]:
    """A recipe, and the plan of a run of its sparse method with a network of choice."""
    source = changed('"safe"', f'"{method}"').replace("rate = 0.1", "rate = 0.01") + evaluation
    recipe = parse_recipe(source)
    made = plan(recipe, Cell("jax", 0.5, "SAFE", 0.8, 1))
    few = Split(*(part[:64] for part in made.data.test))
    return recipe, replace(made, architecture=network, data=made.data._replace(test=few))


NORMED = ResNet(8, width=0.25, image=(8, 8, 1))


@pytest.mark.usefixtures("single_precision")
def test_frameworks_agree() -> None:
    """With gradients at three points, and running statistics of the first alone."""
    _, made = small_plan("safe_sg", NORMED)
    learners = TorchLearner(made), JaxLearner(made)
    for images, labels in made.batches(0):
        losses = [float(learner.step(images, labels)) for learner in learners]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    for both in [[x.variables() for x in learners], [x.projected() for x in learners]]:
        for a, b in zip(*map(leaves, both), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.usefixtures("single_precision")
def test_frameworks_measure_alike() -> None:
    recipe, made = small_plan(
        "safe",
        NORMED,
        "[evaluation]\nbatch_norm_tuning = true\nbatch_norm_samples = 64\nflatness_images = 32\n"
        'flatness = ["sharpness"]\nattacks = [{norm = "linf", radius = 0.1, steps = 2}]\n',
    )
    variables = made.initial_variables()
    found = [
        measure(
            recipe.evaluation,
            made,
            lambda v, side=side: side(made.architecture, made.normalisation, v),
            variables,
            variables,
        )
        for side in (TorchSubject, JaxSubject)
    ]
    assert found[0].keys() == found[1].keys() >= set(recipe.evaluation.metrics()) - {"seconds"}
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], rtol=1e-3, err_msg=name)
    untuned = replace(recipe.evaluation, batch_norm_tuning=False)
    other = measure(
        untuned,
        made,
        lambda v: TorchSubject(made.architecture, made.normalisation, v),
        variables,
        variables,
    )
    assert abs(other["sharpness"] / found[0]["sharpness"] - 1) > 0.01


def test_command_line_from_recipe_to_report(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(
        changed("seeds = [0, 1]", "seeds = [0]")
        .replace("[0.8, 0.9]", "[0.9]")
        .replace(", 0.5]", "]")
        + "[evaluation]\nhistory_epochs = 1\nweight_bins = 5\nlandscape_points = 3\n"
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["study", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "2/2 SAFE at 0.9, seed 0, torch" in result.stderr
    recipe = parse_recipe(path.read_text())
    found = read_results(out / "results.jsonl", recipe)
    safe = found[Cell("torch", 0.0, "SAFE", 0.9, 0)]
    assert safe["zeros"] == int(0.9 * safe["weights"])
    assert [point["epoch"] for point in safe["history"]] == [1, 2]
    assert safe["history"][-1]["accuracy"] == safe["accuracy"]
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    assert f"| SAFE | {safe['accuracy']:.2f} |" in result.stdout
    figures = {p.name for p in out.glob("*.p[dn][fg]")}
    wanted = {"accuracy", "history_distance_0.9", "landscape", "weights"}
    assert {f"{name}.{kind}" for name in wanted for kind in ("png", "pdf")} <= figures
    refused = CliRunner().invoke(app, ["study", "table-99"])
    assert refused.exit_code == 1
    assert "recipe must be an existing file, or one of figure-1, " in refused.stderr


def made_results(out: Path) -> None:
    """Three methods, two seeds and a quote; one seed of the last method diverged."""
    source = TINY.replace(", 0.5]", "]") + '[[methods]]\nmethod = "admm"\nlabel = "AD_MM"\n'
    quote = '[[quoted]]\nsource = "Lee"\nmethod = "{0}"\nnoise = {1}\nvalues = {2}\n'
    source += quote.format("PBW", 0, '{"0.90" = [99.0, 0.25]}')
    source += quote.format("Elsewhere", 0.25, '{"0.9" = 1}') + quote.format("At", 0, '{"0.7" = 1}')
    (out / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    means = {"dense": 98.0, "SAFE": 97.0, "AD_MM": 95.0}
    for cell in cells(recipe):
        result: dict[str, Any] = {"accuracy": means[cell.method] + cell.seed}
        if cell.method == "AD_MM" and cell.sparsity == 0.9 and cell.seed:
            result = {"diverged": True, "losses": []}
        append_result(out / "results.jsonl", recipe, cell, result)


def test_report(tmp_path: Path) -> None:
    made_results(tmp_path)
    files = write_report(tmp_path)
    assert all(file.stat().st_size for file in files)
    markdown = (tmp_path / "report.md").read_text()
    assert "| dense | 98.50 ± 0.50 | 98.50 ± 0.50 |" in markdown
    assert "| SAFE | **97.50 ± 0.50** | **97.50 ± 0.50** |" in markdown
    assert "| AD_MM | <u>95.50 ± 0.50</u> | <u>95.00 (1)</u> |" in markdown
    assert "| PBW (quoted 1) | - | 99.00 ± 0.25 |" in markdown
    assert "Elsewhere" not in markdown
    assert "At (quoted" not in markdown
    assert "\nMean and standard error over 2 seeds;" in markdown
    assert "quoted 1: from Lee, not measured here" in markdown
    latex = (tmp_path / "report.tex").read_text()
    assert r"SAFE & $\mathbf{97.50} \pm 0.50$ & $\mathbf{97.50} \pm 0.50$ \\" in latex
    assert r"AD\_MM & $\underline{95.50} \pm 0.50$ & $\underline{95.00}$ (1) \\" in latex
    assert r"method & 80\% & 90\% \\" in latex


def test_figures_of_sweeps(tmp_path: Path) -> None:
    swept = '[[methods]]\nmethod = "admm"\nlabel = "{0}"\nscope = "{1}"\nsweep = {2}\n'
    source = TINY.split("[[methods]]")[0].replace(", 0.5]", "]") + '[[methods]]\nmethod = "dense"\n'
    source += swept.format("A", "global", "{ penalty = [0.1, 1, 10] }")
    source += swept.format("B", "row", "{ penalty = [1, 0.1] }")
    source += swept.format("C", "row", "{ relaxation = [0.5, 1] }")
    recipe = parse_recipe(source)
    by_label = {entry.label: 50.0 + i for i, entry in enumerate(recipe.methods)}
    assert [entry.family for entry in recipe.methods] == ["dense", *"AAABBCC"]
    results = {c: {"accuracy": by_label[c.method], "distance": 1.0} for c in cells(recipe)}
    results |= {c: {"diverged": True} for c in results if c.method == "B, penalty = 0.1"}
    found = figures._metrics(recipe, results, "")
    assert list(found) == ["accuracy_by_penalty", "accuracy_by_relaxation"]
    (axes,) = found["accuracy_by_penalty"].axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert lines["A, 80%"] == [[0.1, 51.0], [1.0, 52.0], [10.0, 53.0]]
    np.testing.assert_equal(lines["B, 90%"], [[1.0, 54.0], [0.1, np.nan]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "1", "10"]
    half = {c: r for c, r in results.items() if c.method in ("dense", "A, penalty = 1")}
    (axes,) = figures._metrics(recipe, half, "")["accuracy_by_penalty"].axes
    assert [c.get_label() for c in axes.containers] == ["A, 80%", "A, 90%"]


def test_report_of_a_part(tmp_path: Path) -> None:
    source = changed('"SAFE"', '"S|{_}^2\\\\"').replace(", 0.5]", "]")
    (tmp_path / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    for cell in cells(recipe)[:3]:
        append_result(tmp_path / "results.jsonl", recipe, cell, {"accuracy": 50.0})
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| S\\|{_}^2\\ | 50.00 | - |" in markdown
    assert "\nMean and standard error over 1 to 2 of 2 seeds." in markdown
    name = r"S\textbar{}\{\_\}\textasciicircum{}2\textbackslash{} &"
    assert name in (tmp_path / "report.tex").read_text()


def test_report_by_noise_and_metric(tmp_path: Path) -> None:
    source = TINY + '[report]\nrows = ["sparsity", "method"]\ncolumns = "noise"\n'
    source += 'metrics = ["accuracy", "distance"]\n'
    (tmp_path / "recipe.toml").write_text(source)
    recipe = parse_recipe(source)
    for cell in cells(recipe):
        result = {"accuracy": 50 + 10 * cell.noise + cell.seed, "distance": 0.0123}
        append_result(tmp_path / "results.jsonl", recipe, cell, result)
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "**Tiny: accuracy, %**" in markdown
    assert "| sparsity | method | 0% label noise | 50% label noise |" in markdown
    assert "| 80% | SAFE | 50.50 ± 0.50 | 55.50 ± 0.50 |" in markdown
    assert "| 80% | SAFE | 0.01230 ± 0.00000 | 0.01230 ± 0.00000 |" in markdown


def test_report_tells_where_the_frameworks_differ(tmp_path: Path) -> None:
    source = TINY.replace('["torch"]', '["torch", "jax"]').replace(", 0.5]", "]")
    recipe = parse_recipe(source)
    means = {  # (PyTorch, JAX) of the first seed; that of the second is 2 higher
        ("dense", None): (98.0, 98.9),
        ("SAFE", 0.8): (90.0, 94.3),  # three joint standard errors are 4.24
        ("SAFE", 0.9): (90.0, 94.2),
    }
    results = {
        cell: {
            "accuracy": means[cell.method, cell.sparsity][cell.framework == "jax"] + 2 * cell.seed
        }
        for cell in cells(recipe)
    }
    found = agreement(recipe, results)
    assert (found.compared, round(found.largest, 9), found.apart) == (3, 4.3, ["SAFE at 80%"])
    alone = {cell: result for cell, result in results.items() if cell.framework == "torch"}
    assert agreement(recipe, alone) is None
    exact = {cell: {"accuracy": means[cell.method, cell.sparsity][0]} for cell in cells(recipe)}
    lost = {cell: {} if cell.method == "dense" else result for cell, result in exact.items()}
    assert agreement(recipe, lost).apart == []  # all seeds of both diverged
    key = next(c for c in lost if c.method == "SAFE" and c.framework == "jax")
    again = {**lost, **{c: {} for c in lost if c._replace(seed=0) == key._replace(seed=0)}}
    assert agreement(recipe, again).apart == [f"SAFE at {100 * key.sparsity:g}%"]
    for cell, result in results.items():
        append_result(tmp_path / "results.jsonl", recipe, cell, result)
    (tmp_path / "recipe.toml").write_text(source)
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "PyTorch and JAX agree in 2 of 3 accuracies" in markdown
    assert markdown.endswith("They do not in: SAFE at 80%.\n")


def test_quotes_are_what_the_paper_prints() -> None:
    content = tomllib.loads((files("safe_core.study") / "recipes" / "table-2.toml").read_text())
    safe = [q for q in content["quoted"] if q["method"] == "SAFE" and q["noise"] == 0.75]
    assert safe[0]["values"]["0.9"] == [64.72, 0.61]
