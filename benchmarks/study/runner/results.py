"""The files that hold the results of a study, one run per line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .cells import Cell, cells
from .recipe import Recipe

__all__ = ["Found", "append_line", "mend_results", "read_results", "result_file", "result_files"]

_STEM = "results"
# The types of the parts of a run, and of the parts of a result that are not numbers.
_OF_CELL = {
    "framework": str, "noise": int | float, "method": str, "sparsity": int | float | str | None,
    "seed": int,
}  # fmt: skip
_OF_RESULT = {
    "diverged": bool, "losses": list, "history": list, "landscape": dict,
    "weights_histogram": dict, "versions": dict, "machine": dict,
}  # fmt: skip
# What figures draw: the name, its arrays, and whether their shapes fit.
_PLOTS: tuple[tuple[str, tuple[str, str], Callable[[Any, Any], bool]], ...] = (
    ("weights_histogram", ("counts", "edges"), lambda n, m: n[1:] == () and m == (n[0] + 1,)),
    ("landscape", ("coordinates", "values"), lambda n, m: n[1:] == () and m == (n[0], n[0])),
)


class Found(NamedTuple):
    """Hold the runs of a recipe that the files of a study record.

    Attributes
    ----------
    results : dict of Cell to dict
        Finished runs, in the order of the recipe.
    failures : dict of Cell to str
        Runs whose last attempt failed, with the error.
    changed : dict of str to list of Cell
        Finished runs with other settings, by the difference. They do not count.
    """

    results: dict[Cell, Any]
    failures: dict[Cell, str]
    changed: dict[str, list[Cell]]


def result_file(out: Path, shard: tuple[int, int] | None = None) -> Path:
    """Return the file that a process appends to: one for each part of a shared study.

    Examples
    --------
    >>> result_file(Path(), (2, 8)).name
    'results-2-of-8.jsonl'
    """
    part = f"-{shard[0]}-of-{shard[1]}" if shard else ""
    return out / f"{_STEM}{part}.jsonl"


def result_files(out: Path) -> list[Path]:
    """Return the files of results in a folder.

    Raises
    ------
    ValueError
        If one is not a regular file. Reading a FIFO would block.
    """
    found = sorted(out.glob(f"{_STEM}.jsonl")) + sorted(out.glob(f"{_STEM}-*-of-*.jsonl"))
    for file in found:
        if not file.is_file():
            raise ValueError(f"{file} must be a regular file")
    return found


def append_line(file: Path, recipe: Recipe, cell: Cell, result: Mapping[str, Any] | str) -> None:
    """Append a finished run, or the error of one that failed, and wait until it is on the disk.

    Examples
    --------
    >>> import tempfile
    >>> from importlib.resources import files
    >>> from safe_core.study.runner import read_recipe
    >>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml")
    >>> cell = Cell("jax", 0.5, "SAFE", 0.95, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     append_line(result_file(Path(folder)), recipe, cell, {"accuracy": 97.5})
    ...     read_results(Path(folder), recipe).results
    {Cell(framework='jax', noise=0.5, method='SAFE', sparsity=0.95, seed=1, width=None): \
{'accuracy': 97.5}}
    """
    entry: dict[str, Any] = {
        "settings": recipe.settings(cell.method, cell.sparsity, cell.width),
        "cell": cell._asdict(),
        "failed" if isinstance(result, str) else "result": result,
    }
    line = (json.dumps(entry) + "\n").encode()
    # One write, so that lines of several processes never mix.
    out = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(out, line)
        if written < len(line):
            raise OSError(f"{file} took {written} of {len(line)} bytes: is the disk full?")
        os.fsync(out)
    finally:
        os.close(out)


def mend_results(file: Path) -> None:
    """Remove an incomplete last line, before new lines are appended."""
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(file, len(whole))


def read_results(out: Path, recipe: Recipe) -> Found:
    """Return the runs of a recipe that the files in a folder hold.

    Runs that the recipe no longer lists are ignored. An incomplete last line is ignored too:
    another process is writing it, or was killed.

    Raises
    ------
    ValueError
        If a line is not a result. The message names its file and number.
    """
    planned = dict.fromkeys(cells(recipe))
    metrics = recipe.evaluation.metrics()
    results: dict[Cell, Any] = {}
    failures: dict[Cell, str] = {}
    others: dict[Cell, str] = {}
    for cell, settings, result in (e for f in result_files(out) for e in _entries(f, metrics)):
        if len(recipe.widths) == 1:  # another width is another setting
            cell = cell._replace(width=None)
        if cell not in planned:
            continue
        wanted = recipe.settings(cell.method, cell.sparsity, cell.width)
        difference = _difference(settings, wanted)
        if difference:
            if not isinstance(result, str):
                others[cell] = difference
        elif isinstance(result, str):
            failures[cell] = result
        else:
            results[cell] = result
    changed: dict[str, list[Cell]] = {}
    for cell, difference in others.items():
        if cell not in results:
            changed.setdefault(difference, []).append(cell)
    return Found(
        {cell: results[cell] for cell in planned if cell in results},
        {cell: text for cell, text in failures.items() if cell not in results},
        changed,
    )


def _entries(file: Path, metrics: tuple[str, ...]) -> Iterator[tuple[Cell, Any, Any]]:
    """Yield run, settings, and result or error of each line."""
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            entry = json.loads(line.decode())
            parts = {name: _typed(name, entry["cell"][name], t) for name, t in _OF_CELL.items()}
            settings = _typed("settings", entry["settings"], dict)
            # Studies of one width record it as a setting only.
            width = entry["cell"].get("width") or settings.get("model.width")
            cell = Cell(**parts, width=_typed("width", width, int | float | None))
            if "failed" in entry:
                result: Any = _typed("failed", entry["failed"], str)
            else:
                result = _checked(_typed("result", entry["result"], dict), metrics)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{file} must hold one result per line, but line {number} is not a result: {reason}"
            ) from None
        yield cell, settings, result


def _checked(result: dict[str, Any], metrics: tuple[str, ...]) -> dict[str, Any]:
    """Return a result whose values have their types and ranges."""
    for name, value in result.items():
        if name in metrics:
            _typed(name, value, int | float)
            if ("accuracy" in name or name.startswith(("corruption", "pgd"))) and not (
                0 <= value <= 100
            ):
                raise ValueError(f"{name} must be from 0 to 100, got {value!r}")
        elif name in _OF_RESULT:
            _typed(name, value, _OF_RESULT[name])
    _numbers("losses", result.get("losses", []))
    for point in result.get("history", []):
        _typed("history", point, dict)
        _numbers("history", [point[k] for k in ("epoch", "accuracy", "dense_accuracy", "distance")])
    for name, keys, sizes in _PLOTS:
        if name in result:
            shapes = [_shape(f"{name}.{key}", result[name][key]) for key in keys]
            if not sizes(*shapes):
                raise ValueError(f"{name} has arrays of shapes {shapes} that do not fit")
    if not result.get("diverged") and "accuracy" not in result:
        raise ValueError("accuracy is missing")
    return result


def _shape(name: str, values: Any) -> tuple[int, ...]:
    """Return the shape of numbers in a list, or in lists of one length."""
    rows = _typed(name, values, list)
    if rows and all(isinstance(row, list) for row in rows):
        for row in rows:
            _numbers(name, row)
        return (len(rows), *{len(row) for row in rows})
    _numbers(name, rows)
    return (len(rows),)


def _numbers(name: str, values: list[Any]) -> None:
    for value in values:
        _typed(name, value, int | float)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return a value of a type; a boolean is no number, and numbers are not NaN by mistake."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} has the wrong type, {value!r:.60}")
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{name} is too large")
    return value


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how settings differ, or an empty text."""
    parts = []
    for name in dict.fromkeys((*now, *was)):
        before, after = was.get(name), now.get(name)
        if before == after or _same_code(before, after):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed = [k for k in after if before.get(k) != after[k]]
            if changed == ["code"]:
                parts.append(f"the code of {after.get('source')}:{after.get('function')} changed")
                continue
        given = [json.dumps(x) if x is not None else "not set" for x in (before, after)]
        parts.append(f"{name} was {given[0]} and is {given[1]}")
    return ", ".join(parts)


def _same_code(before: Any, after: Any) -> bool:
    """Return whether two functions are the same as far as a report can tell."""
    if not isinstance(before, dict) or not isinstance(after, dict) or "function" not in after:
        return False
    names = ("source", "function", *(("code",) if after.get("code") is not None else ()))
    return all(before.get(name) == after.get(name) for name in names)
