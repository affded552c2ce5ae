"""Measure a network as LiteRT files with synthetic zeros, before it is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safe_core._synthetic import synthetic_weight

from .candidates import Candidate, built, calibrated, copied, is_linear, kernels
from .graph import Graph, Operation, Tensor
from .process import measure
from .simplify import simplify
from .sparsity import BLOCKS

__all__ = ["BLOCKED", "Trial", "dense_layers", "trials"]

Array = np.ndarray[Any, Any]
Key = tuple[str, "float | str"]

_WEIGHTS = {"litert": "float32", "int8": "int8", "1x4": "float32", "1x16": "int8"}
BLOCKED = ("1x4", "1x16")
"""Forms with zeros in blocks."""

_SECONDS = 1.0  # of measurements, besides the least number of calls


class Trial(NamedTuple):
    """A file that was measured.

    Attributes
    ----------
    seconds : float
        Median time of a call with one thread.
    size : int
        Bytes of the file.
    skips : bool
        Whether a layer is computed without its zeros; always True for dense files.
    """

    seconds: float
    size: int
    skips: bool = True


def trials(
    graph: Graph,
    sample: Sequence[Array],
    sparsities: Sequence[float],
    *,
    forms: Collection[str],
    own: bool,
    repeats: int,
) -> dict[Key, Trial]:
    """Return the times and sizes of files of a graph, which take turns.

    Parameters
    ----------
    graph : Graph
        It is simplified in place. Its weights stay.
    sample : sequence of arrays
        The inputs.
    sparsities : sequence of float
        Of the linear layers, whose weights become random with zeros in blocks.
    forms : collection of str
        ``"1x4"`` (float32), ``"1x16"`` (int8), or both.
    own : bool
        Whether to measure files with the zeros that the graph has, too.
    repeats : int
        Calls of each file, at least.

    Returns
    -------
    dict of (str, float or str) to Trial
        By form and sparsity: ``("litert", 0.0)`` and ``("int8", 0.0)`` for the dense files, and
        ``"own"`` for the zeros of the graph.

    Raises
    ------
    FileRuntimeError
        If the runtime refuses a file or crashes.
    """
    simplify(graph)
    with tempfile.TemporaryDirectory(prefix="safe_core-") as name:
        folder = Path(name)
        ranges = calibrated(graph, [sample], folder)
        files, sizes, made = list[Path](), list[int](), dict[Key, Candidate]()
        for key, candidate in _candidates(graph, sparsities, forms, own, ranges):
            file = folder / f"{len(files)}.tflite"
            file.write_bytes(candidate.content)
            files.append(file)
            made[key] = candidate._replace(content=b"")  # which is in the file
            sizes.append(len(candidate.content))
        answer = measure(files, [sample], len(graph.outputs), folder, _SECONDS, least=repeats)
    return {
        key: Trial(
            seconds,
            size,
            key[0] not in BLOCKED or any(layer.skips_zeros for layer in candidate.layers),
        )
        for (key, candidate), size, seconds in zip(made.items(), sizes, answer.seconds, strict=True)
    }


def dense_layers(graph: Graph, form: str) -> tuple[list[str], int]:
    """Return the layers that stay dense in a form, and the number of all layers."""
    block = BLOCKS[_WEIGHTS[form]]
    layers = [op for op in graph.operations if op.weight is not None]
    dense = [op.source for op in layers if (x := _weight(op)) is None or _matrix(x)[1] % block]
    return dense, len(layers)


def _candidates(
    graph: Graph,
    sparsities: Sequence[float],
    forms: Collection[str],
    own: bool,
    ranges: dict[int, tuple[float, float]],
) -> Iterator[tuple[Key, Candidate]]:
    def candidate(form: str, changed: Graph) -> Candidate:
        kind = _WEIGHTS[form]
        chosen = kernels(changed, kind, always=True) if form in BLOCKED else {}
        # Times do not depend on the ranges, so those of the dense network will do.
        return built(changed, chosen, ranges if kind == "int8" else None)

    filled = _changed(
        graph, lambda weight, seed: synthetic_weight(_matrix(weight), (1, 1), 0.0, seed)
    )
    yield ("litert", 0.0), candidate("litert", filled)
    yield ("int8", 0.0), candidate("int8", filled)
    for form in [form for form in BLOCKED if form in forms]:
        block = BLOCKS[_WEIGHTS[form]]
        for sparsity in sparsities:
            yield (form, sparsity), candidate(form, _sparse(graph, block, sparsity))
        if own:
            yield (form, "own"), candidate(form, graph)


def _sparse(graph: Graph, block: int, sparsity: float) -> Graph:
    def change(weight: Tensor, seed: int) -> Array:
        shape = _matrix(weight)
        if shape[1] % block:
            return synthetic_weight(shape, (1, 1), 0.0, seed)
        return synthetic_weight(shape, (1, block), sparsity, seed)

    return _changed(graph, change)


def _changed(graph: Graph, change: Callable[[Tensor, int], Array]) -> Graph:
    """Return a graph with other weights of linear layers; tied ones stay tied."""
    new, _ = copied(graph)
    made: dict[int, Tensor] = {}
    for op in new.operations:
        if (weight := _weight(op)) is not None:
            if id(weight) not in made:
                # Other numbers in each, because a file stores equal ones once.
                data = change(weight, len(made)).reshape(weight.shape)
                made[id(weight)] = replace(weight, data=data)
            op.inputs[1] = made[id(weight)]
    return new


def _weight(op: Operation) -> Tensor | None:
    """Return the weight of a linear layer; None for other operations."""
    weight = op.weight
    return weight if weight is not None and weight.data is not None and is_linear(op) else None


def _matrix(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.size // weight.shape[0]
