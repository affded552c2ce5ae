"""Compare pruning methods on digits with the same tuning for each.

Every method of `TUNED` has one parameter and four values of it. At each sparsity and noise the
value with the highest accuracy on held-out training images is used, over three seeds that the
comparison does not use. The comparison then trains with three new seeds and measures on the test
images.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safe_core.study.runner import run_study
from safe_core.study.runner.statistics import mean_and_error, percent

from .report import machine, machine_table

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.95, 0.99)
NOISES = {0.0: "clean labels", 0.5: "half of the labels random"}
_ADMM = 'method = "admm"\npenalty = {}\n'
_SAFE = 'method = "safe"\nrho = 0.1\npenalty = {}\n'
_COSINE = 'penalty_schedule = "cosine"\n'
_GMP = 'method = "gmp"\nrise_epochs = {}\n'
PENALTIES, EPOCHS = (0.01, 0.03, 0.1, 0.3), (20, 30, 40, 50)
# By label: the table of a recipe, and the values of its one parameter.
TUNED: dict[str, tuple[str, tuple[float, ...]]] = {
    "magnitude, fine-tuned": (_GMP + "prune_every_epochs = {}\n", EPOCHS),
    "GMP": (_GMP + "prune_every_epochs = 2\n", EPOCHS),
    "ADMM, constant penalty": (_ADMM, PENALTIES),
    "ADMM, cosine penalty": (_ADMM + _COSINE, PENALTIES),
    "SAFE, cosine penalty": (_SAFE + _COSINE, PENALTIES),
}
_HEAD = """
title = "Comparison on digits"
frameworks = {frameworks}
sparsities = [{sparsity}]
seeds = {seeds}
data = {{ name = "digits", label_noise = [{noise}], validation = {validation} }}
model = {{ name = "lenet-300-100" }}

[training]
epochs = 60
batch_size = 64
learning_rate = 0.1
schedule = "cosine"
warmup_epochs = 5
momentum = 0.9
weight_decay = 1e-4
"""


def recipe(methods: Mapping[str, str], sparsity: float, noise: float, *, tuning: bool) -> str:
    """Return the recipe that trains these methods, given as tables by label."""
    head = _HEAD.format(
        frameworks='["torch"]',
        sparsity=sparsity,
        noise=noise,
        seeds=[3, 4, 5] if tuning else [0, 1, 2],
        validation=0.25 if tuning else 0.0,
    )
    tables = (f'[[methods]]\nlabel = "{label}"\n{table}' for label, table in methods.items())
    return "\n".join([head, *tables])


def setting(table: str, value: float) -> str:
    """Return a table with a value at each of its blanks."""
    return table.replace("{}", str(value))


def tuned(out: Path, sparsity: float, noise: float, jobs: int) -> dict[str, float]:
    """Return the value of each method with the best held-out accuracy, the lowest of equal ones."""
    tried = {
        f"{label} | {value}": setting(table, value)
        for label, (table, values) in TUNED.items()
        for value in values
    }
    source = recipe(tried, sparsity, noise, tuning=True)
    results = run_study(source, out, jobs=jobs)
    found = {}
    for label, (_, values) in TUNED.items():
        means = {v: _mean(results, f"{label} | {v}", "torch")[0] for v in values}
        found[label] = max(values, key=means.__getitem__)
    return found


def _mean(results: Mapping[Any, Any], label: str, framework: str) -> tuple[float, float]:
    """Return the mean accuracy and its error; a run that diverged counts as 0."""
    here = [r for c, r in results.items() if (c.method, c.framework) == (label, framework)]
    mean, error = mean_and_error([r.get("accuracy", 0.0) for r in here])
    return mean, error or 0.0


class Shown(NamedTuple):
    """The accuracies by method, noise and sparsity, and the chosen values."""

    accuracy: dict[tuple[str, float, float], tuple[float, float]]
    chosen: dict[tuple[str, float, float], float]


def as_table(shown: Shown) -> str:
    """Return a table in Markdown for each noise, with the best and all within its error in bold."""
    labels = list(dict.fromkeys(label for label, _, _ in shown.accuracy))
    parts = []
    for noise, title in NOISES.items():
        heads = [f"{percent(s)}{kind}" for s in SPARSITIES for kind in ("", ", value")]
        lines = [f"**{title}: accuracy, %**", "", "| method | " + " | ".join(heads) + " |"]
        lines.append("| --- |" + " ---: |" * len(heads))
        for label in labels:
            cells = []
            for s in SPARSITIES:
                mean, error = shown.accuracy[label, noise, s]
                group = {x: shown.accuracy[x, noise, s] for x in labels if x != "dense"}
                best = max(group.values())
                near = best[0] - mean <= math.hypot(error, best[1]) and label != "dense"
                mark = "**" if near else ""
                value = shown.chosen.get((label, noise, s), "")
                cells += [f"{mark}{mean:.2f} ± {error:.2f}{mark}", str(value)]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    note = (
        "Mean and standard error over 3 seeds; in bold: the best mean, and all within one joint "
        "standard error. Value: the epochs of pruning, or the penalty."
    )
    return "\n\n".join(["\n".join(machine_table(machine())), *parts, note]) + "\n"


def draw(shown: Shown, path: Path) -> None:
    """Draw a point for each method and sparsity, in one panel for each noise."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for label, _, _ in shown.accuracy))[::-1]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    panels = figure.subplots(1, len(NOISES), sharey=True)
    for axes, (noise, title), low in zip(panels, NOISES.items(), (85.0, 60.0), strict=True):
        for s, marker, colour in zip(SPARSITIES, "os", ("#0072B2", "#D55E00"), strict=True):
            name = f"{percent(s)} zeros"
            for i, label in enumerate(labels):
                mean, error = shown.accuracy[label, noise, s]
                y = i + (0.14 if s == SPARSITIES[0] else -0.14)
                if label == "dense":
                    axes.axvline(mean, color="0.5", linestyle="--", linewidth=1)
                elif mean < low:  # outside: the value beside an arrow
                    axes.plot(low, y, "<", color=colour, markersize=4, clip_on=False)
                    axes.text(low + 0.02 * (100 - low), y, f"{mean:.0f}%", fontsize=7, va="center")
                else:
                    axes.errorbar(
                        mean, y, xerr=error, color=colour, marker=marker, markersize=4, capsize=2,
                        linestyle="none", label=name,
                    )  # fmt: skip
                    name = "_"  # one entry of the legend
        axes.set_xlim(low, 100)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("test accuracy, % (dashed: dense)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    shown_labels = [label for label in labels if label != "dense"]
    panels[0].set_yticks([labels.index(x) for x in shown_labels], shown_labels)
    panels[0].set_ylim(-0.6, len(shown_labels) - 0.4)
    panels[1].legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=200)


def main() -> None:
    """Run what is not finished, and write the table and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("study-results/compare"))
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    options = parser.parse_args()
    shown = Shown({}, {})
    for noise, sparsity in itertools.product(NOISES, SPARSITIES):
        name = f"{percent(sparsity)}-{noise:g}"
        chosen = tuned(options.results / f"tuning-{name}", sparsity, noise, options.jobs)
        methods = {"dense": 'method = "dense"\n', "one-shot": 'method = "magnitude"\n'}
        methods |= {label: setting(TUNED[label][0], value) for label, value in chosen.items()}
        final = recipe(methods, sparsity, noise, tuning=False)
        results = run_study(final, options.results / name, jobs=options.jobs)
        for label in methods:
            shown.accuracy[label, noise, sparsity] = _mean(results, label, "torch")
        shown.chosen.update({(label, noise, sparsity): v for label, v in chosen.items()})
    (ROOT / "docs" / "comparison_table.md").write_text(as_table(shown), encoding="utf-8")
    draw(shown, ROOT / "docs" / "_static" / "comparison.png")


if __name__ == "__main__":
    main()
