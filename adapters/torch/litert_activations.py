"""Activations and arithmetic of PyTorch in the operations of LiteRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from safe_core.litert.build import Builder
from safe_core.litert.graph import Tensor, UnsupportedError

from .litert_operations import Arguments, Operation, as_tensor, registering

__all__ = ["ACTIVATIONS"]

ACTIVATIONS: dict[str, Operation] = {}
operation = registering(ACTIVATIONS)

_UNARY = {
    "abs": "ABS",
    "cos": "COS",
    "exp": "EXP",
    "floor": "FLOOR",
    "hardswish": "HARD_SWISH",
    "log": "LOG",
    "neg": "NEG",
    "relu": "RELU",
    "relu6": "RELU6",
    "rsqrt": "RSQRT",
    "sigmoid": "LOGISTIC",
    "sin": "SIN",
    "sqrt": "SQRT",
    "square": "SQUARE",
    "tanh": "TANH",
}
_BINARY = {
    "add": "ADD",
    "div": "DIV",
    "maximum": "MAXIMUM",
    "minimum": "MINIMUM",
    "mul": "MUL",
    "sub": "SUB",
}


@operation(*_UNARY)
def _unary(graph: Builder, a: Arguments) -> Tensor:
    return graph.unary(_UNARY[a.name], as_tensor(graph, a.self))


@operation(*_BINARY)
def _binary(graph: Builder, a: Arguments) -> Tensor:
    if getattr(a, "rounding_mode", None) is not None:
        raise UnsupportedError("a division must not be rounded")
    return _pairs(graph, _BINARY[a.name], a.self, a.other, getattr(a, "alpha", 1))


@operation("rsub")
def _rsub(graph: Builder, a: Arguments) -> Tensor:
    if a.alpha != 1:
        raise UnsupportedError(f"rsub must have no factor, got alpha={a.alpha}")
    return _pairs(graph, "SUB", a.other, a.self, 1)


def _pairs(graph: Builder, kind: str, first: Any, second: Any, factor: float) -> Tensor:
    """Add an operation of ``first`` and ``factor * second``, which get one type."""
    x, y = as_tensor(graph, first), as_tensor(graph, second)
    if x.dtype != y.dtype:  # such as an integer constant among floating-point numbers
        x, y = (_floating(graph, part) for part in (x, y))
    if factor != 1:
        y = graph.binary("MUL", y, np.asarray(factor, y.dtype))
    return graph.binary(kind, x, y)


def _floating(graph: Builder, x: Tensor) -> Tensor:
    if x.dtype == np.float32:
        return x
    if x.data is not None:
        return graph.constant(x.data.astype(np.float32))
    return graph.add("CAST", [x], x.shape, np.float32)


@operation("pow")
def _pow(graph: Builder, a: Arguments) -> Tensor:
    if a.exponent == 2:
        return graph.unary("SQUARE", as_tensor(graph, a.self))
    return graph.binary("POW", as_tensor(graph, a.self), as_tensor(graph, _float(a.exponent)))


def _float(x: Any) -> Any:
    return float(x) if isinstance(x, int) else x


@operation("clamp", "hardtanh", "clamp_min", "clamp_max")
def _clamp(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    low = getattr(a, "min", getattr(a, "min_val", None))
    high = getattr(a, "max", getattr(a, "max_val", None))
    x = x if low is None else graph.binary("MAXIMUM", x, as_tensor(graph, _float(low)))
    return x if high is None else graph.binary("MINIMUM", x, as_tensor(graph, _float(high)))


@operation("gelu")
def _gelu(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    return graph.unary("GELU", x, approximate=a.approximate == "tanh")


@operation("erf")
def _erf(graph: Builder, a: Arguments) -> Tensor:
    return graph.erf(as_tensor(graph, a.self))


@operation("reciprocal")
def _reciprocal(graph: Builder, a: Arguments) -> Tensor:
    return graph.binary("DIV", 1.0, as_tensor(graph, a.self))


@operation("silu")
def _silu(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    return graph.binary("MUL", x, graph.unary("LOGISTIC", x))


@operation("mish")
def _mish(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    return graph.binary("MUL", x, graph.unary("TANH", graph.softplus(x)))


@operation("softplus")
def _softplus(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    found = graph.softplus(x if a.beta == 1 else graph.binary("MUL", x, float(a.beta)))
    return found if a.beta == 1 else graph.binary("DIV", found, float(a.beta))


@operation("hardsigmoid")
def _hardsigmoid(graph: Builder, a: Arguments) -> Tensor:
    shifted = graph.binary("ADD", as_tensor(graph, a.self), 3.0)
    return graph.binary("DIV", graph.unary("RELU6", shifted), 6.0)


@operation("leaky_relu")
def _leaky_relu(graph: Builder, a: Arguments) -> Tensor:
    return graph.unary("LEAKY_RELU", as_tensor(graph, a.self), alpha=float(a.negative_slope))


@operation("elu")
def _elu(graph: Builder, a: Arguments) -> Tensor:
    if (a.alpha, a.scale, a.input_scale) != (1, 1, 1):
        raise UnsupportedError(f"elu must have alpha=1, got {a.alpha}")
    return graph.unary("ELU", as_tensor(graph, a.self))


@operation("prelu")
def _prelu(graph: Builder, a: Arguments) -> Tensor:
    """Return ``max(x, 0) - slope * max(-x, 0)``."""
    x = as_tensor(graph, a.self)
    slope = a.weight
    if torch.is_tensor(slope) and slope.numel() > 1:
        slope = slope.reshape(1, -1, *[1] * (len(x.shape) - 2))
    negative = graph.unary("RELU", graph.unary("NEG", x))
    scaled = graph.binary("MUL", negative, as_tensor(graph, slope))
    return graph.binary("SUB", graph.unary("RELU", x), scaled)


@operation("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(graph: Builder, a: Arguments) -> Tensor:
    found = graph.softmax(as_tensor(graph, a.self), a.dim)
    if "log" not in a.name:
        return found
    x = as_tensor(graph, a.self)
    shifted = graph.binary("SUB", x, graph.reduce("REDUCE_MAX", x, [a.dim], True))
    total = graph.reduce("SUM", graph.unary("EXP", shifted), [a.dim], True)
    return graph.binary("SUB", shifted, graph.unary("LOG", total))
