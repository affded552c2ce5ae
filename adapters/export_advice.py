"""Report in which forms zeros pay on this machine, and what to train for it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safe_core._readable import aligned, readable_bytes, readable_number

from .export_choice import dense_times
from .export_forms import DENSE, OWN, FormFigures, Sparsity, percent
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
        """Return the lowest measured sparsity at which a form is a tenth faster than dense.

        Dense is the model without zeros in floating point, in the faster one of the framework and
        LiteRT.

        Parameters
        ----------
        name : str
            A form.
        batch : int, optional
            A batch size that was measured. It may be left out if there is one only.

        Returns
        -------
        float or None
            None if the form never is, and for dense forms, which have no zeros.

        Raises
        ------
        KeyError
            If there is no such form.
        ValueError
            If the batch size was not measured, or is left out of several.
        """
        batch = self._batch(batch)
        seconds = MARGIN * dense_times(self.forms, batch).floating
        return self.form(name).lowest_sparsity(batch, seconds)

    def beats_int8_from(self, name: str, batch: int | None = None) -> float | None:
        """Return the lowest measured sparsity at which a form is a tenth faster than dense int8.

        Parameters and errors are those of `pays_from`.

        Returns
        -------
        float or None
            None if the form never is, for dense forms, or if dense int8 was not measured.
        """
        batch = self._batch(batch)
        int8 = dense_times(self.forms, batch).int8
        return None if int8 is None else self.form(name).lowest_sparsity(batch, MARGIN * int8)

    def _batch(self, batch: int | None) -> int | None:
        """Return a batch size that was measured, or raise an error."""
        if batch in self.batch_sizes:
            return batch
        if batch is None and len(self.batch_sizes) == 1:
            return self.batch_sizes[0]
        known = ", ".join(map(str, self.batch_sizes))
        raise ValueError(f"batch must be one of {known}, got {batch!r}")

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
        found: dict[str, Any] = {"title": form.title}
        if form.reason:
            found["reason"] = form.reason
        if not form.seconds:
            return found
        found["seconds"] = {
            _inputs(batch): {str(at): taken for at, taken in times.items()}
            for batch, times in form.seconds.items()
        }
        found["bytes"] = {str(at): size for at, size in form.sizes.items()}
        if form.name not in DENSE:
            for key, start in (
                ("pays_from", self.pays_from),
                ("beats_int8_from", self.beats_int8_from),
            ):
                found[key] = {_inputs(batch): start(form.name, batch) for batch in form.seconds}
        return found

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
        if self.form("int8").reason:
            lines += [_wrapped(f"LiteRT was not measured: {self.form('int8').reason}")]
        for batch, text in self.advice.items():
            lines += [f"{_inputs(batch)}:", *(_wrapped(part, "  ") for part in text.split("; "))]
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
            cells = [readable_number(1e3 * times[s], 3) if s in times else "" for s in columns]
            rows.append((form.title, *cells, *self._starts(form, batch)))
        return [f"  {line}" for line in aligned(rows, right=range(1, len(rows[0])))]

    def _starts(self, form: FormFigures, batch: int | None) -> tuple[str, str]:
        dense = dense_times(self.forms, batch)
        if form.name in ("dense", "litert"):
            return "", ""
        if form.name == "int8":
            pays = form.seconds[batch][0.0] <= MARGIN * dense.floating
            return ("dense" if pays else "no"), ""
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


# A call with up to two levels of parentheses in its arguments.
_CALL = re.compile(r"\w[\w.]*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")


def _wrapped(text: str, indent: str = "") -> str:
    """Return a text in lines, of which all but the first are indented further.

    A line does not end within a call, which is there to be copied.
    """
    return textwrap.fill(
        _CALL.sub(lambda call: call[0].replace(" ", "\N{NO-BREAK SPACE}"), text),
        100,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\N{NO-BREAK SPACE}", " ")
