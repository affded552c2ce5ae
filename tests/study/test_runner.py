"""The runner: each run is done once, frameworks agree, and failures are reported."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress
from small_recipe import OWN, TINY, changed
from typer.testing import CliRunner

import safe_core.study.runner.measure as measuring
import safe_core.study.runner.run as runner
from safe_core.command_line.app import app
from safe_core.study.data import Split
from safe_core.study.models import ResNet
from safe_core.study.runner import cells, parse_recipe, run_study
from safe_core.study.runner.cells import Cell, read_results
from safe_core.study.runner.in_jax import JaxLearner, JaxSubject
from safe_core.study.runner.in_torch import TorchLearner, TorchSubject
from safe_core.study.runner.measure import measure
from safe_core.study.runner.plan import Plan, plan
from safe_core.study.runner.progress import StudyBar
from safe_core.study.runner.recipe import Attack


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
    with pytest.raises(
        ValueError, match=r"corruption_folder must be an existing folder, got 'none'"
    ):
        plan(recipe, cells(recipe)[0])


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
