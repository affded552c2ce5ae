"""The demo trains what its protocol says, alike in both frameworks."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import safe_core
from safe_core.demo import data, figures, report, study, train_jax, train_torch
from safe_core.demo.recipe import CHOSEN, TRAINED, Recipe, Run
from safe_core.demo.run import demo

TINY = Recipe(
    hidden=(16, 8),
    epochs=2,
    warmup_epochs=1,
    dual_update_interval=8,
    penalties=(0.1,),
    rises=(0.5,),
    sparsities=(0.9,),
    seeds=(0,),
)
METHODS = ["dense", "one-shot", "fine-tuned", "gmp", "admm", "published", "safe"]
TRAINERS = {"torch": train_torch.train, "jax": train_jax.train}


def test_split_and_batches_follow_the_protocol():
    run = Run("dense", noise=0.0, seed=0)
    full = data.load(Recipe(), run)
    assert len(full.labels) == 1257
    assert len(full.test[1]) == 540
    np.testing.assert_allclose(full.inputs.mean(axis=0), 0, atol=1e-6)
    assert full.order.shape == (60 * (1257 // 64), 64)
    first_epoch = full.order[: 1257 // 64].ravel()
    assert len(set(first_epoch)) == len(first_epoch)
    held = data.load(Recipe(), Run("published", 0.0, 0, 0.9, 0.1, held_out=True))
    assert len(held.validation[1]) == 252
    assert len(held.labels) + len(held.validation[1]) == 1257


def test_label_noise_redraws_the_given_share_uniformly():
    clean, noisy = (data.load(Recipe(), Run("dense", noise, seed=0)) for noise in (0.0, 0.5))
    changed = np.mean(clean.labels != noisy.labels)
    # A uniform draw hits the old label once in ten times.
    assert changed == pytest.approx(0.45, abs=0.03)
    np.testing.assert_array_equal(clean.test[1], noisy.test[1])


def test_initialisation_is_that_of_he():
    layers = data.initial_layers(Recipe(), Run("dense", 0.0, 0), 64)
    assert [layer.weight.shape for layer in layers] == [(64, 300), (300, 100), (100, 10)]
    assert layers[0].weight.std() == pytest.approx(np.sqrt(2 / 64), rel=0.02)
    assert all((layer.bias == 0).all() for layer in layers)


def test_learning_rate_warms_up_and_decays_to_zero():
    recipe = Recipe()
    rates = [recipe.learning_rate_at(step, 19) for step in range(60 * 19 + 1)]
    assert max(rates) == rates[5 * 19 - 1] == rates[5 * 19] == pytest.approx(0.1)
    assert rates[0] == pytest.approx(0.1 / (5 * 19))
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_admm_differs_from_published_safe_in_the_perturbation_only():
    recipe = Recipe()
    admm, safe = (recipe.method(Run(m, 0.0, 0, 0.9, 0.1), 1140) for m in ("admm", "published"))
    assert admm.perturbation is None
    assert replace(safe, perturbation=None) == admm
    penalty = admm.constraint.penalty
    assert [penalty(step) for step in (0, 570, 1140)] == pytest.approx([0.0, 0.05, 0.1])
    assert recipe.candidates("admm") == recipe.candidates("published")


def test_safe_gets_the_sparsity_and_the_steps_and_nothing_else():
    assert Recipe().method(Run("safe", 0.0, 0, 0.9), 1140) == safe_core.safe(0.9, steps=1140)
    assert "safe" in TRAINED
    assert "safe" not in CHOSEN


@pytest.mark.parametrize(("rise", "last"), [(0.5, 576), (0.8, 896)])
def test_gmp_renews_its_mask_at_dual_updates_during_the_rise(rise, last):
    gmp, admm = (Recipe().method(Run(m, 0.0, 0, 0.99, rise), 1140) for m in ("gmp", "admm"))
    updates = [step for step in range(1140) if admm.is_due(step)]
    assert [step for step in range(1140) if gmp.is_due(step)] == [s for s in updates if s < last]
    assert last == pytest.approx(rise * 1140, abs=16)
    stages = last // 32
    for step in (0, 32, last // 2, last, 1140):
        left = max(0, 1 - step // 32 / stages)
        assert gmp.sparsity.sparsity(step) == pytest.approx(0.99 * (1 - left**3))


def test_methods_without_their_setting_are_refused():
    for method in CHOSEN:
        with pytest.raises(ValueError, match="setting must be given"):
            Recipe().method(Run(method, 0.0, 0, 0.9), 1140)
    with pytest.raises(ValueError, match="setting must be None"):
        Recipe().method(Run("safe", 0.0, 0, 0.9, 0.1), 1140)


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("method", "ascent_share"),
    [
        ("gmp", 1),
        ("dense", 1),
        ("published", 1),
        ("admm", 1),
        ("safe", 0.5),
        ("published", 0.5),
        ("safe", 1),
    ],
)
def test_frameworks_train_the_same_network(method, ascent_share):
    sparsity = None if method == "dense" else 0.9
    setting = {"gmp": 0.5, "safe": None}.get(method, 0.1)
    recipe, run = replace(TINY, ascent_share=ascent_share), Run(method, 0.0, 0, sparsity, setting)
    batches = data.load(recipe, run)
    start = data.initial_layers(recipe, run, 64)
    (torch_before, torch_after), (jax_before, jax_after) = (
        train(recipe, run, batches, start, "cpu") for train in TRAINERS.values()
    )
    for a, b, c in zip(torch_before, jax_before, start, strict=True):
        np.testing.assert_allclose(a.weight, b.weight, atol=1e-5)
        np.testing.assert_allclose(a.bias, b.bias, atol=1e-5)
        assert np.abs(a.weight - c.weight).max() > 1e-2
    size = sum(layer.weight.size for layer in start)
    for layers in (torch_after, jax_after):
        zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
        assert zeros == (0 if method == "dense" else size * 9 // 10)


@pytest.mark.parametrize("trainer", [train_torch, train_jax])
def test_hessian_product_matches_finite_differences(trainer):
    run = Run("dense", 0.0, 0)
    batches = data.load(TINY, run)
    layers = data.initial_layers(TINY, run, 64)
    size = study.parameter_count(layers)
    v = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    v /= np.linalg.norm(v)

    def moved(step: float) -> list[data.Layer]:
        parts, place = [], 0
        for weight, bias in layers:
            # torch orders weight (output, input) then bias, ravel_pytree bias then kernel.
            if trainer is train_torch:
                dw = v[place : place + weight.size].reshape(weight.shape[::-1]).T
                db = v[place + weight.size : place + weight.size + bias.size]
            else:
                db = v[place : place + bias.size]
                dw = v[place + bias.size : place + bias.size + weight.size].reshape(weight.shape)
            place += weight.size + bias.size
            parts.append(data.Layer(weight.astype(float) + step * dw, bias + step * db))
        return parts

    def loss(step: float) -> float:
        return data.cross_entropy(moved(step), batches.inputs.astype(float), batches.labels)

    h = 1e-5  # small, so that no ReLU switches
    expected = (loss(h) - 2 * loss(0.0) + loss(-h)) / h**2
    product = trainer.hessian_product(layers, batches, "cpu")(v)
    assert float(v @ product) == pytest.approx(expected, rel=0.02)


def test_largest_eigenvalue_is_that_of_the_matrix():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((50, 50)).astype(np.float32)
    matrix = matrix + matrix.T
    found = study.largest_eigenvalue(lambda v: matrix @ v, 50)
    assert found == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "best"),
    [("gmp", 0.5), ("gmp", 0.8), ("admm", 0.01), ("admm", 0.1), ("published", 0.1)],
)
def test_the_setting_is_chosen_on_held_out_data(method, best):
    recipe = Recipe(penalties=(0.1, 0.01), rises=(0.8, 0.5), seeds=(0, 1))
    tried = []

    def fit(run):
        tried.append(run)
        labels = np.zeros(10, np.int64)
        good = run.setting == best
        layer = data.Layer(np.zeros((1, 2), np.float32), np.asarray([good, not good], np.float32))
        empty = data.Dataset(*[np.zeros((10, 1))] * 3, (np.zeros((10, 1)), labels), ([], []))
        return empty, None, [layer], 0.0

    assert study.choose_setting(recipe, Run(method, 0.0, 0, 0.9), fit) == best
    values = (0.5, 0.8) if method == "gmp" else (0.01, 0.1)
    assert {(run.setting, run.seed, run.held_out) for run in tried} == {
        (value, seed, True) for value in values for seed in (0, 1)
    }


@pytest.mark.parametrize(("method", "lowest"), [("gmp", 0.5), ("admm", 0.01), ("published", 0.01)])
def test_of_equally_good_settings_the_lowest_is_chosen(method, lowest):
    recipe = Recipe(penalties=(0.1, 0.01), rises=(0.8, 0.5), seeds=(0,))
    layer = data.Layer(np.zeros((1, 2), np.float32), np.zeros(2, np.float32))
    held_out = np.zeros((10, 1)), np.zeros(10, np.int64)
    empty = data.Dataset(*[np.zeros((10, 1))] * 3, held_out, ([], []))
    run = Run(method, 0.0, 0, 0.9)
    assert study.choose_setting(recipe, run, lambda run: (empty, None, [layer], 0.0)) == lowest


def test_the_chosen_setting_is_trained_and_shown(monkeypatch):
    chosen = {"gmp": 0.8, "admm": 0.01, "published": 0.1}
    runs = []

    def train(recipe, run, data, layers, device):
        runs.append(run)
        return layers, study.one_shot(layers, run.sparsity or 0.0)

    monkeypatch.setattr(train_torch, "train", train)
    monkeypatch.setattr(study, "choose_setting", lambda recipe, run, fit: chosen[run.method])
    cells = list(study.study(replace(TINY, noises=(0.0,)), "torch", "cpu", lambda text: None))
    assert {run.method: run.setting for run in runs if run.method in chosen} == chosen
    assert {cell.method: cell.setting for cell in cells if cell.setting is not None} == chosen
    column = report.COLUMNS.index("setting")
    shown = {row[0]: row[column] for row in report.tables(cells)["PyTorch, clean labels"]}
    assert shown == dict.fromkeys(METHODS, "") | {
        "gmp": "rise 0.8",
        "admm": "penalty 0.01",
        "published": "penalty 0.1",
    }


def test_the_short_protocol_chooses_settings_too():
    # A fixed setting may suit one method and not another.
    for method in CHOSEN:
        assert Recipe.quick().candidates(method) == Recipe().candidates(method)
        assert len(Recipe.quick().candidates(method)) > 1


def test_every_method_of_the_figures_has_one_colour():
    assert set(figures.LABELS) == set(figures.COLOURS) == set(METHODS)
    assert len(set(figures.COLOURS.values())) == len(METHODS)


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        replace(TINY, penalties=(0.01, 0.1), noises=(0.0,)),
        replace(TINY, rises=(0.2, 0.5, 0.8), noises=(0.0,)),
    ],
)
def test_every_run_is_counted_and_fine_tuning_starts_from_the_dense_network(recipe, monkeypatch):
    runs, starts, trained = [], {}, {}

    def train(recipe, run, data, layers, device):
        runs.append(run)
        starts[run], trained[run] = (
            layers,
            [layer._replace(bias=layer.bias + 1) for layer in layers],
        )
        return trained[run], study.one_shot(trained[run], run.sparsity or 0.0)

    monkeypatch.setattr(train_torch, "train", train)
    advanced = []
    cells = list(study.study(recipe, "torch", "cpu", advanced.append))
    assert len(advanced) == len(runs) == study.count_runs(recipe)
    assert [c.method for c in cells[: len(METHODS)]] == METHODS
    tuned = [run for run in runs if run.method == "fine-tuned"]
    assert len(tuned) == len(recipe.noises)
    for run in tuned:
        dense = trained[Run("dense", run.noise, run.seed)]
        for layer, wanted in zip(starts[run], dense, strict=True):
            np.testing.assert_array_equal(layer.weight, wanted.weight)
            np.testing.assert_array_equal(layer.bias, wanted.bias)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_fine_tuning_keeps_the_largest_weights_and_trains_them(trainer):
    run = Run("fine-tuned", 0.0, 0, 0.9)
    batches = data.load(TINY, run)
    start = data.initial_layers(TINY, run, 64)
    kept = [layer.weight != 0 for layer in study.one_shot(start, 0.9)]
    _, after = TRAINERS[trainer](TINY, run, batches, start, "cpu")
    for layer, before, mask in zip(after, start, kept, strict=True):
        np.testing.assert_array_equal(layer.weight != 0, mask)
        assert np.abs(layer.weight - before.weight)[mask].max() > 1e-3


def test_mean_and_error():
    assert report.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / np.sqrt(3)))
    assert np.isnan(report.mean_and_error([1.0])[1])


@pytest.mark.parametrize(
    "frameworks", [("torch",), pytest.param(("torch", "jax"), marks=pytest.mark.long)], ids="+".join
)
def test_demo_writes_tables_and_figures(frameworks, tmp_path):
    cells = demo(TINY, frameworks, tmp_path)
    names = {"table.md", "results.json", "accuracy.png", "weights.png", "landscape.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    # Per framework and noise: every method once, at one sparsity.
    assert len(cells) == 2 * len(frameworks) * len(METHODS)
    assert {cell.zeros for cell in cells if cell.sparsity} == {(64 * 16 + 16 * 8 + 80) * 9 // 10}
    document = json.loads((tmp_path / "results.json").read_text())
    assert [entry["accuracy"] for entry in document["cells"]] == [cell.accuracy for cell in cells]
    assert (tmp_path / "table.md").read_text().count("| safe |") == 2 * len(frameworks)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names if "png" in name)
    last = frameworks[-1]
    again = list(study.study(TINY, last, "cpu", lambda text: None))
    assert [c.accuracy for c in again] == [c.accuracy for c in cells if c.framework == last]


def test_a_failing_framework_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"failed in torch(.|\n)*nowhere"):
        demo(TINY, ("torch",), tmp_path, device="nowhere")


def test_workers_keep_the_flags_of_xla_that_are_set(tmp_path, monkeypatch):
    seen = []

    class Worker:
        def __init__(self, **given):
            pass

        def start(self):
            seen.append(os.environ["XLA_FLAGS"].split())
            raise OSError("no process")

    context = SimpleNamespace(Queue=list, Process=Worker)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    own = "--xla_cpu_use_fusion_emitters=false"
    monkeypatch.setenv("XLA_FLAGS", own)
    with pytest.raises(OSError, match="no process"):
        demo(TINY, ("jax",), tmp_path)
    (flags,) = seen
    assert flags[:2] == [own, "--xla_cpu_multi_thread_eigen=false"]
    assert os.environ["XLA_FLAGS"] == own
