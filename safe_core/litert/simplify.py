"""Fold batch norm into weights, fuse activations, and drop what nothing reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from .graph import Graph, Operation, Tensor
from .transposes import move_transposes

__all__ = ["simplify"]

Array = np.ndarray[Any, Any]

_FUSED = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_FUSING = {*_WEIGHTED, "ADD", "AVERAGE_POOL_2D", "DIV", "MAX_POOL_2D", "MUL", "SUB"}


def simplify(graph: Graph) -> None:
    """Rewrite a graph in place so that it computes the same with fewer operations."""
    _drop_unread(graph)
    move_transposes(graph)
    _merge_clips(graph)
    _read_means(graph)
    while _fold_constants(graph) or _fold_affine(graph):
        pass
    _fuse_activations(graph)
    _drop_unread(graph)


def _merge_clips(graph: Graph) -> None:
    """Read ``max(x, 0)`` as RELU, and ``min(RELU(x), 6)`` as RELU6."""
    made = graph.producers()
    for op in graph.operations:
        if op.kind == "MAXIMUM" and (x := _clipped(op, 0)) is not None:
            op.kind, op.inputs, op.options = "RELU", [x], {}
        elif op.kind == "MINIMUM" and (x := _clipped(op, 6)) is not None:
            before = made.get(id(x))
            if before is not None and before.kind == "RELU":
                op.kind, op.inputs, op.options = "RELU6", list(before.inputs), {}


def _clipped(op: Operation, bound: float) -> Tensor | None:
    """Return the input of a clip at a number, or None for another operation."""
    first, second = op.inputs
    for x, limit in ((first, second), (second, first)):
        if x is None or limit is None or limit.data is None or x.data is not None:
            continue
        if x.shape == op.output.shape and bool((limit.data == bound).all()):
            return x
    return None


def _read_means(graph: Graph) -> None:
    """Read a sum over n entries, divided by n, as a mean, which exists in int8 too."""
    made = graph.producers()
    for op in list(graph.operations):
        if op.kind not in ("MUL", "DIV") or not (parts := _constant_side(op)):
            continue
        x, constant, swapped = parts
        before = made.get(id(x))
        if before is None or before.kind != "SUM" or not _read_once(graph, x):
            continue
        whole = before.inputs[0]
        assert whole is not None
        share = np.float64(x.size / whole.size)
        exact = constant.size == 1 and np.isclose(_factor(op.kind, constant), share, rtol=1e-6)
        if exact and not (swapped and op.kind == "DIV"):
            before.kind, before.output = "MEAN", op.output
            made[id(op.output)] = before
            graph.operations.remove(op)


def _fold_constants(graph: Graph) -> bool:
    """Join a product with a constant and the product before it, ``c * (d * x)``."""
    made = graph.producers()
    for op in graph.operations:
        if op.kind not in ("MUL", "DIV") or not (parts := _constant_side(op)):
            continue
        x, constant, swapped = parts
        before = made.get(id(x))
        if before is None or before.kind not in ("MUL", "DIV") or not _read_once(graph, x):
            continue
        inner = _constant_side(before)
        if not inner or (swapped and op.kind == "DIV") or (inner[2] and before.kind == "DIV"):
            continue
        factor = _factor(before.kind, inner[1]) * _factor(op.kind, constant)
        graph.operations.remove(before)
        if factor.size == 1 and np.isclose(factor, 1, rtol=1e-7):
            graph.operations.remove(op)
            _redirect(graph, op.output, inner[0])
        else:
            op.kind, op.inputs = "MUL", [inner[0], graph.constant(factor)]
        return True
    return False


def _redirect(graph: Graph, old: Tensor, new: Tensor) -> None:
    """Let all readers of a tensor read another one."""
    for op in graph.operations:
        op.inputs = [new if x is old else x for x in op.inputs]
    graph.outputs = [new if x is old else x for x in graph.outputs]


def _factor(kind: str, constant: Array) -> Array:
    exact = constant.astype(np.float64)
    return 1 / exact if kind == "DIV" else exact


def _constant_side(op: Operation) -> tuple[Tensor, Array, bool] | None:
    """Return the tensor and the constant of a pair, and whether the constant comes first."""
    if len(op.inputs) != 2 or op.output.dtype != np.float32:
        return None
    first, second = op.inputs
    if first is None or second is None:
        return None
    if second.data is not None and first.data is None and first.shape == op.output.shape:
        return first, second.data, False
    if first.data is not None and second.data is None and second.shape == op.output.shape:
        return second, first.data, True
    return None


def _read_once(graph: Graph, tensor: Tensor) -> bool:
    used = sum(x is tensor for op in graph.operations for x in op.inputs)
    return used == 1 and not any(x is tensor for x in graph.outputs)


def _fold_affine(graph: Graph) -> bool:
    """Fold one scale or shift per output into the weights before it; return whether it did."""
    made = graph.producers()
    for op in graph.operations:
        if op.kind not in ("ADD", "DIV", "MUL", "SUB") or not (parts := _constant_side(op)):
            continue
        x, constant, swapped = parts
        layer = made.get(id(x))
        if layer is None or layer.kind not in _WEIGHTED or not _read_once(graph, x):
            continue
        if layer.options.get("fusedActivationFunction"):
            continue
        channels = layer.output.shape[-1]
        if constant.ndim and constant.size not in (1, constant.shape[-1]):
            continue
        if (swapped and op.kind == "DIV") or constant.size not in (1, channels):
            continue
        values = np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,))
        if _fold(graph, layer, op.kind, values, swapped):
            layer.output = op.output
            graph.operations.remove(op)
            return True
    return False


def _fold(graph: Graph, layer: Operation, kind: str, values: Array, swapped: bool) -> bool:
    weight, bias = layer.inputs[1], layer.inputs[2]
    if weight is None or weight.data is None or (bias is not None and bias.data is None):
        return False
    shift = np.zeros(len(values)) if bias is None else bias.data.astype(np.float64)  # type: ignore[union-attr]
    scale = None
    if kind in ("MUL", "DIV"):
        scale = _factor(kind, values)
        shift = shift * scale
    elif kind == "ADD":
        shift = shift + values
    elif swapped:  # c - (w x + b)
        scale, shift = np.full(len(values), -1.0), values - shift
    else:
        shift = shift - values
    if scale is not None:
        outputs_last = layer.kind == "DEPTHWISE_CONV_2D"
        axes = (len(values),) if outputs_last else (-1, *[1] * (weight.data.ndim - 1))
        layer.inputs[1] = graph.constant(weight.data * scale.reshape(axes), weight.name)
    layer.inputs[2] = graph.constant(shift, "" if bias is None else bias.name)
    return True


def _fuse_activations(graph: Graph) -> None:
    made = graph.producers()
    for op in list(graph.operations):
        if op.kind not in _FUSED:
            continue
        x = op.inputs[0]
        before = made.get(id(x))
        if before is None or before.kind not in _FUSING or x is None or x.dtype != np.float32:
            continue
        if before.options.get("fusedActivationFunction") or not _read_once(graph, x):
            continue
        before.options["fusedActivationFunction"] = _FUSED[op.kind]
        before.output = op.output
        made[id(op.output)] = before
        graph.operations.remove(op)


def _drop_unread(graph: Graph) -> None:
    """Drop operations whose outputs nothing reads."""
    needed = {id(x) for x in graph.outputs}
    kept = []
    for op in reversed(graph.operations):
        if id(op.output) in needed:
            needed |= {id(x) for x in op.inputs if x is not None}
            kept.append(op)
    graph.operations = kept[::-1]
