"""Write the report of a study: tables in Markdown and LaTeX, and figures."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import Cell, cells
from .gains import gain_tables
from .recipe_files import RECIPE, kept_recipe, replace_file
from .results import Found, read_results
from .statistics import Entry, Table, agreement, tables
from .values import as_csv

__all__ = ["as_latex", "as_markdown", "write_report"]


_LATEX = {c: f"\\{c}" for c in "%&#_${}"} | {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def write_report(out: Path) -> list[Path]:
    """Write ``report.md``, ``report.tex``, ``results.csv`` and figures of a study.

    No code that the recipe names is run.

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
    found = read_results(out, recipe)
    results = found.results
    if not results:
        raise ValueError(f"{out} must hold at least one finished run, got none")
    made = [*tables(recipe, results), *gain_tables(recipe, results)]
    state = f"{len(results)} of {len(planned)} runs are finished."
    state += "".join(f" {line}" for line in _troubles(found))
    used = {json.dumps(r["versions"], sort_keys=True) for r in results.values() if "versions" in r}
    with_versions = sorted({f"{k} {v}" for text in used for k, v in json.loads(text).items()})
    made_with = f"Made with {', '.join(with_versions) or 'unknown versions'}{_where(results)}."
    head = f"# {plain_markdown(recipe.title)}\n\n{plain_markdown(f'{state} {made_with}')}"
    agreed = agreement(recipe, results)
    body = [*map(as_markdown, made), *([plain_markdown(agreed.sentence())] if agreed else [])]
    texts = {
        "report.md": "\n\n".join([head, *body]) + "\n",
        "report.tex": "\n\n".join([_comment(state), *map(as_latex, made)]) + "\n",
        "results.csv": as_csv(recipe, found),
    }
    for name, content in texts.items():
        replace_file(out / name, content.encode())
    from .figures import draw  # matplotlib takes a second to import

    return [*(out / name for name in texts), *draw(recipe, results, out)]


def _troubles(found: Found) -> list[str]:
    """Return sentences on runs that failed, and on results that do not count."""
    lines = []
    if found.failures:
        count = len(found.failures)
        named = [f"{c.title} ({text.splitlines()[0]})" for c, text in found.failures.items()]
        more = [f"and {count - 3} more"] if count > 3 else []
        lines.append(f"{count} run{'s' * (count > 1)} failed: {'; '.join([*named[:3], *more])}.")
    others = sum(map(len, found.changed.values()))
    if others:
        lines.append(f"The results of {others} runs with other settings do not count.")
    return lines


def _where(results: Mapping[Cell, Any]) -> str:
    """Return the machines of the runs, with the threads and runs at a time that times depend on."""
    used = [r["machine"] for r in results.values() if r.get("machine")]
    found = dict.fromkeys(
        f"{m.get('processor')}, {m.get('device')}, {m.get('threads')} threads, "
        f"{m.get('jobs')} runs at a time"
        for m in used
    )
    return f", on {'; '.join(found)}" if found else ""


def _comment(text: str) -> str:
    return "% " + " ".join(text.split())


def plain_markdown(text: str) -> str:
    """Return text that Markdown and HTML show as it is.

    Examples
    --------
    >>> plain_markdown("a_b <script> [x](y)")
    'a\\\\_b &lt;script&gt; \\\\[x\\\\](y)'
    """
    text = " ".join(text.split())
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    return html.escape(text, quote=False)


def as_markdown(table: Table) -> str:
    """Return a table in Markdown.

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
        return f"**{text}**" if entry.best else text

    lines = [
        _line(map(plain_markdown, [*table.heads, *table.columns])),
        _line(["---"] * len(table.heads) + ["---:"] * len(table.columns)),
    ]
    for i, row in enumerate(table.rows):
        found = [marked(table.entries.get((i, j))) for j in range(len(table.columns))]
        lines.append(_line([*map(plain_markdown, row), *found]))
    notes = [plain_markdown(_sentence(table.notes))] if table.notes else []
    return "\n\n".join([f"**{plain_markdown(table.caption)}**", "\n".join(lines), *notes])


def as_latex(table: Table) -> str:
    """Return a table in LaTeX, for the package booktabs.

    Means are aligned at their last digit, and errors beside them. All entries of a column have
    the same number of decimals, so that the decimal points are aligned too.

    Examples
    --------
    >>> entries = {(0, 0): Entry(97.5, 0.25, best=True)}
    >>> table = Table("Tiny", ("method",), (("SAFE",),), ("90%",), entries, ())
    >>> print(as_latex(table).splitlines()[6])
    SAFE & $\\mathbf{97.50}$ & $0.25$ \\\\
    """
    columns = range(len(table.columns))
    with_errors = {j for (_, j), entry in table.entries.items() if entry.error is not None}
    wide = [j in with_errors for j in columns]
    body = []
    for i, row in enumerate(table.rows):
        found = [_latex_entry(table.entries.get((i, j)), wide[j]) for j in columns]
        body.append(" & ".join([*map(_escaped, row), *found]) + r" \\")
    heads = [*map(_escaped, table.heads)]
    heads += [
        rf"\multicolumn{{2}}{{c}}{{{_escaped(name)}}}" if wide[j] else _escaped(name)
        for j, name in enumerate(table.columns)
    ]
    spec = "l" * len(table.heads) + "".join(r"r@{\,$\pm$\,}l" if w else "r" for w in wide)
    caption = _escaped(". ".join([table.caption, _sentence(table.notes)]).strip(". ") + ".")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{_label(table.caption)}}}",
            r"\end{table}",
        ]
    )


def _latex_entry(entry: Entry | None, wide: bool) -> str:
    """Return an entry, over two columns where the column has errors."""
    if entry is None:
        return r"\multicolumn{2}{c}{--}" if wide else "--"
    mean, _, error = entry.text("|").partition("|")
    shown = mean if math.isnan(entry.mean) else f"${mean}$"
    if entry.best:
        shown = rf"$\mathbf{{{mean}}}$"
    if not wide:
        return _with_diverged(entry, shown)
    if not error:  # without the sign between the columns
        rest = f" ({entry.diverged})" if entry.diverged else ""
        return rf"\multicolumn{{1}}{{r@{{}}}}{{{shown}}} &{rest}"
    return f"{shown} & {_with_diverged(entry, f'${error}$')}"


def _label(caption: str) -> str:
    """Return a caption as the name of a label.

    Examples
    --------
    >>> _label("Noisy labels, digits: accuracy, %")
    'noisy-labels-digits-accuracy'
    """
    return "-".join(re.findall(r"[a-z0-9.]+", caption.lower()))


def _line(parts: Iterable[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def _with_diverged(entry: Entry, text: str) -> str:
    return f"{text} ({entry.diverged})" if entry.diverged else text


def _sentence(notes: Sequence[str]) -> str:
    text = "; ".join(notes)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _escaped(text: str) -> str:
    """Return plain text escaped for LaTeX."""
    return re.sub(r"[\\%&#_${}^~<>|]", lambda found: _LATEX[found[0]], " ".join(text.split()))
