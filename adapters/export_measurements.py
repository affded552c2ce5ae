"""Collect the figures of forms of export, and measure those of LiteRT, for every framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safe_core import _checks
from safe_core._installed import require
from safe_core.finalization import listed
from safe_core.layout import Layout, resolve
from safe_core.litert.process import FileRuntimeError
from safe_core.litert.trials import BLOCKED, dense_layers, trials
from safe_core.patterns import Block

from .export_advice import ExportAdvice
from .export_choice import choice, own_choice
from .export_forms import DENSE, FORMS, OWN, FormFigures, Sparsity, chosen_forms, percent
from .export_sums import SummedTimes
from .layer_timing import HALF, LayerTiming
from .memory_errors import lacks_memory

__all__ = [
    "LITERT",
    "Collected",
    "Plan",
    "check_call",
    "check_fit",
    "check_plan",
    "first_line",
    "measure_litert",
    "measure_own",
    "resized",
    "single_sample",
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
    dtype : str
        That of the model.
    """

    framework: str
    known: Sequence[str]
    forms: Sequence[str]
    batch_sizes: tuple[int | None, ...]
    sparsities: tuple[float, ...]
    repeats: int
    own: float | None = None
    dtype: str = "float32"

    def place(self, batch: int | None) -> str:
        """Return the name of a batch size, empty if it is the only one."""
        return "" if len(self.batch_sizes) == 1 else f"batch size {batch}"


def check_plan(
    framework: str,
    known: Sequence[str],
    *,
    forms: Any,
    batch_sizes: Any,
    sparsities: Any,
    repeats: Any,
    zeros: float,
    dtype: str = "float32",
) -> Plan:
    """Return what to measure, or raise an error that names the wrong argument."""
    _checks.integer("repeats", repeats, low=1)
    batches: tuple[int | None, ...] = (None,)
    if batch_sizes is not None:
        given = _entries("batch_sizes", batch_sizes)
        batches = tuple(dict.fromkeys(_checks.integer("batch_sizes", n, low=1) for n in given))
    fractions = []
    for s in _entries("sparsities", sparsities):
        # By its decimal, because the float32 number 0.9 is another float64 number.
        fraction = float(_checks.decimal_fraction(_checks.sparsity("sparsities", s)))
        if not fraction:
            raise ValueError(
                f"sparsities must be above 0, because the dense model is always measured, got {s}"
            )
        fractions.append(fraction)
    return Plan(
        framework=framework,
        known=known,
        forms=chosen_forms(forms, known),
        batch_sizes=batches,
        sparsities=tuple(sorted(set(fractions))),
        repeats=repeats,
        own=zeros if zeros >= _LEAST else None,
        dtype=dtype,
    )


def _entries(name: str, values: Any) -> list[Any]:
    scalar = isinstance(values, (str, bytes)) or not getattr(values, "ndim", 1)
    if scalar or not isinstance(values, Collection):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    if not len(values):
        raise ValueError(f"{name} must have an entry, got none")
    return list(values)


@dataclass
class Collected:
    """The figures of forms, as they come.

    Attributes
    ----------
    plan : Plan
    parts : int
        How many parts there are to measure.
    progress : callable, optional
        Called with the number of finished parts and that of all.
    notes : dict of str to None
        What the figures leave out, each once.
    compressed : int or None
        Bytes of a compressed file with the zeros of the model.
    ragged : set of str
        Forms whose groups of zeros do not divide the shape of some weight.
    """

    plan: Plan
    parts: int = 1
    progress: Callable[[int, int], object] | None = None
    notes: dict[str, None] = field(default_factory=dict)
    seconds: dict[str, dict[int | None, dict[Sparsity, float]]] = field(default_factory=dict)
    sizes: dict[str, dict[Sparsity, int]] = field(default_factory=dict)
    reasons: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    compressed: int | None = None
    ragged: set[str] = field(default_factory=set)
    finished: int = 0

    def finish(self) -> None:
        """Tell that a part is measured."""
        self.finished += 1
        if self.progress is not None:
            self.progress(self.finished, self.parts)

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

    def not_measured(self, forms: Collection[str], reason: str, place: str = "") -> None:
        """Tell why forms cannot be measured, and for which batch, shape or sparsity."""
        for form in forms:
            places = self.reasons.setdefault(form, {}).setdefault(reason, [])
            if place and place not in places:
                places.append(place)

    def advice(self, machine: str) -> ExportAdvice:
        """Return the report."""
        plan = self.plan
        forms = tuple(self._figures(name) for name in plan.known)
        for form in forms:
            if not form.reason:
                for text in self._reasons(form.name):
                    self.note(f"{form.title} was not measured{text}")
        advice = {}
        for batch in plan.batch_sizes:
            own = own_choice(forms, batch, self.compressed)
            advice[batch] = "; ".join(filter(None, (choice(forms, batch), own)))
        return ExportAdvice(
            forms, plan.batch_sizes, plan.sparsities, plan.own, advice, tuple(self.notes), machine
        )

    def _figures(self, name: str) -> FormFigures:
        plan, reason = self.plan, ""
        if name not in DENSE and name not in plan.forms:
            reason = "forms= leaves it out"
        elif not any(self.seconds.get(name, {}).values()):
            found = self.reasons.get(name, {})
            reason = next(iter(found), "")  # the only one says all
            if len(found) > 1:
                reason = "; ".join(text.removeprefix(" ") for text in self._reasons(name))
            elif not found and name not in self.sizes:
                reason = "the model has no layer that it fits"
        return FormFigures(
            name,
            self.title(name),
            self.seconds.get(name, {}),
            self.sizes.get(name, {}),
            reason,
            "float32" if name in LITERT else plan.dtype,
            name in self.ragged,
        )

    def title(self, name: str) -> str:
        """Return the name of a form in the table."""
        return FORMS[name].title.format(framework=self.plan.framework, dtype=self.plan.dtype)

    def _reasons(self, name: str) -> Iterator[str]:
        """Yield the reasons with the places that they hold for."""
        for reason, places in self.reasons.get(name, {}).items():
            yield f" for {listed(places)}: {reason}" if places else f": {reason}"


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its type if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_call(run: Callable[[], Any], place: str) -> None:
    """Call a model on its example inputs, and raise a ValueError if it fails.

    Examples
    --------
    >>> check_call(lambda: int("x"), "batch size 8")
    Traceback (most recent call last):
    ValueError: model must take example_inputs with batch size 8, got ValueError: invalid literal \
for int() with base 10: 'x'
    """
    try:
        run()
    except Exception as error:
        if lacks_memory(error):
            raise
        which = f" with {place}" if place else ""
        raise ValueError(
            f"model must take example_inputs{which}, got {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def single_sample(arrays: Iterable[Any]) -> list[int] | None:
    """Return the batch size 1 if all arrays hold one sample, and None otherwise.

    Examples
    --------
    >>> single_sample([np.ones((1, 3))]), single_sample([np.ones((1, 3)), np.ones((2, 3))])
    ([1], None)
    """
    lengths = {x.shape[0] if getattr(x, "ndim", 0) else None for x in arrays}
    return [1] if lengths == {1} else None


def resized(x: Any, batch: int) -> Any:
    """Return an array with a number of samples along its first axis, repeated or cut.

    Raises
    ------
    TypeError, ValueError
        If it is no array, or has no samples.

    Examples
    --------
    >>> resized(np.asarray([1, 2]), 3).tolist()
    [1, 2, 1]
    """
    if not getattr(x, "ndim", 0) or not len(x):
        kind = ValueError if hasattr(x, "ndim") else TypeError
        raise kind(
            "example_inputs must be arrays with samples on their first axes for batch_sizes=, got "
            f"{_checks.shown(x)}"
        )
    return x[np.arange(batch) % len(x)]


def check_fit(
    found: Collected, weights: Iterable[tuple[str, tuple[int, ...], Layout | None]]
) -> None:
    """Note for which forms some weights do not fit the pattern to train.

    Parameters
    ----------
    found : Collected
    weights : iterable of (name, shape, layout)
        All weights that can be pruned.
    """
    known = list(weights)
    for form in found.plan.forms:
        unit = FORMS[form].unit
        if unit is None:
            continue
        block = Block(unit, 0.5)
        ragged = [weight for weight in known if not _fits(block, *weight)]
        loose = Block(unit, 0.5, ragged="dense")
        unknown = [weight[0] for weight in ragged if not _fits(loose, *weight)]
        if len(ragged) > len(unknown):
            found.ragged.add(form)
        if unknown:
            found.note(
                f"{found.title(form)}: leave out {listed(unknown)} with where=, or pass layout=, "
                "because the roles of the axes are unknown"
            )


def _fits(block: Block, name: str, shape: tuple[int, ...], layout: Layout | None) -> bool:
    try:
        block.check(shape, None if layout is None else resolve(layout, len(shape), name), name)
    except ValueError:
        return False
    return True


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
        found.not_measured(LITERT, str(error), plan.place(batch))
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
                f"{FORMS[form].title}: {len(dense)} of {count} layers stay dense, because they "
                f"are not linear or their number of inputs is not a multiple of {block}: "
                f"{listed(dense)}"
            )


def measure_own(
    found: Collected,
    batch: int | None,
    forms: Collection[str],
    layers: Collection[LayerTiming],
) -> None:
    """Add the times of forms for the zeros that a model has.

    Parameters
    ----------
    found : Collected
        With the size of a compressed file.
    batch : int or None
    forms : collection of str
        Those whose files `save_compressed` writes.
    layers : collection of LayerTiming
        All layers with zeros.
    """
    assert found.compressed is not None
    totals = SummedTimes(found.seconds["dense"][batch][0.0])
    for layer in layers:
        if layer.seconds:
            totals.add(1, _own_times(layer))
    own = {form: seconds for (form, _), seconds in totals.seconds()}
    for form in forms:
        if form in own or form in found.sizes:
            found.add(form, batch, OWN, own.get(form), found.compressed)
    few = [layer.name for layer in layers if layer.sparsity < HALF]
    if few:
        found.note(
            f"its own zeros: {len(few)} of {len(layers)} layers have fewer than half zeros, so "
            f"they are not timed and count as dense: {listed(few)}"
        )


def _own_times(layer: LayerTiming) -> dict[tuple[str, Sparsity], float]:
    """Return the times of a layer in the forms for its own zeros, of BSR the fastest."""
    times: dict[tuple[str, Sparsity], float] = {}
    for name, taken in layer.seconds.items():
        form = name.partition(" ")[0].lower()
        key = (form, 0.0 if form == "dense" else OWN)
        times[key] = min(taken, times.get(key, math.inf))
    return times
