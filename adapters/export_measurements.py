"""Collect the figures of forms of export, and measure those of LiteRT, for every framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safe_core import _checks
from safe_core._installed import require
from safe_core.compressed.forms import places_size
from safe_core.finalization import listed
from safe_core.litert.process import FileRuntimeError
from safe_core.litert.trials import BLOCKED, dense_layers, trials

from .export_advice import ExportAdvice
from .export_choice import choice, own_choice
from .export_forms import DENSE, FORMS, OWN, FormFigures, Sparsity, chosen_forms, percent
from .layer_timing import MARGIN, LayerTiming

__all__ = [
    "LITERT",
    "Collected",
    "Plan",
    "Totals",
    "check_plan",
    "measure_litert",
    "own_times",
    "stored_bytes",
]

LITERT = ("litert", "int8", *BLOCKED)
"""Forms that LiteRT runs."""

_LEAST = 0.01  # of zeros, from which a model counts as sparse


@dataclass(frozen=True)
class Plan:
    """State what to measure.

    Attributes
    ----------
    framework : str
        Its name in titles.
    known, forms : list of str
        All forms of the framework, and those with zeros to measure.
    batch_sizes : tuple of int or None
    sparsities : tuple of float
    repeats : int
    own : float or None
        The fraction of zeros of the model, where they are measured too.
    """

    framework: str
    known: Sequence[str]
    forms: Sequence[str]
    batch_sizes: tuple[int | None, ...]
    sparsities: tuple[float, ...]
    repeats: int
    own: float | None = None


def check_plan(
    framework: str,
    known: Sequence[str],
    *,
    forms: Any,
    batch_sizes: Any,
    sparsities: Any,
    repeats: Any,
    zeros: float,
) -> Plan:
    """Return what to measure, or raise an error that names the wrong argument."""
    _checks.integer("repeats", repeats, low=1)
    batches: tuple[int | None, ...] = (None,)
    if batch_sizes is not None:
        listed = _listed("batch_sizes", batch_sizes)
        batches = tuple(dict.fromkeys(_checks.integer("batch_sizes", n, low=1) for n in listed))
    fractions = []
    for s in _listed("sparsities", sparsities):
        fraction = float(_checks.sparsity("sparsities", s))
        if not fraction:
            raise ValueError(f"sparsities must be above 0, since dense is measured, got {s!r}")
        fractions.append(fraction)
    return Plan(
        framework=framework,
        known=known,
        forms=chosen_forms(forms, known),
        batch_sizes=batches,
        sparsities=tuple(sorted(set(fractions))),
        repeats=repeats,
        own=zeros if zeros >= _LEAST else None,
    )


def _listed(name: str, values: Any) -> Collection[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Collection):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    if not values:
        raise ValueError(f"{name} must have an entry, got none")
    return values


@dataclass
class Collected:
    """The figures of forms, as they come.

    Attributes
    ----------
    plan : Plan
    notes : dict of str to str
        What the figures leave out, each once.
    """

    plan: Plan
    notes: dict[str, None] = field(default_factory=dict)
    seconds: dict[str, dict[int | None, dict[Sparsity, float]]] = field(default_factory=dict)
    sizes: dict[str, dict[Sparsity, int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(
        self, form: str, batch: int | None, at: Sparsity, seconds: float | None, size: int
    ) -> None:
        """Add a measurement; seconds are None where the zeros are not skipped."""
        times = self.seconds.setdefault(form, {}).setdefault(batch, {})
        if seconds is not None:
            times[at] = seconds
        self.sizes.setdefault(form, {}).setdefault(at, size)

    def note(self, text: str) -> None:
        """Add what the figures leave out."""
        self.notes[text] = None

    def miss(self, forms: Collection[str], reason: str) -> None:
        """Tell why forms cannot be measured."""
        self.reasons.update(dict.fromkeys(forms, reason))

    def advice(self, machine: str) -> ExportAdvice:
        """Return the report."""
        plan = self.plan
        forms = tuple(self._figures(name) for name in plan.known)
        advice = {}
        for batch in plan.batch_sizes:
            own = own_choice(forms, batch)
            advice[batch] = "; ".join(filter(None, (choice(forms, batch), own)))
        return ExportAdvice(
            forms, plan.batch_sizes, plan.sparsities, plan.own, advice, tuple(self.notes), machine
        )

    def _figures(self, name: str) -> FormFigures:
        title = FORMS[name].title.format(self.plan.framework)
        reason = self.reasons.get(name, "")
        if name not in DENSE and name not in self.plan.forms:
            reason = "forms= leaves it out"
        elif not reason and name not in self.seconds:
            reason = "the model has no layer that it fits"
        return FormFigures(
            name, title, self.seconds.get(name, {}), self.sizes.get(name, {}), reason
        )


def measure_litert(
    found: Collected,
    batch: int | None,
    trace: Callable[[], tuple[Any, Sequence[np.ndarray[Any, Any]]]],
) -> None:
    """Measure whole files of a model, or note why they cannot be written.

    Parameters
    ----------
    found : Collected
    batch : int, optional
        The batch size of the sample.
    trace : callable
        Returns the graph of the model, and a sample.
    """
    plan = found.plan
    try:
        require("LiteRT", "flatbuffers", "ai_edge_litert", extra="litert")
        graph, sample = trace()
        measured = trials(
            graph,
            sample,
            plan.sparsities,
            forms=plan.forms,
            own=plan.own is not None,
            repeats=plan.repeats,
        )
    except (ModuleNotFoundError, FileRuntimeError, TypeError, ValueError) as error:
        found.miss(LITERT, str(error))
        return
    for (form, at), trial in measured.items():
        found.add(form, batch, at, trial.seconds if trial.skips else None, trial.size)
        if not trial.skips:
            zeros = "its own zeros" if at == OWN else f"{percent(float(at))} zeros"
            found.note(
                f"{FORMS[form].title}: {zeros} are not in such blocks, or too few, so that LiteRT "
                "computes dense"
            )
    for form in BLOCKED:
        dense, count = dense_layers(graph, form)
        if form in plan.forms and dense:
            block = form.partition("x")[2]
            found.note(
                f"{FORMS[form].title}: {len(dense)} of {count} layers stay dense, which are not "
                f"linear, or whose inputs are no multiple of {block}: {listed(dense)}"
            )


class Totals:
    """Sum the times of layers in a form, in which those stay dense that are not faster."""

    def __init__(self, whole: float) -> None:
        self.whole = whole
        self.dense = 0.0
        self.forms: dict[tuple[str, Sparsity], float] = {}

    def add(self, count: int, times: Mapping[tuple[str, Sparsity], float]) -> None:
        """Add calls of a layer, whose dense time is that of ``("dense", 0.0)``."""
        dense = times["dense", 0.0]
        self.dense += count * dense
        for key, taken in times.items():
            if key[0] != "dense":
                gain = dense - taken if taken <= MARGIN * dense else 0.0
                self.forms[key] = self.forms.get(key, 0.0) + count * gain

    def seconds(self) -> Iterator[tuple[tuple[str, Sparsity], float]]:
        """Yield the time of the whole model in each form."""
        # Layers alone can take longer than within the model, which must not make it negative.
        scale = min(1.0, self.whole / self.dense) if self.dense else 1.0
        for key, gain in self.forms.items():
            yield key, self.whole - scale * gain


def own_times(layer: LayerTiming) -> dict[tuple[str, Sparsity], float]:
    """Return the times of a layer in the forms for its own zeros, of BSR the fastest."""
    times: dict[tuple[str, Sparsity], float] = {}
    for name, taken in layer.seconds.items():
        form = name.partition(" ")[0].lower()
        key = (form, 0.0 if form == "dense" else OWN)
        times[key] = min(taken, times.get(key, math.inf))
    return times


def stored_bytes(entries: int, kept: int, width: int, *, in_2_of_4: bool = False) -> int:
    """Return the bytes that `save_compressed` takes for a tensor.

    Parameters
    ----------
    entries, kept : int
        Numbers of entries, and of those that are not zero.
    width : int
        Bytes of an entry.
    in_2_of_4 : bool
        Whether at most two of every four entries are not zero.

    Examples
    --------
    >>> stored_bytes(800, 80, 4), stored_bytes(800, 790, 4)
    (420, 3200)
    """
    sizes = [entries * width, kept * width + places_size("bitmask", entries)]
    if in_2_of_4:
        sizes.append(entries // 2 * width + places_size("2:4", entries))
    return min(sizes)
