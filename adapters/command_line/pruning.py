"""Prune the model of a folder, and save it in a new folder: the work of ``safe-core prune``."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from safe_core.adapters.torch.blocks.processes import Processes, processes_of
from safe_core.adapters.torch.blocks.pruning import PruningPlan, PruningReport
from safe_core.adapters.torch.blocks.report import Progress

from .drafts import save_somewhere, written_at_once
from .job import PruningJob, find_solver
from .model_card import model_card
from .output import numbers_left_out, printable, spread
from .preparation import (
    check_job,
    finished_blocks,
    job_tokenizer,
    naming_blocks,
    prepare,
)
from .saving import Imprint, check_saved, copy_other_files, refers_to_code
from .sparsities import parse_sparsity

__all__ = [
    "PruningJob",
    "PruningResult",
    "WeightRow",
    "find_solver",
    "parse_sparsity",
    "prune_folder",
]


class WeightRow(NamedTuple):
    """One pruned weight: its entries, zeros, and the relative error of its block."""

    name: str
    shape: tuple[int, ...]
    entries: int
    zeros: int
    block_error: float


class PruningResult(NamedTuple):
    """The result of `prune_folder`.

    Attributes
    ----------
    out : pathlib.Path
    device : str
    report : PruningReport
    weights : list of WeightRow
        Zeros are counted in the saved weights.
    steps : int
        Training steps in each block, 0 for a method that does not train.
    """

    out: Path
    device: str
    report: PruningReport
    weights: list[WeightRow]
    steps: int = 0

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in all pruned weights."""
        return sum(w.zeros for w in self.weights) / max(1, sum(w.entries for w in self.weights))

    def table(self) -> Any:
        """Return a `rich.table.Table`.

        Weights of one shape share a row if their names differ in numbers only.
        """
        from rich.table import Table

        table = Table(padding=(0, 1, 0, 0), show_footer=True, box=None)
        entries, zeros = (sum(getattr(w, k) for w in self.weights) for k in ("entries", "zeros"))
        table.add_column("weights", "total", overflow="fold", ratio=1)
        for header, footer in (
            ("number", f"{len(self.weights):,}"),
            ("shape", ""),
            ("entries", f"{entries:,}"),
            ("zeros", f"{zeros:,}"),
            ("sparsity", f"{self.sparsity:.4%}"),
        ):
            table.add_column(header, footer, justify="right", no_wrap=True)
        alike: dict[tuple[str, tuple[int, ...]], list[WeightRow]] = {}
        for w in self.weights:
            alike.setdefault((numbers_left_out(w.name), w.shape), []).append(w)
        for (name, shape), rows in alike.items():
            counts = [sum(getattr(w, key) for w in rows) for key in ("entries", "zeros")]
            table.add_row(
                printable(rows[0].name if len(rows) == 1 else name),
                f"{len(rows):,}",
                " x ".join(map(str, shape)),
                *(f"{n:,}" for n in counts),
                spread([w.zeros / max(1, w.entries) for w in rows], ".4%", ".2%"),
            )
        if self.weights:
            errors = spread([w.block_error for w in self.weights], ".3g")
            table.caption = f"squared error of a block, relative to its outputs: {errors}"
            table.caption_justify = "left"
        return table


def prune_folder(
    job: PruningJob,
    out: str | os.PathLike[str],
    *,
    progress: Callable[[Progress], object] | None = None,
    say: Callable[[str], object] = lambda text: None,
    command: str | None = None,
) -> PruningResult:
    """Prune the model of a folder, and save it with its other files and a model card.

    The new folder is read back: every weight and the outputs of a forward pass must be those of
    the model in memory.

    Parameters
    ----------
    job : PruningJob
    out : path
        A new or empty folder, which appears only when complete.
    progress : callable, optional
        Called with a `Progress` after every epoch and every block.
    say : callable
        Called with a line of text before pruning.
    command : str, optional
        The command line of the run, for the model card.

    Returns
    -------
    PruningResult

    Raises
    ------
    TypeError, ValueError, OSError
        If files are missing, damaged or too short, the model is quantised, ``out`` is not empty,
        lies in the model's folder or is written by another run, the disk is full, or a setting
        does not fit the model. If something fails after the weights are saved, they are kept,
        and a note on the error names their folder.

    Examples
    --------
    >>> prune_folder(PruningJob(".", ["text.txt"]), "out")
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    processes = processes_of(distributed=job.settings.distributed)
    with processes.together():
        result = _pruned(job, Path(out), progress, say, command, processes)
        processes.meet()  # the first has saved the model
    return result


def _pruned(
    job: PruningJob,
    target: Path,
    progress: Callable[[Progress], object] | None,
    say: Callable[[str], object],
    command: str | None,
    processes: Processes,
) -> PruningResult:
    """Prune the model in all processes, and save it in the first."""
    checked = check_job(job, target, processes)
    # Begin the draft now, so that a wrong path or a full disk fails before hours of work.
    with written_at_once(target) if processes.first else nullcontext() as draft:
        if draft is not None:
            draft.reserve(checked.source.nbytes)
        source, where, model, data, plan = prepare(job, checked, say, processes)
        report = _applied(model, plan, job, progress, say)
        result = PruningResult(target, where, report, _rows(model, report), plan.steps)
        del plan
        if draft is not None:
            imprint, work_dir = Imprint.of(model, data.probe), job.settings.work_dir
            save_somewhere(
                model.save_pretrained,  # type: ignore[arg-type]
                draft,
                target.name,
                None if work_dir is None else Path(work_dir),
            )
            del model  # so that the check has room to load the saved one
            if job.inputs is None:
                job_tokenizer(job).save_pretrained(draft.path)
            code = job.trust_remote_code or refers_to_code(source.folder)
            left = copy_other_files(source.folder, draft.path, code=code)
            scripts = [name for name in left if name.endswith(".py") and not name.startswith(".")]
            if scripts and not code:
                say(
                    "note: not copied, because no configuration names code by auto_map: "
                    f"{', '.join(map(printable, scripts))}"
                )
            card = model_card(job, source, result, data, command)
            (draft.path / "README.md").write_text(card, encoding="utf-8")
            check_saved(imprint, draft.path, trust_remote_code=job.trust_remote_code)
    return result


def _applied(
    model: nn.Module,
    plan: PruningPlan,
    job: PruningJob,
    progress: Callable[[Progress], object] | None,
    say: Callable[[str], object],
) -> PruningReport:
    """Run the plan; say what is resumed and, after an error, what is kept."""
    work_dir = job.settings.work_dir
    if found := plan.finished_blocks():
        say(f"resuming after {_blocks(found)} in {work_dir}")
    try:
        with naming_blocks(model, plan):
            return plan.apply(progress)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or getattr(error, "__notes__", None):
            # The note of the library, in its place, is about a model in memory.
            error.__notes__ = [_kept(work_dir)]
        raise


def _kept(work_dir: str | os.PathLike[str] | None) -> str:
    if work_dir is None:
        return (
            "Nothing was kept. With --work-dir, an interrupted run resumes after its last "
            "finished block"
        )
    done = _blocks(finished_blocks(work_dir))
    return f"Kept {done} in {work_dir}. The same command resumes there"


def _blocks(number: int) -> str:
    return f"{number:,} finished block{'' if number == 1 else 's'}"


def _rows(model: nn.Module, report: PruningReport) -> list[WeightRow]:
    rows = []
    for block in report.blocks:
        for name in block.weights:
            full = f"{block.name}.{name}"
            p = model.get_parameter(full).detach()
            zeros = p.numel() - int(p.count_nonzero())
            row = WeightRow(full, tuple(p.shape), p.numel(), zeros, block.relative_error)
            rows.append(row)
    return rows
