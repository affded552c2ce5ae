"""The settings of one pruning on the command line, in plain values."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from safe_core import Method, _checks
from safe_core.adapters.loading import load_named, names_object
from safe_core.adapters.torch.blocks.settings import PruningSettings
from safe_core.patterns import Pattern
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import Solver, as_solver, named_solvers

from .records import has_records
from .sparsities import SparsityRules, check_regex, parse_rules, takes_scope

__all__ = ["PruningJob", "find_solver"]

_DEFAULTS = PruningSettings(device="auto")


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
        meant = difflib.get_close_matches(str(method).lower(), known, n=1)
        raise ValueError(
            f"method must be one of {', '.join(known)}, or your own as file.py:SOLVER or "
            f"package.module:SOLVER, got {method!r}{f': write {meant[0]}' if meant else ''}"
        )
    return known[method]


@dataclass(frozen=True)
class PruningJob:
    """Hold the settings of one pruning, in plain values.

    Attributes
    ----------
    model : path
        A folder with a model and, for texts, its tokenizer.
    calibration : sequence of path
        Text files as for `safe_core.command_line.text_files.read_text_file`, each named once.
    sparsity : str or sequence of str
        A fraction of zeros in each weight, "N:M", "my_parts.py:PATTERN", or "owl:0.7" for a
        sparsity of each block by its outliers, with the mean 0.7, see
        `safe_core.adapters.transformers.outlier_sparsities`; and "REGEX=SPARSITY" for weights
        with a matching name, of which the first that matches counts. Without a sparsity for all,
        the other weights stay dense.
    method : str
        A solver as in `find_solver`.
    scope : {None, "tensor", "row"}
        Where entries compete under a fraction: within each weight, or each of its outputs. None
        is the default of the method: outputs for "wanda", as published, weights for the others.
    samples, length : int
        Number of calibration windows, and tokens in each, at least two. ``settings.seed`` draws
        them.
    only, ignore : str, optional
        Regular expressions: only weights whose full name contains a match of ``only``, and none
        of ``ignore``, are pruned.
    inputs : path, optional
        Calibration inputs instead of texts, for models that take other arguments: see
        `safe_core.command_line.input_files.read_input_file`. ``samples`` rows are drawn from it.
    field : str, optional
        The field of the text in the records of JSON and parquet files, "text" by default.
    chat_template : bool
        Whether the tokenizer's chat template makes a text of each record, which is a list of
        messages, by default in the field "messages", or a text.
    epochs, learning_rate, rho, penalty, dual_update_interval, start : optional
        Settings of methods that train, such as "safe" and "safe+", see
        `safe_core.reconstruction.Reconstruction` for their defaults.
    settings : PruningSettings
        The other settings of `safe_core.adapters.transformers.prune_blocks`. ``batch_size`` is
        also that of training steps. ``device`` may be "auto", and is by default, for a GPU if
        there is one; ``where`` must be None, see ``only``.
    gguf_file : str, optional
        The name of the GGUF file in the folder to prune; by default the only one, if the folder
        has no other weights.
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
    calibration: Sequence[str | os.PathLike[str]] = ()
    sparsity: str | Sequence[str] = "0.5"
    method: str = "safe+"
    scope: Literal["tensor", "row"] | None = None
    samples: int = 128
    length: int = 2048
    only: str | None = None
    ignore: str | None = None
    inputs: str | os.PathLike[str] | None = None
    field: str | None = None
    chat_template: bool = False
    epochs: int | None = None
    learning_rate: float | None = None
    rho: float | None = None
    penalty: float | None = None
    dual_update_interval: int | None = None
    start: str | None = None
    settings: PruningSettings = _DEFAULTS
    gguf_file: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _checks.choice("scope", self.scope, ("tensor", "row", None))
        if not isinstance(self.settings, PruningSettings):
            raise TypeError(f"settings must be PruningSettings, got {self.settings!r}")
        if self.settings.where is not None:
            raise ValueError("where must be None in a job, which selects weights by `only`")
        _checks.integer("samples", self.samples, low=1)
        _checks.integer("length", self.length, low=1)
        if self.length == 1:
            raise ValueError(
                "length must be at least 2 tokens, so that attention has more than one position, "
                "such as the default of 2048, got 1"
            )
        for argument, regex in (("only", self.only), ("ignore", self.ignore)):
            if regex is not None:
                check_regex(argument, regex)
        if self.chat_template and self.inputs is not None:
            raise ValueError("chat_template must be left out for inputs, which are no text")
        self._check_files()
        self.rules, self.solver  # noqa: B018 (checks them)
        texts = [text.rpartition("=")[2] for text in self.sparsities]
        if self.scope is not None and not any(map(takes_scope, texts)):
            raise ValueError(f"scope must be left out for sparsity N:M, got {self.scope!r}")

    def _check_files(self) -> None:
        if isinstance(self.calibration, (str, os.PathLike)):
            raise TypeError(f"calibration must be a list of files, got {self.calibration!r}")
        if bool(self.calibration) == (self.inputs is not None):
            got = "both" if self.calibration else "neither"
            raise ValueError(
                "pass text files as calibration or, for a model that takes no text, a file as "
                f"inputs, got {got}"
            )
        if self.field is not None and not any(has_records(Path(f)) for f in self.calibration):
            raise ValueError(
                "field must be left out without a file of records, such as .jsonl or .parquet, got "
                f"{self.field!r}"
            )
        whole = [Path(file).resolve() for file in self.calibration]
        twice = next((file for file in whole if whole.count(file) > 1), None)
        if twice is not None:
            raise ValueError(
                f"calibration must name each file once, got {twice} {whole.count(twice)} times: "
                "increase samples to draw more windows from it"
            )

    @property
    def sparsities(self) -> tuple[str, ...]:
        """The texts of the sparsities."""
        return (self.sparsity,) if isinstance(self.sparsity, str) else tuple(self.sparsity)

    @property
    def rules(self) -> SparsityRules:
        """The sparsity of each weight, by its name."""
        scope = self.scope or find_solver(self.method).default_scope
        return parse_rules(self.sparsities, scope)

    @property
    def pattern(self) -> Pattern:
        """The first of the patterns of all weights."""
        return self.rules.patterns[0]

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
            start=self.start,
        )

    def settings_on(self, device: torch.device) -> PruningSettings:
        """Return the settings for a device, with the selection of weights."""
        only, ignore = self.only, self.ignore

        def where(name: str, weight: object) -> bool:
            left_out = ignore is not None and re.search(ignore, name) is not None
            return not left_out and (only is None or re.search(only, name) is not None)

        chosen = None if only is None and ignore is None else where
        return replace(self.settings, device=device, where=chosen)
