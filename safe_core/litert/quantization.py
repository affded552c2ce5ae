"""Rewrite a graph in 8-bit integers, with ranges that were measured on samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .graph import Graph, Operation, Quantization, Tensor

__all__ = ["Range", "quantize"]

Array = np.ndarray[Any, Any]
Range = tuple[float, float]

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# These have the scale of their input: they only move or choose numbers, or average few of them.
_SAME_SCALE = {"AVERAGE_POOL_2D", "MAX_POOL_2D", "PAD", "PADV2", "RESHAPE", "TRANSPOSE"}
_RESCALED = {"ADD", "CONCATENATION", "LEAKY_RELU", "MEAN", "RELU", "RELU6"}
_BIAS_BITS = 2**30


def quantize(
    graph: Graph, ranges: Mapping[int, Range], whole: Mapping[int, Any]
) -> tuple[Graph, dict[int, Operation]]:
    """Return a graph that computes layers, their activations and residual sums in int8.

    Inputs and outputs stay float32, and so do all other operations, such as softmax and layer
    norm.

    Parameters
    ----------
    graph : Graph
    ranges : mapping of int to (lowest, highest)
        What a tensor held for the samples, by its ``id``.
    whole : mapping
        The ``id`` of the operations whose weights have one scale instead of one per output.

    Returns
    -------
    Graph
    dict of int to Operation
        The new operations by the ``id`` of the old ones.
    """
    rewriter = _Rewriter(graph, ranges, whole)
    rewriter.run()
    return rewriter.result, rewriter.renewed


class _Rewriter:
    """Rewrite operations in order; a tensor may have a float32 and an int8 form, or both."""

    def __init__(self, graph: Graph, ranges: Mapping[int, Range], whole: Mapping[int, Any]) -> None:
        self.graph, self.ranges, self.whole = graph, ranges, whole
        self.result = Graph(inputs=list(graph.inputs))
        self.floats: dict[int, Tensor] = {id(x): x for x in graph.inputs}
        self.bytes: dict[int, Tensor] = {}
        self.renewed: dict[int, Operation] = {}

    def run(self) -> None:
        for op in self.graph.operations:
            if op.kind in _WEIGHTED and self.fixed(op):
                self.weighted(op)
            elif self.moves_bytes(op):
                self.unweighted(op)
            else:
                self.keep(op)
        self.result.outputs = [self.as_float(x) for x in self.graph.outputs]

    def fixed(self, op: Operation) -> bool:
        """Return whether weights and bias are constants."""
        bias = op.inputs[2]
        return op.weight is not None and (bias is None or bias.data is not None)

    def moves_bytes(self, op: Operation) -> bool:
        """Return whether an operation between layers is done in int8: its inputs are."""
        if op.kind not in _SAME_SCALE | _RESCALED:
            return False
        if op.kind == "MEAN" and len(op.inputs[0].shape) != 4:  # type: ignore[union-attr]
            return False  # that of a layer norm, which needs more digits
        inputs = [x for x in op.inputs if x is not None and x.data is None]
        if op.kind == "ADD" and len(inputs) != 2:
            return False
        return all(id(x) in self.bytes for x in inputs)

    def keep(self, op: Operation) -> None:
        """Add an operation as it is, in float32."""
        inputs = [x if x is None else self.as_float(x) for x in op.inputs]
        self.append(op, inputs, op.output)
        self.floats[id(op.output)] = op.output

    def append(self, op: Operation, inputs: list[Tensor | None], output: Tensor) -> Operation:
        new = Operation(op.kind, inputs, output, dict(op.options), op.source)
        self.result.operations.append(new)
        self.renewed[id(op)] = new
        return new

    def as_float(self, tensor: Tensor) -> Tensor:
        if tensor.data is not None or tensor.dtype != np.float32:
            return tensor
        if id(tensor) not in self.floats:
            output = Tensor(tensor.shape, tensor.dtype)
            source = self.bytes[id(tensor)]
            self.result.operations.append(Operation("DEQUANTIZE", [source], output))
            self.floats[id(tensor)] = output
        return self.floats[id(tensor)]

    def as_bytes(self, tensor: Tensor, wanted: Quantization | None = None) -> Tensor:
        """Return the int8 form of a tensor, with the quantization that an operation wants."""
        found = self.bytes.get(id(tensor))
        if found is None:
            found = self.quantized(self.as_float(tensor), self.measured(tensor))
            self.bytes[id(tensor)] = found
        held = found.quantization
        if wanted is None or held is None or _equal(held, wanted):
            return found
        return self.quantized(found, wanted)

    def quantized(self, tensor: Tensor, quantization: Quantization) -> Tensor:
        output = Tensor(tensor.shape, np.dtype(np.int8), quantization=quantization)
        self.result.operations.append(Operation("QUANTIZE", [tensor], output))
        return output

    def measured(self, tensor: Tensor) -> Quantization:
        """Return scale and zero point of the range of a tensor, so that 0 is exact."""
        low, high = self.ranges[id(tensor)]
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32((high - low) / 255) or np.float32(1)
        zero = int(np.clip(np.round(-128 - low / scale), -128, 127))
        return Quantization(np.asarray([scale], np.float32), zero)

    def weighted(self, op: Operation) -> None:
        weight, bias = op.weight, op.inputs[2]
        x = self.as_bytes(op.inputs[0])  # type: ignore[arg-type]
        assert weight is not None
        assert weight.data is not None
        assert x.quantization is not None
        shift = None if bias is None else bias.data
        axis = 3 if op.kind == "DEPTHWISE_CONV_2D" else 0
        scale = _scales(weight.data, axis, shift, x.quantization.scale, id(op) in self.whole)
        shape = [1] * weight.data.ndim
        shape[axis] = -1
        rounded = np.clip(np.round(weight.data / scale.reshape(shape)), -127, 127).astype(np.int8)
        stored = Tensor(
            weight.shape, rounded.dtype, rounded, weight.name, Quantization(scale, 0, axis)
        )
        steps = scale * x.quantization.scale
        shift = np.zeros(op.output.shape[-1]) if shift is None else shift
        integers = np.clip(np.round(shift / steps), -_BIAS_BITS, _BIAS_BITS).astype(np.int32)
        name = "" if bias is None else bias.name
        added = Tensor(integers.shape, integers.dtype, integers, name, Quantization(steps, 0, 0))
        self.store(op, [x, stored, added], self.measured(op.output))

    def unweighted(self, op: Operation) -> None:
        first = self.as_bytes(op.inputs[0])  # type: ignore[arg-type]
        wanted = first.quantization if op.kind in _SAME_SCALE else self.measured(op.output)
        assert wanted is not None
        inputs: list[Tensor | None] = []
        for x in op.inputs:
            assert x is not None
            if op.kind == "CONCATENATION":
                inputs.append(self.as_bytes(x, wanted))
            elif x.data is None:
                inputs.append(self.as_bytes(x))
            elif x.dtype == np.float32:  # what PADV2 pads with, which the next maximum ignores
                lowest = np.full(x.shape, -128, np.int8)
                inputs.append(Tensor(x.shape, lowest.dtype, lowest, quantization=wanted))
            else:
                inputs.append(x)
        self.store(op, inputs, wanted)

    def store(self, op: Operation, inputs: list[Tensor | None], wanted: Quantization) -> None:
        output = Tensor(op.output.shape, np.dtype(np.int8), name="", quantization=wanted)
        self.append(op, inputs, output)
        self.bytes[id(op.output)] = output


def _scales(weight: Array, axis: int, bias: Array | None, step: Array, whole: bool) -> Array:
    """Return the scale of the weights, or one for each output."""
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=others)
    if whole:
        largest = largest.max(keepdims=True)
    # An output without weights needs a scale for its bias alone.
    least = np.zeros_like(largest)
    if bias is not None:
        least = np.abs(bias) / (float(step[0]) * _BIAS_BITS)
        least = least.max(keepdims=True) if whole else least
    scale = np.maximum(largest / 127, least)
    usual = scale.max(initial=0) or 1.0
    return np.where(scale > 0, scale, usual).astype(np.float32)


def _equal(first: Quantization, second: Quantization) -> bool:
    return first.zero_point == second.zero_point and bool((first.scale == second.scale).all())
