"""The runner: each run is done once, frameworks agree, and failures are reported."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress
from small_recipe import OWN, TINY, changed

import safe_core.study.runner.measure as measuring
import safe_core.study.runner.run as running
from safe_core.study.data import Split
from safe_core.study.models import ResNet
from safe_core.study.runner import cells, parse_recipe, run_study
from safe_core.study.runner.cells import Cell
from safe_core.study.runner.in_jax import JaxLearner, JaxSubject
from safe_core.study.runner.in_torch import TorchLearner, TorchSubject
from safe_core.study.runner.measure import measure
from safe_core.study.runner.plan import Plan, plan
from safe_core.study.runner.progress import StudyBar
from safe_core.study.runner.recipe import Attack
from safe_core.study.runner.run import FailedRunsError


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


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_unknown_device_is_refused(framework: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be available to \w+, got 'abacus'"):
        run_study(changed('"torch"', f'"{framework}"'), tmp_path, device="abacus")
    assert not list(tmp_path.glob("results*"))


def test_jobs_take_the_devices_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def in_processes(recipe: Any, units: Any, devices: list[str], *rest: Any) -> list[Any]:
        taken.append(devices)
        return [(unit, "not trained") for unit in units]

    monkeypatch.setattr(running, "in_processes", in_processes)
    monkeypatch.setattr(running, "checked_in_process", running.check)
    with pytest.raises(FailedRunsError, match="not trained"):
        run_study(TINY, tmp_path, jobs=3, device="cpu, cpu:0")
    assert taken == [["cpu", "cpu:0", "cpu"]]


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
    for both in [[x.variables() for x in learners], [x.projected(made.method) for x in learners]]:
        for a, b in zip(*map(leaves, both), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.long
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
    assert (
        found[0].keys()
        == found[1].keys()
        >= set(recipe.evaluation.metrics()) - {"seconds", "peak_memory"}
    )
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
