"""Choose how the file stores weights, and compress them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .graph import Compressed, Graph, Operation, Tensor

__all__ = [
    "BLOCKS",
    "CSR",
    "DENSE",
    "FILLED",
    "LARGEST_DENSITY",
    "PACKED",
    "apply_formats",
    "block_density",
    "compress",
    "kernel_format",
    "largest_density",
    "smallest",
]

Array = np.ndarray[Any, Any]

DENSE = "dense"
PACKED = "packed"
"""Stored without zeros, and made dense when the file is loaded."""
CSR = "csr"

BLOCKS = {"float32": 4, "int8": 16}
"""Consecutive inputs in the blocks that a kernel can skip."""

# A kernel for compressed weights can be faster than the dense one if at most this share of blocks
# is not zero, by the number of inputs at once: (largest number, share). Measured on two CPUs.
_WORTH_TRYING = {
    "float32": ((8, 0.35), (math.inf, 0.15)),
    "int8": ((1, 0.3), (8, 0.15), (math.inf, 0.06)),
    CSR: ((8, 0.06), (math.inf, 0.03)),
}
LARGEST_DENSITY = 0.75
"""Share of blocks that are not zero, up to which a kernel skips zeros if the user asks for it."""

# Zeros are in blocks if so much of the blocks that are not zero is not zero.
FILLED = 0.5
_STORED = (16, 4, 1)


def compress(weight: Array, block: int) -> Compressed:
    """Return an array in blocks of ``1 x block``.

    Examples
    --------
    >>> found = compress(np.asarray([[0, 0, 0, 0], [0, 0, 5, 0]]), 2)
    >>> found.values.tolist(), found.segments.tolist(), found.indices.tolist()
    ([5, 0], [0, 0, 1], [1])
    """
    *outer, _ = weight.shape
    blocks = weight.reshape(-1, weight.shape[-1] // block, block)
    occupied = (blocks != 0).any(axis=2)
    segments = np.concatenate([[0], np.cumsum(occupied.sum(axis=1))])
    return Compressed(
        np.ascontiguousarray(blocks[occupied].reshape(-1)),
        _narrow(segments),
        _narrow(np.nonzero(occupied)[1]),
        tuple(outer),
        block,
    )


def kernel_format(weight: Array, rows: int, kind: str, *, always: bool = False) -> str | None:
    """Return the format of a kernel that skips the zeros of weights, or None.

    Parameters
    ----------
    weight : array, shape (output, input)
    rows : int
        Number of inputs that are multiplied at once.
    kind : str
        ``"float32"`` or ``"int8"``.
    always : bool
        Whether to use blocks where such a kernel is unlikely to be faster, too.

    Returns
    -------
    str or None
        ``"1x4"``, ``"1x16"`` or ``"csr"``.

    Examples
    --------
    >>> weight = np.zeros((8, 16)); weight[3, 4:8] = 1
    >>> kernel_format(weight, 1, "float32"), kernel_format(weight + 1, 1, "float32")
    ('1x4', None)
    """
    block, single = BLOCKS[kind], block_density(weight, 1)
    if weight.shape[1] % block == 0:
        density = block_density(weight, block)
        limit = LARGEST_DENSITY if always else largest_density(kind, rows)
        in_blocks = single >= FILLED * density
        if in_blocks and density <= limit:
            return f"1x{block}"
    if kind == "float32" and single <= largest_density(CSR, rows):
        return CSR
    return None


def largest_density(kind: str, rows: int) -> float:
    """Return the share of blocks that are not zero, up to which a kernel can be faster.

    Examples
    --------
    >>> largest_density("float32", 1), largest_density("float32", 64)
    (0.35, 0.15)
    """
    return next(density for limit, density in _WORTH_TRYING[kind] if rows <= limit)


def block_density(weight: Array, block: int) -> float:
    """Return the share of blocks that are not all zero."""
    return float((weight.reshape(-1, block) != 0).any(axis=1).mean()) if weight.size else 1.0


def smallest(weight: Array) -> Compressed | None:
    """Return the smallest compressed form, or None where the dense one is smaller."""
    best = None
    for block in _STORED:
        if weight.shape[-1] % block:
            continue
        density = block_density(weight, block)
        if density * (block * weight.itemsize + 1) < block * weight.itemsize:
            found = compress(weight, block)
            if best is None or found.nbytes < best.nbytes:
                best = found
    return best if best is not None and best.nbytes < 0.95 * weight.nbytes else None


def apply_formats(graph: Graph, formats: dict[int, str]) -> None:
    """Compress the weights of a graph in place.

    ``formats`` gives the kernels by the ``id`` of the operations. Weights of the others are
    packed where that makes the file smaller.
    """
    operations: list[Operation] = []
    for op in graph.operations:
        weight = op.weight
        if weight is None or weight.data is None:
            operations.append(op)
        elif (chosen := formats.get(id(op))) is not None:
            op.inputs[1] = replace(weight, compressed=compress(weight.data, _block(chosen)))
            operations.append(op)
        elif (packed := smallest(weight.data)) is not None:
            if op.kind == "FULLY_CONNECTED" and weight.dtype == np.int8:
                operations.extend(_packed_linear(graph, op, weight, packed))
            else:
                operations.append(_unpacking(op, replace(weight, compressed=packed)))
                operations.append(op)
        else:
            operations.append(op)
    graph.operations = operations


def _unpacking(op: Operation, stored: Tensor) -> Operation:
    """Return the operation that makes compressed weights dense, and let ``op`` read them."""
    dense = Tensor(stored.shape, stored.dtype, quantization=stored.quantization)
    op.inputs[1] = dense
    return Operation("DENSIFY", [stored], dense, source=op.source)


def _packed_linear(
    graph: Graph, op: Operation, weight: Tensor, packed: Compressed
) -> list[Operation]:
    """Return a linear layer as a convolution, whose int8 weights can be packed."""
    x, _, bias = op.inputs
    assert x is not None
    outputs, inputs = weight.shape
    rows = op.output.size // outputs

    def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Operation:
        output = Tensor(shape, tensor.dtype, quantization=tensor.quantization)
        return Operation("RESHAPE", [tensor, graph.constant(np.asarray(shape, np.int32))], output)

    before = reshaped(x, (rows, 1, 1, inputs))
    layer = Operation(
        "CONV_2D",
        [before.output, None, bias],
        Tensor((rows, 1, 1, outputs), op.output.dtype, quantization=op.output.quantization),
        {
            "padding": 1,  # none
            "strideH": 1,
            "strideW": 1,
            "dilationHFactor": 1,
            "dilationWFactor": 1,
            "fusedActivationFunction": op.options.get("fusedActivationFunction", 0),
        },
        op.source,
    )
    shape = (outputs, 1, 1, inputs)
    unpacking = _unpacking(
        layer, replace(weight, shape=shape, compressed=packed._replace(outer=shape[:3]))
    )
    after = reshaped(layer.output, op.output.shape)
    after.output = op.output
    return [unpacking, before, layer, after]


def _block(chosen: str) -> int:
    return 1 if chosen == CSR else int(chosen.removeprefix("1x"))


def _narrow(values: Array) -> Array:
    """Return indices in the smallest type that holds them."""
    largest = int(values.max(initial=0))
    kind = np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32
    return values.astype(kind)
