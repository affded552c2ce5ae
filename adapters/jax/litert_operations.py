"""The operations of JAX that a LiteRT file can express, and how.

Every function takes a `Builder`, the operands, and the parameters of the primitive. Operands are
tensors of the graph or constant arrays. `shape` is the shape of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from safe_core.litert.build import Builder
from safe_core.litert.graph import Tensor, UnsupportedError, stored_type

__all__ = ["ENTRYWISE", "OPERATIONS", "Call", "as_tensor"]

Array = np.ndarray[Any, Any]
Operand = Tensor | Array


class Call(NamedTuple):
    """One application of a primitive.

    Attributes
    ----------
    operands : list of Tensor or array
    shape : tuple of int
    dtype : numpy.dtype
    params : dict
    """

    operands: list[Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    params: dict[str, Any]

    @property
    def x(self) -> Any:
        """Return the first operand."""
        return self.operands[0]


Rule = Callable[[Builder, Call], Any]
OPERATIONS: dict[str, Rule] = {}


def primitive(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for primitives of JAX."""

    def register(function: Rule) -> Rule:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def as_tensor(graph: Builder, x: Operand) -> Tensor:
    """Return a constant array as a tensor of the graph."""
    return x if isinstance(x, Tensor) else graph.constant(np.asarray(x))


# Entry by entry; constants and results may be smaller than JAX says, where they would broadcast.

_UNARY = {
    "abs": "ABS",
    "cos": "COS",
    "exp": "EXP",
    "floor": "FLOOR",
    "log": "LOG",
    "logistic": "LOGISTIC",
    "neg": "NEG",
    "not": "LOGICAL_NOT",
    "rsqrt": "RSQRT",
    "sign": "SIGN",
    "sin": "SIN",
    "sqrt": "SQRT",
    "square": "SQUARE",
    "tanh": "TANH",
}
_BINARY = {
    "add": "ADD",
    "add_any": "ADD",
    "div": "DIV",
    "max": "MAXIMUM",
    "min": "MINIMUM",
    "mul": "MUL",
    "pow": "POW",
    "sub": "SUB",
}
_COMPARISONS = {
    "eq": "EQUAL",
    "ge": "GREATER_EQUAL",
    "gt": "GREATER",
    "le": "LESS_EQUAL",
    "lt": "LESS",
    "ne": "NOT_EQUAL",
    "and": "LOGICAL_AND",
    "or": "LOGICAL_OR",
}


def _unary(kind: str) -> Rule:
    return lambda graph, call: graph.unary(kind, call.x)


def _binary(kind: str, dtype: Any = None) -> Rule:
    return lambda graph, call: graph.binary(kind, *call.operands[:2], dtype=dtype)


OPERATIONS.update({name: _unary(kind) for name, kind in _UNARY.items()})
OPERATIONS.update({name: _binary(kind) for name, kind in _BINARY.items()})
OPERATIONS.update({name: _binary(kind, np.bool_) for name, kind in _COMPARISONS.items()})


@primitive("copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint")
def _identity(graph: Builder, call: Call) -> Any:
    return call.x


@primitive("max")
def _maximum(graph: Builder, call: Call) -> Any:
    for x, bound in (call.operands, call.operands[::-1]):
        if not isinstance(bound, Tensor) and np.all(np.asarray(bound) == -np.inf):
            return x  # JAX guards the maximum of an empty softmax
    return graph.binary("MAXIMUM", *call.operands)


@primitive("convert_element_type")
def _convert(graph: Builder, call: Call) -> Any:
    wanted = stored_type(call.dtype)
    if call.x.dtype == wanted:
        return call.x
    return graph.add("CAST", [call.x], call.x.shape, wanted)


@primitive("integer_pow")
def _integer_pow(graph: Builder, call: Call) -> Tensor:
    power = call.params["y"]
    if power == 2:
        return graph.unary("SQUARE", call.x)
    if power == 3:
        return graph.binary("MUL", call.x, graph.unary("SQUARE", call.x))
    return graph.binary("POW", call.x, np.float32(power))


@primitive("log1p")
def _log1p(graph: Builder, call: Call) -> Tensor:
    return graph.unary("LOG", graph.binary("ADD", call.x, np.float32(1)))


@primitive("expm1")
def _expm1(graph: Builder, call: Call) -> Tensor:
    return graph.binary("SUB", graph.unary("EXP", call.x), np.float32(1))


@primitive("erf")
def _erf(graph: Builder, call: Call) -> Tensor:
    return graph.erf(call.x)


@primitive("erfc")
def _erfc(graph: Builder, call: Call) -> Tensor:
    return graph.binary("SUB", np.float32(1), graph.erf(call.x))


@primitive("select_n")
def _select(graph: Builder, call: Call) -> Tensor:
    if len(call.operands) != 3:
        raise UnsupportedError("select_n must have two cases")
    which, false, true = (as_tensor(graph, x) for x in call.operands)
    shape = np.broadcast_shapes(which.shape, false.shape, true.shape)
    return graph.add("SELECT_V2", [which, true, false], shape, true.dtype)


@primitive("clamp")
def _clamp(graph: Builder, call: Call) -> Tensor:
    low, x, high = call.operands
    return graph.binary("MINIMUM", graph.binary("MAXIMUM", x, low), high)


ENTRYWISE = frozenset(OPERATIONS)
"""Primitives whose operands may be smaller than JAX says, where they would broadcast."""

# Shapes


@primitive("broadcast_in_dim")
def _broadcast(graph: Builder, call: Call) -> Tensor:
    """Add axes of size 1; who reads the result broadcasts it."""
    shape = [1] * len(call.shape)
    for axis, size in zip(call.params["broadcast_dimensions"], call.x.shape, strict=True):
        shape[axis] = size
    return graph.reshape(call.x, shape)


@primitive("reshape", "squeeze", "expand_dims")
def _reshape(graph: Builder, call: Call) -> Tensor:
    return graph.reshape(call.x, call.shape)


@primitive("transpose")
def _transpose(graph: Builder, call: Call) -> Tensor:
    return graph.transpose(call.x, call.params["permutation"])


@primitive("concatenate")
def _concatenate(graph: Builder, call: Call) -> Tensor:
    parts = [as_tensor(graph, x) for x in call.operands]
    return graph.concatenate(parts, call.params["dimension"])


@primitive("stack")
def _stacked(graph: Builder, call: Call) -> Tensor:
    axis = call.params["axis"]
    shape = [1 if a == axis else n for a, n in enumerate(call.shape)]
    parts = [graph.reshape(as_tensor(graph, x), shape) for x in call.operands]
    return graph.concatenate(parts, axis)


@primitive("slice")
def _slice(graph: Builder, call: Call) -> Tensor:
    begin, end = call.params["start_indices"], call.params["limit_indices"]
    return graph.slice(call.x, begin, end, call.params["strides"] or [1] * len(begin))


@primitive("split")
def _split(graph: Builder, call: Call) -> list[Tensor]:
    axis, start, found = call.params["axis"], 0, []
    for size in call.params["sizes"]:
        begin, end = [0] * len(call.x.shape), list(call.x.shape)
        begin[axis], end[axis] = start, start + size
        found.append(graph.slice(call.x, begin, end, [1] * len(begin)))
        start += size
    return found


@primitive("pad")
def _pad(graph: Builder, call: Call) -> Tensor:
    x, value = call.operands
    config = call.params["padding_config"]
    if isinstance(value, Tensor) or not isinstance(x, Tensor) or any(i for _, _, i in config):
        raise UnsupportedError("padding must be constant and outside of the array")
    return graph.pad(x, [(low, high) for low, high, _ in config], float(value))


@primitive("gather")
def _gather(graph: Builder, call: Call) -> Tensor:
    table, index = (as_tensor(graph, x) for x in call.operands)
    numbers, rest = call.params["dimension_numbers"], table.shape[1:]
    rows = len(index.shape) - 1
    simple = (
        tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == tuple(range(rows, rows + len(rest)))
        and tuple(call.params["slice_sizes"]) == (1, *rest)
    )
    if not simple:
        raise UnsupportedError("gather must take whole rows of a table")
    index = graph.reshape(index, index.shape[:-1])
    return graph.add("GATHER", [table, index], (*index.shape, *rest), table.dtype, axis=0)


# Reductions

_REDUCTIONS = {"reduce_max": "REDUCE_MAX", "reduce_min": "REDUCE_MIN", "reduce_sum": "SUM"}


def _reduction(kind: str) -> Rule:
    return lambda graph, call: graph.reduce(kind, call.x, call.params["axes"], False)


OPERATIONS.update({name: _reduction(kind) for name, kind in _REDUCTIONS.items()})


@primitive("argmax")
def _argmax(graph: Builder, call: Call) -> Tensor:
    (axis,) = call.params["axes"]
    inputs = [call.x, graph.constant(np.int32(axis))]
    return graph.add("ARG_MAX", inputs, call.shape, np.int32, outputType=2)  # int32


def _pooling(kind: str) -> Rule:
    def rule(graph: Builder, call: Call) -> Tensor:
        params = call.params
        window, padding = params["window_dimensions"], params["padding"]
        dilated = any(n != 1 for n in (*params["base_dilation"], *params["window_dilation"]))
        if len(window) not in (3, 4) or (window[0], window[-1]) != (1, 1) or dilated:
            raise UnsupportedError(
                f"pooling must be over the axes between batch and channel, got {window}"
            )
        x, strides = call.x, params["window_strides"]
        if len(window) == 3:
            x = graph.reshape(x, (x.shape[0], 1, *x.shape[1:]))
            window, strides = (1, *window), (1, *strides)
            padding = ((0, 0), *padding)
        found = graph.pool(kind, x, window[1:3], strides[1:3], padding[1:3])
        if kind == "AVERAGE_POOL_2D":
            found = graph.binary("MUL", found, np.float32(math.prod(window)))
        return graph.reshape(found, call.shape)

    return rule


OPERATIONS["reduce_window_max"] = _pooling("MAX_POOL_2D")
OPERATIONS["reduce_window_sum"] = _pooling("AVERAGE_POOL_2D")


# Layers


@primitive("dot_general")
def _dot(graph: Builder, call: Call) -> Tensor:
    x, y = call.operands
    (over_x, over_y), (batch_x, batch_y) = call.params["dimension_numbers"]
    free_x = [a for a in range(len(x.shape)) if a not in (*over_x, *batch_x)]
    free_y = [a for a in range(len(y.shape)) if a not in (*over_y, *batch_y)]
    if not batch_x and not isinstance(y, Tensor):
        found = _layer(graph, x, free_x, over_x, y, free_y, over_y)
        return graph.reshape(found, call.shape)
    if not batch_x and not isinstance(x, Tensor):
        found = _layer(graph, y, free_y, over_y, x, free_x, over_x)
        shape = [y.shape[a] for a in free_y] + [x.shape[a] for a in free_x]
        order = [*range(len(free_y), len(shape)), *range(len(free_y))]
        return graph.transpose(graph.reshape(found, shape), order)
    first = _stack(graph, x, batch_x, free_x, over_x)
    second = _stack(graph, y, batch_y, free_y, over_y)
    return graph.reshape(graph.matmul(first, second, transposed=True), call.shape)


def _layer(
    graph: Builder,
    x: Tensor,
    free: Sequence[int],
    over: Sequence[int],
    weight: Array,
    outputs: Sequence[int],
    inputs: Sequence[int],
) -> Tensor:
    """Return the product with constant weights; the last axis holds all outputs."""
    held = np.asarray(weight).transpose(*outputs, *inputs)
    matrix = held.reshape(math.prod(held.shape[: len(outputs)]), -1)
    flat = graph.transpose(x, [*free, *over])
    flat = graph.reshape(flat, (*(x.shape[a] for a in free), matrix.shape[1]))
    return graph.linear(flat, graph.constant(matrix))


def _stack(
    graph: Builder, x: Operand, batch: Sequence[int], free: Sequence[int], over: Sequence[int]
) -> Tensor:
    tensor = as_tensor(graph, x)
    shape = [math.prod(tensor.shape[a] for a in axes) for axes in (batch, free, over)]
    return graph.reshape(graph.transpose(tensor, [*batch, *free, *over]), shape)


@primitive("conv_general_dilated")
def _convolution(graph: Builder, call: Call) -> Tensor:
    x, weight = call.operands
    params = call.params
    numbers = params["dimension_numbers"]
    rank = len(x.shape) - 2
    constant = not isinstance(weight, Tensor)
    if rank not in (1, 2) or not constant or any(n != 1 for n in params["lhs_dilation"]):
        raise UnsupportedError(
            "a convolution must be over one or two axes, not transposed, and have constant "
            f"weights, got {'constant' if constant else 'computed'} weights of shape {weight.shape}"
        )
    image, kernel, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    x = graph.transpose(x, [image[0], *image[2:], image[1]])
    held = np.asarray(weight).transpose(kernel[0], *kernel[2:], kernel[1])
    strides, padding = list(params["window_strides"]), list(params["padding"])
    dilation = list(params["rhs_dilation"])
    if rank == 1:
        x = graph.reshape(x, (x.shape[0], 1, *x.shape[1:]))
        held = held[:, None]
        strides, dilation, padding = [1, *strides], [1, *dilation], [(0, 0), *padding]
    found = graph.convolution(
        x,
        graph.constant(held),
        strides=strides,
        padding=[(int(low), int(high)) for low, high in padding],
        dilation=dilation,
        groups=params["feature_group_count"],
    )
    if rank == 1:
        found = graph.reshape(found, (found.shape[0], *found.shape[2:]))
    order = [0] * (rank + 2)
    for place, axis in zip(result, (0, rank + 1, *range(1, rank + 1)), strict=True):
        order[place] = axis
    return graph.transpose(found, order)
