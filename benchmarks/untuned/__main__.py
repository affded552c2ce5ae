"""Train the cells that are not finished. A run that was interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_core.study.runner import run_study
from safe_core.study.runner.statistics import mean_and_error

from .cells import OURS, Cell, cells, comparators, recipe
from .table import as_markdown, draw, read

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"


def accuracy(results: Mapping[Any, Any], label: str) -> list[float]:
    """Return the accuracy of each seed; a run that diverged counts as 0."""
    return [r.get("accuracy", 0.0) for c, r in results.items() if c.method == label]


def tuned(cell: Cell, out: Path, framework: str) -> dict[str, str]:
    """Return the table of each comparator with the best accuracy on held-out images."""
    tried = {
        f"{label} | {i}": table
        for label, tables in comparators(cell).items()
        for i, table in enumerate(tables)
    }
    source = recipe(cell, tried, tuning=True, framework=framework)
    results = run_study(source, out / "tuning", folder=HERE)
    found = {}
    for label, tables in comparators(cell).items():
        means = [mean_and_error(accuracy(results, f"{label} | {i}"))[0] for i in range(len(tables))]
        found[label] = tables[means.index(max(means))]
    return found


def run(cell: Cell, out: Path, framework: str) -> None:
    """Train one cell, and write its accuracies beside the results."""
    file = out / "cell.json"
    if file.exists():
        return
    chosen = tuned(cell, out, framework)
    methods = {"dense": 'method = "dense"\n', **chosen, **OURS}
    source = recipe(cell, methods, tuning=False, framework=framework)
    results = run_study(source, out / "final", folder=HERE)
    found = {label: accuracy(results, label) for label in methods}
    text = json.dumps(
        {**cell._asdict(), "framework": framework, "accuracy": found, "chosen": chosen}
    )
    file.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the cells of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.untuned", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("study-results/untuned"))
    parser.add_argument("--shard", default="0/1", help="run every n-th cell, as in 0/2 and 1/2")
    parser.add_argument("--only", default="", help="run the cells whose name holds this text")
    parser.add_argument("--framework", default="torch", choices=["torch", "jax"])
    parser.add_argument(
        "--tables", action="store_true", help="train nothing, and write the table and the figure"
    )
    options = parser.parse_args()
    if options.tables:
        rows = read(options.results)
        (DOCS / "untuned_table.md").write_text(as_markdown(rows), encoding="utf-8")
        draw(rows, DOCS / "_static" / "untuned.png")
        return
    index, count = map(int, options.shard.split("/"))
    mine = [cell for cell in list(cells())[index::count] if options.only in cell.name]
    for i, cell in enumerate(mine):
        print(f"{i + 1}/{len(mine)}: {cell.name}", flush=True)
        run(cell, options.results / options.framework / cell.name, options.framework)


if __name__ == "__main__":
    main()
