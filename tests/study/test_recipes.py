"""Recipes: which are refused, and the methods and settings that they build."""

from __future__ import annotations

import pickle
from dataclasses import replace
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_recipe import OWN, RECIPES, TINY, changed

import safe_core
import safe_core.study.runner.figures as figures
import safe_core.study.runner.run as runner
from safe_core import NM, Unstructured, schedules
from safe_core.study.runner import cells, parse_recipe, read_recipe, run_study, write_report
from safe_core.study.runner.methods import read_entries
from safe_core.study.runner.plan import plan
from safe_core.study.runner.results import append_line
from safe_core.study.runner.statistics import tables
from safe_core.study.runner.train import run_cell
from safe_core.study.runner.training import Training


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("title =", "recipe must be TOML"),
        (changed('title = "Tiny"', ""), "title is missing in recipe"),
        ("colour = 3\n" + TINY, "colour is not a key of recipe, which takes: title, data, model"),
        (
            changed("width", "depth"),
            r"model\.depth is not a key of model, which takes: name, options, width, dense_layers",
        ),
        (changed('"digits"', '"svhn"'), r"data\.name must be one of 'digits', 'mnist', .*'svhn'"),
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
        (
            changed("default", '"0.91"'),
            r'penalty \(SAFE\) must have keys that are sparsities of the study, 0\.8, .*"0\.91"',
        ),
        (changed(", default = 1e-1", ""), r'penalty must have a value for sparsity "0\.9"'),
        (changed("interval = 2", "interval = 0"), r"methods\[1\] \(SAFE\) at sparsity 0\.8: dual_"),
        (changed("[0.8, 0.9]", '[0.8, "4:2"]'), r"sparsities\[1\]: .*4:2"),
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
        (changed("rate = 0.1", "rate = 0.1\neps = 1e-3"), r"training\.eps must come .* not sgd"),
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
    twin = f"{name.removesuffix('.toml').removesuffix('-mnist-5k')}-digits.toml"
    assert digits or twin in RECIPES or "cifar" in name
    labels = {entry.label for entry in recipe.methods}
    measured_elsewhere = {"PBW", "MLPrune", "LTH"}
    assert {quote.method for quote in recipe.quoted} <= labels | measured_elsewhere


@pytest.mark.parametrize("name", ["adasap", "sassha"])
def test_settings_on_images_of_mnist_are_those_of_the_digits(name: str) -> None:
    folder = files("safe_core.study") / "recipes"
    digits, mnist = (read_recipe(folder / f"{name}-{data}.toml") for data in ("digits", "mnist-5k"))
    assert replace(mnist.data, name="digits") == digits.data
    assert mnist.frameworks == ("torch",)
    own = {"title": digits.title, "data": digits.data, "frameworks": digits.frameworks}
    assert replace(mnist, **own) == digits


@pytest.mark.parametrize(
    "name",
    [
        "table-3",
        "figure-1",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("table-7", "table-8", "figure-4")
        ),
    ],
)
def test_studies_on_digits_run(name: str, tmp_path: Path) -> None:
    """A recipe runs as it is, with a narrow network and one batch an epoch."""
    whole = read_recipe(files("safe_core.study") / "recipes" / f"{name}-digits.toml")
    recipe = replace(
        whole,
        data=replace(whole.data, train_images=64),
        model=replace(whole.model, width=0.1),
        evaluation=replace(whole.evaluation, flatness_images=64),
        seeds=(0,),
        frameworks=("torch",),
    )
    last = (None, whole.sparsities[-1])
    results = {cell: run_cell(recipe, cell) for cell in cells(recipe) if cell.sparsity in last}
    assert len(results) == len(recipe.methods)
    for cell, found in results.items():
        assert set(recipe.evaluation.metrics()) <= found.keys()
        wanted = int(Fraction(str(cell.sparsity or 0)) * found["weights"])
        assert (cell.method, found["zeros"]) == (cell.method, wanted)
    (caption,) = {table.caption.split(":")[0] for table in tables(recipe, results)}
    assert caption == recipe.title
    drawn = {path.stem.split("_")[0] for path in figures.draw(recipe, results, tmp_path)}
    assert drawn >= {"figure-1": {"landscape", "weights"}, "figure-4": {"history"}}.get(name, set())


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_the_study_of_sassha_runs_for_an_epoch(framework: str) -> None:
    whole = read_recipe(files("safe_core.study") / "recipes" / "sassha-digits.toml")
    recipe = replace(
        whole,
        data=replace(whole.data, train_images=128, label_noise=(0.5,)),
        model=replace(whole.model, width=0.1),
        training=replace(whole.training, epochs=1, warmup_epochs=0),
        evaluation=replace(whole.evaluation, flatness_images=64),
        seeds=(0,),
        frameworks=(framework,),
    )
    found = {cell.method: run_cell(recipe, cell) for cell in cells(recipe)}
    assert list(found) == ["SGD", "SAM", "AdamW", "Sassha", "Sassha, published eps"]
    assert len({result["losses"][0] for result in found.values()}) == 5
    for result in found.values():
        assert result["zeros"] == 0
        assert result["accuracy"] == result["dense_accuracy"]
        assert result["eigenvalue"] > 0


@pytest.mark.every_second
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sassha"])
def test_eps_reaches_the_optimizer(optimizer: str, framework: str) -> None:
    def first_losses(extra: str) -> list[float]:
        table = f'optimizer = "{optimizer}"\nlearning_rate = 0.01{extra}'
        recipe = parse_recipe(changed("learning_rate = 0.1", table))
        recipe = replace(recipe, frameworks=(framework,))
        return run_cell(recipe, cells(recipe)[0])["losses"]

    assert first_losses("\neps = 10.0") != first_losses("")
    without = parse_recipe(TINY)
    assert "training.eps" not in without.settings("dense", None)


def test_dense_training_may_perturb() -> None:
    tables = [{"method": "dense", "sweep": {"rho": [0.0, 0.1]}}]
    plain, sam = (e.build(None, epochs=2, steps_per_epoch=4, seed=0) for e in read_entries(tables))
    assert plain is None
    assert sam == safe_core.Method(0.0, safe_core.AtEnd(), perturbation=safe_core.SAM(0.1))
    source = changed('method = "dense"', 'method = "dense"\nrho = 0.1')
    settings = [parse_recipe(text).settings("dense", None) for text in (TINY, source)]
    assert settings[1] == {**settings[0], "method.rho": 0.1}
    with pytest.raises(ValueError, match=r"methods\[0\] \(dense\): rho must be a finite number"):
        parse_recipe(source.replace("rho = 0.1", "rho = -0.1"))


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
    tmp_path: Path,
    sub: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = parse_recipe(BY_HAND, tmp_path)
    entry = recipe.methods[0]
    assert entry.label == "in_rounds"
    found = entry.build(0.9, epochs=2, steps_per_epoch=3, seed=0)
    assert found.sparsity.sparsity == schedules.linear_sparsity(0.9, steps=6, every=6)
    assert found.perturbation.rho(0) == 0.3
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    monkeypatch.chdir(tmp_path)
    settings = recipe.settings("in_rounds", 0.9)
    assert parse_recipe(BY_HAND).settings("in_rounds", 0.9) == settings

    def fake(_: Any, unit: Any, **__: Any) -> Any:
        ran.append(unit)
        return {cell: {"accuracy": 50.0, "losses": [1.0]} for cell in unit}

    ran: list[Any] = []
    monkeypatch.setattr(runner, "run_unit", fake)
    out = tmp_path / "out"
    run_study(BY_HAND, out, folder=tmp_path)
    own, everything = 2 * 2 * 2, len(ran)
    (sub / "mine.py").write_text(METHODS.replace("return None", "return 1") + "# another line")
    assert parse_recipe(BY_HAND).settings("in_rounds", 0.9) == settings
    run_study(BY_HAND, out)
    assert len(ran) == everything
    (sub / "mine.py").write_text(METHODS.replace("rounds=2", "rounds=3"))
    assert parse_recipe(BY_HAND).settings("in_rounds", 0.9) != settings
    run_study(BY_HAND, out)
    assert [unit[0].method for unit in ran[everything:]] == ["in_rounds"] * own
    assert "the code of mine.py:in_rounds changed" in capsys.readouterr().err
    with (out / "code" / "mine.py").open("a") as file:
        file.write("raise SystemExit('a report runs nothing')\n")
    write_report(out)
    assert (
        "The results of 8 runs with other settings do not count" in (out / "report.md").read_text()
    )
    (out / "code" / "mine.py").write_bytes((sub / "mine.py").read_bytes())
    (sub / "mine.py").unlink()
    write_report(out)
    assert r"| in\_rounds | **50.00 ± 0.00** |" in (out / "report.md").read_text()


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


@pytest.mark.parametrize("method", ["safe", "safe_sg", "admm"])
def test_numbers_are_derived_from_the_steps_unless_a_penalty_is_given(method: str) -> None:
    size = {"epochs": 20, "steps_per_epoch": 40, "seed": 0}
    make = safe_core.admm if method == "admm" else safe_core.safe
    own = {"projected_gradient": True} if method == "safe_sg" else {}
    given: list[dict[str, Any]] = [{}, {"dual_update_interval": 9}]
    given += [] if method == "admm" else [{"rho": 0.2}]
    for options in given:
        (entry,) = read_entries([{"method": method, **options}])
        assert entry.build(0.9, **size) == make(0.9, steps=800, **own, **options)
        (entry,) = read_entries([{"method": method, "penalty": 0.1, **options}])
        assert entry.build(0.9, **size) == make(0.9, penalty=0.1, **own, **options)
    (entry,) = read_entries([{"method": method, "penalty": 0.1, "penalty_schedule": "cosine"}])
    penalty = safe_core.schedules.cosine(0.1, steps=800)
    assert entry.build(0.9, **size) == make(0.9, penalty=penalty, **own)


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
    (entry,) = read_entries([{"method": "admm", "floor": 0.25, "penalty": 1}])
    assert entry.build(0.9, **size).sparsity == Unstructured(0.9, floor=0.25)
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
    assert recipe.settings("SAFE", 0.8) != other.settings("SAFE", 0.8)
    assert recipe.settings("dense", None) == other.settings("dense", None)
    by_hand = {"accuracy": 50.0, "losses": [1.0]}
    for cell in cells(recipe):
        append_line(tmp_path / "results.jsonl", recipe, cell, by_hand)
    (tmp_path / "recipe.toml").write_text(OWN)
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert r"; SAFE trained with epochs = 3, batch\_size = 16." in markdown


def test_learning_rates() -> None:
    common = {"epochs": 4, "batch_size": 2, "learning_rate": 1.0}
    step = Training(**common, schedule="step", milestones=(2, 3), warmup_epochs=1)
    rates = [step.rate(t, steps_per_epoch=2) for t in range(8)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    line = Training(**common, schedule="linear")
    assert [line.rate(t, 1) for t in range(4)] == [1, 0.75, 0.5, 0.25]
