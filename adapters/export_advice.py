"""Report in which forms zeros pay on this machine, and what to train for it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safe_core._readable import aligned, readable_bytes

from .export_choice import bars
from .export_forms import OWN, FormFigures, Sparsity, percent
from .layer_timing import MARGIN

__all__ = ["ExportAdvice"]


@dataclass(frozen=True)
class ExportAdvice:
    """Hold the result of `advise`. ``str(advice)`` is a table with the advice below it.

    Attributes
    ----------
    forms : tuple of FormFigures
        All forms, those that could not be measured with their reasons.
    batch_sizes : tuple of int or None
    sparsities : tuple of float
    own : float or None
        The fraction of zeros that the model has in the weights that can be pruned; None if that
        is less than a hundredth.
    advice : dict of int or None to str
        What to train and how to export, by batch size.
    notes : tuple of str
        What the figures leave out.
    machine : str
        The processor, and the threads.
    """

    forms: tuple[FormFigures, ...]
    batch_sizes: tuple[int | None, ...]
    sparsities: tuple[float, ...]
    own: float | None
    advice: Mapping[int | None, str]
    notes: tuple[str, ...]
    machine: str

    def form(self, name: str) -> FormFigures:
        """Return the figures of a form, such as ``"1x4"``."""
        for form in self.forms:
            if form.name == name:
                return form
        known = ", ".join(form.name for form in self.forms)
        raise KeyError(f"name must be one of {known}, got {name!r}")

    def pays_from(self, name: str, batch: int | None = None) -> float | None:
        """Return the lowest measured sparsity at which a form is a tenth faster than dense float32.

        None if it never is. Dense float32 is the faster one of the framework and LiteRT.
        """
        found = self.form(name)
        return found.starts(batch, MARGIN * bars(self.forms, batch).float32)

    def beats_int8_from(self, name: str, batch: int | None = None) -> float | None:
        """Return the lowest measured sparsity at which a form is a tenth faster than dense int8.

        None if it never is, or dense int8 was not measured.
        """
        int8 = bars(self.forms, batch).int8
        return None if int8 is None else self.form(name).starts(batch, MARGIN * int8)

    def plain(self) -> dict[str, Any]:
        """Return all figures as nested dictionaries and lists, ready for JSON."""
        return {
            "machine": self.machine,
            "own_sparsity": self.own,
            "advice": {_inputs(batch): text for batch, text in self.advice.items()},
            "notes": list(self.notes),
            "forms": {form.name: self._plain(form) for form in self.forms},
        }

    def _plain(self, form: FormFigures) -> dict[str, Any]:
        if form.reason and not form.seconds:
            return {"title": form.title, "reason": form.reason}
        return {
            "title": form.title,
            "seconds": {
                _inputs(batch): {str(at): taken for at, taken in times.items()}
                for batch, times in form.seconds.items()
            },
            "bytes": {str(at): size for at, size in form.sizes.items()},
            "pays_from": {_inputs(b): self.pays_from(form.name, b) for b in form.seconds},
            "beats_int8_from": {
                _inputs(b): self.beats_int8_from(form.name, b) for b in form.seconds
            },
        }

    def __str__(self) -> str:
        lines = []
        for batch in self.batch_sizes:
            lines += [f"milliseconds of a call, {_inputs(batch)}:", *self._times(batch), ""]
        lines += ["size of the file:", *self._sizes(), ""]
        missing: dict[str, list[str]] = {}
        for form in self.forms:
            if form.reason:
                missing.setdefault(form.reason, []).append(form.title)
        if missing:
            texts = [f"{'; '.join(titles)}: {reason}" for reason, titles in missing.items()]
            lines += ["not measured:", *(_wrapped(text, "  ") for text in texts), ""]
        lines += [_wrapped(note) for note in self.notes]
        lines += [f"medians on {self.machine}", ""]
        lines += [_wrapped(f"{_inputs(batch)}: {text}") for batch, text in self.advice.items()]
        return "\n".join(lines)

    def _columns(self) -> dict[Sparsity, str]:
        """Return the sparsities of any form with the heads of their columns."""
        found = {s for form in self.forms for s in form.sizes}
        numbers = sorted(s for s in found if not isinstance(s, str))
        columns: dict[Sparsity, str] = {s: percent(s) if s else "dense" for s in numbers}
        return columns | ({OWN: f"own {self.own:.1%}"} if OWN in found else {})

    def _times(self, batch: int | None) -> list[str]:
        columns = self._columns()
        rows = [("form", *columns.values(), "pays from", "over int8 from")]
        for form in self.forms:
            if batch not in form.seconds:
                continue
            times = form.seconds[batch]
            cells = [f"{1e3 * times[s]:.3g}" if s in times else "" for s in columns]
            rows.append((form.title, *cells, *self._starts(form, batch)))
        return [f"  {line}" for line in aligned(rows, right=range(1, len(rows[0])))]

    def _starts(self, form: FormFigures, batch: int | None) -> tuple[str, str]:
        dense = bars(self.forms, batch)
        if form.name in ("dense", "litert"):
            return "", ""
        if form.name == "int8":
            return ("dense" if form.seconds[batch][0.0] <= MARGIN * dense.float32 else "no"), ""
        found = self.pays_from(form.name, batch), self.beats_int8_from(form.name, batch)
        first, second = ("no" if s is None else percent(s) for s in found)
        return first, "" if dense.int8 is None else second

    def _sizes(self) -> list[str]:
        columns = self._columns()
        rows = [("form", *columns.values())]
        for form in self.forms:
            if form.sizes:
                cells = [readable_bytes(form.sizes[s]) if s in form.sizes else "" for s in columns]
                rows.append((form.title, *cells))
        return [f"  {line}" for line in aligned(rows, right=range(1, len(rows[0])))]


def _inputs(batch: int | None) -> str:
    return "inputs as given" if batch is None else f"batch size {batch}"


def _wrapped(text: str, indent: str = "") -> str:
    """Return a text in lines, of which all but the first are indented further."""
    return textwrap.fill(
        text,
        100,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
