"""Check a pruning job, load its model and calibration, and plan the run."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from safe_core.adapters.memory_errors import lacks_memory
from safe_core.adapters.torch.blocks.calibration import drawn_windows, joined_tokens, overlap
from safe_core.adapters.torch.blocks.outliers import outlier_sparsities
from safe_core.adapters.torch.blocks.processes import Processes
from safe_core.adapters.torch.blocks.pruning import PruningPlan, plan_pruning
from safe_core.adapters.torch.blocks.settings import PruningSettings
from safe_core.adapters.torch.blocks.structure import NoChainError, other_blocks
from safe_core.adapters.torch.blocks.task import PatternError
from safe_core.adapters.torch.blocks.work_folder import check_work_folder
from safe_core.patterns import Unstructured

from .chats import chat_renderer
from .drafts import check_new_folder
from .input_files import InputFile, read_input_file
from .job import PruningJob
from .launch import own_device
from .model_folder import chosen_device, load_tokenizer, read_model
from .output import by_option, naming_options, numbers_left_out
from .perplexity import check_length
from .source import Source, check_source
from .sparsities import SparsityRules, check_matches
from .text_files import TextFile, read_text_file

__all__ = [
    "Calibration",
    "Checked",
    "Prepared",
    "check_job",
    "finished_blocks",
    "job_tokenizer",
    "naming_blocks",
    "prepare",
]

_PROBE = 64  # tokens of the forward pass by which the saved model is compared


class Calibration(NamedTuple):
    """Files as they were read, the samples, and one short sample to compare models with.

    ``tokens`` is the number of tokens in the texts; 0 for inputs that are not text.
    """

    files: Sequence[TextFile | InputFile]
    batches: Any
    probe: dict[str | None, Any]
    kind: str
    tokens: int = 0


class Checked(NamedTuple):
    """A job whose files and folders were checked, with its calibration if that is text."""

    source: Source
    device: torch.device
    texts: Calibration | None


class Prepared(NamedTuple):
    """A job that is ready to run."""

    source: Source
    where: str
    model: nn.Module
    data: Calibration
    plan: PruningPlan


def check_job(job: PruningJob, target: Path, processes: Processes) -> Checked:
    """Check all that can be checked before the model is loaded.

    Only the first process checks the folders that it writes.

    Raises
    ------
    TypeError, ValueError, OSError
        If files are missing, damaged or too short, the model is quantised, or folders overlap.
    """
    folder = Path(job.model)
    device = own_device(chosen_device(str(job.settings.device or "auto")))
    source = check_source(folder, job.gguf_file)
    if processes.first:
        check_new_folder(target, folder)
        if job.settings.work_dir is not None:
            _check_work_dir(Path(job.settings.work_dir), target, folder)
    return Checked(source, device, None if job.inputs is not None else _text_calibration(job))


def prepare(
    job: PruningJob, checked: Checked, say: Callable[[str], object], processes: Processes
) -> Prepared:
    """Load the model and plan the run; ``say`` gets what the user should know.

    Raises
    ------
    TypeError, ValueError
        If the model cannot be loaded, or a setting does not fit it.
    """
    model, notes = read_model(
        Path(job.model), gguf_file=job.gguf_file, trust_remote_code=job.trust_remote_code
    )
    for note in notes:
        say(note)
    if checked.texts is not None:
        check_length(model, job.length)
        if note := overlap(checked.texts.tokens, job.samples, job.length):
            say(f"warning: calibration {note}")
    data = checked.texts or _input_calibration(job, model)
    plan = _planned(job, model, data, checked.device, say)
    where, each = str(checked.device), ""
    if processes.size > 1:
        where, each = f"{checked.device.type} in {processes.size} processes", " in each"
    say(
        f"{job.method} to {', '.join(job.sparsities)}: {len(plan.weights)} weights of "
        f"{plan.name} on {where}, memory beside the model{each}: {plan.memory}"
    )
    if job.settings.shard and processes.size == 1:
        say("note: --shard has no effect in one process; start several with torchrun")
    left = _other_stacks(model, plan.name)
    if left:
        say(f"note: only {plan.name} is pruned, not {', '.join(left)}; --blocks chooses")
    return Prepared(checked.source, where, model, data, plan)


def job_tokenizer(job: PruningJob) -> Any:
    """Load the tokenizer of the job's model."""
    return load_tokenizer(
        Path(job.model),
        gguf_file=job.gguf_file,
        trust_remote_code=job.trust_remote_code,
        otherwise="; for a model that takes no text, pass --inputs",
    )


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


def _text_calibration(job: PruningJob) -> Calibration:
    tokenizer = job_tokenizer(job)
    chat = chat_renderer(tokenizer) if job.chat_template else None
    files = [read_text_file(Path(file), job.field, chat) for file in job.calibration]
    tokens = joined_tokens(tokenizer, [file.text for file in files])
    try:
        batches = drawn_windows(tokens, job.samples, job.length, job.settings.seed)
    except ValueError as error:
        raise ValueError(naming_options(str(error), "samples", "length")) from None
    kind = f"a window of {job.length} tokens"
    return Calibration(files, batches, {None: batches[:1, :_PROBE]}, kind, len(tokens))


def _input_calibration(job: PruningJob, model: nn.Module) -> Calibration:
    assert job.inputs is not None  # checked by the job
    file = read_input_file(Path(job.inputs))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    samples = file.samples(job.samples, job.settings.seed, dtype)
    probe: dict[str | None, Any] = dict(samples[0].items())
    return Calibration([file], samples, probe, f"a row of {file.name}")


def _planned(
    job: PruningJob,
    model: nn.Module,
    data: Calibration,
    device: torch.device,
    say: Callable[[str], object],
) -> PruningPlan:
    """Plan the run; errors name the options of the command line."""
    rules = job.rules
    everything = [name for name, _ in model.named_parameters()]
    names = [name for name, p in model.named_parameters() if p.ndim >= 2]
    check_matches("only", [job.only] if job.only is not None else [], names)
    check_matches("ignore", [job.ignore] if job.ignore is not None else [], everything)
    check_matches("sparsity", [regex for regex, _ in rules.rules], names)
    settings = job.settings_on(device)
    sparsity: Any = rules if rules.rules else rules.default
    try:
        if rules.outliers is not None:
            sparsity = _by_outliers(rules, model, data, settings, say)
        plan = plan_pruning(model, data.batches, job.solver, sparsity, settings=settings)
    except PatternError as error:
        raise ValueError(_other_groups(error)) from None
    except NoChainError as error:
        raise ValueError(by_option(str(error))) from None
    except Exception as error:
        ours = _is_ours(error)
        if ours and type(error) in (TypeError, ValueError):
            raise type(error)(by_option(str(error))) from None
        if ours or lacks_memory(error):
            raise
        raise ValueError(_why_not_run(model, data, error)) from error
    regexes = [regex for regex, _ in rules.rules]
    check_matches("sparsity", regexes, plan.weights, "a weight that is pruned")
    return plan


def _why_not_run(model: nn.Module, data: Calibration, error: Exception) -> str:
    """Return the error of a model that does not run on the calibration, with a remedy."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    parameters = inspect.signature(model.forward).parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    others = [name for name in data.probe if name is not None and name not in known]
    takes = ", ".join(known)
    if None in data.probe:
        remedy = (
            "If it does not run on text alone, pass --inputs with arrays named after its "
            f"arguments, {takes}"
        )
    elif others:
        remedy = f"Its signature does not name {', '.join(others)}. Its arguments are {takes}"
    else:
        remedy = f"It may need more arrays. Its arguments are {takes}"
    return (
        f"{type(model).__name__} must run on {data.kind}, but fails: {reason}. {remedy}; for "
        "anything else, call safe_core.adapters.transformers.prune_blocks from Python"
    )


def _by_outliers(
    rules: SparsityRules,
    model: nn.Module,
    data: Calibration,
    settings: PruningSettings,
    say: Callable[[str], object],
) -> Callable[[str, Any], Any]:
    """Return the sparsity of each weight: that of its own rule, or that of its block."""
    rule, uniform = rules.outliers, rules.default
    assert rule is not None
    assert isinstance(uniform, Unstructured)

    def where(name: str, weight: Any) -> bool:
        chosen = settings.where is None or settings.where(name, weight)
        return chosen and rules.own(name) is None

    say("running the dense model, to find the outliers of its blocks")
    found = outlier_sparsities(
        model,
        data.batches,
        rule.sparsity,
        threshold=rule.threshold,
        reach=rule.reach,
        scope=uniform.scope,  # type: ignore[arg-type]
        settings=replace(settings, where=where),
    )
    least, most = (f(found.blocks, key=lambda block: block.sparsity) for f in (min, max))
    say(
        f"sparsity by outliers: from {least.sparsity:.2%} in {least.name} "
        f"({least.outliers:.2%} outliers) to {most.sparsity:.2%} in {most.name} "
        f"({most.outliers:.2%})"
    )

    def sparsity(name: str, weight: Any) -> Any:
        return found.patterns.get(name, rules.own(name))

    return sparsity


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


@contextmanager
def naming_blocks(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Turn errors of blocks that do not run in a chain into messages that name the options."""
    try:
        yield
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        text = (
            f"blocks must run one after the other, but {plan.name} fails: {reason}"
            f"{by_option(other_blocks(model, plan.name))}"
        )
        raise _with_notes(ValueError(text), error) from error
    except NoChainError as error:
        raise _with_notes(ValueError(by_option(str(error))), error) from error


def _with_notes(error: ValueError, first: BaseException) -> ValueError:
    for note in getattr(first, "__notes__", ()):
        error.add_note(note)
    return error


def finished_blocks(work_dir: str | os.PathLike[str] | None) -> int:
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
    text = (
        f"{pattern.group} must divide the inputs of every weight for --sparsity "
        f"{pattern.describe()}, got {error.inputs} of {error.name}: --sparsity "
        f"{groups}{float(zeros):g} would do"
    )
    if error.others:
        regex = "|".join(dict.fromkeys(_within_block(name) for name in error.misfits))
        text += (
            f"; or, to keep {pattern.describe()} for the other weights, put --sparsity "
            f"'{regex}={float(zeros):g}' first, or leave these dense by --ignore '{regex}'"
        )
    return text


def _within_block(name: str) -> str:
    """Return the part of a weight's name that it shares with those of other blocks."""
    part = numbers_left_out(name).rpartition("*.")[2]
    return part.removesuffix(".weight")
