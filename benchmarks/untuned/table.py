"""Write the cells that are finished as tables in Markdown and as a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safe_core import untuned
from safe_core.study.runner.statistics import mean_and_error

from ..results import lines
from .cells import ABLATED, ABLATIONS, BASES, OURS, PLAIN, SAFE, TASKS, Cell, cells

__all__ = [
    "CONSTANTS", "Row", "ablations_as_markdown", "as_markdown", "draw", "latest", "read",
    "read_ablations",
]  # fmt: skip

CONSTANTS = {name: x for name, x in vars(untuned).items() if isinstance(x, int | float)}
"""Constants that results of ours hold for. Results with other ones are not shown."""

MARGIN = 0.5  # points that the best tuned comparator may be ahead
SHOWN_POINTS = 5.0  # least range of the accuracies in a panel of the figure
SHOWN_SPARSITIES = 3  # fewest points of a line in a panel


class Row(NamedTuple):
    """A finished cell: mean accuracy in percent and its standard error, by label.

    Examples
    --------
    >>> accuracy = {"GMP": (96.0, 0.3), "SAFE, untuned": (95.2, 0.1)}
    >>> row = Row(Cell("digits", "SGD 0.1", 60, 0.9), "torch", accuracy)
    >>> row.best, round(row.lead, 1), row.is_behind
    ('GMP', -0.8, True)
    """

    cell: Cell
    framework: str
    accuracy: dict[str, tuple[float, float]]

    @property
    def base(self) -> str:
        """The base optimizer, with the framework if it is JAX."""
        return self.cell.base if self.framework == "torch" else f"{self.cell.base}, JAX"

    @property
    def zeros(self) -> str:
        """The sparsity as text."""
        sparsity = self.cell.sparsity
        return sparsity if isinstance(sparsity, str) else f"{100 * sparsity:g}%"

    def shown(self, label: str) -> str:
        """Return mean and standard error as text, empty if the label was not trained."""
        found = self.accuracy.get(label)
        return "{:.1f} ± {:.1f}".format(*found) if found else ""

    @property
    def tuned(self) -> list[str]:
        """The comparators of the cell."""
        return [label for label in self.accuracy if label not in ("dense", *OURS)]

    @property
    def best(self) -> str:
        """The comparator with the highest accuracy, the first of equal ones."""
        return max(self.tuned, key=lambda label: self.accuracy[label][0])

    def lead_over(self, label: str) -> float:
        """Return by how many points ours is ahead."""
        return self.accuracy[SAFE][0] - self.accuracy[label][0]

    @property
    def lead(self) -> float:
        """The lead over the best comparator."""
        return self.lead_over(self.best)

    @property
    def margin(self) -> float:
        """The points that count as a lead: over half a point and two joint standard errors."""
        joint = math.hypot(self.accuracy[SAFE][1], self.accuracy[self.best][1])
        return max(MARGIN, 2 * joint)

    @property
    def is_behind(self) -> bool:
        """Whether the best is ahead by more than the margin."""
        return -self.lead > self.margin


def latest(results: Path, part: str) -> dict[tuple[Cell, str], dict[str, Any]]:
    """Return the last line of each cell and framework, for one part of the results.

    Lines of ours with other constants than those of `safe_core.untuned` are left out.
    """
    return {
        (Cell(*(line[key] for key in Cell._fields)), line["framework"]): line
        for line in lines(results)
        if line["part"] == part and line.get("constants", CONSTANTS) == CONSTANTS
    }


def read(results: Path) -> list[Row]:
    """Read all finished cells, in the order of the tasks."""
    planned, order = set(cells()), list(TASKS)
    others = latest(results, "comparators")
    rows = [
        Row(*key, _means(others[key]) | _means(line))
        for key, line in latest(results, "ours").items()
        if key[0] in planned
    ]
    return sorted(
        rows,
        key=lambda row: (
            row.framework != "torch",
            order.index(row.cell.task),
            row.cell.base,
            row.cell.epochs,
            str(row.cell.sparsity),
        ),
    )


def read_ablations(results: Path) -> list[Row]:
    """Read all finished ablations, in the order of `ABLATED`."""
    found = latest(results, "ablations").items()
    rows = [Row(*key, _means(line)) for key, line in found if key[0] in ABLATED]
    return sorted(rows, key=lambda row: ABLATED.index(row.cell))


def _means(line: dict[str, Any]) -> dict[str, tuple[float, float]]:
    found = {label: mean_and_error(values) for label, values in line["accuracy"].items()}
    return {label: (mean, error or 0.0) for label, (mean, error) in found.items()}


def ablations_as_markdown(rows: Sequence[Row]) -> str:
    """Return the accuracy of every variant by cell."""
    lines = [
        "| task | base | epochs | zeros | " + " | ".join(ABLATIONS) + " |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(ABLATIONS),
    ]
    for row in rows:
        shown = (row.shown(label) for label in ABLATIONS)
        parts = (row.cell.task, row.base, row.cell.epochs, row.zeros, *shown)
        lines.append("| " + " | ".join(map(str, parts)) + " |")
    return "\n".join(lines) + "\n"


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a summary by half of the tasks, and every cell.

    The summary is over the cells in PyTorch, because those in JAX repeat some of them.
    """
    ran = [row for row in rows if row.framework == "torch"]
    halves = {
        "all cells": ran,
        "clean labels": [r for r in ran if not TASKS[r.cell.task].noise],
        "random labels": [r for r in ran if TASKS[r.cell.task].noise],
        "tasks that the constants were chosen on": [r for r in ran if TASKS[r.cell.task].chooses],
        "other tasks": [r for r in ran if not TASKS[r.cell.task].chooses],
    }
    parts = [
        f"{len(ran)} of {sum(1 for _ in cells())} cells in PyTorch, {len(rows) - len(ran)} in JAX."
    ]
    if ran:
        parts.append(_summary({name: found for name, found in halves.items() if found}))
    if both := _in_both(rows):
        parts.append(both)
    for task in TASKS:
        mine = [row for row in rows if row.cell.task == task]
        if mine:
            parts += [f"**{task}**", _cells(mine)]
    return "\n\n".join(parts) + "\n"


def _summary(halves: dict[str, Sequence[Row]]) -> str:
    labels = list(
        dict.fromkeys(label for rows in halves.values() for r in rows for label in r.tuned)
    )
    lines = [
        "| lead of SAFE, untuned, in points | " + " | ".join(halves) + " |",
        "| --- |" + " ---: |" * len(halves),
    ]
    for label in (*labels, PLAIN):
        leads = [
            _mean(r.lead_over(label) for r in rows if label in r.accuracy)
            for rows in halves.values()
        ]
        lines.append(f"| over {label} | " + " | ".join(leads) + " |")
    best = [_mean(r.lead for r in rows) for rows in halves.values()]
    lines.append("| over the best of each cell | " + " | ".join(best) + " |")
    behind = [f"{sum(r.is_behind for r in rows)} of {len(rows)}" for rows in halves.values()]
    lines.append("| cells behind the best | " + " | ".join(behind) + " |")
    ahead = [f"{sum(r.lead > r.margin for r in rows)} of {len(rows)}" for rows in halves.values()]
    lines.append("| cells ahead of the best | " + " | ".join(ahead) + " |")
    return "\n".join(lines)


def _in_both(rows: Sequence[Row]) -> str:
    """Return sentences on the cells that both frameworks trained, "" if there are none."""
    by_framework = {(row.framework, row.cell): row for row in rows}
    pairs = [
        (row, by_framework["torch", row.cell])
        for row in rows
        if row.framework == "jax" and ("torch", row.cell) in by_framework
    ]
    if not pairs:
        return ""
    jax, torch = (_mean(row.lead for row in found) for found in zip(*pairs, strict=True))
    ours = _mean(a.accuracy[SAFE][0] - b.accuracy[SAFE][0] for a, b in pairs)
    n = f"In the {len(pairs)} cells" if len(pairs) > 1 else "In the cell"
    return (
        f"{n} that both frameworks trained, the lead over the best is {jax} points in JAX and "
        f"{torch} in PyTorch on average. The accuracy of SAFE, untuned, differs by {ours} points "
        "in JAX. The table above is for PyTorch only."
    )


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):+.2f}" if found else ""


def _cells(rows: Sequence[Row]) -> str:
    heads = ("base", "epochs", "zeros", "dense", "best tuned", "", SAFE, PLAIN, "lead")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        lead = f"**{row.lead:+.1f}**" if row.is_behind else f"{row.lead:+.1f}"
        dense, best, ours, plain = map(row.shown, ("dense", row.best, SAFE, PLAIN))
        values = (row.base, row.cell.epochs, row.zeros, dense, row.best, best, ours, plain, lead)
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against sparsity by task, for the base and length with most sparsities.

    Tasks without three sparsities, such as those with N:M patterns, are only in the tables.
    """
    from matplotlib.figure import Figure

    ran = [row for row in rows if row.framework == "torch"]
    drawn = {}
    for task in TASKS:
        mine = [row for row in ran if row.cell.task == task]
        if mine and len((line := _longest_line(mine))[1]) >= SHOWN_SPARSITIES:
            drawn[task] = line
    if not drawn:
        raise ValueError(
            f"rows must have {SHOWN_SPARSITIES} sparsities of a task in PyTorch to draw, got fewer"
        )
    across = min(len(drawn), 4)
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(2.6 * across, 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(drawn) :]:
        axes.remove()
    lines = {
        "best tuned": ("#D55E00", lambda row: row.accuracy[row.best][0]),
        SAFE: ("#0072B2", lambda row: row.accuracy[SAFE][0]),
        PLAIN: ("0.5", lambda row: row.accuracy[PLAIN][0]),
    }
    for axes, (task, line) in zip(panels[: len(drawn)], drawn.items(), strict=True):
        (base, epochs), mine = line
        for label, (colour, value) in lines.items():
            shown = [value(row) for row in mine]
            axes.plot(range(len(mine)), shown, "o-", color=colour, markersize=3, label=label)
        dense = [row.accuracy["dense"][0] for row in mine if "dense" in row.accuracy]
        if dense:
            axes.axhline(sum(dense) / len(dense), color="0", ls=":", lw=1, label="dense")
        # Small differences should look small.
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - SHOWN_POINTS), high)
        axes.set_xticks(range(len(mine)), [row.zeros for row in mine], fontsize=8)
        axes.set_title(f"{task}\n{base}, {epochs} epochs", fontsize=9)
        axes.set_xlabel("zeros", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[: len(drawn) : across]:
        axes.set_ylabel("test accuracy, %", fontsize=8)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=200)


def _longest_line(rows: Iterable[Row]) -> tuple[tuple[str, int], list[Row]]:
    """Return the base and length with the most sparsities, and their rows.

    Of several, it is the first in the order of `BASES`.
    """
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(BASES).index(row.cell.base)):
        lines.setdefault((row.cell.base, row.cell.epochs), []).append(row)
    return max(lines.items(), key=lambda line: len(line[1]))
