"""The model card of a pruned model, with all settings that are needed to repeat the run."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from .output import by_option, printable

if TYPE_CHECKING:
    from .input_files import InputFile
    from .pruning import PruningJob, PruningResult
    from .source import Source
    from .text_files import TextFile

__all__ = ["code", "escaped", "markdown_table", "model_card"]

_INPUTS = {
    "pruned": "outputs of the pruned blocks before it",
    "dense": "outputs of the dense blocks before it",
}
_PACKAGES = ("safe-core", "torch", "transformers", "numpy")


def model_card(
    job: PruningJob,
    source: Source,
    result: PruningResult,
    files: Sequence[TextFile | InputFile],
) -> str:
    """Return the text of a README.md, with the calibration files as they were read.

    Examples
    --------
    See `safe_core.command_line.pruning.prune_folder`, which writes one.

    >>> model_card.__name__
    'model_card'
    """
    name = source.folder.resolve().name
    title, named = escaped(name), code(name)
    report, s = result.report, job.settings
    targets = s.target_inputs if s.propagate == "pruned" else "dense"
    settings = [
        *_dequantised(source),
        ("requested sparsity", escaped(job.rules.describe())),
        ("achieved sparsity", f"{result.sparsity:.6%} of {_entries(result):,} pruned entries"),
        ("method", escaped(job.method)),
        *((escaped(key), escaped(value)) for key, value in job.solver.describe(job.pattern)),
        ("batch", f"{s.batch_size} samples"),
        ("inputs of a block", _INPUTS[s.propagate]),
        ("targets of a block", f"its dense outputs for the {_INPUTS[targets]}"),
        *([("pruned weights", f"those whose name matches {code(job.only)}")] if job.only else []),
        *(
            [("dense weights", f"those whose name matches {code(job.ignore)}")]
            if job.ignore
            else []
        ),
        ("seed", str(s.seed)),
        ("device", result.device),
        ("time", f"{report.seconds:.1f} s"),
    ]
    calibration = [(escaped(file.name), f"{file.nbytes:,}", code(file.sha256)) for file in files]
    drawn = f"{job.samples:,} windows of {job.length:,} tokens, drawn from"
    if job.chat_template:
        drawn += " chats, made by the tokenizer's chat template, in"
    if job.inputs is not None:
        drawn = f"At most {job.samples:,} rows of the inputs in"
    if job.field is not None:
        drawn += f" the field {code(job.field)} of"
    versions = [("Python", platform.python_version()), *((p, version(p)) for p in _PACKAGES)]
    weights = [
        (code(w.name), " x ".join(map(str, w.shape)), f"{w.zeros:,}", f"{w.block_error:.4g}")
        for w in result.weights
    ]
    dense = [(code(name), escaped(by_option(reason))) for name, reason in report.dense.items()]
    left = ["## Dense matrices of the blocks", "", markdown_table(("matrix", "because"), dense), ""]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [safe-core, pruning, sparse]",
            "---",
            "",
            f"# {title}, pruned",
            "",
            f"The weights of the blocks of {named}, pruned by safe_core; embeddings, norms, "
            "biases and the head are dense.",
            "",
            markdown_table(("setting", "value"), settings),
            "",
            "## Calibration",
            "",
            drawn,
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


def _dequantised(source: Source) -> list[tuple[str, str]]:
    """Return the row that tells of dequantised weights, if there are any."""
    if source.gguf is None or not source.blocks:
        return []
    types = ", ".join(source.blocks)
    return [("weights of the model", f"dequantised from {code(source.gguf.name)} ({types})")]


def _entries(result: PruningResult) -> int:
    return sum(w.entries for w in result.weights)


def escaped(text: str) -> str:
    """Return a text such that Markdown and HTML show it as it is, on one line.

    Examples
    --------
    >>> print(escaped("a_b <script> [x](y)"))
    a\\_b &lt;script> \\[x\\](y)
    """
    plain = printable(text).replace("&", "&amp;")
    return re.sub(r"([\\`*_\[\]#~])", r"\\\1", plain).replace("<", "&lt;")


def code(text: str) -> str:
    """Return a text as code of Markdown, which may hold backticks itself.

    Examples
    --------
    >>> code("weight"), code("a`b")
    ('`weight`', '`` a`b ``')
    """
    plain = printable(text)
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{plain}{space}{fence}"


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
