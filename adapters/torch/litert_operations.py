"""The operations of PyTorch that a LiteRT file can express, and how.

Every function takes a `Builder`, and the arguments of the operation by their names in PyTorch.
Arguments are tensors of the graph, constants of PyTorch, or plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from safe_core.litert.build import Builder
from safe_core.litert.graph import Tensor, UnsupportedError

__all__ = ["OPERATIONS", "Arguments", "Operation", "as_tensor", "registering"]

Arguments = SimpleNamespace
Operation = Callable[[Builder, Arguments], Any]

OPERATIONS: dict[str, Operation] = {}
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels of images


def registering(table: dict[str, Operation]) -> Callable[..., Callable[[Operation], Operation]]:
    """Return a decorator that puts a function into a table, under names of PyTorch."""

    def named(*names: str) -> Callable[[Operation], Operation]:
        def register(function: Operation) -> Operation:
            table.update(dict.fromkeys(names, function))
            return function

        return register

    return named


operation = registering(OPERATIONS)


def as_tensor(graph: Builder, x: Any, name: str = "") -> Tensor:
    """Return a constant of PyTorch, or a number, as a tensor of the graph."""
    if isinstance(x, Tensor):
        return x
    if torch.is_tensor(x):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
        return graph.constant(x.numpy(), name)
    return graph.constant(x, name)


def _optional(graph: Builder, x: Any) -> Tensor | None:
    return None if x is None else as_tensor(graph, x)


# Layers


@operation("linear")
def _linear(graph: Builder, a: Arguments) -> Tensor:
    return _product(graph, a.input, a.weight, a.bias)


@operation("addmm")
def _addmm(graph: Builder, a: Arguments) -> Tensor:
    if (a.alpha, a.beta) != (1, 1) or not torch.is_tensor(a.mat2):
        raise UnsupportedError("addmm must have constant weights and no factors")
    found = _product(graph, a.mat1, a.mat2.T, None)
    return graph.binary("ADD", found, as_tensor(graph, a.self))


@operation("matmul", "mm", "bmm")
def _matmul(graph: Builder, a: Arguments) -> Tensor:
    first, second = a.self, a.mat2 if hasattr(a, "mat2") else a.other
    if torch.is_tensor(second) and second.ndim == 2:
        return _product(graph, first, second.T, None)
    x, y = as_tensor(graph, first), as_tensor(graph, second)
    if len(x.shape) < 2 or len(y.shape) < 2:
        raise UnsupportedError("a product of two results must be one of matrices")
    return graph.matmul(x, y)


def _product(graph: Builder, x: Any, weight: Any, bias: Any) -> Tensor:
    """Return ``x @ weight.T + bias``."""
    if isinstance(weight, Tensor):  # computed from the input
        found = graph.matmul(as_tensor(graph, x), weight, transposed=True)
        return found if bias is None else graph.binary("ADD", found, as_tensor(graph, bias))
    return graph.linear(as_tensor(graph, x), as_tensor(graph, weight), _optional(graph, bias))


@operation("conv2d", "conv1d", "convolution")
def _convolution(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.input)
    rank = len(a.weight.shape) - 2
    if getattr(a, "transposed", False) or rank not in (1, 2) or len(x.shape) != rank + 2:
        raise UnsupportedError(
            f"a convolution must be over one or two axes of a batch, and not "
            f"transposed, got weights of shape {tuple(a.weight.shape)}"
        )
    if not torch.is_tensor(a.weight):
        raise UnsupportedError("weights of a convolution must be constant")
    strides, dilation = _pair(a.stride, rank), _pair(a.dilation, rank)
    window = a.weight.shape[2:]
    if a.padding == "same":
        totals = [d * (n - 1) for d, n in zip(dilation[-rank:], window, strict=True)]
        padding = [(n // 2, n - n // 2) for n in totals]
    else:
        sizes = [0] * rank if a.padding == "valid" else _pair(a.padding, rank)[-rank:]
        padding = [(n, n) for n in sizes]
    weight = a.weight
    if rank == 1:
        x, weight = graph.reshape(x, (*x.shape[:2], 1, x.shape[2])), weight[:, :, None]
        padding = [(0, 0), *padding]
    found = graph.convolution(
        graph.transpose(x, _LAST),
        as_tensor(graph, weight.permute(0, 2, 3, 1)),
        _optional(graph, a.bias),
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=a.groups,
    )
    found = graph.transpose(found, _FIRST)
    return graph.reshape(found, (*found.shape[:2], found.shape[3])) if rank == 1 else found


def _pair(value: Any, rank: int = 2) -> tuple[int, int]:
    """Return one number for height and width each; that of a single axis is the second."""
    values = [value] if isinstance(value, int) else list(value)
    if rank == 1:
        return 1, values[0]
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


@operation("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(graph: Builder, a: Arguments) -> Any:
    if getattr(a, "training", False) or a.running_mean is None:
        raise UnsupportedError("a batch norm must use running statistics, not those of the batch")
    mean, var = a.running_mean.double(), a.running_var.double()
    scale = (var + a.eps).rsqrt()
    scale = scale if a.weight is None else scale * a.weight.double()
    shift = -mean * scale if a.bias is None else a.bias.double() - mean * scale
    x = as_tensor(graph, a.input)
    shape = (1, -1, *[1] * (len(x.shape) - 2))
    found = graph.binary("MUL", x, as_tensor(graph, scale.reshape(shape)))
    found = graph.binary("ADD", found, as_tensor(graph, shift.reshape(shape)))
    return found if a.name == "batch_norm" else (found, None, None)


@operation("layer_norm")
def _layer_norm(graph: Builder, a: Arguments) -> Tensor:
    axes = range(-len(a.normalized_shape), 0)
    found = graph.layer_norm(as_tensor(graph, a.input), list(axes), a.eps)
    return _affine(graph, found, a.weight, a.bias)


@operation("rms_norm")
def _rms_norm(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.input)
    squares = graph.reduce(
        "MEAN", graph.binary("MUL", x, x), range(-len(a.normalized_shape), 0), True
    )
    eps = torch.finfo(torch.float32).eps if a.eps is None else a.eps
    found = graph.binary("MUL", x, graph.unary("RSQRT", graph.binary("ADD", squares, eps)))
    return _affine(graph, found, a.weight, None)


@operation("group_norm")
def _group_norm(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.input)
    groups = graph.reshape(x, (x.shape[0], a.num_groups, x.size // (x.shape[0] * a.num_groups)))
    found = graph.reshape(graph.layer_norm(groups, [-1], a.eps), x.shape)
    shape = (1, -1, *[1] * (len(x.shape) - 2))
    weight, bias = (None if p is None else p.reshape(shape) for p in (a.weight, a.bias))
    return _affine(graph, found, weight, bias)


def _affine(graph: Builder, x: Tensor, weight: Any, bias: Any) -> Tensor:
    x = x if weight is None else graph.binary("MUL", x, as_tensor(graph, weight))
    return x if bias is None else graph.binary("ADD", x, as_tensor(graph, bias))


@operation("embedding")
def _embedding(graph: Builder, a: Arguments) -> Tensor:
    table, index = as_tensor(graph, a.weight), as_tensor(graph, a.indices)
    shape = (*index.shape, *table.shape[1:])
    return graph.add("GATHER", [table, index], shape, table.dtype, axis=0)


@operation("scaled_dot_product_attention")
def _attention(graph: Builder, a: Arguments) -> Tensor:
    query, key, value = (as_tensor(graph, x) for x in (a.query, a.key, a.value))
    scale = 1 / math.sqrt(query.shape[-1]) if a.scale is None else a.scale
    scores = graph.matmul(graph.binary("MUL", query, scale), key, transposed=True)
    mask = a.attn_mask
    if a.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if torch.is_tensor(mask):
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, float(np.finfo(np.float32).min))
        scores = graph.binary("ADD", scores, as_tensor(graph, mask))
    elif mask is not None or a.dropout_p or a.enable_gqa:
        raise UnsupportedError(
            "attention must have a constant mask, no dropout and no shared heads"
        )
    return graph.matmul(graph.softmax(scores, -1), value)


# Pooling


@operation("max_pool2d")
def _max_pool(graph: Builder, a: Arguments) -> Tensor:
    if _pair(a.dilation) != (1, 1):
        raise UnsupportedError(f"pooling must have no dilation, got {a.dilation}")
    return _pool(graph, "MAX_POOL_2D", a, True)


@operation("avg_pool2d")
def _average_pool(graph: Builder, a: Arguments) -> Tensor:
    if a.divisor_override is not None:
        raise UnsupportedError("pooling must have no divisor of its own")
    return _pool(graph, "AVERAGE_POOL_2D", a, a.count_include_pad)


def _pool(graph: Builder, kind: str, a: Arguments, count_padding: bool) -> Tensor:
    x = graph.transpose(as_tensor(graph, a.self), _LAST)
    window = _pair(a.kernel_size)
    strides = _pair(a.stride) if a.stride else window
    padding = [(n, n) for n in _pair(a.padding)]
    sizes = zip(x.shape[1:3], window, strides, padding, strict=True)
    if a.ceil_mode and any((n + 2 * p[0] - k) % s for n, k, s, p in sizes):
        raise UnsupportedError("pooling must have ceil_mode=False")
    found = graph.pool(kind, x, window, strides, padding, count_padding=count_padding)
    return graph.transpose(found, _FIRST)


@operation("adaptive_avg_pool2d")
def _adaptive_pool(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    sizes = [n if m is None else m for n, m in zip(x.shape[2:], a.output_size, strict=True)]
    if sizes == [1, 1]:
        return graph.reduce("MEAN", x, (2, 3), True)
    if any(n % m for n, m in zip(x.shape[2:], sizes, strict=True)):
        raise UnsupportedError(
            f"the output of adaptive pooling must divide its input, got "
            f"{tuple(sizes)} of {x.shape[2:]}"
        )
    window = [n // m for n, m in zip(x.shape[2:], sizes, strict=True)]
    found = graph.pool("AVERAGE_POOL_2D", graph.transpose(x, _LAST), window, window, [(0, 0)] * 2)
    return graph.transpose(found, _FIRST)


@operation("mean", "sum", "amax", "amin")
def _reduce(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    axes = getattr(a, "dim", None)
    axes = [axes] if isinstance(axes, int) else axes or range(len(x.shape))
    kind = {"amax": "REDUCE_MAX", "amin": "REDUCE_MIN"}.get(a.name, a.name.upper())
    return graph.reduce(kind, x, axes, getattr(a, "keepdim", False))


@operation("argmax")
def _argmax(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    if a.dim is None:
        x, a.dim = graph.reshape(x, (x.size,)), 0
    axis = a.dim % len(x.shape)
    shape = [n for i, n in enumerate(x.shape) if i != axis]
    options = {"outputType": 2}  # int32
    found = graph.add("ARG_MAX", [x, graph.constant(np.int32(axis))], shape, np.int32, **options)
    return graph.reshape(found, [*shape[:axis], 1, *shape[axis:]]) if a.keepdim else found


# Shapes


@operation("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
def _reshape(graph: Builder, a: Arguments) -> Tensor:
    return graph.reshape(as_tensor(graph, a.self), a.shape)


@operation("transpose", "permute", "t", "swapaxes", "movedim")
def _transpose(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    moved = torch.empty(0, device="meta").as_strided(x.shape, tuple(range(len(x.shape))))
    order = a.target(moved, *a.rest[0], **a.rest[1]).stride()
    return graph.transpose(x, order)


@operation(
    "contiguous",
    "clone",
    "dropout",
    "dropout_",
    "detach",
    "alias",
    "lift_fresh_copy",
    "feature_dropout",
    "alpha_dropout",
)
def _identity(graph: Builder, a: Arguments) -> Any:
    if getattr(a, "train", False):
        raise UnsupportedError("dropout must be off")
    return a.self if hasattr(a, "self") else a.input


@operation("to", "_to_copy", "type_as")
def _cast(graph: Builder, a: Arguments) -> Any:
    x = as_tensor(graph, a.self)
    if a.dtype_out.is_floating_point and x.dtype == np.float32:
        return x
    return graph.add(
        "CAST", [x], x.shape, np.float32 if a.dtype_out.is_floating_point else np.int32
    )


@operation("expand", "broadcast_to", "expand_as")
def _expand(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    x = graph.reshape(x, (*[1] * (len(a.shape) - len(x.shape)), *x.shape))
    return graph.broadcast(x, a.shape)


@operation("cat", "concatenate", "concat")
def _cat(graph: Builder, a: Arguments) -> Tensor:
    return graph.concatenate([as_tensor(graph, x) for x in a.tensors], a.dim)


@operation("stack")
def _stack(graph: Builder, a: Arguments) -> Tensor:
    axis = a.dim % len(a.shape)
    parts = [as_tensor(graph, x) for x in a.tensors]
    shape = [*a.shape[:axis], 1, *a.shape[axis + 1 :]]
    return graph.concatenate([graph.reshape(x, shape) for x in parts], axis)


@operation("select")
def _select(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    axis, index = a.dim % len(x.shape), a.index % x.shape[a.dim]
    return graph.reshape(_range(graph, x, axis, index, index + 1), a.shape)


@operation("unbind")
def _unbind(graph: Builder, a: Arguments) -> list[Tensor]:
    x = as_tensor(graph, a.self)
    axis = a.dim % len(x.shape)
    parts = [_range(graph, x, axis, i, i + 1) for i in range(x.shape[axis])]
    return [graph.reshape(part, shape) for part, shape in zip(parts, a.shape, strict=True)]


@operation("slice")
def _slice(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    start, end, _ = slice(a.start, a.end).indices(x.shape[a.dim])
    return _range(graph, x, a.dim % len(x.shape), start, end, a.step)


@operation("split", "split_with_sizes", "chunk")
def _split(graph: Builder, a: Arguments) -> list[Tensor]:
    x = as_tensor(graph, a.self)
    axis = a.dim % len(x.shape)
    found, start = [], 0
    for shape in a.shape:
        found.append(_range(graph, x, axis, start, start + shape[axis]))
        start += shape[axis]
    return found


def _range(graph: Builder, x: Tensor, axis: int, start: int, end: int, step: int = 1) -> Tensor:
    begin, stop, strides = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
    begin[axis], stop[axis], strides[axis] = start, end, step
    return graph.slice(x, begin, stop, strides)


@operation("pad", "constant_pad_nd")
def _pad(graph: Builder, a: Arguments) -> Tensor:
    x = as_tensor(graph, a.self)
    if getattr(a, "mode", "constant") != "constant":
        raise UnsupportedError(f"padding must be constant, got {a.mode!r}")
    pairs: Sequence[int] = a.pad
    widths = [(0, 0)] * len(x.shape)
    for i in range(len(pairs) // 2):
        widths[-1 - i] = pairs[2 * i], pairs[2 * i + 1]
    return graph.pad(x, widths, a.value or 0.0)
