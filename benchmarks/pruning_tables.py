"""The tables of the study of post-training pruning, in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .report import machine_table

__all__ = ["SPARSITIES", "tables"]

SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")
Line = dict[str, Any]


def tables(results: list[Line], methods: list[str], described: dict[str, str]) -> str:
    """A table for each study and figure: the mean and its standard error over seeds."""
    parts = ["\n".join(machine_table(described))]
    for study, figures in FIGURES.items():
        rows = [line for line in results if line["study"] == study]
        dense = [line for line in rows if line["method"] == "Dense"]
        rows = [line for line in rows if line["method"] != "Dense"]
        if rows:
            parts.append(f"**{study}**: {_settings(study, rows)}")
            columns = "hidden" if study == "growth" else "sparsity"
            parts += [_grid(rows, methods, columns, *figure) for figure in figures]
            parts += [
                f"Perplexity of the dense model: {d['perplexity']:.4g}"
                for d in dense
                if "perplexity" in d
            ]
    return "\n\n".join(parts) + "\n"


def _last_drift(line: Line) -> float:
    return float(line["drift"][-1])


def _seconds(line: Line) -> float:
    return float(np.mean(line["block_seconds"]))


_BOTH = (
    ("squared error of the last hidden state on held-out text over its square", _last_drift, min),
    ("seconds for one block", _seconds, min),
)
FIGURES: dict[str, tuple[tuple[str, Callable[[Line], float], Any], ...]] = {
    "llama": (("perplexity", lambda line: line["perplexity"], min), *_BOTH),
    "encoder": (
        ("cosine with the dense model's embedding", lambda line: line["cosine"], max),
        ("rank correlation of similarities", lambda line: line["spearman"], max),
        *_BOTH,
    ),
    "growth": (("seconds for one block by its width", _seconds, min),),
}


def _settings(study: str, rows: list[Line]) -> str:
    """In words; what was not run alike is refused."""
    found = {tuple(line[key] for key in ("samples", "length", "epochs")) for line in rows}
    if len(found) > 1:
        raise ValueError(f"results must be of one setting for {study}, got {sorted(found)}")
    samples, length, epochs = found.pop()
    return f"{samples} samples of {length} tokens, {epochs} epochs where a method trains"


def _grid(
    rows: list[Line],
    methods: list[str],
    columns: str,
    title: str,
    figure: Callable[[Line], float],
    best: Any,
) -> str:
    levels = [s for s in SPARSITIES if any(r[columns] == s for r in rows)] or sorted(
        {r[columns] for r in rows}
    )
    found = {
        (m, s): [figure(r) for r in rows if (r["method"], r[columns]) == (m, s)]
        for m in methods
        for s in levels
    }
    out = [f"| {title} | " + " | ".join(map(str, levels)) + " |"]
    out.append("| --- |" + " ---: |" * len(levels))
    for m in methods:
        if not any(found[m, s] for s in levels):
            continue
        row = []
        for s in levels:
            means = [np.mean(found[other, s]) for other in methods if found[other, s]]
            values = found[m, s]
            row.append(_entry(values, bool(values) and np.mean(values) == best(means)))
        out.append(f"| {m} | " + " | ".join(row) + " |")
    return "\n".join(out)


def _entry(values: list[float], is_best: bool) -> str:
    if not values:
        return ""
    text = f"{np.mean(values):.4g}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2g}"
    return f"**{text}**" if is_best else text
