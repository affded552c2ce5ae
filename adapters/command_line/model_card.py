"""The model card of a pruned model: what was done to it, so that it can be done again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_core.patterns import Pattern
from safe_core.schedules import Constant

if TYPE_CHECKING:
    from .perplexity import TextFile
    from .pruning import PruningJob, PruningResult

__all__ = ["markdown_table", "model_card"]

_TARGETS = {
    "pruned": "what a block returns, when dense, for what the pruned blocks before it return",
    "dense": "what a block returned in the dense model",
}
_PACKAGES = ("safe-core", "torch", "transformers", "numpy")


def model_card(job: PruningJob, result: PruningResult, files: Sequence[TextFile]) -> str:
    """Return the text of a README.md, for calibration files as they were when they were read.

    Examples
    --------
    See `safe_core.command_line.pruning.prune_folder`, which writes one.

    >>> model_card.__name__
    'model_card'
    """
    source = Path(job.model).resolve().name
    report = result.report
    settings = [
        ("sparsity asked for", job.pattern.describe()),
        ("sparsity achieved", f"{result.sparsity:.6%} of {_entries(result):,} pruned entries"),
        *_of_method(job.method, job.solver, job.pattern),
        ("batch", f"{job.batch_size} samples"),
        ("inputs of a block", "what the pruned blocks before it return"),
        ("reference for a block", _TARGETS[job.targets]),
        ("seed", str(job.seed)),
        ("device", result.device),
        ("time", f"{report.seconds:.1f} s"),
    ]
    calibration = [(file.name, f"{file.nbytes:,}", f"`{file.sha256}`") for file in files]
    versions = [("Python", platform.python_version()), *((p, version(p)) for p in _PACKAGES)]
    weights = [
        (f"`{w.name}`", " x ".join(map(str, w.shape)), f"{w.zeros:,}", f"{w.block_error:.4g}")
        for w in result.weights
    ]
    left = [f"Not pruned: {', '.join(f'`{name}`' for name in report.dense)}.", ""]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [safe-core, pruning, sparse]",
            "---",
            "",
            f"# {source}, pruned",
            "",
            f"The weights of the blocks of `{source}`, made sparse by safe_core; embeddings, "
            "norms, biases and the head are dense.",
            "",
            markdown_table(("setting", "value"), settings),
            "",
            "## Calibration",
            "",
            f"{job.samples:,} windows of {job.length:,} tokens, drawn from",
            "",
            markdown_table(("file", "bytes", "SHA-256"), calibration),
            "",
            "## Weights",
            "",
            "The error is that of what the whole block returns, over its mean square.",
            "",
            markdown_table(("weight", "shape", "zeros", "error of block"), weights),
            "",
            *(left if report.dense else []),
            "## Versions",
            "",
            markdown_table(("package", "version"), versions),
            "",
        ]
    )


def _of_method(name: str, solver: Any, pattern: Pattern) -> list[tuple[str, str]]:
    """Return the settings of a solver, named as people read them."""
    if not solver.trains:
        found = [(f.name.replace("_", " "), str(getattr(solver, f.name))) for f in fields(solver)]
        return [("method", f"{name}: {type(solver).__name__}, layer by layer"), *found]
    method, (first, second) = solver.bound(pattern), solver.betas
    radius = "none" if method.perturbation is None else _value(method.perturbation.rho)
    plus = "magnitude times norm of input" if solver.importance else "magnitude"
    plus = plus if method.importance is None else f"`{method.importance!r}`"
    return [
        ("method", f"{name}: trained on the reconstruction error of each block"),
        ("weights ranked by", plus),
        ("perturbation radius (rho)", radius),
        *_of_constraint(method.constraint),
        ("optimizer", f"Adam, betas {first:g} and {second:g}"),
        ("highest learning rate", f"{solver.learning_rate:g}"),
        ("epochs", str(solver.epochs)),
        ("epochs in which the rate rises", str(solver.warmup)),
    ]


_SYMBOLS = {"penalty": "penalty (lambda)", "dual_update_interval": "dual update interval (K)"}


def _of_constraint(constraint: Any) -> list[tuple[str, str]]:
    """Return the settings of a constraint that are not the default."""
    rows = [("constraint", type(constraint).__name__)]
    for f in fields(constraint):
        value = getattr(constraint, f.name)
        if f.name in _SYMBOLS or value != f.default:
            rows.append((_SYMBOLS.get(f.name, f.name.replace("_", " ")), _value(value)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, (int, str)):
        return str(value)
    return f"{value.value:g}" if isinstance(value, Constant) else f"`{value!r}`"


def _entries(result: PruningResult) -> int:
    return sum(w.entries for w in result.weights)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Examples
    --------
    >>> print(markdown_table(("a", "b"), [("1", "x|y")]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)
