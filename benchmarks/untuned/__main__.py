"""Train the cells that are not finished. A run that was interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_core.study.runner import run_study
from safe_core.study.runner.statistics import mean_and_error

from .cells import ABLATED, ABLATIONS, OURS, Cell, cells, comparators, recipe
from .table import CONSTANTS, ablations_as_markdown, as_markdown, draw, read, read_ablations

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"


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


def run(cell: Cell, out: Path, framework: str) -> None:
    """Train what is missing of one cell, and write its accuracies beside the results."""
    head = {**cell._asdict(), "framework": framework}
    file = out / "comparators.json"
    if not file.exists():
        chosen, searches = tuned(cell, out, framework), comparators(cell)
        tables = {label: searches[label].table(cell, found) for label, found in chosen.items()}
        methods = {"dense": 'method = "dense"\n', **tables}
        accuracy = trained(cell, methods, out / "comparators", framework)
        _write(file, {**head, "accuracy": accuracy, "chosen": chosen})
    _train_ours(cell, OURS, out / "ours", framework)


def ablate(cell: Cell, out: Path, framework: str) -> None:
    """Train SAFE with one part changed at a time, and write the accuracies."""
    _train_ours(cell, ABLATIONS, out / "ablations", framework)


def _train_ours(cell: Cell, methods: Mapping[str, str], out: Path, framework: str) -> None:
    """Train methods that depend on the constants of `safe_core.untuned`.

    They are trained again when a constant has changed, and so is a method that is new.
    """
    file, constants = (out.with_name(f"{out.name}{end}") for end in (".json", "-constants.json"))
    if constants.exists() and json.loads(constants.read_text(encoding="utf-8")) != CONSTANTS:
        file.unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)
    found = json.loads(file.read_text(encoding="utf-8"))["accuracy"] if file.exists() else {}
    if not methods.keys() <= found.keys():
        _write(constants, CONSTANTS)
        head = {**cell._asdict(), "framework": framework}
        _write(file, {**head, "accuracy": trained(cell, methods, out, framework)})


def _write(file: Path, found: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    """Run the cells of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.untuned", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("study-results/untuned"))
    parser.add_argument("--shard", default="0/1", help="run every n-th cell, as in 0/2 and 1/2")
    parser.add_argument("--only", default="", help="run the cells whose name holds this text")
    parser.add_argument("--framework", default="torch", choices=["torch", "jax"])
    parser.add_argument(
        "--ablations", action="store_true", help="train SAFE with one part changed at a time"
    )
    parser.add_argument(
        "--tables", action="store_true", help="train nothing, and write the table and the figure"
    )
    options = parser.parse_args()
    if options.tables:
        rows = read(options.results)
        parts = ablations_as_markdown(read_ablations(options.results))
        (DOCS / "untuned_table.md").write_text(as_markdown(rows), encoding="utf-8")
        (DOCS / "untuned_ablations.md").write_text(parts, encoding="utf-8")
        draw(rows, DOCS / "_static" / "untuned.png")
        return
    index, count = map(int, options.shard.split("/"))
    todo, train = (ABLATED, ablate) if options.ablations else (cells(), run)
    mine = [cell for cell in todo if options.only in cell.name][index::count]
    for i, cell in enumerate(mine):
        print(f"{i + 1}/{len(mine)}: {cell.name}", flush=True)
        train(cell, options.results / options.framework / cell.name, options.framework)


if __name__ == "__main__":
    main()
