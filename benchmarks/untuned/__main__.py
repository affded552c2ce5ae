"""Train the cells that are not finished. A run that was interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_core.study.runner import run_study
from safe_core.study.runner.statistics import mean_and_error

from ..results import append
from .cells import ABLATED, ABLATIONS, IN_JAX, OURS, Cell, cells, comparators, recipe
from .table import (
    CONSTANTS,
    ablations_as_markdown,
    as_markdown,
    draw,
    latest,
    read,
    read_ablations,
)

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
RESULTS = DOCS / "untuned_results.jsonl"


def trained(
    cell: Cell, methods: Mapping[str, str], out: Path, framework: str, *, tuning: bool = False
) -> dict[str, list[float]]:
    """Train the methods, given as tables by label, and return the accuracies of their seeds.

    A run that diverged counts as 0.
    """
    source = recipe(cell, methods, tuning=tuning, framework=framework)
    results = run_study(source, out, folder=HERE)
    found: dict[str, list[float]] = {label: [] for label in methods}
    for run, result in results.items():
        if run.method in found:
            found[run.method].append(result.get("accuracy", 0.0))
    return found


def tuned(cell: Cell, out: Path, framework: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each comparator with the best accuracy on held-out images."""
    searches = comparators(cell)
    scores: dict[str, list[tuple[float, dict[str, Any]]]] = {label: [] for label in searches}

    def best(label: str) -> dict[str, Any]:
        return max(scores[label], key=lambda found: found[0])[1]

    for stage in ("first", "then"):
        tried = {
            f"{label} | {i}": (label, settings)
            for label, search in searches.items()
            for i, settings in enumerate(
                search.start() if stage == "first" else search.around(best(label))
            )
        }
        tables = {
            name: searches[label].table(cell, values) for name, (label, values) in tried.items()
        }
        for name, found in trained(cell, tables, out / stage, framework, tuning=True).items():
            label, settings = tried[name]
            scores[label].append((mean_and_error(found)[0], settings))
    return {label: best(label) for label in searches}


def run(cell: Cell, results: Path, runs: Path, framework: str) -> None:
    """Train what is missing of one cell, and append its accuracies to the results."""
    out = runs / framework / cell.name
    if (cell, framework) not in latest(results, "comparators"):
        chosen, searches = tuned(cell, out, framework), comparators(cell)
        tables = {label: searches[label].table(cell, found) for label, found in chosen.items()}
        methods = {"dense": 'method = "dense"\n', **tables}
        accuracy = trained(cell, methods, out / "comparators", framework)
        _add(results, "comparators", cell, framework, accuracy, chosen=chosen)
    _train_ours("ours", cell, OURS, results, out, framework)


def ablate(cell: Cell, results: Path, runs: Path, framework: str) -> None:
    """Train SAFE with one part changed at a time, and append the accuracies to the results."""
    _train_ours("ablations", cell, ABLATIONS, results, runs / framework / cell.name, framework)


def _train_ours(
    part: str, cell: Cell, methods: Mapping[str, str], results: Path, out: Path, framework: str
) -> None:
    """Train methods that depend on the constants of `safe_core.untuned`.

    They are trained again when a constant has changed, and so is a method that is new.
    """
    found = latest(results, part).get((cell, framework))
    if found is None or not methods.keys() <= found["accuracy"].keys():
        # Runs in this folder may be of other constants.
        shutil.rmtree(out / part, ignore_errors=True)
        accuracy = trained(cell, methods, out / part, framework)
        _add(results, part, cell, framework, accuracy, constants=CONSTANTS)


def _add(
    results: Path,
    part: str,
    cell: Cell,
    framework: str,
    accuracy: Mapping[str, list[float]],
    **more: Any,
) -> None:
    # Five digits show every image of the test data, and keep the file small.
    rounded = {label: [round(a, 3) for a in values] for label, values in accuracy.items()}
    line = {"part": part, **cell._asdict(), "framework": framework, "accuracy": rounded, **more}
    append(results, [line], hidden=("chosen", "constants"))


def main() -> None:
    """Run the cells of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.untuned", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="JSONL file to which cells are added"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("study-results/untuned"), help="folder of single runs"
    )
    parser.add_argument("--shard", default="0/1", help="run every n-th cell, as in 0/2 and 1/2")
    parser.add_argument("--only", default="", help="run the cells whose name holds this text")
    parser.add_argument(
        "--framework",
        default="torch",
        choices=["torch", "jax"],
        help="jax trains a part of the cells; ablations are the same",
    )
    parser.add_argument(
        "--ablations", action="store_true", help="train SAFE with one part changed at a time"
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="train nothing, and write the tables and the figure of what is finished",
    )
    options = parser.parse_args()
    if options.tables:
        rows, parts = read(options.results), read_ablations(options.results)
        if rows:
            (DOCS / "untuned_table.md").write_text(as_markdown(rows), encoding="utf-8")
            draw(rows, DOCS / "_static" / "untuned.png")
        if parts:
            text = ablations_as_markdown(parts)
            (DOCS / "untuned_ablations.md").write_text(text, encoding="utf-8")
        return
    index, count = map(int, options.shard.split("/"))
    part = cells() if options.framework == "torch" else IN_JAX
    todo, train = (ABLATED, ablate) if options.ablations else (part, run)
    mine = [cell for cell in todo if options.only in cell.name][index::count]
    for i, cell in enumerate(mine):
        print(f"{i + 1}/{len(mine)}: {cell.name}", flush=True)
        train(cell, options.results, options.runs, options.framework)


if __name__ == "__main__":
    main()
