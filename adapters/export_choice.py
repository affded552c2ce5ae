"""Choose the form of export from measured times and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from safe_core._readable import readable_number

from .export_forms import DENSE, OWN, FormFigures, percent
from .layer_timing import MARGIN

__all__ = ["DenseTimes", "choice", "dense_times", "own_choice"]

_COSTLY = "removed channels cost more accuracy than other zeros"
_IF_INT8_COSTS = "if int8 costs too much accuracy"

# The dense form whose file differs from that of a form by the zeros alone.
_DENSE_OF = {"1x4": "litert", "1x16": "int8"}


class DenseTimes(NamedTuple):
    """Seconds of the dense forms.

    Attributes
    ----------
    floating : float
        Of the faster one of the framework and LiteRT, so that a gain comes from zeros, not from
        another runtime.
    int8 : float or None
        None if it was not measured.
    dtype : str
        That of the faster one.
    """

    floating: float
    int8: float | None
    dtype: str = "float32"

    @property
    def fastest(self) -> float:
        """Return the seconds of the fastest dense form."""
        return self.floating if self.int8 is None else min(self.floating, self.int8)

    @property
    def name(self) -> str:
        """Return the name of the fastest dense form."""
        return "dense int8" if self.fastest == self.int8 else f"dense {self.dtype}"


def dense_times(forms: Sequence[FormFigures], batch: int | None) -> DenseTimes:
    """Return the seconds of the dense forms for a batch size.

    Examples
    --------
    >>> times = {"dense": {1: {0.0: 4.0}}, "int8": {1: {0.0: 1.0}}}
    >>> dense_times([FormFigures(name, "", found) for name, found in times.items()], 1)
    DenseTimes(floating=4.0, int8=1.0, dtype='float32')
    """
    known = {form.name: form for form in forms if form.name in DENSE and batch in form.seconds}
    taken = {name: form.seconds[batch][0.0] for name, form in known.items()}
    best = min((name for name in taken if name != "int8"), key=lambda name: taken[name])
    dtype = "float32" if best == "litert" else known[best].dtype
    return DenseTimes(taken[best], taken.get("int8"), dtype)


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
file 4 times smaller than dense float32; 4 times faster at 90% zeros
    """
    dense = dense_times(forms, batch)
    others = [form for form in forms if form.name != "channels"]
    if (found := _first(others, batch, MARGIN * dense.fastest)) is not None:
        return _train(forms, batch, *found)
    channels = _first(forms, batch, MARGIN * dense.fastest)
    bar = MARGIN * dense.floating
    gains = _first(others, batch, bar) is not None
    in_floats = _first([x for x in others if _DENSE_OF.get(x.name) != "int8"], batch, bar)
    if dense.int8 is None or dense.int8 > MARGIN * dense.floating:
        if channels is not None:
            return f"{_train(forms, batch, *channels)}; {_COSTLY}"
        unknown = " (dense int8 was not measured)" if dense.int8 is None else ""
        parts = [f"{_none_pays(forms, batch, dense.name)}{unknown}"]
        if not gains and (smallest := _smallest(forms)):
            parts = [f"{parts[0]}, so zeros only make the file smaller", smallest]
    else:
        parts = [f"export dense int8 with {_named(forms, 'int8').export(batch)}: "
                 f"{_faster(dense, dense.int8)}"]  # fmt: skip
        if channels is None:
            parts.append(_none_pays(forms, batch, "that"))
        else:
            only = "no form with zeros but removed channels"
            parts += [_none_pays(forms, batch, "that", only), _COSTLY]
            parts[-1] += f": {_train(forms, batch, *channels)}"
    if in_floats is not None:
        parts.append(f"{_IF_INT8_COSTS}, {_train(forms, batch, *in_floats)}")
    return "; ".join(parts)


def own_choice(
    forms: Sequence[FormFigures], batch: int | None, compressed: int | None = None
) -> str:
    """Return how to export the zeros that a model has; empty if that gains nothing.

    Parameters
    ----------
    forms : sequence of FormFigures
    batch : int or None
    compressed : int, optional
        Bytes of the file that `save_compressed` writes; None for a model without zeros.

    Examples
    --------
    >>> forms = [
    ...     FormFigures("dense", "dense", {1: {0.0: 4.0}}, {0.0: 1000}),
    ...     FormFigures("csr", "CSR", {1: {OWN: 3.8}}, {OWN: 200}),
    ... ]
    >>> own_choice(forms, 1, 200)
    'its own zeros do not make it a tenth faster in any form; save_compressed makes the file 5 \
times smaller'
    """
    dense = dense_times(forms, batch)
    timed = [form for form in forms if OWN in form.seconds.get(batch, {})]
    saved = None if compressed is None else _ratio(_named(forms, "dense").sizes[0.0], compressed)
    smaller = [] if saved in (None, "1") else [f"save_compressed makes the file {saved} times "
                                               "smaller"]  # fmt: skip
    if not timed:
        return "; ".join(["its own zeros were not timed", *smaller]) if smaller else ""
    best = min(timed, key=lambda form: form.seconds[batch][OWN])
    taken = best.seconds[batch][OWN]
    if taken <= MARGIN * dense.fastest:
        return f"with its own zeros, {_way(best, batch)}: {_gains(dense, taken)}"
    text = "its own zeros do not make it a tenth faster in any form"
    if taken <= MARGIN * dense.floating:
        text = (
            f"with its own zeros the model is {_faster(dense, taken)} ({best.title}), but not a "
            "tenth faster than dense int8"
        )
    return "; ".join([text, *smaller])


def _first(
    forms: Sequence[FormFigures], batch: int | None, seconds: float
) -> tuple[FormFigures, float] | None:
    """Return the form and the lowest sparsity that take at most some seconds."""
    found = []
    for form in forms:
        start = form.lowest_sparsity(batch, seconds)
        if start is not None:
            last = form.name == "channels"
            found.append(((last, start, form.seconds[batch][start]), form, start))
    return min(found, key=lambda each: each[0])[1:] if found else None


def _train(forms: Sequence[FormFigures], batch: int | None, form: FormFigures, start: float) -> str:
    dense, times = dense_times(forms, batch), form.seconds[batch]
    size, name = _dense_file(forms, form)
    way = f"then {_way(form, batch)}" if form.name == "channels" else _way(form, batch)
    text = (
        f"train safe_core.safe({form.pattern(start)}, steps=...), {way}: "
        f"{_gains(dense, times[start])}, file {_ratio(size, form.sizes[start])} times smaller than "
        f"{name}"
    )
    last = max(s for s in times if not isinstance(s, str))
    if last > start and times[last] <= MARGIN * times[start]:
        more = f"{_ratio(dense.floating, times[last])} times faster at {percent(last)} zeros"
        text = f"{text}; {more}"
    return text


def _way(form: FormFigures, batch: int | None) -> str:
    """Return what to do with zeros, once they are there."""
    if form.name == "channels":
        # Not keep_zeros() before shrink: it holds weights, so silent biases could grow again.
        return f"call {form.export(batch)}, and train the smaller network further"
    return f"export with {form.export(batch)}"


def _dense_file(forms: Sequence[FormFigures], form: FormFigures) -> tuple[int, str]:
    """Return the bytes and the name of the dense file to compare a form with."""
    sized = {each.name: each for each in forms if 0.0 in each.sizes}
    same = sized.get(_DENSE_OF.get(form.name, "dense"), sized["dense"])
    return same.sizes[0.0], "dense int8" if same.name == "int8" else f"dense {same.dtype}"


def _faster(dense: DenseTimes, taken: float) -> str:
    return f"{_ratio(dense.floating, taken)} times faster than dense {dense.dtype}"


def _gains(dense: DenseTimes, taken: float) -> str:
    text = _faster(dense, taken)
    if dense.int8 is None:
        return f"{text} (dense int8 was not measured)"
    how = "faster than" if dense.int8 > taken else "as fast as"
    return f"{text}, {_ratio(dense.int8, taken)} times {how} dense int8"


def _ratio(first: float, second: float) -> str:
    return readable_number(first / second, 2)


def _none_pays(
    forms: Sequence[FormFigures], batch: int | None, bar: str, only: str = "no form with zeros"
) -> str:
    """Return that no form with zeros beats a dense one, as far as that was measured."""
    found = [s for form in forms for s in form.seconds.get(batch, {})
             if not isinstance(s, str) and s > 0]  # fmt: skip
    if found:
        return f"{only} is a tenth faster than {bar} up to {percent(max(found))} zeros"
    if any(s for form in forms for s in form.sizes if not isinstance(s, str)):
        return f"{only} is faster, because LiteRT computes them dense"
    return f"{only} was measured"


def _smallest(forms: Sequence[FormFigures]) -> str:
    """Return how small a file gets by the pattern that keeps accuracy best, if it is known."""
    for form in forms:
        found = [s for s in form.sizes if not isinstance(s, str)]
        if form.name in ("csr", "bcsr") and found:
            s = min(found)
            size, _ = _dense_file(forms, form)
            return (
                f"with safe_core.safe({form.pattern(s)}, steps=...), save_compressed makes the "
                f"file {_ratio(size, form.sizes[s])} times smaller"
            )
    return ""


def _named(forms: Sequence[FormFigures], name: str) -> FormFigures:
    return next(form for form in forms if form.name == name)
