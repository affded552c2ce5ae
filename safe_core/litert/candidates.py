"""Ways to store one network: with kernels that skip zeros, dense, and for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .flatbuffer import serialized
from .graph import Graph, Operation
from .process import ranges
from .quantization import Range, quantize
from .report import LayerFormat
from .sparsity import BLOCKS, apply_formats, block_density, kernel_format, largest_density

__all__ = [
    "DENSE",
    "FLOAT",
    "SPARSE",
    "Candidate",
    "built",
    "calibrated",
    "candidates",
    "copied",
    "is_linear",
    "kernels",
]

Array = np.ndarray[Any, Any]
Samples = Sequence[Sequence[Array]]

SPARSE = "with kernels that skip zeros"
DENSE = "computed dense"
FLOAT = "dense float32"


class Candidate(NamedTuple):
    """One way to store a network.

    Attributes
    ----------
    content : bytes
    layers : tuple of LayerFormat
    """

    content: bytes
    layers: tuple[LayerFormat, ...]


def candidates(
    graph: Graph, samples: Samples, folder: Path, *, weights: str, compute: str
) -> tuple[dict[str, Candidate], int]:
    """Return the files to measure, and the bytes of the file with dense weights.

    For int8, the ranges of all tensors are measured first.
    """
    chosen: dict[int, str] = {}
    if compute != "dense":
        chosen = kernels(graph, weights, always=compute == "sparse")
    measured = calibrated(graph, samples, folder) if weights == "int8" else None
    found = {SPARSE: built(graph, chosen, measured)} if chosen else {}
    found[DENSE] = built(graph, {}, measured)
    if measured is not None:
        found[FLOAT] = Candidate(serialized(graph).content, ())
    size = len(found[DENSE].content)
    if any(layer.format == "packed" for layer in found[DENSE].layers):
        size = len(serialized(_renewed(graph, {}, measured)[0]).content)
    return found, size


def kernels(graph: Graph, weights: str, *, always: bool) -> dict[int, str]:
    """Return the formats of layers for which the runtime can skip zeros, by their ``id``."""
    found = {}
    for op in graph.operations:
        weight = op.weight
        if weight is None or weight.data is None or not is_linear(op):
            continue
        outputs = weight.shape[0]
        chosen = kernel_format(
            weight.data.reshape(outputs, -1), op.output.size // outputs, weights, always=always
        )
        if chosen is not None:
            found[id(op)] = chosen
    return found


def is_linear(op: Operation) -> bool:
    """Return whether an operation is a linear layer, or a convolution that is one at each pixel."""
    if op.kind == "FULLY_CONNECTED":
        return True
    if op.kind != "CONV_2D" or op.weight is None:
        return False
    strides = (op.options["strideH"], op.options["strideW"])
    return op.weight.shape[1:3] == (1, 1) and strides == (1, 1)


def calibrated(graph: Graph, samples: Samples, folder: Path) -> dict[int, Range]:
    """Return the lowest and highest entries of all tensors of a graph, by their ``id``."""
    file = serialized(graph)
    path = folder / "calibration.tflite"
    path.write_bytes(file.content)
    tensors = [*graph.inputs, *(op.output for op in graph.operations)]
    tensors = [tensor for tensor in tensors if tensor.dtype == np.float32]
    values = ranges(path, samples, [file.indices[id(x)] for x in tensors], folder)
    path.unlink()
    return {
        id(x): (float(low), float(high)) for x, (low, high) in zip(tensors, values, strict=True)
    }


def built(graph: Graph, chosen: dict[int, str], measured: dict[int, Range] | None) -> Candidate:
    """Return a file with kernels that skip zeros for some operations; in int8 by ranges."""
    new, renewed = _renewed(graph, chosen, measured)
    formats = {id(renewed[key]): value for key, value in chosen.items()}
    for op in new.operations:
        if id(op) in formats and op.kind == "CONV_2D":
            _make_linear(op)
    apply_formats(new, formats)
    return Candidate(
        serialized(new).content, _layers(new, formats, "float32" if measured is None else "int8")
    )


def _renewed(
    graph: Graph, chosen: dict[int, str], measured: dict[int, Range] | None
) -> tuple[Graph, dict[int, Operation]]:
    """Return a copy to change, in int8 by ranges, and its operations as `copied` does."""
    return copied(graph) if measured is None else quantize(graph, measured, chosen)


def copied(graph: Graph) -> tuple[Graph, dict[int, Operation]]:
    """Return a copy with the same tensors, and its operations by the ``id`` of the former ones."""
    renewed = {
        id(op): replace(op, inputs=list(op.inputs), options=dict(op.options))
        for op in graph.operations
    }
    return replace(graph, operations=list(renewed.values())), renewed


def _make_linear(op: Operation) -> None:
    weight = op.weight
    assert weight is not None
    assert weight.data is not None
    shape = weight.shape[0], weight.shape[3]
    op.kind = "FULLY_CONNECTED"
    op.inputs[1] = replace(weight, shape=shape, data=weight.data.reshape(shape))
    fused = op.options.get("fusedActivationFunction", 0)
    op.options = {"keepNumDims": True, "fusedActivationFunction": fused}


def _layers(graph: Graph, formats: dict[int, str], weights: str) -> tuple[LayerFormat, ...]:
    made = graph.producers()
    found = []
    for op in graph.operations:
        if op.kind not in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"):
            continue
        weight = op.inputs[1]
        unpacked = made.get(id(weight))
        if unpacked is not None and unpacked.kind == "DENSIFY":
            weight = unpacked.inputs[0]
        if weight is None or weight.data is None:
            continue  # a product of two results
        packed = weight.compressed
        size = weight.data.nbytes if packed is None else packed.nbytes
        name = formats.get(id(op), "dense" if packed is None else "packed")
        zeros = 1 - np.count_nonzero(weight.data) / max(weight.size, 1)
        shape = weight.data.shape  # not that of the convolution that a packed linear layer becomes
        sizes = size, weight.data.nbytes
        facts = _blocks(weight.data, op.output.size, weights) if len(shape) == 2 else ()
        found.append(LayerFormat(op.source, shape, float(zeros), name, *sizes, *facts))
    return tuple(found)


def _blocks(weight: Array, outputs: int, weights: str) -> tuple[float, float]:
    """Return the share of zero blocks, and that from which a kernel can be faster."""
    block, rows = BLOCKS[weights], outputs // weight.shape[0]
    zeros = 0.0 if weight.shape[1] % block else 1 - block_density(weight, block)
    return zeros, 1 - largest_density(weights, rows)
