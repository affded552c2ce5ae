"""The model card of a pruned model, with all settings that are needed to repeat the run."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_core.patterns import NM, Pattern, Unstructured
from safe_core.reconstruction import Reconstruction
from safe_core.schedules import Constant
from safe_core.solvers import Solver

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
        ("requested sparsity", _requested(job.pattern)),
        ("achieved sparsity", f"{result.sparsity:.6%} of {_entries(result):,} pruned entries"),
        *_method_settings(job.method, job.solver, job.pattern),
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


def _requested(pattern: Pattern) -> str:
    if isinstance(pattern, NM):
        return f"{pattern.n}:{pattern.m}, {pattern.n} of every {pattern.m} inputs in a row are kept"
    if not isinstance(pattern, Unstructured) or pattern.schedule is not None:
        return pattern.describe()
    each = "each output of each weight" if pattern.by_output else "each weight"
    return f"{100 * float(pattern.fractions()[-1]):g}% of {each}"


def _method_settings(name: str, solver: Solver, pattern: Pattern) -> list[tuple[str, str]]:
    """Return the settings of a solver with readable names."""
    if not isinstance(solver, Reconstruction):
        origin = solver.origin
        title = getattr(origin, "__name__", type(origin).__name__)
        named = fields(origin) if is_dataclass(origin) else ()
        found = [(f.name.replace("_", " "), str(getattr(origin, f.name))) for f in named]
        return [("method", f"{name}: {title}, layer by layer"), *found]
    method, (first, second) = solver.bound(pattern), solver.betas
    radius = "none" if method.perturbation is None else _value(method.perturbation.rho)
    plus = "magnitude times norm of input" if solver.importance else "magnitude"
    return [
        ("method", f"{name}: SAFE on the reconstruction error of each block"),
        ("entries ranked by", plus),
        ("perturbation radius (rho)", radius),
        ("penalty (lambda)", _value(method.penalty)),
        ("steps between dual updates (K)", str(method.dual_update_interval)),
        ("optimizer", f"Adam, betas {first:g} and {second:g}"),
        ("peak learning rate", f"{solver.learning_rate:g}"),
        ("epochs", str(solver.epochs)),
        ("warm-up epochs", str(solver.warmup)),
    ]


def _value(schedule: Any) -> str:
    return f"{schedule.value:g}" if isinstance(schedule, Constant) else f"`{schedule!r}`"


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
