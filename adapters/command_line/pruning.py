"""``safe-core prune``: from a folder of a model to the folder of a sparse one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from safe_core import _checks
from safe_core.adapters.torch.blocks.methods import METHODS, default_scope
from safe_core.adapters.torch.blocks.pruning import (
    PruningReport,
    SafeReconstruction,
    calibration_batches,
    plan_pruning,
)
from safe_core.adapters.torch.blocks.report import Progress
from safe_core.adapters.torch.blocks.task import OFFLOADS, RaggedWeightError
from safe_core.patterns import NM, Pattern, Unstructured, as_pattern

from .model_card import model_card
from .model_folder import (
    check_new_folder,
    chosen_device,
    load_model,
    load_tokenizer,
    written_at_once,
)
from .perplexity import check_length, read_text_file

__all__ = ["PruningJob", "PruningResult", "WeightRow", "parse_sparsity", "prune_folder"]


def parse_sparsity(text: str, scope: Literal["tensor", "row"] = "tensor") -> Pattern:
    """Return the pattern of a text: a fraction of zeros such as "0.5", or "N:M".

    Parameters
    ----------
    text : str
    scope : {"tensor", "row"}
        Where entries compete under a fraction: within each weight, or each of its outputs.

    Raises
    ------
    ValueError
        If the text is neither.

    Examples
    --------
    >>> parse_sparsity("0.29", "row"), parse_sparsity("2:4")
    (Unstructured(sparsity=0.29, scope='row', budget=None), NM(n=2, m=4, ragged='error'))
    >>> parse_sparsity("half")
    Traceback (most recent call last):
    ValueError: sparsity must be a fraction in [0, 1) such as 0.5, or N:M such as 2:4, got 'half'
    """
    try:
        if ":" in text:
            return as_pattern(text)
        # By way of Decimal, so that "nan", "50%" and the like are refused alike.
        return Unstructured(float(_checks.sparsity("sparsity", Decimal(text))), scope=scope)
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
        A fraction of the zeros of each weight, or "N:M".
    method : str
        "safe+", "safe", "alps", "sparsegpt", "wanda" or "magnitude".
    scope : {None, "tensor", "row"}
        Where entries compete under a fraction; by default within outputs for "wanda", as it
        was published, and within weights for the others.
    samples, length, seed : int
        How many windows of the text, tokens in each, at least two, and what they are drawn by.
    epochs : int, optional
        Of "safe" and "safe+"; 30 by default.
    learning_rate : float, optional
        Of the same; 2e-4 by default.
    batch_size : int
        Samples in a step and in a forward pass.
    targets : {"pruned", "dense"}
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
    batch_size: int = 8
    targets: Literal["pruned", "dense"] = "pruned"
    offload: Literal["cpu", "disk", "none"] = "cpu"
    work_dir: str | os.PathLike[str] | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _checks.choice("method", self.method, tuple(METHODS))
        _checks.choice("offload", self.offload, OFFLOADS)
        _checks.choice("targets", self.targets, ("pruned", "dense"))
        _checks.choice("scope", self.scope, ("tensor", "row", None))
        if isinstance(self.pattern, NM) and self.scope is not None:
            raise ValueError(f"scope must be left out for sparsity N:M, got {self.scope!r}")
        trained = isinstance(METHODS[self.method], SafeReconstruction)
        for name, value in (("epochs", self.epochs), ("learning_rate", self.learning_rate)):
            if value is not None and not trained:
                raise ValueError(
                    f"{name} must be left out for method={self.method!r}, which does not train, "
                    f"got {value!r}"
                )
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
        """What is asked of each weight."""
        return parse_sparsity(self.sparsity, self.scope or default_scope(self.method))

    @property
    def solver(self) -> Any:
        """The solver of the method, with the settings asked for."""
        solver = METHODS[self.method]
        if not isinstance(solver, SafeReconstruction):
            return solver
        given = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        changed: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return replace(solver, batch_size=self.batch_size, **changed)


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
            targets=job.targets,
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
    """What to ask for in the place of groups that do not divide the inputs of a weight."""
    pattern = job.pattern
    assert isinstance(pattern, NM)  # by which the error came
    least = pattern.m // math.gcd(pattern.n, pattern.m)  # the smallest groups of the same share
    sizes = [m for m in range(least, pattern.m, least) if error.common % m == 0]
    groups = f"{pattern.n * sizes[-1] // pattern.m}:{sizes[-1]} or " if sizes else ""
    return (
        f"--sparsity {job.sparsity} must divide the inputs of every weight, got {error.inputs} of "
        f"{error.name}: --sparsity {groups}{1 - pattern.n / pattern.m:g} would do"
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
