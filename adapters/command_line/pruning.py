"""``safe-core prune``: from a folder of a model to the folder of a sparse one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from safe_core import Method, _checks
from safe_core.adapters.loading import load_named, names_object
from safe_core.adapters.torch.blocks.methods import SOLVERS, as_solver, default_scope
from safe_core.adapters.torch.blocks.pruning import (
    PruningReport,
    calibration_batches,
    plan_pruning,
)
from safe_core.adapters.torch.blocks.reconstruction import SafeReconstruction
from safe_core.adapters.torch.blocks.report import Progress
from safe_core.adapters.torch.blocks.task import OFFLOADS, RaggedWeightError
from safe_core.methods import safe
from safe_core.patterns import Pattern, as_pattern

from .model_card import model_card
from .model_folder import (
    check_new_folder,
    chosen_device,
    load_model,
    load_tokenizer,
    written_at_once,
)
from .perplexity import check_length, read_text_file

# Settings of a method that trains, and those of SAFE itself.
_OF_TRAINING = ("epochs", "learning_rate")
_OF_METHOD = ("rho", "penalty", "dual_update_interval")

__all__ = ["PruningJob", "PruningResult", "WeightRow", "parse_sparsity", "prune_folder"]


def parse_sparsity(text: str, scope: Literal["tensor", "row"] = "tensor") -> Pattern:
    """Return the pattern for a text: a fraction of zeros, "N:M", or the name of a pattern.

    "my_parts.py:PATTERN" and "package.module:PATTERN" name a pattern of one's own, whose code
    is run.

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
        # Decimal refuses "nan", "50%" and the like alike.
        return as_pattern(float(_checks.sparsity("sparsity", Decimal(text))), scope)
    except (ValueError, TypeError, OverflowError, InvalidOperation):
        raise ValueError(
            f"sparsity must be a fraction in [0, 1) such as 0.5, or N:M such as 2:4, got {text!r}"
        ) from None


@dataclass(frozen=True)
class PruningJob:
    """What to prune and how, in plain values.

    Attributes
    ----------
    model : path
        A folder with a causal language model and its tokenizer.
    calibration : sequence of path
        UTF-8 text files, each named once.
    sparsity : str
        The fraction of zeros of each weight, "N:M", or "my_parts.py:PATTERN".
    method : str
        The name of a solver, such as "safe+", "safe", "alps", "sparsegpt", "wanda" or
        "magnitude", or "my_parts.py:SOLVER" for a solver, a `Method` or a function of yours.
    scope : {None, "tensor", "row"}
        Where entries compete under a fraction; by default within outputs for "wanda", as it
        was published, and within weights for the others.
    samples, length, seed : int
        The number of windows of the text, the tokens in each, at least two, and the seed that
        draws them.
    epochs : int, optional
        Passes over the samples, of a method that trains; 30 by default.
    learning_rate : float, optional
        The highest learning rate of a method that trains; 2e-4 by default.
    rho, penalty : float, optional
        Perturbation radius and penalty parameter of "safe" and "safe+".
    dual_update_interval : int, optional
        Steps between two dual updates of "safe" and "safe+".
    batch_size : int
        Samples in a step and in a forward pass.
    blocks : str, optional
        The name of the list of blocks; by default the one with the most parameters.
    only : str, optional
        A regular expression: only weights whose name it matches somewhere are pruned.
    targets, propagate : {"pruned", "dense"}
    offload : {"cpu", "disk", "none"}
    work_dir : path, optional
        As for `safe_core.adapters.transformers.prune_blocks`.
    device : str
        Where blocks are pruned; "auto" for a GPU where there is one.
    trust_remote_code : bool

    Raises
    ------
    TypeError, ValueError
        If a field is not of its kind or out of its range.

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
    seed: int = 0
    epochs: int | None = None
    learning_rate: float | None = None
    rho: float | None = None
    penalty: float | None = None
    dual_update_interval: int | None = None
    batch_size: int = 8
    blocks: str | None = None
    only: str | None = None
    targets: Literal["pruned", "dense"] = "pruned"
    propagate: Literal["pruned", "dense"] = "pruned"
    offload: Literal["cpu", "disk", "none"] = "cpu"
    work_dir: str | os.PathLike[str] | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not names_object(str(self.method)):
            _checks.choice("method", self.method, tuple(SOLVERS))
        _checks.choice("offload", self.offload, OFFLOADS)
        for name in ("targets", "propagate"):
            _checks.choice(name, getattr(self, name), ("pruned", "dense"))
        _checks.choice("scope", self.scope, ("tensor", "row", None))
        if self.scope is not None and ":" in self.sparsity:
            raise ValueError(f"scope must be left out for sparsity N:M, got {self.scope!r}")
        for name in (*_OF_TRAINING, *_OF_METHOD):
            if getattr(self, name) is not None and not self._named.trains:
                raise ValueError(
                    f"{name} must be left out for method={self.method!r}, which does not train, "
                    f"got {getattr(self, name)!r}"
                )
        for name in _OF_METHOD:
            if getattr(self, name) is not None and self._named.method is not None:
                raise ValueError(
                    f"{name} must be left out for a method of your own, got "
                    f"{getattr(self, name)!r} and method={self.method!r}"
                )
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise ValueError(
                f"only must be a regular expression, got {self.only!r}: {error}"
            ) from None
        if self.length == 1:
            raise ValueError(
                "length must be at least 2 tokens, for attention to have something to attend to, "
                "such as the default of 2048, got 1"
            )
        self._check_files()
        self.solver  # noqa: B018 (checks its fields)

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
                "more windows of it are drawn by a larger samples"
            )

    @property
    def pattern(self) -> Pattern:
        """The pattern that each weight is pruned to."""
        return parse_sparsity(self.sparsity, self.scope or default_scope(self.method))

    @property
    def solver(self) -> Any:
        """The solver of the method, with the settings asked for."""
        solver = self._named
        if not solver.trains:
            return solver
        changed = self._given(_OF_TRAINING)
        of_method = self._given(_OF_METHOD)
        if of_method:
            changed["method"] = safe(self.pattern, **{"rho": 2e-4, **of_method})
        return replace(solver, batch_size=self.batch_size, **changed)

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def _named(self) -> Any:
        """The solver with its own settings."""
        if not names_object(self.method):
            return SOLVERS[self.method]
        found = load_named("method", self.method)
        if isinstance(found, Method):
            return SafeReconstruction(method=found)
        return as_solver(found() if isinstance(found, type) else found)

    def chooses(self, name: str, parameter: object) -> bool:
        """Return whether the weight of this name is to be pruned."""
        return self.only is None or re.search(self.only, name) is not None


class WeightRow(NamedTuple):
    """One pruned weight: entries, those that are zero now, and the relative error of its block."""

    name: str
    shape: tuple[int, ...]
    entries: int
    zeros: int
    block_error: float


class PruningResult(NamedTuple):
    """What `prune_folder` has done.

    Attributes
    ----------
    out : pathlib.Path
    device : str
    report : PruningReport
    weights : list of WeightRow
        Zeros are counted in the weights that were saved.
    """

    out: Path
    device: str
    report: PruningReport
    weights: list[WeightRow]

    @property
    def sparsity(self) -> float:
        """The share of zeros in all pruned weights."""
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
        A folder that is new or empty; it is there once all of it is written.
    progress : callable, optional
        Called with a `Progress` after every epoch and every block.
    say : callable
        Called with a line of text about what comes next.

    Returns
    -------
    PruningResult

    Raises
    ------
    TypeError, ValueError, OSError
        If files are missing, empty or too short, ``out`` has something in it or lies in the
        model's folder, there is no room on the disk, or a setting does not fit the model. If
        something fails once the weights are saved, they are kept, and a note of the error names
        the folder.

    Examples
    --------
    >>> prune_folder(PruningJob(".", ["text.txt"]), "out")
    Traceback (most recent call last):
    ValueError: model folder must hold a config.json, got .
    """
    source, target = Path(job.model), Path(out)
    device = chosen_device(job.device)
    tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    check_new_folder(target, source)
    files = [read_text_file(Path(file)) for file in job.calibration]
    batches = calibration_batches(
        tokenizer,
        [file.text for file in files],
        samples=job.samples,
        length=job.length,
        seed=job.seed,
    )
    model = load_model(source, trust_remote_code=job.trust_remote_code)
    check_length(model, job.length)
    try:
        plan = plan_pruning(
            model,
            batches,
            job.solver,
            job.pattern,
            blocks=job.blocks,
            where=job.chooses,
            targets=job.targets,
            propagate=job.propagate,
            batch_size=job.batch_size,
            device=device,
            offload=job.offload,
            work_dir=job.work_dir,
            seed=job.seed,
        )
    except RaggedWeightError as error:
        raise ValueError(_ragged(job, error)) from None
    say(
        f"{job.method} to {job.sparsity}: {len(plan.weights)} weights of {plan.name} on {device}, "
        f"memory beside the model: {plan.memory}"
    )
    # The draft comes first: that no folder can be made there is not found after hours of work.
    with written_at_once(target) as draft:
        report = plan.apply(progress)
        model.save_pretrained(draft.path)  # type: ignore[operator]
        draft.keep = True
        tokenizer.save_pretrained(draft.path)
        result = PruningResult(target, str(device), report, _rows(model, report))
        card = model_card(job, result, files)
        (draft.path / "README.md").write_text(card, encoding="utf-8")
    return result


def _ragged(job: PruningJob, error: RaggedWeightError) -> str:
    """Return what to ask for in place of groups that do not divide the inputs of a weight."""
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
