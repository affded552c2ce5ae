"""Write the Markdown tables of the study of post-training pruning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .report import machine_table

__all__ = ["tables"]

Line = dict[str, Any]


class Figure(NamedTuple):
    """A table: its title, the values of a result by column, and which value is best."""

    title: str
    values: Callable[[Line], dict[str, float]]
    best: Callable[[list[float]], float] = min


def tables(results: list[Line], methods: list[str], described: dict[str, str]) -> str:
    """Return a table for each study and figure, with means and standard errors over seeds."""
    parts = ["\n".join(machine_table(described))]
    for study, figures in FIGURES.items():
        lines = [line for line in results if line["study"] == study]
        if lines:
            parts.append(f"**{study}**: {_settings(study, lines)}.")
            named = dict.fromkeys([*methods, *(line["method"] for line in lines)])
            rows = [method for method in named if method != "Dense"]
            parts += [_grid(lines, rows, figure) for figure in figures]
    return "\n\n".join(parts) + "\n"


def _by_sparsity(value: Callable[[Line], float]) -> Callable[[Line], dict[str, float]]:
    return lambda line: {line["sparsity"]: float(value(line))}


def _by_block(line: Line) -> dict[str, float]:
    if line["sparsity"] != "0.5":
        return {}
    errors = line["block_errors"]
    return {f"block {i}": e for i, e in enumerate(errors)} | {"sum": sum(errors)}


_ERRORS = (
    Figure(
        "relative squared error of the last hidden state on held-out text",
        _by_sparsity(lambda line: line["drift"][-1]),
    ),
    Figure("relative squared error of each block's output, at 50%", _by_block),
)
_FIRST_BLOCK = (
    Figure(
        "relative squared error of the first block's output, by penalty",
        lambda line: {f"{line['penalty']:g}": line["block_errors"][0]},
    ),
)
FIGURES = {
    "llama": (Figure("perplexity", _by_sparsity(lambda line: line["perplexity"])), *_ERRORS),
    "encoder": (
        Figure(
            "cosine similarity to the dense model's embedding",
            _by_sparsity(lambda line: line["cosine"]),
            max,
        ),
        Figure(
            "rank correlation of pairwise similarities with the dense model's",
            _by_sparsity(lambda line: line["spearman"]),
            max,
        ),
        *_ERRORS,
    ),
    "llama, first block": _FIRST_BLOCK,
    "encoder, first block": _FIRST_BLOCK,
    "growth": (
        Figure(
            "seconds per block, by width",
            lambda line: {str(line["hidden"]): line["block_seconds"][0]},
        ),
    ),
}


def _settings(study: str, lines: list[Line]) -> str:
    """Describe the settings of a study, which must be the same for all results."""
    found = {tuple(line[key] for key in ("samples", "length", "epochs")) for line in lines}
    if len(found) > 1:
        raise ValueError(f"results must have one setting for {study}, got {sorted(found)}")
    samples, length, epochs = found.pop()
    dense = {line.get("perplexity") for line in lines if line["method"] == "Dense"} - {None}
    known = f"; the perplexity of the dense model is {dense.pop():.4g}" if dense else ""
    return f"{samples} samples of {length} tokens; methods that train use {epochs} epochs{known}"


def _grid(lines: list[Line], methods: list[str], figure: Figure) -> str:
    """Return a table of methods by columns, with the best mean of each column in bold."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["method"] in methods:
            for column, value in figure.values(line).items():
                found[column][line["method"]].append(value)
    best = {c: figure.best([float(np.mean(v)) for v in found[c].values()]) for c in found}
    out = ["| " + " | ".join([figure.title, *found]) + " |", "| --- |" + " ---: |" * len(found)]
    for method in methods:
        row = [_entry(found[column].get(method, []), best[column]) for column in found]
        if any(row):
            out.append("| " + " | ".join([method, *row]) + " |")
    return "\n".join(out)


def _entry(values: list[float], best: float) -> str:
    if not values:
        return ""
    text = f"{np.mean(values):.4g}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2g}"
    return f"**{text}**" if np.mean(values) == best else text
