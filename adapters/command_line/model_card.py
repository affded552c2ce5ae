"""The model card of a pruned model, with all settings that are needed to repeat the run."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .perplexity import TextFile
    from .pruning import PruningJob, PruningResult

__all__ = ["markdown_table", "model_card"]

_INPUTS = {
    "pruned": "outputs of the pruned blocks before it",
    "dense": "outputs of the dense blocks before it",
}
_PACKAGES = ("safe-core", "torch", "transformers", "numpy")


def model_card(job: PruningJob, result: PruningResult, files: Sequence[TextFile]) -> str:
    """Return the text of a README.md, with the calibration files as they were read.

    Examples
    --------
    See `safe_core.command_line.pruning.prune_folder`, which writes one.

    >>> model_card.__name__
    'model_card'
    """
    source = Path(job.model).resolve().name
    report, s = result.report, job.settings
    targets = s.target_inputs if s.propagate == "pruned" else "dense"
    settings = [
        ("requested sparsity", job.pattern.describe()),
        ("achieved sparsity", f"{result.sparsity:.6%} of {_entries(result):,} pruned entries"),
        ("method", job.method),
        *job.solver.describe(job.pattern),
        ("batch", f"{s.batch_size} samples"),
        ("inputs of a block", _INPUTS[s.propagate]),
        ("targets of a block", f"its dense outputs for the {_INPUTS[targets]}"),
        *([("pruned weights", f"those whose name matches `{job.only}`")] if job.only else []),
        ("seed", str(s.seed)),
        ("device", result.device),
        ("time", f"{report.seconds:.1f} s"),
    ]
    calibration = [(file.name, f"{file.nbytes:,}", f"`{file.sha256}`") for file in files]
    versions = [("Python", platform.python_version()), *((p, version(p)) for p in _PACKAGES)]
    weights = [
        (f"`{w.name}`", " x ".join(map(str, w.shape)), f"{w.zeros:,}", f"{w.block_error:.4g}")
        for w in result.weights
    ]
    unused = ", ".join(f"`{name}`" for name in report.dense)
    left = [f"Not pruned, because no matrix product used them: {unused}.", ""]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [safe-core, pruning, sparse]",
            "---",
            "",
            f"# {source}, pruned",
            "",
            f"The weights of the blocks of `{source}`, pruned by safe_core; embeddings, norms, "
            "biases and the head are dense.",
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
            "The error is the mean squared error of the outputs of the whole block, divided by "
            "their mean square.",
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
