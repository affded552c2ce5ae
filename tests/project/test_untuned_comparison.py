"""The comparison without tuning: its cells are valid recipes, and its choice is the best tried."""

from __future__ import annotations

import json
import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import safe_core
from safe_core import Mask, Pull, untuned
from safe_core.study.runner import parse_recipe
from safe_core.study.runner.cells import Cell as Run

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.untuned import __main__ as command
from benchmarks.untuned import (
    parts,
    table,
)
from benchmarks.untuned.cells import (
    ABLATED,
    ABLATIONS,
    BASES,
    OURS,
    SAFE,
    TASKS,
    Cell,
    cells,
    comparators,
    recipe,
)

HERE = command.HERE

CELLS = list(cells())
CHECKED = [
    *{cell.task: cell for cell in CELLS}.values(),
    *{c.task: c for c in CELLS[::-1]}.values(),
]


@pytest.mark.parametrize("cell", CHECKED, ids=lambda cell: cell.name)
def test_cells_are_recipes_whose_methods_can_be_built(cell: Cell) -> None:
    tables = {
        f"{label} {i}": search.table(cell, settings)
        for label, search in comparators(cell).items()
        for first in search.start()
        for i, settings in enumerate([first, *search.around(first)])
    }
    found = parse_recipe(recipe(cell, {**tables, **OURS}, tuning=True, framework="torch"), HERE)
    assert (found.data.validation, found.training.epochs) == (0.25, cell.epochs)
    for entry in found.methods:
        method = entry.build(cell.sparsity, epochs=20, steps_per_epoch=7, seed=0)
        assert method is not None
        if entry.label in OURS:
            assert isinstance(method.constraint, Pull)
        # Dense training before the mask takes its epochs from those of the cell.
        training = entry.trained(found.training)
        own = training.dense_epochs - TASKS[cell.task].dense_epochs
        assert training.epochs + own == cell.epochs
        assert (own > 0) == ("dense" in entry.label + tables.get(entry.label, ""))
    final = parse_recipe(recipe(cell, OURS, tuning=False, framework="torch"), HERE)
    assert not set(found.seeds) & set(final.seeds)
    assert final.data.validation == 0


def test_every_base_is_used_and_half_of_the_tasks_are_the_test() -> None:
    assert {cell.base for cell in cells()} == set(BASES)
    assert {task.chooses for task in TASKS.values()} == {True, False}
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names)


def test_comparators_update_as_published_or_as_often_as_ours() -> None:
    steps = 1140
    every = untuned.interval(steps)
    gmp = parts.gradual(0.9, steps, part=0.5)
    assert isinstance(gmp.constraint, Mask)
    assert [t for t in range(3 * every) if gmp.is_due(t)] == [
        every - 1,
        2 * every - 1,
        3 * every - 1,
    ]
    assert parts.gradual(0.9, steps, part=0.5, rho=0.1).perturbation is not None
    published = parts.split(0.9, steps, penalty=0.1, interval=32, rho=0.1)
    assert published.constraint.dual_update_interval == 32
    assert published.constraint.penalty(steps) == 0.1
    assert published.perturbation.rho(0) == 0.1
    constant = parts.split(0.9, steps, penalty=0.1, interval=0, schedule="constant").constraint
    assert constant.penalty(0) == 0.1
    assert constant.dual_update_interval == every
    in_rounds = parts.rounds(0.9, steps, count=3)
    assert [t + 1 for t in range(steps) if in_rounds.is_due(t)] == [285, 570, 855]
    # Each round keeps the same fraction of what is left.
    sparsity = parts.Rounds(0.936, steps=3).table
    kept = [1 - float(s) for s in sparsity]
    assert kept == pytest.approx([1, 0.4, 0.16, 0.064], abs=1e-6)
    assert sparsity[-1] == Fraction("0.936")


def test_the_best_on_held_out_images_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_study(source: str, out: Path, **options: Any) -> dict[Run, dict[str, Any]]:
        asked.append(out.name)
        content = tomllib.loads(source)
        assert (content["data"]["validation"] > 0) == (out.name in ("first", "then"))
        found: dict[Run, dict[str, Any]] = {}
        for method in content["methods"]:
            score = 90.0
            if method.get("penalty") == 0.1:
                score += 1
            if method.get("rho") == 0.2:
                score += 2
            if method.get("part") == 0.5:
                score += 1
            for seed in content["seeds"]:
                result = {"diverged": True} if method.get("penalty") == 1.0 else {"accuracy": score}
                found[Run("torch", 0.0, method["label"], 0.9, seed)] = result
        return found

    monkeypatch.setattr(command, "run_study", run_study)
    cell, results = Cell("digits", "SGD 0.1", 20, 0.9), tmp_path / "results.jsonl"
    chosen = command.tuned(cell, tmp_path, "torch")
    assert chosen == {
        "magnitude, fine-tuned": {"dense": 0.3},
        "GMP": {"part": 0.5},
        "GMP with SAM": {"part": 0.5, "rho": 0.2},
        "IMP with SAM": {"count": 3, "rho": 0.2},
        "ADMM": {"penalty": 0.1, "interval": 32},
        "SAFE, published": {"penalty": 0.1, "interval": 32, "rho": 0.2},
    }
    command.run(cell, results, tmp_path, "torch")
    command.run(cell, results, tmp_path, "torch")  # finished: nothing is trained again
    assert asked == 2 * ["first", "then"] + ["comparators", "ours"]
    (row,) = table.read(results)
    assert (row.best, row.accuracy["GMP"], row.lead) == ("GMP with SAM", (91.0, 0.0), -3)
    # Other constants train ours again, and nothing else.
    for module in (command, table):
        monkeypatch.setattr(module, "CONSTANTS", {"RADIUS": 3.0})
    assert table.read(results) == []
    command.run(cell, results, tmp_path, "torch")
    assert asked[6:] == ["ours"]
    assert len(table.read(results)) == 1
    # A method that is new is trained too.
    monkeypatch.setattr(command, "OURS", {**OURS, "new": 'method = "admm"\n'})
    command.run(cell, results, tmp_path, "torch")
    assert asked[7:] == ["ours"]


def test_ablations_change_one_part_of_the_default() -> None:
    default = safe_core.safe(0.95, steps=1140)
    found = {
        part: parts.changed(0.95, 1140, part=part)
        for part in ("rise", "pull", "weak", "interval", "travel", "growth")
    }
    differs = {
        part: [
            name
            for name in ("sparsity", "constraint", "perturbation")
            if getattr(method, name) != getattr(default, name)
        ]
        for part, method in found.items()
    }
    assert differs == {
        "rise": ["sparsity"],
        "pull": ["constraint"],
        "weak": ["constraint"],
        # The pattern rises at dual updates, and the pull counts them.
        "interval": ["sparsity", "constraint"],
        "travel": ["perturbation"],
        "growth": ["perturbation"],
    }
    assert found["rise"].sparsity.sparsity_of("x") == 0.95
    assert (found["travel"].perturbation.full_step, found["growth"].perturbation.max_growth) == (
        0,
        0,
    )
    weak, full = (m.constraint.penalty(600) for m in (found["weak"], default))
    assert weak == pytest.approx(full / 10)
    interval = found["interval"].constraint.dual_update_interval
    assert interval == 4 * default.constraint.dual_update_interval


def test_ablations_are_trained_once_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_study(source: str, out: Path, **options: Any) -> dict[Run, dict[str, Any]]:
        content = tomllib.loads(source)
        asked.append(content["title"])
        first = 90.0 if content["title"] == ABLATED[0].name else 80.0
        scores = {label: first + i for i, label in enumerate(ABLATIONS)}
        assert [method["label"] for method in content["methods"]] == list(scores)
        return {
            Run("torch", 0.0, label, 0.9, seed): {"accuracy": scores[label] + seed}
            for label in scores
            for seed in content["seeds"]
        }

    monkeypatch.setattr(command, "run_study", run_study)
    for cell in (ABLATED[-1], ABLATED[0], ABLATED[0]):
        command.ablate(cell, tmp_path / "results.jsonl", tmp_path, "torch")
    assert asked == [ABLATED[-1].name, ABLATED[0].name]
    found = table.read_ablations(tmp_path / "results.jsonl")
    first, last = table.ablations_as_markdown(found).splitlines()[2:]
    assert first.startswith("| digits | SGD 0.1 | 60 | 95% | 91.0 ± 0.6 | 92.0 ± 0.6 |")
    assert last.startswith("| MNIST-1D | SGD 0.1 | 60 | 95% | 81.0 ± 0.6 | 82.0 ± 0.6 |")
    for cell in ABLATED:
        parse_recipe(recipe(cell, ABLATIONS, tuning=False, framework="torch"), HERE)


COUNT = len(list(cells()))


def test_the_cells_in_jax_are_a_part_of_those_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Cell, str]] = []
    monkeypatch.setattr(command, "run", lambda cell, *paths: asked.append((cell, paths[-1])))
    for framework in ("torch", "jax"):
        monkeypatch.setattr(sys, "argv", ["untuned", "--framework", framework])
        command.main()
    trained = {name: [cell for cell, kind in asked if kind == name] for name in ("torch", "jax")}
    assert trained["torch"] == list(cells())
    assert set(trained["jax"]) < set(trained["torch"])
    assert len(trained["jax"]) == 8
    page = (command.DOCS / "untuned.md").read_text(encoding="utf-8")
    assert "`--framework jax` trains eight of them in JAX" in page


def finished(results: Path, cell: Cell, **accuracy: list[float]) -> None:
    named = {"dense": [98.0], "GMP": accuracy["gmp"], "ADMM": accuracy["admm"]}
    ours = dict(zip(OURS, (accuracy["ours"], accuracy["plain"]), strict=True))
    head = {**cell._asdict(), "framework": "torch"}
    lines = [
        {"part": "comparators", **head, "accuracy": named},
        {"part": "ours", **head, "accuracy": ours, "constants": table.CONSTANTS},
        # Results with other constants are not shown, even if they are newer.
        {"part": "ours", **head, "accuracy": {key: [0.0] for key in ours}, "constants": {}},
    ]
    with results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_the_table_shows_where_ours_is_behind(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    cells = [Cell("digits", "SGD 0.1", 60, s) for s in (0.9, 0.95)]
    noisy = cells[0]._replace(task="digits, random labels")
    finished(results, cells[0], gmp=[97, 97], admm=[90, 90], ours=[95, 95], plain=[94, 94])
    finished(results, cells[1], gmp=[97, 91], admm=[90, 90], ours=[92, 92], plain=[94, 94])
    finished(results, noisy, gmp=[60, 60], admm=[70, 70], ours=[80, 80], plain=[60, 60])
    unplanned = cells[0]._replace(epochs=61)
    finished(results, unplanned, gmp=[1, 1], admm=[1, 1], ours=[1, 1], plain=[1, 1])
    rows = table.read(results)
    assert [row.best for row in rows] == ["GMP", "GMP", "ADMM"]
    assert [row.lead for row in rows] == [-2, -2, 10]
    # In the second cell the error of GMP is 3 points.
    assert [row.is_behind for row in rows] == [True, False, False]
    text = table.as_markdown(rows)
    assert text.startswith(f"3 of {COUNT} cells in PyTorch, 0 in JAX.")
    assert "| cells behind the best | 1 of 3 | 1 of 2 | 0 of 1 | 1 of 3 |" in text
    assert "| cells ahead of the best | 1 of 3 | 0 of 2 | 1 of 1 | 1 of 3 |" in text
    assert "| over GMP | +5.33 | -2.00 | +20.00 | +5.33 |" in text
    shown = ("98.0 ± 0.0", "GMP", "97.0 ± 0.0", "95.0 ± 0.0", "94.0 ± 0.0", "**-2.0**")
    assert " | ".join(("| SGD 0.1", "60", "90%", *shown)) in text
    # The averages are of PyTorch, and cells of both frameworks are compared.
    better = {SAFE: (96.0, 0.0), "GMP": (95.0, 0.0)}
    again = table.as_markdown(
        [*rows, rows[0]._replace(framework="jax", accuracy=rows[0].accuracy | better)]
    )
    assert "| cells behind the best | 1 of 3 | 1 of 2 | 0 of 1 | 1 of 3 |" in again
    assert "In the cell that both frameworks trained, the lead over the best is +1.00 poi" in again
    assert "in JAX and -2.00 in PyTorch" in again
    assert "untuned, differs by +1.00 points in JAX" in again
    assert "both frameworks" not in text
    worse = rows[1]._replace(framework="jax", accuracy=rows[1].accuracy | {SAFE: (89.0, 0.0)})
    again = table.as_markdown([*rows, rows[0]._replace(framework="jax"), worse])
    assert "In the 2 cells that both frameworks trained, the lead over the best is -3.50 p" in again
    assert "differs by -1.50 points in JAX" in again
    alone = table.as_markdown([worse])
    assert alone.startswith(f"0 of {COUNT} cells in PyTorch, 1 in JAX.\n\n**digits**")
    line = table._longest_line(
        [rows[0]._replace(cell=cells[0]._replace(base="Adam 3e-3")), *rows[:2]]
    )
    assert line == (("SGD 0.1", 60), rows[:2])
    tied = [rows[0]._replace(cell=cells[0]._replace(base="Adam 3e-3")), rows[0]]
    assert table._longest_line(tied) == (("SGD 0.1", 60), rows[:1])
    third = rows[0]._replace(cell=cells[0]._replace(sparsity=0.99))
    table.draw([*rows, third], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for few in (rows, [row._replace(framework="jax") for row in (*rows, third)]):
        with pytest.raises(ValueError, match="3 sparsities of a task in PyTorch to draw"):
            table.draw(few, tmp_path / "figure.png")
