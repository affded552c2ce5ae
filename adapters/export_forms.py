"""Name the forms in which a network can be exported, and hold their measured figures."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

from safe_core._readable import readable_number

__all__ = [
    "DENSE",
    "FORMS",
    "OWN",
    "FormFigures",
    "Sparsity",
    "channel_share",
    "chosen_forms",
    "percent",
]

Sparsity = float | str
"""A fraction of zeros, or `OWN`."""

OWN = "own"
"""The zeros that the model has."""

DENSE = ("dense", "litert", "int8")
"""Forms without zeros, which are always measured."""


class Form(NamedTuple):
    """A form of export.

    Attributes
    ----------
    title : str
        ``{framework}`` and ``{dtype}`` stand for those of the model.
    pattern : str
        The argument of `safe_core.safe`, in which ``{}`` stands for the sparsity; empty for a
        dense form.
    export : str
        The call that exports; ``{}`` stands for more arguments.
    unit : (outputs, inputs), optional
        The group of entries that must divide the shape of a weight.
    """

    title: str
    pattern: str
    export: str
    unit: tuple[int, int] | None = None


FORMS = {
    "dense": Form("dense {dtype}, {framework}", "", ""),
    "litert": Form("dense float32, LiteRT", "", "save_litert(model, inputs, path{})"),
    "int8": Form("dense int8, LiteRT", "", 'save_litert(model, inputs, path, weights="int8"{})'),
    "1x4": Form(
        "blocks 1x4 float32, LiteRT",
        "safe_core.Block((1, 4), {})",
        'save_litert(model, inputs, path, compute="sparse"{})',
        (1, 4),
    ),
    "1x16": Form(
        "blocks 1x16 int8, LiteRT",
        "safe_core.Block((1, 16), {})",
        'save_litert(model, inputs, path, weights="int8", compute="sparse"{})',
        (1, 16),
    ),
    "csr": Form("CSR, {framework}", "{}", "sparse_modules(model, inputs)"),
    "bsr": Form(
        "BSR 16x16, {framework}",
        "safe_core.Block((16, 16), {})",
        "sparse_modules(model, inputs)",
        (16, 16),
    ),
    "bcsr": Form("BCSR, {framework}", "{}", "sparse_modules(model, inputs)"),
    "channels": Form(
        "channels removed, {framework}",
        "safe_core.Channel({})",
        "silence_channels(model, inputs) and shrink(model, inputs)",
    ),
    "2:4": Form("2:4, CUDA", '"2:4"', "sparse_modules(model, inputs)", (1, 4)),
}


class FormFigures(NamedTuple):
    """A form in which a network can be exported, with its figures.

    Attributes
    ----------
    name : str
        Such as ``"1x4"``.
    title : str
        The name in the table.
    seconds : dict of int or None to dict
        Medians of a call, by batch size, then by sparsity: 0.0 for a dense form, ``"own"`` for
        the zeros that the model has. The batch size None stands for inputs as they were given.
    sizes : dict
        Bytes of the file, by sparsity.
    reason : str
        Why the form was not measured.
    dtype : str
        That of the model where it was measured.
    ragged : bool
        Whether the groups of the pattern do not divide the shape of some weight.
    """

    name: str
    title: str
    seconds: Mapping[int | None, Mapping[Sparsity, float]] = {}
    sizes: Mapping[Sparsity, int] = {}
    reason: str = ""
    dtype: str = "float32"
    ragged: bool = False

    def pattern(self, sparsity: float) -> str:
        """Return the pattern to train, as the argument of `safe_core.safe`.

        Channels are counted so that the weights between two such layers are as few as those of
        other patterns. Weights that groups do not fit keep their tails dense.

        Examples
        --------
        >>> FormFigures("1x4", "").pattern(0.9), FormFigures("channels", "").pattern(0.75)
        ('safe_core.Block((1, 4), 0.9)', 'safe_core.Channel(0.5)')
        >>> FormFigures("1x4", "", ragged=True).pattern(0.9)
        'safe_core.Block((1, 4), 0.9, ragged="dense")'
        """
        if self.name == "2:4":
            return 'safe_core.NM(2, 4, ragged="dense")' if self.ragged else '"2:4"'
        number = repr(float(sparsity))
        if self.name == "channels":
            number = _rounded(channel_share(sparsity))
        more = ', ragged="dense"' if self.ragged else ""
        return FORMS[self.name].pattern.format(f"{number}{more}")

    def export(self, batch: int | None) -> str:
        """Return the call that exports for a batch size.

        Examples
        --------
        >>> FormFigures("1x4", "").export(8)
        'save_litert(model, inputs, path, compute="sparse", batch_size=8)'
        """
        return FORMS[self.name].export.format("" if batch == 1 else f", batch_size={batch}")

    def lowest_sparsity(self, batch: int | None, seconds: float) -> float | None:
        """Return the lowest measured sparsity at which a call takes at most some seconds.

        None if there is none, as for a dense form.

        Examples
        --------
        >>> FormFigures("1x4", "", {1: {0.8: 4.0, 0.9: 2.0}}).lowest_sparsity(1, 3.0)
        0.9
        """
        found = self.seconds.get(batch, {}).items()
        return min((s for s, t in found if not isinstance(s, str) and s > 0 and t <= seconds),
                   default=None)  # fmt: skip


def channel_share(sparsity: float) -> float:
    """Return the share of channels to remove from all layers, for the zeros that it leaves out.

    Examples
    --------
    >>> channel_share(0.75)
    0.5
    """
    return 1 - math.sqrt(1 - sparsity)


def _rounded(share: float) -> str:
    """Return a share with three digits, or as many as keep it below 1."""
    digits = 3
    while float(text := readable_number(share, digits)) >= 1:
        digits += 1
    return text


def percent(sparsity: float) -> str:
    """Return a fraction as a percentage.

    Examples
    --------
    >>> percent(0.875), percent(0.99999)
    ('87.5%', '99.999%')
    """
    return f"{readable_number(100 * sparsity, 10)}%"


def chosen_forms(forms: Collection[str] | None, known: Collection[str]) -> list[str]:
    """Return the forms to measure, or raise an error that names the wrong one."""
    sparse = [name for name in known if name not in DENSE]
    if forms is None:
        return sparse
    if isinstance(forms, str) or not isinstance(forms, Collection):
        raise TypeError(f"forms must be a list of names, got {forms!r}")
    for name in forms:
        if name not in sparse:
            raise ValueError(f"forms must be among {', '.join(sparse)}, got {name!r}")
    return [name for name in sparse if name in forms]
