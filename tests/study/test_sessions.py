"""Sessions of a study: each run is done once, whatever fails, changes or is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_recipe import TINY, changed
from typer.testing import CliRunner

import safe_core.study.runner.run as runner
from safe_core.command_line.app import app
from safe_core.study.runner import (
    FailedRunsError,
    cells,
    parse_recipe,
    planned_runs,
    run_study,
    write_report,
)
from safe_core.study.runner.cells import Cell
from safe_core.study.runner.results import read_results
from safe_core.study.runner.units import units

SMALL = changed("seeds = [0, 1]", "seeds = [0]").replace("[0.8, 0.9]", "[0.8]")


class Killed(BaseException):
    """Not an error that a run may have."""


class Runs:
    """Stands for training: notes the runs, and fails or is killed where it is told to."""

    def __init__(self) -> None:
        self.ran: list[Cell] = []
        self.fails: set[Cell] = set()
        self.killed_after = 10**9

    def __call__(self, recipe: Any, unit: tuple[Cell, ...], **_: Any) -> dict[Cell, Any]:
        for cell in unit:
            if cell in self.fails:
                raise ValueError("no such thing")
            if len(self.ran) == self.killed_after:
                raise Killed
            self.ran.append(cell)
        return {cell: {"accuracy": 50.0, "losses": [1.0]} for cell in unit}

    def take(self) -> list[Cell]:
        found, self.ran = self.ran, []
        return found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(runner, "run_unit", found)
    return found


def test_no_run_is_done_twice(tmp_path: Path, runs: Runs) -> None:
    runs.killed_after = 5
    with pytest.raises(Killed):
        run_study(TINY, tmp_path)
    file = tmp_path / "results.jsonl"
    with file.open("a") as out:
        out.write('{"recipe": "cut off by a k')
    first = runs.take()
    with pytest.raises(Killed):
        run_study(TINY, tmp_path)
    second = runs.take()
    run_study(changed('"Tiny"', '"A new title"'), tmp_path)
    planned = cells(parse_recipe(TINY))
    assert sorted(map(str, [*first, *second, *runs.take()])) == sorted(map(str, planned))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(planned)


def test_a_changed_setting_trains_its_runs_again_and_is_named(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(TINY, tmp_path)
    runs.take()
    other = changed('"0.8" = 1e-2', '"0.8" = 2e-2')
    capsys.readouterr()
    run_study(other, tmp_path)
    assert {(c.method, c.sparsity) for c in runs.take()} == {("SAFE", 0.8)}
    said = capsys.readouterr().err
    assert "other settings for SAFE at 0.8, seed 0, torch and 3 more, trained again" in said
    assert "method.penalty was 0.01 and is 0.02" in said
    run_study(TINY, tmp_path)  # the old results are still there
    assert runs.take() == []
    capsys.readouterr()
    run_study(changed("batch_size = 32", "batch_size = 16"), tmp_path)
    assert len(runs.take()) == len(cells(parse_recipe(TINY)))
    assert "training.batch_size was 32 and is 16" in capsys.readouterr().err


def test_a_study_may_grow_and_shrink(tmp_path: Path, runs: Runs) -> None:
    run_study(TINY, tmp_path)
    planned = cells(parse_recipe(TINY))
    runs.take()
    grown = changed("[0, 1]", "[0, 2, 1]").replace("[0.8, 0.9]", "[0.8, 0.85, 0.9]")
    grown += '[[methods]]\nmethod = "admm"\n'
    found = run_study(grown, tmp_path)
    assert list(found) == cells(parse_recipe(grown))
    assert set(runs.take()) == set(found) - set(planned)
    assert list(run_study(TINY, tmp_path)) == planned
    assert runs.take() == []


def test_a_run_that_fails_stops_no_other_and_is_tried_last(tmp_path: Path, runs: Runs) -> None:
    planned = cells(parse_recipe(TINY))
    runs.fails = {planned[0]}
    with pytest.raises(FailedRunsError, match="1 run failed; the same command tries it") as caught:
        run_study(TINY, tmp_path)
    assert "dense, seed 0, torch: ValueError: no such thing" in str(caught.value)
    assert set(runs.take()) == set(planned[1:])
    held = read_results(tmp_path, parse_recipe(TINY))
    assert held.failures[planned[0]].startswith("ValueError: no such thing")
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "1 run failed: dense, seed 0, torch (ValueError: no such thing)" in report
    runs.fails = set()
    grown = changed("seeds = [0, 1]", "seeds = [0, 1, 2]")
    found = run_study(grown, tmp_path)
    assert runs.take()[-1] == planned[0]
    assert len(found) == len(cells(parse_recipe(grown)))
    assert not read_results(tmp_path, parse_recipe(grown)).failures


def test_the_command_line_reports_failures_by_its_exit_code(tmp_path: Path, runs: Runs) -> None:
    runs.fails = {cells(parse_recipe(TINY))[0]}
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["study", str(path), "--out", out])
    assert (result.exit_code, "1 run failed" in result.stderr) == (1, True)
    result = CliRunner().invoke(app, ["study", str(path), "--out", out, "--dry-run"])
    assert "dense, seed 0, torch\n1 runs are left, in 1 trainings" in result.stdout
    listed = CliRunner().invoke(app, ["study", "--list"])
    assert "table-2-digits: Noisy labels, digits" in listed.stdout


def test_a_study_that_is_stopped_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(runner, "run_unit", stopped)
    path, out = tmp_path / "tiny.toml", str(tmp_path / "out")
    path.write_text(TINY)
    result = CliRunner().invoke(app, ["study", str(path), "--out", out])
    assert (result.exit_code, "run the same command to continue" in result.stderr) == (130, True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result = CliRunner().invoke(app, ["report", out])
    assert "must hold at least one finished run, got none" in result.stderr


def test_a_folder_with_anything_else_is_refused(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a new or empty folder.* holds recipe\.toml"):
        run_study(TINY, tmp_path)
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        planned_runs(TINY, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]
    assert (tmp_path / "recipe.toml").read_text() == "mine"


def test_files_that_are_not_a_study_are_refused_in_one_line(tmp_path: Path, runs: Runs) -> None:
    def message(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(x) for x in arguments])
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        return result.stderr.replace("\n", " ")

    recipe, out = tmp_path / "tiny.toml", tmp_path / "out"
    recipe.write_text(SMALL)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for wrong in (recipe, tmp_path / "link", tmp_path / "fifo"):
        for more in ([], ["--dry-run"]):
            said = message("study", recipe, "--out", wrong, *more)
            assert f"out must be a folder, got {wrong}" in said
    run_study(SMALL, out)
    (out / "results.jsonl").unlink()
    os.mkfifo(out / "results.jsonl")
    for command in (("study", recipe, "--out", out), ("report", out)):
        assert "results.jsonl must be a regular file" in message(*command)
    (out / ".safe-core-study").unlink()
    os.mkfifo(out / ".safe-core-study")
    assert "out must be a new or empty folder" in message("study", recipe, "--out", out)
    recipe.write_bytes(b"\x80")
    assert f"TOML in UTF-8, got other bytes in {recipe}" in message("study", recipe)


def test_parts_share_a_folder_and_no_run(tmp_path: Path, runs: Runs) -> None:
    parts = []
    for i in (1, 2, 3):
        run_study(TINY, tmp_path, shard=f"{i}/3")
        parts.append(set(runs.take()))
    planned = cells(parse_recipe(TINY))
    assert set().union(*parts) == set(planned)
    assert sum(map(len, parts)) == len(planned)
    assert len(list(tmp_path.glob("results-*-of-3.jsonl"))) == 3
    assert list(run_study(TINY, tmp_path)) == planned
    assert runs.take() == []
    with pytest.raises(ValueError, match=r"shard must be .* with i from 1 to n.*, got '0/3'"):
        run_study(TINY, tmp_path, shard="0/3")


def test_parts_work_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = []

    def inner(recipe: Any, unit: tuple[Cell, ...], **_: Any) -> dict[Cell, Any]:
        if not messages:
            messages.append("started")
            monkeypatch.setattr(runner, "run_unit", quick)
            run_study(TINY, tmp_path, shard="2/2")
            for other, shard in ((TINY, None), (TINY, "1/2"), (changed("Tiny", "New"), "2/2")):
                with pytest.raises(ValueError, match="in use") as caught:
                    run_study(other, tmp_path, shard=shard)
                messages.append(str(caught.value))
        return quick(recipe, unit)

    def quick(recipe: Any, unit: tuple[Cell, ...], **_: Any) -> dict[Cell, Any]:
        return {cell: {"accuracy": 50.0, "losses": [1.0]} for cell in unit}

    monkeypatch.setattr(runner, "run_unit", inner)
    found = run_study(TINY, tmp_path, shard="1/2")
    assert list(found) == cells(parse_recipe(TINY))
    assert "by another study; processes can share a folder if each takes a part" in messages[1]
    assert messages[2].startswith("part 1/2 of")
    assert "by parts of a study with another recipe" in messages[3]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SMALL.replace("0.8]", '"2:3"]').replace('"0.8"', '"2:3"'), "must be divisible|divide"),
        (SMALL.replace("batch_size = 32", "batch_size = 97"), "batch_size must be at most the 96"),
        (SMALL + "[evaluation]\ncorruptions = [9]", "corruptions must be from 1 to 5"),
    ],
)
def test_settings_that_cannot_work_are_found_before_the_first_run(
    source: str, message: str, tmp_path: Path, runs: Runs
) -> None:
    with pytest.raises(ValueError, match=message):
        run_study(source, tmp_path)
    assert runs.ran == []


def test_too_few_dual_updates_are_pointed_out(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(TINY, tmp_path)
    said = capsys.readouterr().err
    assert "hint: SAFE makes only 3 dual updates in 6 steps" in said
    assert "Set dual_update_interval = 1, or train for at least 10 epochs" in said
    assert said.count("hint:") == 1
    long = changed("epochs = 2", "epochs = 10")
    run_study(long, tmp_path / "long")
    assert "hint:" not in capsys.readouterr().err


def test_networks_that_are_pruned_after_training_share_it(tmp_path: Path) -> None:
    source = changed(", 0.5]", "]").replace("seeds = [0, 1]", "seeds = [0]")
    source = source.split("[[methods]]")[0] + "\n".join(
        f'[[methods]]\nmethod = "{name}"' for name in ("dense", "magnitude", "iht")
    )
    recipe = parse_recipe(source)
    assert [len(unit) for unit in units(recipe, cells(recipe))] == [3, 1, 1]
    found = run_study(source, tmp_path / "together")
    dense, *pruned = (r for c, r in found.items() if c.method != "iht")
    assert all(r["dense_accuracy"] == dense["accuracy"] for r in pruned)
    wanted = [int(s * dense["weights"]) for s in (0.8, 0.9)]
    assert [r["zeros"] for r in pruned] == wanted
    alone = run_study(source.replace('[[methods]]\nmethod = "dense"', ""), tmp_path / "alone")
    for cell, result in alone.items():
        assert result["accuracy"] == found[cell]["accuracy"]
    assert all(r["peak_memory"] > 1 and r["machine"]["jobs"] == 1 for r in found.values())


OWN_PARTS = """
import os
import numpy as np
from pathlib import Path
from safe_core import safe
from safe_core.study.data import Dataset, Normalisation, Split

def images(n=64, *, classes=3):
    rng = np.random.default_rng(0)
    def split():
        labels = rng.integers(classes, size=n)
        return Split(rng.integers(256, size=(n, 4, 4, 1), dtype=np.uint8), labels)
    return Dataset(split(), split(), classes, Normalisation((0.5,), (0.25,)))

def network(classes, framework, *, units=16):
    if framework == "torch":
        from torch import nn
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, units), nn.BatchNorm1d(units), nn.Linear(units, classes)
        )
    import flax.linen as nn
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(classes)(nn.relu(nn.Dense(units)(x.reshape(len(x), -1))))
    return Net()

def deadly(sparsity, seed):
    if seed == 1 and os.environ.get("OMP_NUM_THREADS") == "7":
        marker = Path(__file__).with_name("killed")
        if not marker.exists() and Path(__file__).with_name("armed").exists():
            marker.write_text("")
            os.kill(os.getpid(), 9)
    return safe(sparsity, penalty=0.1, dual_update_interval=1)
"""
OWN_RECIPE = """
title = "Own"
frameworks = ["torch", "jax"]
sparsities = [0.5]
seeds = [0, 1]
data = { name = "parts.py:images", options = { n = 32 } }
model = { name = "parts.py:network", options = { units = 8 } }
training = { epochs = 1, batch_size = 16, learning_rate = 0.1 }
[[methods]]
method = "parts.py:deadly"
"""


def test_data_and_networks_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(OWN_PARTS)
    found = run_study(OWN_RECIPE, tmp_path / "out", folder=tmp_path)
    assert [r["weights"] for r in found.values()] == [8 * 16 + 3 * 8] * 4
    assert all(r["zeros"] == r["weights"] // 2 for r in found.values())
    for source, message in (
        (OWN_RECIPE.replace("units = 8", "depth = 8"), r"model\.options must fit network\("),
        (OWN_RECIPE.replace("parts.py:images", "parts.py:deadly"), "data|sparsity"),
        (
            OWN_RECIPE.replace("parts.py:network", "parts.py:images").replace("units = 8", "n = 8"),
            "must return a torch",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run_study(source, tmp_path / "other", folder=tmp_path)


def test_a_killed_process_costs_only_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts.py").write_text(OWN_PARTS)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    source = OWN_RECIPE.replace('["torch", "jax"]', '["torch"]').replace("[0, 1]", "[0, 1, 2]")
    out = tmp_path / "out"
    run_study(source.replace("[0, 1, 2]", "[0]"), out, folder=tmp_path)
    (out / "code" / "armed").write_text("")
    # The check of the first kind passes, because it builds seed 2's and not seed 1's method.
    source = source.replace("[0, 1, 2]", "[2, 1, 0]")
    with pytest.raises(FailedRunsError, match=r"seed 1, torch: .*its process was k"):
        run_study(source, out, folder=tmp_path, jobs=2)
    held = read_results(out, parse_recipe(source, tmp_path))
    assert [c.seed for c in held.results] == [2, 0]
    assert len(run_study(source, out, folder=tmp_path)) == 3


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the processes from /proc")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(changed("epochs = 2", "epochs = 100000"))
    out = tmp_path / "out"
    start = "from safe_core.command_line.app import app; app()"
    arguments = ["study", str(path), "--jobs", "2", "--out", str(out)]
    deadline = time.monotonic() + 120
    with subprocess.Popen([sys.executable, "-c", start, *arguments]) as process:
        while not (out / "recipe.toml").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        # Two workers, and the process with which Python counts what they share.
        while len(workers := children(process.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(workers) >= 2
    assert [worker for worker in workers if alive(worker)] == []


def children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in text.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_only_code_beside_the_recipe_runs_unasked(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "far.py").write_text(OWN_PARTS)
    (tmp_path / "recipes" / "link.py").symlink_to(tmp_path / "far.py")
    for name in ("../far.py", str(tmp_path / "far.py"), "link.py", "json.tool"):
        source = OWN_RECIPE.replace("parts.py:deadly", f"{name}:deadly")
        source = source.replace("parts.py", "link.py")
        with pytest.raises(ValueError, match="must name a file in the folder of the recipe"):
            parse_recipe(source, tmp_path / "recipes")
    source = OWN_RECIPE.replace("parts.py", "link.py")
    recipe = parse_recipe(source, tmp_path / "recipes", allow_code=True)
    assert recipe.methods[0].label == "deadly"


def test_a_study_names_the_code_that_it_runs_before_it_runs(tmp_path: Path) -> None:
    parts = 'print("parts ran", file=__import__("sys").stderr)\n' + OWN_PARTS
    (tmp_path / "parts.py").write_text(parts)
    (tmp_path / "own.toml").write_text(OWN_RECIPE.replace('"torch", "jax"', '"torch"'))
    for dry in (["--dry-run"], []):
        arguments = ["study", str(tmp_path / "own.toml"), "--out", str(tmp_path / "out"), *dry]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        named = f"running the code of {tmp_path / 'parts.py'}, which the recipe names"
        assert result.stderr.splitlines().count(named) == 1
        assert result.stderr.startswith(named)
        assert "running the code of" not in result.stdout
    (tmp_path / "tiny.toml").write_text(SMALL)
    result = CliRunner().invoke(app, ["study", str(tmp_path / "tiny.toml"), "--dry-run"])
    assert "running the code" not in result.output
    (tmp_path / "parts.py").write_text("raise RuntimeError('broken')")
    result = CliRunner().invoke(app, arguments)
    assert result.stderr.splitlines()[0] == named
    assert "broken" in result.stderr.splitlines()[1]
    assert "parts ran" not in CliRunner().invoke(app, ["report", str(tmp_path / "out")]).output
