"""Report the formats of layers, the size, the error and the time of a LiteRT file."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safe_core._readable import aligned, readable_bytes, readable_ms, readable_number

__all__ = ["LayerFormat", "LiteRTReport"]

_WIDTH = 100  # of the lines of notes


class LayerFormat(NamedTuple):
    """Describe how the file stores the weights of one layer.

    Attributes
    ----------
    name : str
        The module or operation.
    shape : tuple of int
        Shape of the weights in the file: (output, ..., input), of depthwise convolutions
        (1, height, width, output).
    sparsity : float
        Share of the weights that are zero.
    format : str
        ``"1x4"``, ``"1x16"`` or ``"csr"``: computed without the zeros. ``"packed"``: stored
        without zeros and computed dense. ``"dense"``: stored and computed dense.
    size, dense_size : int
        Bytes of the weights in the file, and of the same weights stored dense.
    zero_blocks : float
        Share of blocks that are all zero, among blocks of 1x4 (float32) or 1x16 (int8); 0 for
        layers without a kernel that skips them.
    needed_zeros : float
        Smallest share of zero blocks at which such a kernel can be faster.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    format: str
    size: int
    dense_size: int
    zero_blocks: float = 0.0
    needed_zeros: float = 0.0

    @property
    def skips_zeros(self) -> bool:
        """Return whether the runtime multiplies only what is stored."""
        return self.format not in ("dense", "packed")


@dataclass(frozen=True)
class LiteRTReport:
    """Report the file that `save_litert` wrote and measured. ``str(report)`` is a table.

    Attributes
    ----------
    path : pathlib.Path
    weights : str
        ``"float32"`` or ``"int8"``.
    batch_size : int or None
        Samples that the file takes at once; None for inputs as they were given.
    layers : tuple of LayerFormat
    size, dense_size : int
        Bytes of the file, and of the file of the same type with dense weights.
    error : float
        The largest ``|y - f(x)|`` of a sample, divided by the root mean square of ``|f(x)|``.
    seconds : dict of str to float
        Median time of a call on this machine with one thread: of ``"this file"``, of the same
        file that computes dense, ``"dense float32"`` or ``"dense int8"``, and for int8 of
        ``"dense float32"``, too.
    notes : tuple of str
        What zeros cost that the runtime does not skip, and other advice.
    """

    path: Path
    weights: str
    batch_size: int | None
    layers: tuple[LayerFormat, ...]
    size: int
    dense_size: int
    error: float
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def latency(self) -> float:
        """Return the median time of a call in seconds."""
        return self.seconds["this file"]

    def __str__(self) -> str:
        rows = [("layer", "weights", "zeros", "format", "size", "dense")]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            sizes = (readable_bytes(layer.size), readable_bytes(layer.dense_size))
            rows.append((layer.name, shape, f"{layer.sparsity:.1%}", layer.format, *sizes))
        lines = [
            f"{self.path.name}: {self.weights}, {readable_bytes(self.size)} "
            f"(dense: {readable_bytes(self.dense_size)}), largest relative error {self.error:.1e}"
        ]
        lines += [f"  {line}" for line in aligned(rows, right=(4, 5))]
        size = "inputs as given" if self.batch_size is None else f"batch size {self.batch_size}"
        lines.append(f"time of a call with one thread, {size}:")
        own = "this file"
        if not any(layer.skips_zeros for layer in self.layers):
            own += f" (computes dense {self.weights})"
        width = max(map(len, (own, *self.seconds)))
        for name, seconds in self.seconds.items():
            ratio = f", {readable_number(seconds / self.latency, 2)} times this file"
            label, ratio = (own, "") if name == "this file" else (name, ratio)
            lines.append(f"  {label.ljust(width)}  {readable_ms(seconds)}{ratio}")
        for note in self.notes:
            lines += textwrap.wrap(note, _WIDTH, break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)
