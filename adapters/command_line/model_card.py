"""The model card of a pruned model, with all settings that are needed to repeat the run."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from .output import by_option, printable

if TYPE_CHECKING:
    from .base_model import BaseModel
    from .preparation import Calibration
    from .pruning import PruningJob, PruningResult, WeightRow
    from .source import Source

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
    data: Calibration,
    command: str | None = None,
) -> str:
    """Return the text of a README.md, with the calibration as it was read.

    ``command`` is the command line of the run, if there was one.

    Examples
    --------
    See `safe_core.command_line.pruning.prune_folder`, which writes one.

    >>> model_card.__name__
    'model_card'
    """
    base, dense = source.base, result.report.dense
    versions = [("Python", platform.python_version()), *((p, version(p)) for p in _PACKAGES)]
    reasons = [(code(name), escaped(by_option(reason))) for name, reason in dense.items()]
    return "\n".join(
        [
            *_front_matter(base),
            "",
            f"# {escaped(base.name)}, pruned",
            "",
            f"The weights of the blocks of {code(base.name)}, pruned by safe_core; embeddings, "
            "norms, biases and the head are dense.",
            "",
            markdown_table(("base model", "value"), _base_rows(source)),
            "",
            markdown_table(("setting", "value"), _settings(job, result)),
            "",
            *([] if command is None else ["## Command", "", _fenced(command), ""]),
            "## Calibration",
            "",
            _drawn(job, data.tokens),
            "",
            markdown_table(
                ("file", "bytes", "SHA-256"),
                [(escaped(f.name), f"{f.nbytes:,}", code(f.sha256)) for f in data.files],
            ),
            "",
            "## Blocks",
            "",
            "The error is the mean squared error of the outputs of the block, divided by their "
            "mean square.",
            "",
            *_block_table(result),
            "## Weights",
            "",
            markdown_table(
                ("weight", "shape", "zeros", "sparsity"),
                [
                    (code(w.name), " x ".join(map(str, w.shape)), f"{w.zeros:,}", _share([w]))
                    for w in result.weights
                ],
            ),
            "",
            *(["## Dense matrices of the blocks", ""] if dense else []),
            *([markdown_table(("matrix", "because"), reasons), ""] if dense else []),
            "## Versions",
            "",
            markdown_table(("package", "version"), versions),
            "",
        ]
    )


def _front_matter(base: BaseModel) -> list[str]:
    """Return the lines that the hub reads; JSON strings are YAML too."""
    known = dict(base.licence)
    if not known and base.licence_file is not None:
        known = {"license": "other", "license_link": base.licence_file}
    if base.hub_id is not None:
        known = {"base_model": base.hub_id, **known}
    lines = [f"{key}: {json.dumps(value)}" for key, value in known.items()]
    tags = "tags: [safe-core, pruning, sparse]"
    return ["---", "library_name: transformers", *lines, tags, "---"]


def _base_rows(source: Source) -> list[tuple[str, str]]:
    base = source.base
    rows = [("name", escaped(base.name)), ("folder", code(str(source.folder)))]
    if base.hub_id is not None:
        link = f"https://huggingface.co/{base.hub_id}"
        rows[0] = ("name", f"[{escaped(base.hub_id)}]({link})")
    if source.gguf is not None:
        types = f", dequantised from {', '.join(source.blocks)}" if source.blocks else ""
        rows.append(("weights", f"{code(source.gguf.name)}{types}"))
    licence = ", ".join(escaped(text) for text in base.licence.values())
    file = "" if base.licence_file is None else f"see the file {code(base.licence_file)}"
    said = "; ".join(text for text in (licence, file) if text)
    return [*rows, ("licence", said or "not stated in its files")]


def _settings(job: PruningJob, result: PruningResult) -> list[tuple[str, str]]:
    s = job.settings
    targets = s.target_inputs if s.propagate == "pruned" else "dense"
    entries = sum(w.entries for w in result.weights)
    described = job.solver.describe(job.pattern, result.steps or None)
    chosen = (("pruned weights", job.only), ("dense weights", job.ignore))
    return [
        ("requested sparsity", escaped(job.rules.describe())),
        ("achieved sparsity", f"{result.sparsity:.6%} of {entries:,} pruned entries"),
        ("method", escaped(job.method)),
        *((escaped(key), escaped(value)) for key, value in described),
        ("batch", f"{s.batch_size} samples"),
        ("inputs of a block", _INPUTS[s.propagate]),
        ("targets of a block", f"its dense outputs for the {_INPUTS[targets]}"),
        *((key, f"those whose name matches {code(regex)}") for key, regex in chosen if regex),
        ("seed", str(s.seed)),
        ("device", result.device),
        ("time", f"{result.report.seconds:.1f} s"),
    ]


def _drawn(job: PruningJob, tokens: int) -> str:
    """Return where the calibration samples come from."""
    if job.inputs is not None:
        return f"At most {job.samples:,} rows of the inputs in"
    text = f"{job.samples:,} windows of {job.length:,} tokens, drawn from the {tokens:,} tokens of"
    if job.chat_template:
        text += " chats, made by the tokenizer's chat template, in"
    return text if job.field is None else f"{text} the field {code(job.field)} of"


def _block_table(result: PruningResult) -> list[str]:
    """Return the lines of the table of blocks, with their training where it was compared."""
    header: tuple[str, ...] = ("block", "sparsity", "error", "seconds", "training")
    rows: list[tuple[str, ...]] = []
    weights = list(result.weights)
    for block in result.report.blocks:
        own, weights = weights[: len(block.weights)], weights[len(block.weights) :]
        error = f"{block.relative_error:.4g}"
        seconds = f"{block.seconds:.1f}"
        rows.append((code(block.name), _share(own), error, seconds, block.training))
    if not any(block.training for block in result.report.blocks):
        header, rows = header[:-1], [row[:-1] for row in rows]
    note = result.report.training_note
    said = [] if note is None else [f"{note[0].upper()}{note[1:]}.", ""]
    return [markdown_table(header, rows), "", *said]


def _share(weights: Sequence[WeightRow]) -> str:
    """Return the sparsity of weights together."""
    return f"{sum(w.zeros for w in weights) / max(1, sum(w.entries for w in weights)):.4%}"


def _fenced(command: str) -> str:
    """Return a command as a block of code, which may hold backticks itself."""
    plain = printable(command)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    return f"{fence}bash\n{plain}\n{fence}"


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
