"""Run all studies on digits, and write their tables and figures to docs/."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from safe_core.study.runner import (
    Cell,
    Recipe,
    parse_recipe,
    read_recipe,
    run_study,
    write_report,
)
from safe_core.study.runner.report import as_markdown
from safe_core.study.runner.statistics import agreement, tables

from .report import machine, machine_table

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = "-digits"
# Figures that add to the tables.
FIGURES = {
    "figure-1-digits": ("landscape_pytorch", "weights_pytorch"),
    "figure-3-digits": ("accuracy_by_penalty_pytorch",),
    "figure-4-digits": ("history_accuracy_0.95_pytorch", "history_distance_0.95_pytorch"),
    "figure-5-digits": ("accuracy_by_dual_update_interval_pytorch",),
    "table-7-digits": ("accuracy_pytorch",),
}


def recipes() -> list[str]:
    """Return the names of the paper's recipes on digits, in its order."""
    folder = files("safe_core.study") / "recipes"
    names = [p.name.removesuffix(".toml") for p in folder.iterdir()]
    mine = [n for n in names if n.endswith(SUFFIX) and n.startswith(("figure-", "table-"))]
    return sorted(mine, key=lambda name: (name.split("-")[0], int(name.split("-")[1])))


def section(name: str, recipe: Recipe, results: Mapping[Cell, Any]) -> str:
    """Describe one study: results in PyTorch, agreement with JAX, and figures of the paper."""
    minutes = sum(r["seconds"] for r in results.values()) / 60
    shown = replace(recipe, frameworks=("torch",))
    in_torch = {cell: r for cell, r in results.items() if cell.framework == "torch"}
    parts = [
        f"### {recipe.title}",
        f"`safe-core study {name}`: {len(results)} runs, {minutes:.0f} min of training in total.",
        *map(as_markdown, tables(shown, in_torch)),
    ]
    agreed = agreement(recipe, results)
    parts += [agreed.sentence()] if agreed else []
    parts += [
        f"![{recipe.title}](_static/digits/{name}-{figure}.png)" for figure in FIGURES.get(name, ())
    ]
    parts += [as_markdown(table) for parent in parents(name) for table in tables(parent, {})]
    return "\n\n".join(parts)


def parents(name: str) -> list[Recipe]:
    """Return the recipes of the paper that a study on digits follows."""
    folder = files("safe_core.study") / "recipes"
    stem = name.removesuffix(SUFFIX)
    found = [p for p in folder.iterdir() if p.name.startswith((f"{stem}.", f"{stem}-cifar"))]
    return [read_recipe(path) for path in sorted(found, key=lambda path: path.name)]


def main() -> None:
    """Run the studies that are not finished, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("study-results"), help="folder for the results"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    options = parser.parse_args()
    sections = []
    for name in recipes():
        folder = options.results / name
        source = (files("safe_core.study") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
        results = run_study(source, folder, jobs=options.jobs)
        write_report(folder)
        for figure in FIGURES.get(name, ()):
            target = ROOT / "docs" / "_static" / "digits" / f"{name}-{figure}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{figure}.png", target)
        sections.append(section(name, parse_recipe(source), results))
    head = "\n".join(machine_table(machine()))
    (ROOT / "docs" / "digits_tables.md").write_text("\n\n".join([head, *sections]) + "\n")


if __name__ == "__main__":
    main()
