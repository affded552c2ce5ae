"""Prune the model of a folder, and save it in a new folder: the work of ``safe-core prune``."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from safe_core.adapters.torch.blocks.processes import Processes, processes_of
from safe_core.adapters.torch.blocks.pruning import (
    PruningPlan,
    PruningReport,
    calibration_batches,
    plan_pruning,
)
from safe_core.adapters.torch.blocks.report import Progress
from safe_core.adapters.torch.blocks.structure import NoChainError, other_blocks
from safe_core.adapters.torch.blocks.task import PatternError
from safe_core.adapters.torch.blocks.work_folder import check_work_folder

from .checkpoint_files import check_weights, weight_files
from .drafts import check_new_folder, save_somewhere, written_at_once
from .input_files import InputFile, read_input_file
from .job import PruningJob, find_solver
from .launch import own_device
from .model_card import model_card
from .model_folder import (
    check_model_folder,
    chosen_device,
    load_tokenizer,
    quantisation,
    read_model,
)
from .output import printable
from .perplexity import check_length
from .saving import Imprint, check_saved, copy_other_files
from .sparsities import check_matches, parse_sparsity
from .stored_tensors import FORMATS
from .text_files import TextFile, read_text_file

__all__ = [
    "PruningJob",
    "PruningResult",
    "WeightRow",
    "find_solver",
    "parse_sparsity",
    "prune_folder",
]

_PROBE = 64  # tokens of the forward pass by which the saved model is compared


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
        The device and, if there are several, the number of processes.
    report : PruningReport
    weights : list of WeightRow
        Zeros are counted in the saved weights.
    """

    out: Path
    device: str
    report: PruningReport
    weights: list[WeightRow]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in all pruned weights."""
        return sum(w.zeros for w in self.weights) / max(1, sum(w.entries for w in self.weights))

    def table(self) -> Any:
        """Return a `rich.table.Table`."""
        from rich.table import Table

        table = Table(padding=(0, 1, 0, 0), show_footer=True, box=None)
        entries, zeros = (sum(getattr(w, k) for w in self.weights) for k in ("entries", "zeros"))
        table.add_column("weight", "total", overflow="fold", ratio=1)
        for header, footer in (
            ("shape", ""),
            ("entries", f"{entries:,}"),
            ("zeros", f"{zeros:,}"),
            ("sparsity", f"{self.sparsity:.4%}"),
            ("error of block", ""),
        ):
            table.add_column(header, footer, justify="right", no_wrap=True)
        for w in self.weights:
            share, error = f"{w.zeros / max(1, w.entries):.4%}", f"{w.block_error:.3g}"
            shape = " x ".join(map(str, w.shape))
            table.add_row(printable(w.name), shape, f"{w.entries:,}", f"{w.zeros:,}", share, error)
        return table


class _Calibration(NamedTuple):
    """Files as they were read, the samples, and one short sample to compare models with."""

    files: Sequence[TextFile | InputFile]
    batches: Any
    probe: dict[str | None, Any]
    kind: str


def prune_folder(
    job: PruningJob,
    out: str | os.PathLike[str],
    *,
    progress: Callable[[Progress], object] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> PruningResult:
    """Prune the model of a folder, and save it with its other files and a model card.

    The new folder is read back: every weight and the outputs of a forward pass must be those of
    the model in memory. If `torch.distributed` is initialised, every process calls this function,
    see `safe_core.adapters.transformers.prune_blocks`. The first writes the folder.

    Parameters
    ----------
    job : PruningJob
    out : path
        A new or empty folder, which appears only when complete.
    progress : callable, optional
        Called with a `Progress` after every epoch and every block.
    say : callable
        Called with a line of text before pruning.

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
        result = _pruned(job, Path(job.model), Path(out), progress, say, processes)
        processes.meet()  # the first has saved the model
    return result


def _pruned(
    job: PruningJob,
    source: Path,
    target: Path,
    progress: Callable[[Progress], object] | None,
    say: Callable[[str], object],
    processes: Processes,
) -> PruningResult:
    """Prune the model in all processes, and save it in the first."""
    device = own_device(chosen_device(str(job.settings.device or "auto")))
    _check_source(source)
    if processes.first:
        check_new_folder(target, source)
        if job.settings.work_dir is not None:
            _check_work_dir(Path(job.settings.work_dir), target, source)
    texts = None if job.inputs is not None else _text_calibration(job, source)
    # Begin the draft now, so that a wrong path or a full disk fails before hours of work.
    with written_at_once(target) if processes.first else nullcontext() as draft:
        if draft is not None:
            draft.reserve(sum(file.stat().st_size for file in weight_files(source)))
        model, notes = read_model(source, trust_remote_code=job.trust_remote_code)
        for note in notes:
            say(note)
        if texts is not None:
            check_length(model, job.length)
        data = texts or _input_calibration(job, model)
        plan = _planned(job, model, data, device)
        where, each = str(device), ""
        if processes.size > 1:
            where, each = f"{device.type} in {processes.size} processes", " in each"
        say(
            f"{job.method} to {', '.join(job.sparsities)}: {len(plan.weights)} weights of "
            f"{plan.name} on {where}, memory beside the model{each}: {plan.memory}"
        )
        left = _other_stacks(model, plan.name)
        if left:
            say(f"note: only {plan.name} is pruned, not {', '.join(left)}; --blocks chooses")
        report = _applied(model, plan, job, progress, say)
        result = PruningResult(target, where, report, _rows(model, report))
        del plan
        if draft is not None:
            imprint = Imprint.of(model, data.probe)
            work_dir = job.settings.work_dir
            save_somewhere(
                model.save_pretrained,  # type: ignore[arg-type]
                draft,
                target.name,
                None if work_dir is None else Path(work_dir),
            )
            del model
            _complete(job, source, draft.path, result, data, imprint)
    return result


def _complete(
    job: PruningJob,
    source: Path,
    folder: Path,
    result: PruningResult,
    data: _Calibration,
    imprint: Imprint,
) -> None:
    """Write what belongs to a saved model, and read the folder back."""
    if job.inputs is None:
        load_tokenizer(source, trust_remote_code=job.trust_remote_code).save_pretrained(folder)
    copy_other_files(source, folder)
    card = model_card(job, result, data.files)
    (folder / "README.md").write_text(card, encoding="utf-8")
    check_saved(imprint, folder, trust_remote_code=job.trust_remote_code)


def _check_work_dir(work_dir: Path, target: Path, source: Path) -> None:
    """Refuse a foreign work folder, and one that overlaps with the output or the model folder."""
    check_work_folder(work_dir)
    whole = work_dir.resolve()
    if whole in target.resolve().parents:
        raise ValueError(f"--out must be outside of work_dir, {work_dir}, got {target}")
    for name, folder in (("--out", target.resolve()), ("the model folder", source.resolve())):
        if folder == whole or folder in whole.parents:
            raise ValueError(
                f"work_dir must be outside of {name}, such as {target}-work, got {work_dir}"
            )


def _check_source(source: Path) -> None:
    check_model_folder(source)
    method = quantisation(source)
    if method is not None:
        raise ValueError(
            f"model folder must hold weights of 16 bits or more, got {source} quantised by "
            f"{method}: its files hold scales and packed numbers, which pruned weights do not fit. "
            "Load it dequantised in transformers, save that in a new folder, and prune the folder"
        )
    for tensor in check_weights(source).values():
        form = FORMATS.get(tensor.format or "")
        if tensor.packed or (form is not None and form.floating and form.width < 2):
            raise ValueError(
                f"model folder must hold weights of 16 bits or more, got {tensor.dtype} for "
                f"{tensor.name} in {source}: save the model dequantised, and prune that"
            )


def _text_calibration(job: PruningJob, source: Path) -> _Calibration:
    tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    files = [read_text_file(Path(file), job.text_field) for file in job.calibration]
    batches = calibration_batches(
        tokenizer,
        [file.text for file in files],
        samples=job.samples,
        length=job.length,
        seed=job.settings.seed,
    )
    kind = f"a window of {job.length} tokens"
    return _Calibration(files, batches, {None: batches[:1, :_PROBE]}, kind)


def _input_calibration(job: PruningJob, model: nn.Module) -> _Calibration:
    assert job.inputs is not None  # checked by the job
    file = read_input_file(Path(job.inputs))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    samples = file.samples(job.samples, job.settings.seed, dtype)
    probe: dict[str | None, Any] = dict(samples[0].items())
    return _Calibration([file], samples, probe, f"a row of {file.name}")


def _planned(
    job: PruningJob, model: nn.Module, data: _Calibration, device: torch.device
) -> PruningPlan:
    """Plan the run; errors name the options of the command line."""
    rules = job.rules
    names = [name for name, _ in model.named_parameters()]
    check_matches("only", [job.only] if job.only is not None else [], names)
    check_matches("ignore", [job.ignore] if job.ignore is not None else [], names)
    sparsity = rules if rules.rules else rules.default
    try:
        plan = plan_pruning(
            model, data.batches, job.solver, sparsity, settings=job.settings_on(device)
        )
    except PatternError as error:
        raise ValueError(_other_groups(error)) from None
    except NoChainError as error:
        raise ValueError(_by_option(str(error))) from None
    except Exception as error:
        if _is_ours(error) or isinstance(error, MemoryError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        parameters = inspect.signature(model.forward).parameters.values()
        takes = ", ".join(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        raise ValueError(
            f"{type(model).__name__} must run on {data.kind}, but fails: {reason}. If it takes no "
            f"text alone, pass --inputs with its arguments, of {takes}; for anything else, call "
            "safe_core.adapters.transformers.prune_blocks from Python"
        ) from error
    check_matches("sparsity", [regex for regex, _ in rules.rules], plan.weights)
    return plan


def _is_ours(error: BaseException) -> bool:
    """Return whether an error was raised by this library, or by the code of a model below it."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    name = "" if where is None else str(where.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] == "safe_core"


def _other_stacks(model: nn.Module, chosen: str) -> list[str]:
    """Return the outermost lists of modules that hold matrices and no chosen block."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or _is_within(chosen, name):
            continue
        if any(_is_within(name, outer) for outer in (chosen, *found)):
            continue
        if any(p.ndim == 2 for p in module.parameters()):
            found.append(name)
    return found


def _is_within(name: str, outer: str) -> bool:
    """Return whether a module is another one, or a part of it, by their names."""
    return f"{name}.".startswith(f"{outer}.")


def _by_option(text: str) -> str:
    """Return a message with the option of the command instead of the keyword argument."""
    return text.replace("blocks=", "--blocks")


def _applied(
    model: nn.Module,
    plan: PruningPlan,
    job: PruningJob,
    progress: Callable[[Progress], object] | None,
    say: Callable[[str], object],
) -> PruningReport:
    """Run the plan; say what is resumed and, after an error, what is kept."""
    work_dir = job.settings.work_dir
    found = _finished_blocks(work_dir)
    if found:
        say(f"found {found} finished blocks in {work_dir}: resuming after them")
    try:
        return plan.apply(progress)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or getattr(error, "__notes__", None):
            # The note of the library, in its place, is about a model in memory.
            error.__notes__ = [_kept(work_dir)]
        if isinstance(error, NoChainError):
            text = _by_option(str(error))
        elif isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            reason = str(error).strip().partition("\n")[0]
            text = (
                f"blocks must run one after the other, but {plan.name} fails: {reason}"
                f"{_by_option(other_blocks(model, plan.name))}"
            )
        else:
            raise
        clear = ValueError(text)
        clear.__notes__ = list(getattr(error, "__notes__", ()))
        raise clear from error


def _kept(work_dir: str | os.PathLike[str] | None) -> str:
    if work_dir is None:
        return (
            "Nothing was kept. With --work-dir, an interrupted run resumes after its last "
            "finished block"
        )
    done = _finished_blocks(work_dir)
    return f"{done} finished blocks are kept in {work_dir}; the same command resumes after them"


def _finished_blocks(work_dir: str | os.PathLike[str] | None) -> int:
    """Return the number of finished blocks in a folder for them, 0 if it cannot be read."""
    if work_dir is None:
        return 0
    try:
        return len(json.loads((Path(work_dir) / "manifest.json").read_bytes())["blocks"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _other_groups(error: PatternError) -> str:
    """Return a message that suggests groups that divide the inputs of every weight."""
    pattern = error.pattern
    zeros = pattern.fractions()[-1]
    least = zeros.denominator  # the smallest group with this fraction of zeros
    sizes = [m for m in range(least, pattern.group or 0, least) if error.common % m == 0]
    groups = f"{int((1 - zeros) * sizes[-1])}:{sizes[-1]} or " if sizes else ""
    return (
        f"--sparsity {pattern.describe()} must divide the inputs of every weight, got "
        f"{error.inputs} of {error.name}: --sparsity {groups}{float(zeros):g} would do"
    )


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
