"""Choose the form of export from measured times and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .export_forms import DENSE, OWN, FormFigures, percent
from .layer_timing import MARGIN

__all__ = ["Bars", "bars", "choice", "own_choice"]

_COSTLY = "removed channels cost more accuracy than other zeros"


class Bars(NamedTuple):
    """Seconds of the dense forms.

    Attributes
    ----------
    float32 : float
        Of the faster one of the framework and LiteRT, so that a gain comes from zeros, not from
        another runtime.
    int8 : float or None
        None if it was not measured.
    """

    float32: float
    int8: float | None

    @property
    def fastest(self) -> float:
        """Return the seconds of the fastest dense form."""
        return self.float32 if self.int8 is None else min(self.float32, self.int8)


def bars(forms: Sequence[FormFigures], batch: int | None) -> Bars:
    """Return the seconds of the dense forms for a batch size.

    Examples
    --------
    >>> times = {"dense": {1: {0.0: 4.0}}, "int8": {1: {0.0: 1.0}}}
    >>> bars([FormFigures(name, "", found) for name, found in times.items()], 1)
    Bars(float32=4.0, int8=1.0)
    """
    known = {form.name: form.seconds[batch][0.0] for form in forms
             if form.name in DENSE and batch in form.seconds}  # fmt: skip
    return Bars(min(known[name] for name in known if name != "int8"), known.get("int8"))


def choice(forms: Sequence[FormFigures], batch: int | None) -> str:
    """Return what to train and how to export, for a batch size.

    A form wins if it takes at most nine tenths of the time of every dense form. Among those that
    win at the lowest sparsity, the fastest is chosen. Channels are chosen last, after dense int8,
    because they cost the most accuracy.

    Examples
    --------
    >>> forms = [
    ...     FormFigures("dense", "", {1: {0.0: 4.0}}, {0.0: 1000}),
    ...     FormFigures("1x4", "", {1: {0.8: 2.0, 0.9: 1.0}}, {0.8: 250, 0.9: 125}),
    ... ]
    >>> print(choice(forms, 1))
    train safe_core.safe(safe_core.Block((1, 4), 0.8), steps=...), export with \
save_litert(model, inputs, path, compute="sparse"): 2 times faster than dense float32 (dense int8 \
was not measured), \
file 4 times smaller; 4 times faster at 90% zeros
    """
    dense, tried = bars(forms, batch), _tried(forms, batch)
    others = [form for form in forms if form.name != "channels"]
    if (found := _first(others, batch, MARGIN * dense.fastest)) is not None:
        return _train(forms, batch, *found)
    channels = _first(forms, batch, MARGIN * dense.fastest)
    if dense.int8 is None or dense.int8 > MARGIN * dense.float32:
        if channels is not None:
            return f"{_train(forms, batch, *channels)}; {_COSTLY}"
        unknown = " (dense int8 was not measured)" if dense.int8 is None else ""
        advice = [
            f"no form is a tenth faster than dense float32 {tried}{unknown}, so train zeros for a "
            "smaller file alone"
        ]
        return "; ".join([*advice, *_smallest(forms)])
    gain = f"{dense.float32 / dense.int8:.2g} times faster than dense float32"
    only = "no form with zeros" if channels is None else "no form with zeros but removed channels"
    advice = [
        f"export dense int8 with {_named(forms, 'int8').export(batch)}: {gain}, and {only} is a "
        f"tenth faster than that {tried}"
    ]
    if channels is not None:
        advice.append(f"{_COSTLY}: {_train(forms, batch, *channels)}")
    if (found := _first(others, batch, MARGIN * dense.float32)) is not None:
        advice.append(f"if int8 costs too much accuracy, {_train(forms, batch, *found)}")
    return "; ".join(advice)


def own_choice(forms: Sequence[FormFigures], batch: int | None) -> str:
    """Return how to export the zeros that a model has; empty if none were measured.

    Examples
    --------
    >>> forms = [
    ...     FormFigures("dense", "dense", {1: {0.0: 4.0}}, {0.0: 1000}),
    ...     FormFigures("csr", "CSR", {1: {OWN: 3.8}}, {OWN: 200}),
    ... ]
    >>> own_choice(forms, 1)
    'its own zeros do not make it a tenth faster in any form; save_compressed makes the file 5 \
times smaller'
    """
    dense = bars(forms, batch)
    timed = [form for form in forms if OWN in form.seconds.get(batch, {})]
    if not timed:
        return ""
    best = min(timed, key=lambda form: form.seconds[batch][OWN])
    taken = best.seconds[batch][OWN]
    if taken <= MARGIN * dense.fastest:
        return f"with its own zeros, export with {best.export(batch)}: {_gains(dense, taken)}"
    parts = ["its own zeros do not make it a tenth faster in any form"]
    if dense.int8 is not None and taken <= MARGIN * dense.float32:
        parts = [f"its own zeros are {dense.float32 / taken:.2g} times faster than dense float32 "
                 f"({best.title}), but no tenth faster than dense int8"]  # fmt: skip
    saved = [form for form in timed if form.name in ("csr", "bsr", "bcsr", "2:4")]
    if saved and (ratio := _dense_size(forms) / saved[0].sizes[OWN]) > 1:
        parts.append(f"save_compressed makes the file {ratio:.2g} times smaller")
    return "; ".join(parts)


def _first(
    forms: Sequence[FormFigures], batch: int | None, bar: float
) -> tuple[FormFigures, float] | None:
    """Return the form and the lowest sparsity that stay below a time."""
    found = []
    for form in forms:
        start = None if form.name in DENSE else form.starts(batch, bar)
        if start is not None:
            last = form.name == "channels"
            found.append(((last, start, form.seconds[batch][start]), form, start))
    return min(found, key=lambda each: each[0])[1:] if found else None


def _train(forms: Sequence[FormFigures], batch: int | None, form: FormFigures, start: float) -> str:
    dense, times = bars(forms, batch), form.seconds[batch]
    ratio = _dense_size(forms) / form.sizes[start]
    text = (
        f"train safe_core.safe({form.pattern(start)}, steps=...), export with "
        f"{form.export(batch)}: {_gains(dense, times[start])}, file {ratio:.2g} times smaller"
    )
    last = max(s for s in times if not isinstance(s, str))
    if last > start and times[last] <= MARGIN * times[start]:
        more = f"{dense.float32 / times[last]:.2g} times faster at {percent(last)} zeros"
        text = f"{text}; {more}"
    return text


def _gains(dense: Bars, taken: float) -> str:
    text = f"{dense.float32 / taken:.2g} times faster than dense float32"
    if dense.int8 is None:
        return f"{text} (dense int8 was not measured)"
    ratio = dense.int8 / taken
    return f"{text}, {ratio:.2g} times {'faster than' if ratio > 1 else 'as fast as'} dense int8"


def _tried(forms: Sequence[FormFigures], batch: int | None) -> str:
    found = sorted({s for form in forms for s in form.seconds.get(batch, {})
                    if not isinstance(s, str) and s > 0})  # fmt: skip
    if not found:
        return "(no form with zeros was measured)"
    return f"up to {percent(found[-1])} zeros"


def _smallest(forms: Sequence[FormFigures]) -> list[str]:
    """Return how small a file gets by the pattern that keeps accuracy best, if it is known."""
    for form in forms:
        found = [s for s in form.sizes if not isinstance(s, str)]
        if form.name in ("csr", "bcsr") and found:
            s = min(found)
            ratio = _dense_size(forms) / form.sizes[s]
            pattern = form.pattern(s)
            return [
                f"with safe_core.safe({pattern}, steps=...), save_compressed makes it {ratio:.2g} "
                "times smaller"
            ]
    return []


def _named(forms: Sequence[FormFigures], name: str) -> FormFigures:
    return next(form for form in forms if form.name == name)


def _dense_size(forms: Sequence[FormFigures]) -> int:
    return _named(forms, "dense").sizes[0.0]
