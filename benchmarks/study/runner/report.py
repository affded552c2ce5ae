"""Write the report of a study: tables in Markdown and LaTeX, and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cells import cells
from .recipe_files import RECIPE, kept_recipe
from .results import read_results
from .statistics import Entry, Table, agreement, tables

__all__ = ["as_latex", "as_markdown", "write_report"]


_LATEX = {c: f"\\{c}" for c in "%&#_${}"} | {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def write_report(out: Path) -> list[Path]:
    """Write ``report.md``, ``report.tex`` and figures for the finished runs of a study.

    Parameters
    ----------
    out : Path
        The results folder of `run_study`. You can edit the title, ``[report]`` and ``[[quoted]]``
        in its recipe.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    FileNotFoundError, ValueError
        If ``out`` holds no study or no finished run.

    Examples
    --------
    >>> write_report(Path("/nowhere"))
    Traceback (most recent call last):
        ...
    FileNotFoundError: /nowhere must be the folder of a study, with its recipe.toml
    """
    if not (out / RECIPE).is_file():
        raise FileNotFoundError(f"{out} must be the folder of a study, with its {RECIPE}")
    recipe = kept_recipe(out)
    planned = cells(recipe)
    results = read_results(out, recipe).results
    if not results:
        raise ValueError(f"{out} must hold at least one finished run, got none")
    made = tables(recipe, results)
    state = f"{len(results)} of {len(planned)} runs are finished."
    used = {json.dumps(r["versions"], sort_keys=True) for r in results.values() if "versions" in r}
    with_versions = sorted({f"{k} {v}" for text in used for k, v in json.loads(text).items()})
    head = (
        f"# {recipe.title}\n\n{state} Made with {', '.join(with_versions) or 'unknown versions'}."
    )
    agreed = agreement(recipe, results)
    body = [*map(as_markdown, made), *([agreed.sentence()] if agreed else [])]
    texts = {
        "report.md": "\n\n".join([head, *body]) + "\n",
        "report.tex": "\n\n".join([f"% {state}", *map(as_latex, made)]) + "\n",
    }
    for name, content in texts.items():
        (out / name).write_text(content, encoding="utf-8")
    from .figures import draw  # matplotlib takes a second to import

    return [*(out / name for name in texts), *draw(recipe, results, out)]


def as_markdown(table: Table) -> str:
    """Return a table in Markdown; HTML underlines the second best.

    Examples
    --------
    >>> table = Table("Tiny", ("method",), (("SAFE",),), ("90%",), {(0, 0): Entry(97.5)}, ())
    >>> print(as_markdown(table))
    **Tiny**
    <BLANKLINE>
    | method | 90% |
    | --- | ---: |
    | SAFE | 97.50 |
    """

    def marked(entry: Entry | None) -> str:
        if entry is None:
            return "-"
        text = _with_diverged(entry, entry.text())
        return {0: text, 1: f"**{text}**", 2: f"<u>{text}</u>"}[entry.rank]

    lines = [
        _line(map(_cell, [*table.heads, *table.columns])),
        _line(["---"] * len(table.heads) + ["---:"] * len(table.columns)),
    ]
    for i, row in enumerate(table.rows):
        found = [marked(table.entries.get((i, j))) for j in range(len(table.columns))]
        lines.append(_line([*map(_cell, row), *found]))
    notes = [f"{_sentence(table.notes)}"] if table.notes else []
    return "\n\n".join([f"**{table.caption}**", "\n".join(lines), *notes])


def as_latex(table: Table) -> str:
    """Return a table in LaTeX, for the package booktabs.

    Examples
    --------
    >>> entries = {(0, 0): Entry(97.5, 0.25, rank=1)}
    >>> table = Table("Tiny", ("method",), (("SAFE",),), ("90%",), entries, ())
    >>> print(as_latex(table).splitlines()[6])
    SAFE & $\\mathbf{97.50} \\pm 0.25$ \\\\
    """

    def marked(entry: Entry | None) -> str:
        if entry is None:
            return "--"
        mean, _, error = entry.text("|").partition("|")
        if mean == "diverged":
            return mean
        mean = {0: mean, 1: rf"\mathbf{{{mean}}}", 2: rf"\underline{{{mean}}}"}[entry.rank]
        return _with_diverged(entry, f"${mean} \\pm {error}$" if error else f"${mean}$")

    body = []
    for i, row in enumerate(table.rows):
        found = [marked(table.entries.get((i, j))) for j in range(len(table.columns))]
        body.append(" & ".join([*map(_escaped, row), *found]) + r" \\")
    heads = " & ".join(map(_escaped, (*table.heads, *table.columns)))
    caption = _escaped(". ".join([table.caption, _sentence(table.notes)]).strip(". ") + ".")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{{'l' * len(table.heads)}{'r' * len(table.columns)}}}",
            r"\toprule",
            heads + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{caption}}}",
            r"\end{table}",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(parts: Iterable[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def _with_diverged(entry: Entry, text: str) -> str:
    return f"{text} ({entry.diverged})" if entry.diverged else text


def _sentence(notes: Sequence[str]) -> str:
    text = "; ".join(notes)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _escaped(text: str) -> str:
    """Return plain text escaped for LaTeX."""
    return re.sub(r"[\\%&#_${}^~<>|]", lambda found: _LATEX[found[0]], text)
