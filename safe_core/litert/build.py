"""Add layers to a graph: what front ends say in one call, and LiteRT in several operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .graph import Graph, Tensor, UnsupportedError

__all__ = ["Builder"]

Pairs = Sequence[tuple[int, int]]

_SAME, _VALID = 0, 1
_P = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


class Builder(Graph):
    """A graph with methods for layers. Images have the axes (batch, height, width, channel)."""

    def unary(self, kind: str, x: Tensor, **options: Any) -> Tensor:
        """Add an operation on every entry."""
        return self.add(kind, [x], x.shape, x.dtype, **options)

    def binary(self, kind: str, x: Any, y: Any, *, dtype: Any = None) -> Tensor:
        """Add an operation on pairs of entries, which broadcasts as NumPy does."""
        first, second = self.tensor(x), self.tensor(y)
        shape = np.broadcast_shapes(first.shape, second.shape)
        return self.add(kind, [first, second], shape, dtype or first.dtype)

    def tensor(self, x: Any) -> Tensor:
        """Return a tensor, or a number or array as a constant."""
        return x if isinstance(x, Tensor) else self.constant(x)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Change the shape."""
        wanted = tuple(int(n) for n in shape)
        if wanted == x.shape:
            return x
        return self.add(
            "RESHAPE", [x, self.constant(np.asarray(wanted, np.int32))], wanted, x.dtype
        )

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Reorder the axes."""
        if list(order) == sorted(order):
            return x
        shape = [x.shape[axis] for axis in order]
        return self.add("TRANSPOSE", [x, self.constant(np.asarray(order))], shape, x.dtype)

    def broadcast(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Repeat entries to reach a shape."""
        if x.shape == tuple(shape):
            return x
        target = self.constant(np.asarray(shape, np.int32))
        return self.add("BROADCAST_TO", [x, target], shape, x.dtype)

    def reduce(self, kind: str, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
        """Reduce axes by ``MEAN``, ``SUM``, ``REDUCE_MAX`` or ``REDUCE_MIN``."""
        found = sorted(axis % len(x.shape) for axis in axes)
        shape = [1 if a in found else n for a, n in enumerate(x.shape) if keep or a not in found]
        return self.add(
            kind, [x, self.constant(np.asarray(found, np.int32))], shape, x.dtype, keepDims=keep
        )

    def concatenate(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Join tensors along an axis."""
        axis %= len(parts[0].shape)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.add("CONCATENATION", parts, shape, parts[0].dtype, axis=axis)

    def slice(
        self, x: Tensor, begin: Sequence[int], end: Sequence[int], strides: Sequence[int]
    ) -> Tensor:
        """Take a range of every axis."""
        shape = [len(range(*each)) for each in zip(begin, end, strides, strict=True)]
        if tuple(shape) == x.shape:
            return x
        limits = [self.constant(np.asarray(each, np.int32)) for each in (begin, end, strides)]
        return self.add("STRIDED_SLICE", [x, *limits], shape, x.dtype)

    def pad(self, x: Tensor, widths: Pairs, value: float = 0.0) -> Tensor:
        """Add entries around a tensor; negative widths remove some."""
        if any(n < 0 for pair in widths for n in pair):
            begin = [max(0, -low) for low, _ in widths]
            end = [n + min(0, high) for n, (_, high) in zip(x.shape, widths, strict=True)]
            x = self.slice(x, begin, end, [1] * len(begin))
            widths = [(max(0, low), max(0, high)) for low, high in widths]
        if not np.any(widths):
            return x
        shape = [n + low + high for n, (low, high) in zip(x.shape, widths, strict=True)]
        inputs = [x, self.constant(np.asarray(widths, np.int32))]
        if value == 0:
            return self.add("PAD", inputs, shape, x.dtype)
        return self.add("PADV2", [*inputs, self.constant(np.float32(value))], shape, x.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Add a linear layer over the last axis, with weights (output, input)."""
        if len(x.shape) == 1:
            found = self.linear(self.reshape(x, (1, *x.shape)), weight, bias)
            return self.reshape(found, found.shape[1:])
        options = {"keepNumDims": len(x.shape) > 2}
        shape = (*x.shape[:-1], weight.shape[0])
        return self.add("FULLY_CONNECTED", [x, weight, bias], shape, **options)

    def matmul(self, x: Tensor, y: Tensor, transposed: bool = False) -> Tensor:
        """Multiply stacks of matrices; ``transposed`` reads the second ones as transposed."""
        columns = y.shape[-2] if transposed else y.shape[-1]
        stacks = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return self.add("BATCH_MATMUL", [x, y], (*stacks, x.shape[-2], columns), adjY=transposed)

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        strides: Sequence[int],
        padding: Pairs,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        """Add a convolution over height and width, with weights (output, height, width, input)."""
        sizes = [(n - 1) * d + 1 for n, d in zip(weight.shape[1:3], dilation, strict=True)]
        x, mode, shape = self._window(x, sizes, strides, padding, 0.0)
        options = {
            "padding": mode,
            "strideH": strides[0],
            "strideW": strides[1],
            "dilationHFactor": dilation[0],
            "dilationWFactor": dilation[1],
        }
        channels, outputs = x.shape[3], weight.shape[0]
        if bias is None:  # not all kernels do without
            bias = self.constant(np.zeros(outputs, np.float32))
        shape = (x.shape[0], *shape, outputs)
        if groups == 1:
            return self.add("CONV_2D", [x, weight, bias], shape, **options)
        if groups != channels or weight.data is None:
            raise UnsupportedError(
                f"a convolution must have 1 group, or one for each of its "
                f"{channels} input channels, got {groups}"
            )
        data = np.ascontiguousarray(weight.data[..., 0].transpose(1, 2, 0)[None])
        options["depthMultiplier"] = outputs // channels
        return self.add(
            "DEPTHWISE_CONV_2D", [x, self.constant(data, weight.name), bias], shape, **options
        )

    def pool(
        self,
        kind: str,
        x: Tensor,
        window: Sequence[int],
        strides: Sequence[int],
        padding: Pairs,
        *,
        count_padding: bool = True,
    ) -> Tensor:
        """Add a pooling layer, ``MAX_POOL_2D`` or ``AVERAGE_POOL_2D``.

        ``count_padding`` averages over entries of the padding too, as zeros.
        """
        average = kind == "AVERAGE_POOL_2D"
        lowest = float(np.finfo(np.float32).min)
        exact = average and count_padding and bool(np.any(padding))
        outer = x
        x, mode, shape = self._window(
            x, window, strides, padding, 0.0 if average else lowest, explicit=exact
        )
        if average and not count_padding and x is not outer:
            raise UnsupportedError(
                f"an average that leaves the padding out must be padded as little "
                f"as its window needs, got {list(padding)}"
            )
        options = {
            "padding": mode,
            "strideH": strides[0],
            "strideW": strides[1],
            "filterHeight": window[0],
            "filterWidth": window[1],
        }
        return self.add(kind, [x], (x.shape[0], *shape, x.shape[3]), **options)

    def _window(
        self,
        x: Tensor,
        sizes: Sequence[int],
        strides: Sequence[int],
        padding: Pairs,
        value: float,
        *,
        explicit: bool = False,
    ) -> tuple[Tensor, int, tuple[int, ...]]:
        """Return the input of a window, padded where needed, the padding mode, and the shape."""
        extents = x.shape[1:3]
        same = []
        for n, size, stride in zip(extents, sizes, strides, strict=True):
            total = max((math.ceil(n / stride) - 1) * stride + size - n, 0)
            same.append((total // 2, total - total // 2))
        if np.any(padding) and [*map(tuple, padding)] == same and not explicit:
            shape = [math.ceil(n / stride) for n, stride in zip(extents, strides, strict=True)]
            return x, _SAME, tuple(shape)
        x = self.pad(x, [(0, 0), *padding, (0, 0)], value)
        counts = [
            (n - size) // stride + 1
            for n, size, stride in zip(x.shape[1:3], sizes, strides, strict=True)
        ]
        return x, _VALID, tuple(counts)

    def layer_norm(self, x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
        """Return x with mean 0 and variance 1 over some axes."""
        centred = self.binary("SUB", x, self.reduce("MEAN", x, axes, True))
        variance = self.reduce("MEAN", self.binary("MUL", centred, centred), axes, True)
        return self.binary("MUL", centred, self.unary("RSQRT", self.binary("ADD", variance, eps)))

    def softmax(self, x: Tensor, axis: int, scale: float = 1.0) -> Tensor:
        """Add a softmax of ``scale * x`` over an axis."""
        last = len(x.shape) - 1
        order = list(range(last + 1))
        order[axis], order[last] = order[last], order[axis]
        found = self.unary("SOFTMAX", self.transpose(x, order), beta=scale)
        return self.transpose(found, order)

    def softplus(self, x: Tensor) -> Tensor:
        """Add ``log(1 + exp(x))``, in a form that does not overflow."""
        small = self.unary("EXP", self.unary("NEG", self.unary("ABS", x)))
        tail = self.unary("LOG", self.binary("ADD", small, 1.0))
        return self.binary("ADD", self.unary("RELU", x), tail)

    def erf(self, x: Tensor) -> Tensor:
        """Add the error function, with an absolute error of 1.5e-7.

        Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
        """
        size = self.unary("ABS", x)
        t = self.binary("DIV", np.float32(1), self.binary("ADD", self.binary("MUL", size, _P), 1.0))
        total = self.binary("MUL", t, _ERF[-1])
        for factor in reversed(_ERF[:-1]):
            total = self.binary("MUL", self.binary("ADD", total, factor), t)
        decay = self.unary("EXP", self.unary("NEG", self.unary("SQUARE", x)))
        found = self.binary("SUB", np.float32(1), self.binary("MUL", total, decay))
        return self.binary("MUL", self.unary("SIGN", x), found)
