"""Run what is left of a study, in one or more processes, and save every result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safe_core import _checks

from .cells import Cell, cells
from .progress import study_bar
from .recipe import Recipe
from .recipe_files import keep_recipe, parse_recipe
from .results import Found, append_line, mend_results, read_results, result_file
from .sharing import held, read_shard, refuse_foreign, stopped_by_signal
from .train import run_unit
from .units import Unit, check, units
from .workers import Outcome, checked_in_process, failure, in_processes

__all__ = ["FailedRunsError", "planned_runs", "run_study"]

Advance = Callable[[], None]


class FailedRunsError(RuntimeError):
    """Some runs of a study failed. All others are done.

    Attributes
    ----------
    failures : dict of Cell to str
        The error of each run, with its traceback.

    Examples
    --------
    >>> print(FailedRunsError({Cell("jax", 0.0, "SAFE", 0.9, 1): "ValueError: no such file"}))
    1 run failed; the same command tries it again:
      SAFE at 0.9, seed 1, jax: ValueError: no such file
    """

    def __init__(self, failures: dict[Cell, str]) -> None:
        self.failures = failures
        several = len(failures) > 1
        lines = [f"  {c.title}: {text.splitlines()[0]}" for c, text in failures.items()]
        if len(lines) > 5:
            lines[5:] = [f"  and {len(lines) - 5} more"]
        count = f"{len(failures)} run{'s' * several} failed"
        again = f"the same command tries {'them' if several else 'it'} again"
        super().__init__("\n".join([f"{count}; {again}:", *lines]))


def run_study(
    source: str,
    out: Path,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    data: Path | None = None,
    device: str = "cpu",
    shard: str | None = None,
    allow_code: bool = False,
) -> dict[Cell, Any]:
    """Run what is left of a study.

    Every finished run becomes a line of ``results.jsonl`` in ``out`` before the next one starts.
    After an interruption, the same call runs only what is left. Runs whose settings changed are
    trained again; their old results stay in the file. A run that fails is recorded, and tried
    again by the next call, after the others.

    Parameters
    ----------
    source : str
        The text of a recipe; see `parse_recipe`. ``out`` keeps a copy of it and of its files.
    out : Path
        Folder for the results: new, empty, or that of an earlier study.
    folder : Path, optional
        Folder of the recipe, by default the current folder. The code in it runs.
    jobs : int
        Number of processes.
    data : Path, optional
        Folder of the data files; by default that of the recipe.
    device : str
        Device to train on, such as "cpu" or "cuda", or several, "cuda:0,cuda:1", which the
        processes take in turn.
    shard : str, optional
        The part of the study to run, such as ``"2/8"`` for the second of eight. Processes with
        different parts can share ``out``.
    allow_code : bool
        Whether the recipe may run code of other folders and of installed modules.

    Returns
    -------
    dict of Cell to dict
        All results, old and new, of all parts; see `run_cell`.

    Raises
    ------
    ValueError
        If the recipe is invalid, or ``out`` is in use or holds something else.
    FailedRunsError
        If runs failed. It is raised after all others are done.

    Examples
    --------
    >>> import tempfile
    >>> source = '''
    ... title = "tiny"
    ... sparsities = [0.9]
    ... seeds = [0]
    ... frameworks = ["torch"]
    ... data = {name = "digits", train_images = 64}
    ... model = {name = "lenet-300-100", width = 0.1}
    ... training = {epochs = 1, batch_size = 32, learning_rate = 0.1}
    ... methods = [{method = "magnitude"}]
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = run_study(source, Path(folder))
    >>> [cell.title for cell in found]
    ['magnitude at 0.9, seed 0, torch']
    """
    _checks.integer("jobs", jobs, low=1)
    part = None if shard is None else read_shard(shard)
    recipe = parse_recipe(source, folder, allow_code=allow_code, say=_say)
    devices = [name.strip() for name in device.split(",")]
    with stopped_by_signal(), held(out, source, part):
        file = result_file(out, part)
        found = read_results(out, recipe)
        mend_results(file)
        _say_what_changed(found)
        mine = left_to_run(recipe, found, part)
        settings: dict[str, Any] = {"folder": data, "jobs": jobs}
        several = jobs > 1 and len(mine) > 1
        _check(recipe, mine, data, devices[0], several)
        recipe = keep_recipe(recipe, source, out)
        epochs = {c: recipe.training_of(c.method).epochs * (not i) for u in mine for i, c in
                  enumerate(u)}  # fmt: skip
        failures: dict[Cell, str] = {}
        with study_bar(len(found.results) + len(epochs), epochs) as bar:
            if several:
                each = [devices[i % len(devices)] for i in range(min(jobs, len(mine)))]
                outcomes = in_processes(recipe, mine, each, settings, bar.epoch)
            else:
                outcomes = _here(recipe, mine, devices[0], settings, bar.epoch)
            for unit, outcome in outcomes:
                for cell in unit:
                    result = outcome if isinstance(outcome, str) else outcome[cell]
                    append_line(file, recipe, cell, result)
                    bar.finished(cell, result)
                    if isinstance(result, str):
                        failures[cell] = result
        if failures:
            raise FailedRunsError(failures)
        return read_results(out, recipe).results


def planned_runs(
    source: str,
    out: Path,
    *,
    folder: Path | None = None,
    data: Path | None = None,
    device: str = "cpu",
    shard: str | None = None,
    allow_code: bool = False,
) -> tuple[list[Cell], int]:
    """Check everything that `run_study` checks, and train and write nothing.

    Returns
    -------
    list of Cell
        The runs that are left, in their order.
    int
        The number of trainings that they take.

    Examples
    --------
    >>> from safe_core.study.runner import recipe_source
    >>> source = recipe_source(Path("figure-5-digits"))[1].replace('["torch", "jax"]', '["torch"]')
    >>> left, trainings = planned_runs(source, Path("no-such-folder"))
    >>> len(left), trainings
    (36, 36)
    """
    recipe = parse_recipe(source, folder, allow_code=allow_code, say=_say)
    part = None if shard is None else read_shard(shard)
    found = Found({}, {}, {})
    refuse_foreign(out)
    if out.is_dir():
        found = read_results(out, recipe)
    _say_what_changed(found)
    mine = left_to_run(recipe, found, part)
    _check(recipe, mine, data, device.split(",")[0].strip(), several=False)
    return [cell for unit in mine for cell in unit], len(mine)


def left_to_run(recipe: Recipe, found: Found, part: tuple[int, int] | None = None) -> list[Unit]:
    """Return the units of a part that are not finished, with those that failed at the end.

    Parts are fixed by the recipe, so that they never overlap.
    """
    whole = units(recipe, cells(recipe))
    mine = whole if part is None else whole[part[0] - 1 :: part[1]]
    left = [tuple(cell for cell in unit if cell not in found.results) for unit in mine]
    return sorted(filter(None, left), key=lambda unit: any(c in found.failures for c in unit))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_what_changed(found: Found) -> None:
    for difference, changed in found.changed.items():
        named = changed[0].title + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
        _say(
            f"other settings for {named}, trained again: {difference}. The old results stay in "
            "the file; with the old settings they count again"
        )


def _check(
    recipe: Recipe, mine: Sequence[Unit], data: Path | None, device: str, several: bool
) -> None:
    """Find settings that cannot work before the first run, and print hints."""
    left = [cell for unit in mine for cell in unit]
    checked = checked_in_process if several else check
    for hint in checked(recipe, left, data, device):
        _say(f"hint: {hint}")


def _here(
    recipe: Recipe, mine: Sequence[Unit], device: str, settings: dict[str, Any], advance: Advance
) -> Iterator[tuple[Unit, Outcome]]:
    """Yield the units in this process."""
    for unit in mine:
        try:
            outcome: Outcome = run_unit(recipe, unit, device=device, advance=advance, **settings)
        except Exception as error:
            outcome = failure(error)
        yield unit, outcome
