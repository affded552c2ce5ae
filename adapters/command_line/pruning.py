"""Prune the model of a folder, and save it in a new folder: the work of ``safe-core prune``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from safe_core import Method, _checks
from safe_core.adapters.loading import load_named, names_object
from safe_core.adapters.torch.blocks.pruning import (
    PruningReport,
    PruningSettings,
    calibration_batches,
    plan_pruning,
)
from safe_core.adapters.torch.blocks.report import Progress
from safe_core.adapters.torch.blocks.task import PatternError
from safe_core.patterns import Pattern, as_pattern
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Solver, as_solver, named_solvers

from .model_card import model_card
from .model_folder import (
    check_new_folder,
    chosen_device,
    load_model,
    load_tokenizer,
    written_at_once,
)
from .perplexity import check_length, read_text_file

__all__ = [
    "PruningJob",
    "PruningResult",
    "WeightRow",
    "find_solver",
    "parse_sparsity",
    "prune_folder",
]

_DEFAULTS = PruningSettings(device="auto")


def parse_sparsity(text: str, scope: Literal["tensor", "row"] = "tensor") -> Pattern:
    """Return the pattern for a text: a fraction of zeros, "N:M", or the name of a pattern.

    "my_parts.py:PATTERN" and "package.module:PATTERN" name a pattern of your own, whose code is
    run.

    Parameters
    ----------
    text : str
    scope : {"tensor", "row"}
        Where entries compete under a fraction: within each weight, or each of its outputs.

    Raises
    ------
    ValueError
        If the text is none of these.

    Examples
    --------
    >>> parse_sparsity("0.29", "row"), parse_sparsity("2:4")
    (Unstructured(sparsity=0.29, scope='row', distribution=None), NM(n=2, m=4, ragged='error'))
    >>> parse_sparsity("half")
    Traceback (most recent call last):
    ValueError: sparsity must be a fraction in [0, 1) such as 0.5, or N:M such as 2:4, got 'half'
    """
    if names_object(text):
        return as_pattern(load_named("sparsity", text), scope)
    try:
        if ":" in text:
            return as_pattern(text)
        # Decimal refuses "nan", "50%" and the like in the same way.
        return as_pattern(float(_checks.sparsity("sparsity", Decimal(text))), scope)
    except (ValueError, TypeError, OverflowError, InvalidOperation):
        raise ValueError(
            f"sparsity must be a fraction in [0, 1) such as 0.5, or N:M such as 2:4, got {text!r}"
        ) from None


def find_solver(method: str) -> Solver:
    """Return the solver that ``--method`` names.

    Parameters
    ----------
    method : str
        The name of a solver, or "my_parts.py:SOLVER" or "package.module:SOLVER" for a solver,
        its class, a function or a `safe_core.Method` of your own, whose code is run.

    Raises
    ------
    TypeError, ValueError
        If there is no such solver, or its code fails.

    Examples
    --------
    >>> find_solver("safe+").name, find_solver("safe_core.solvers:Wanda").name
    ('safe+', 'wanda')
    """
    if names_object(str(method)):
        found = load_named("method", method)
        return Reconstruction(method=found) if isinstance(found, Method) else as_solver(found)
    known = named_solvers()
    if method not in known:
        raise ValueError(
            f"method must be one of {', '.join(known)}, or your own as file.py:SOLVER or "
            f"package.module:SOLVER, got {method!r}"
        )
    return known[method]


@dataclass(frozen=True)
class PruningJob:
    """Hold the settings of one pruning, in plain values.

    Attributes
    ----------
    model : path
        A folder with a causal language model and its tokenizer.
    calibration : sequence of path
        UTF-8 text files, each named once.
    sparsity : str
        A fraction of zeros in each weight, "N:M", or "my_parts.py:PATTERN".
    method : str
        A solver as in `find_solver`.
    scope : {None, "tensor", "row"}
        Where entries compete under a fraction: within each weight, or each of its outputs. None
        is the default of the method: outputs for "wanda", as published, weights for the others.
    samples, length : int
        Number of calibration windows, and tokens in each, at least two. ``settings.seed`` draws
        them.
    only : str, optional
        Regular expression; only weights whose full name it matches somewhere are pruned.
    epochs, learning_rate, rho, penalty, dual_update_interval : optional
        Settings of methods that train, "safe" and "safe+", see
        `safe_core.reconstruction.Reconstruction` for their defaults.
    settings : PruningSettings
        The other settings of `safe_core.adapters.transformers.prune_blocks`. ``batch_size`` is
        also that of training steps. ``device`` may be "auto", and is by default, for a GPU if
        there is one; ``where`` must be None, see ``only``.
    trust_remote_code : bool
        Whether to run code that comes with the model.

    Raises
    ------
    TypeError, ValueError
        If a field is of another kind or out of its range.

    Examples
    --------
    >>> PruningJob("model", ["text.txt"], "2:4", method="wanda").pattern
    NM(n=2, m=4, ragged='error')
    """

    model: str | os.PathLike[str]
    calibration: Sequence[str | os.PathLike[str]]
    sparsity: str = "0.5"
    method: str = "safe+"
    scope: Literal["tensor", "row"] | None = None
    samples: int = 128
    length: int = 2048
    only: str | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    rho: float | None = None
    penalty: float | None = None
    dual_update_interval: int | None = None
    settings: PruningSettings = _DEFAULTS
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _checks.choice("scope", self.scope, ("tensor", "row", None))
        if not isinstance(self.settings, PruningSettings):
            raise TypeError(f"settings must be PruningSettings, got {self.settings!r}")
        if self.settings.where is not None:
            raise ValueError("where must be None in a job, which selects weights by `only`")
        if self.scope is not None and ":" in self.sparsity:
            raise ValueError(f"scope must be left out for sparsity N:M, got {self.scope!r}")
        if self.length == 1:
            raise ValueError(
                "length must be at least 2 tokens, so that attention has more than one position, "
                "such as the default of 2048, got 1"
            )
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise ValueError(
                f"only must be a regular expression, got {self.only!r}: {error}"
            ) from None
        self._check_files()
        self.pattern, self.solver  # noqa: B018 (checks them)

    def _check_files(self) -> None:
        if isinstance(self.calibration, (str, os.PathLike)):
            raise TypeError(f"calibration must be a list of files, got {self.calibration!r}")
        if not self.calibration:
            raise ValueError("calibration must name at least one text file, got none")
        whole = [Path(file).resolve() for file in self.calibration]
        twice = next((file for file in whole if whole.count(file) > 1), None)
        if twice is not None:
            raise ValueError(
                f"calibration must name each file once, got {twice} {whole.count(twice)} times: "
                "increase samples to draw more windows from it"
            )

    @property
    def pattern(self) -> Pattern:
        """The sparsity of each weight."""
        return parse_sparsity(self.sparsity, self.scope or find_solver(self.method).default_scope)

    @property
    def solver(self) -> Solver:
        """The solver of the method, with the settings of this job."""
        return find_solver(self.method).configured(
            batch_size=self.settings.batch_size,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            rho=self.rho,
            penalty=self.penalty,
            dual_update_interval=self.dual_update_interval,
        )

    def settings_on(self, device: torch.device) -> PruningSettings:
        """Return the settings for a device, with the selection of weights."""
        only = self.only
        where = None if only is None else lambda name, p: re.search(only, name) is not None
        return replace(self.settings, device=device, where=where)


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
            table.add_row(w.name, shape, f"{w.entries:,}", f"{w.zeros:,}", share, error)
        return table


def prune_folder(
    job: PruningJob,
    out: str | os.PathLike[str],
    *,
    progress: Callable[[Progress], object] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> PruningResult:
    """Prune the model of a folder, and save it with its tokenizer and a model card.

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
        If files are missing, empty or too short, ``out`` is not empty or lies in the model's
        folder, the disk is full, or a setting does not fit the model. If something fails after
        the weights are saved, they are kept, and a note on the error names their folder.

    Examples
    --------
    >>> prune_folder(PruningJob(".", ["text.txt"]), "out")
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    source, target = Path(job.model), Path(out)
    device = chosen_device(str(job.settings.device or "auto"))
    tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    check_new_folder(target, source)
    files = [read_text_file(Path(file)) for file in job.calibration]
    batches = calibration_batches(
        tokenizer,
        [file.text for file in files],
        samples=job.samples,
        length=job.length,
        seed=job.settings.seed,
    )
    model = load_model(source, trust_remote_code=job.trust_remote_code)
    check_length(model, job.length)
    try:
        plan = plan_pruning(
            model, batches, job.solver, job.pattern, settings=job.settings_on(device)
        )
    except PatternError as error:
        raise ValueError(_other_groups(job, error)) from None
    say(
        f"{job.method} to {job.sparsity}: {len(plan.weights)} weights of {plan.name} on {device}, "
        f"memory beside the model: {plan.memory}"
    )
    # Create the draft first, so that a wrong path fails now and not after hours of work.
    with written_at_once(target) as draft:
        report = plan.apply(progress)
        model.save_pretrained(draft.path)  # type: ignore[operator]
        draft.keep = True
        tokenizer.save_pretrained(draft.path)
        result = PruningResult(target, str(device), report, _rows(model, report))
        card = model_card(job, result, files)
        (draft.path / "README.md").write_text(card, encoding="utf-8")
    return result


def _other_groups(job: PruningJob, error: PatternError) -> str:
    """Return a message that suggests groups that divide the inputs of every weight."""
    zeros = job.pattern.fractions()[-1]
    least = zeros.denominator  # the smallest group with this fraction of zeros
    sizes = [m for m in range(least, job.pattern.group or 0, least) if error.common % m == 0]
    groups = f"{int((1 - zeros) * sizes[-1])}:{sizes[-1]} or " if sizes else ""
    return (
        f"--sparsity {job.sparsity} must divide the inputs of every weight, got {error.inputs} of "
        f"{error.name}: --sparsity {groups}{float(zeros):g} would do"
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
