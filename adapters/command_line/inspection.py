"""Analyse the sparsity of a checkpoint, for ``safe-core inspect``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safe_core._readable import readable_bytes
from safe_core.inspection import TensorAnalysis, analyse

from .checkpoint_files import StoredTensor, check_index, read_tensors, weight_sources
from .output import numbers_left_out, printable

__all__ = ["CheckpointReport", "TensorFigures", "inspect_checkpoint"]

_TOTALS = {
    "weights": "total of weights (two axes or more)",
    "all": "total of all, with biases and norms",
    "optimizer": "total of the optimizer's state",
}
_MOST_ROWS = 1000  # of a table that people read


class TensorFigures(NamedTuple):
    """One tensor of a checkpoint.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
    nbytes : int
    analysis : TensorAnalysis or None
        None for unknown dtypes, for dtypes that pack several entries in a byte, and for tensors
        that share the memory of an earlier one.
    same_as : str or None
        The name of that earlier tensor.
    packed : bool
        Whether a byte holds several entries.
    optimizer : bool
        Whether the tensor is part of the state of an optimizer, such as a moment of Adam.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    analysis: TensorAnalysis | None
    same_as: str | None
    packed: bool = False
    optimizer: bool = False

    def plain(self) -> dict[str, Any]:
        """Return the figures by name, ready for JSON."""
        found: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        if self.optimizer:
            found["optimizer"] = True
        if self.same_as is not None:
            return found | {"same_as": self.same_as}
        if self.analysis is None:
            return found | {"dense_bytes": self.nbytes, "compressed_bytes": self.nbytes}
        return found | {"sparsity": self.analysis.sparsity} | self.analysis._asdict()


class CheckpointReport(NamedTuple):
    """All tensors of a checkpoint.

    Attributes
    ----------
    files : list of str
    tensors : list of TensorFigures
        In the order of the files.

    Examples
    --------
    >>> analysis = TensorAnalysis(8, 4, "2:4", 1, 0, 0, 1, 32, 17)
    >>> report = CheckpointReport([], [TensorFigures("w", (2, 4), "F32", 32, analysis, None)])
    >>> report.totals()["weights"]
    {'entries': 8, 'zeros': 4, 'sparsity': 0.5, 'dense_bytes': 32, 'compressed_bytes': 17}
    """

    files: list[str]
    tensors: list[TensorFigures]

    def totals(self) -> dict[str, dict[str, Any]]:
        """Return the sums over ``"weights"`` and over ``"all"`` tensors.

        Weights are tensors of two axes or more, including embeddings. All tensors also include
        biases, norms and buffers. The state of an optimizer, if there is one, has its own sums,
        ``"optimizer"``. Shared memory counts once. Entries and zeros only count tensors that
        have an analysis.
        """
        own = [row for row in self.tensors if row.same_as is None and not row.optimizer]
        state = [row for row in self.tensors if row.same_as is None and row.optimizer]
        found = {"weights": _sums(row for row in own if len(row.shape) > 1), "all": _sums(own)}
        return found | ({"optimizer": _sums(state)} if state else {})

    def plain(self) -> dict[str, Any]:
        """Return all figures as nested dictionaries and lists, ready for JSON."""
        return {
            "files": self.files,
            "tensors": {row.name: row.plain() for row in self.tensors},
            "totals": self.totals(),
        }

    def table(self) -> Any:
        """Return a `rich.table.Table`.

        Of more than a thousand tensors, those whose names differ in numbers only share a row.
        """
        from rich.table import Table

        table = Table(padding=(0, 1, 0, 0), box=None)
        table.add_column("tensor", overflow="fold", ratio=1)
        for header in ("shape", "dtype", "zeros", "pattern", "ties", "dense", "compressed"):
            right = header not in ("dtype", "pattern")
            table.add_column(header, justify="right" if right else "left", no_wrap=right)
        for line in self._lines():
            table.add_row(*map(printable, line))
        for name, total in self.totals().items():
            sizes = [readable_bytes(total[f"{kind}_bytes"]) for kind in ("dense", "compressed")]
            share = f"{total['sparsity']:.2%}" if total["entries"] else "not counted"
            cells = f"{total['entries']:,}", "", share, "", "", *sizes
            table.add_row(_TOTALS[name], *cells, style="bold")
        return table

    def _lines(self) -> Iterator[list[str]]:
        if len(self.tensors) <= _MOST_ROWS:
            for row in self._in_reading_order():
                yield [row.name, _shape(row), row.dtype, *_cells(row)]
            return
        alike: dict[tuple[str, tuple[int, ...], str], list[TensorFigures]] = {}
        for row in self.tensors:
            alike.setdefault((numbers_left_out(row.name), row.shape, row.dtype), []).append(row)
        for (name, _, dtype), rows in list(alike.items())[:_MOST_ROWS]:
            yield [f"{name} ({len(rows):,})", _shape(rows[0]), dtype, *_shared_cells(rows)]
        if len(alike) > _MOST_ROWS:
            left = sum(len(rows) for rows in list(alike.values())[_MOST_ROWS:])
            yield [f"and {left:,} more tensors, see --json"]

    def _in_reading_order(self) -> list[TensorFigures]:
        """Return the tensors in numeric order (2 before 10) if the file lists them alphabetically.

        Any other order is that of the file.
        """
        names = [row.name for row in self.tensors]
        return self.tensors if names != sorted(names) else sorted(self.tensors, key=_by_numbers)


def _by_numbers(row: TensorFigures) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", row.name)
    return [(int(x), x) if x.isdecimal() and i % 2 else (0, x) for i, x in enumerate(parts)]


def _shape(row: TensorFigures) -> str:
    return " x ".join(map(str, row.shape))


def _shared_cells(rows: list[TensorFigures]) -> list[str]:
    """Return the cells of a row for several tensors: sums, and the pattern if they agree."""
    total = _sums(row for row in rows if row.same_as is None)
    sizes = [readable_bytes(total[f"{kind}_bytes"]) for kind in ("dense", "compressed")]
    patterns = {row.analysis.pattern for row in rows if row.analysis is not None}
    pattern = patterns.pop() if len(patterns) == 1 else "mixed" if patterns else ""
    ties = sum(row.analysis.ties for row in rows if row.analysis is not None)
    return [f"{total['sparsity']:.2%}", pattern, f"{ties:,}" if ties else "", *sizes]


def _sums(rows: Iterable[TensorFigures]) -> dict[str, Any]:
    found = [(row.nbytes, row.analysis) for row in rows]
    packed = sum(nbytes for nbytes, x in found if x is None)
    analysed = [x for _, x in found if x is not None]
    entries, zeros = sum(x.entries for x in analysed), sum(x.zeros for x in analysed)
    return {
        "entries": entries,
        "zeros": zeros,
        "sparsity": zeros / max(entries, 1),
        "dense_bytes": packed + sum(x.dense_bytes for x in analysed),
        "compressed_bytes": packed + sum(x.compressed_bytes for x in analysed),
    }


def _cells(row: TensorFigures) -> list[str]:
    if row.same_as is not None:
        return ["", f"same as {row.same_as}"]
    x = row.analysis
    if x is None:
        label = "packed" if row.packed else "unknown dtype"
        return ["", label, "", *[readable_bytes(row.nbytes)] * 2]
    found = [x.pattern]
    if x.axis is not None and x.axis != len(row.shape) - 1:
        found.append(f"along axis {x.axis}")
    if x.zeros < x.entries:
        slices = zip((x.zero_rows, x.zero_columns), row.shape, ("rows", "columns"), strict=False)
        found += [f"{n} of {size} {what} empty" for n, size, what in slices if n]
    sizes = [readable_bytes(n) for n in (x.dense_bytes, x.compressed_bytes)]
    return [f"{x.sparsity:.2%}", ", ".join(found), f"{x.ties:,}" if x.ties else "", *sizes]


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointReport:
    """Find the zeros of every tensor of a checkpoint, their pattern and what they save.

    Tensors are read one after the other, so that memory is needed for the largest only.

    Parameters
    ----------
    path : path
        A folder of a model, a safetensors file, an index of shards, or a file of torch.

    Returns
    -------
    CheckpointReport

    Raises
    ------
    ValueError
        If there are no weights, or a file is damaged or could run code.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import safe_core
    >>> from safetensors.numpy import save_file
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> weight = np.random.default_rng(0).normal(size=(16, 32))
    >>> save_file({"w": safe_core.project(weight, "2:4").values}, file)
    >>> inspect_checkpoint(file).tensors[0].analysis.pattern
    '2:4'
    """
    sources = weight_sources(Path(path))
    tensors: list[TensorFigures] = []
    for file, index in sources.items():
        here = [_figures(tensor) for tensor in read_tensors(file)]
        if index is not None:
            check_index(file, index, {tensor.name for tensor in here})
        tensors += here
    return CheckpointReport([str(file) for file in sources], tensors)


def _figures(tensor: StoredTensor) -> TensorFigures:
    analysis = None
    if tensor.array is not None and tensor.same_as is None:
        analysis = analyse(tensor.array, floating=tensor.floating, format=tensor.format)
    return TensorFigures(
        tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, analysis, tensor.same_as,
        tensor.packed, tensor.optimizer,
    )  # fmt: skip
