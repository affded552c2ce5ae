"""Move transposes behind the operations that do not depend on the order of axes.

Front ends of frameworks that put channels first transpose around every convolution. Moved
through what lies between, nearly all of these transposes cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .graph import Graph, Operation, Tensor

__all__ = ["move_transposes"]

Order = tuple[int, ...]

_ENTRYWISE = {
    *("ABS", "CAST", "COS", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOG"),
    *("LOGICAL_NOT", "LOGISTIC", "NEG", "RELU", "RELU6", "RSQRT", "SIGN", "SIN", "SQRT", "SQUARE"),
    *("ADD", "DIV", "MAXIMUM", "MINIMUM", "MUL", "POW", "SELECT_V2", "SUB", "TANH"),
    *("EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "NOT_EQUAL"),
    *("LOGICAL_AND", "LOGICAL_OR"),
}
_REDUCTIONS = ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN")


def move_transposes(graph: Graph) -> None:
    """Move transposes towards the outputs, in place, and leave out those that cancel."""
    _Mover(graph).run()


class _Mover:
    """Rewrite operations in order.

    ``views`` maps the ``id`` of an old tensor to ``(base, order)``: the old tensor is the
    transpose of ``base`` with ``order``.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.views: dict[int, tuple[Tensor, Order]] = {}
        self.made: dict[tuple[int, Order], Tensor] = {}
        self.operations: list[Operation] = []

    def run(self) -> None:
        for op in self.graph.operations:
            self.rewrite(op)
        self.graph.outputs = [self.plain(x) for x in self.graph.outputs]
        self.graph.operations = self.operations

    def rewrite(self, op: Operation) -> None:
        """Add an operation in its new form."""
        handled = False
        if op.kind == "TRANSPOSE":
            base, order = self.view(op.inputs[0])
            self.views[id(op.output)] = base, tuple(order[axis] for axis in _values(op.inputs[1]))
            handled = True
        elif op.kind in _ENTRYWISE:
            handled = self.entrywise(op)
        elif op.kind in _REDUCTIONS:
            handled = self.reduction(op)
        elif op.kind == "CONCATENATION":
            handled = self.concatenation(op)
        elif op.kind in ("PAD", "PADV2"):
            handled = self.padding(op)
        elif op.kind == "RESHAPE":
            handled = self.reshape(op)
        if not handled:
            op.inputs = [x if x is None else self.plain(x) for x in op.inputs]
            self.operations.append(op)

    def view(self, tensor: Tensor | None) -> tuple[Tensor, Order]:
        assert tensor is not None
        return self.views.get(id(tensor), (tensor, tuple(range(len(tensor.shape)))))

    def plain(self, tensor: Tensor) -> Tensor:
        """Return a tensor with its axes in order, transposed if that is left to do."""
        base, order = self.view(tensor)
        return self.transposed(base, order)

    def transposed(self, base: Tensor, order: Order) -> Tensor:
        if order == tuple(range(len(order))):
            return base
        if (id(base), order) not in self.made:
            output = Tensor(tuple(base.shape[a] for a in order), base.dtype)
            axes = self.graph.constant(np.asarray(order, np.int32))
            self.operations.append(Operation("TRANSPOSE", [base, axes], output))
            self.made[id(base), order] = output
        return self.made[id(base), order]

    def emit(
        self, op: Operation, inputs: Sequence[Tensor | None], order: Order, **options: Any
    ) -> bool:
        """Add an operation whose output is the old one before a transpose with ``order``."""
        back = _inverse(order)
        base = Tensor(tuple(op.output.shape[axis] for axis in back), op.output.dtype)
        if order == tuple(range(len(order))):
            base = op.output
        self.operations.append(
            Operation(op.kind, list(inputs), base, {**op.options, **options}, op.source)
        )
        self.views[id(op.output)] = base, order
        return True

    def entrywise(self, op: Operation) -> bool:
        rank = len(op.output.shape)
        orders = [
            self.view(x)[1]
            for x in op.inputs
            if x is not None and x.data is None and len(x.shape) == rank
        ]
        moved = [order for order in orders if order != tuple(range(rank))]
        if not moved:
            return False
        order = moved[0]
        back = _inverse(order)
        inputs: list[Tensor | None] = []
        for x in op.inputs:
            assert x is not None
            if x.data is not None:
                full = x.data.reshape((1,) * (rank - x.data.ndim) + x.data.shape)
                small = x.size == 1
                inputs.append(x if small else self.graph.constant(full.transpose(back), x.name))
            elif len(x.shape) != rank:
                return False
            else:
                base, own = self.view(x)
                inputs.append(self.transposed(base, tuple(own[axis] for axis in back)))
        return self.emit(op, inputs, order)

    def reduction(self, op: Operation) -> bool:
        base, order = self.view(op.inputs[0])
        axes = [order[axis] for axis in _values(op.inputs[1])]
        if order == tuple(range(len(order))):
            return False
        if op.options["keepDims"]:
            left: Order = order
        else:
            rest = [axis for axis in order if axis not in axes]
            left = tuple(sorted(rest).index(axis) for axis in rest)
        return self.emit(op, [base, self.graph.constant(np.sort(np.asarray(axes, np.int32)))], left)

    def concatenation(self, op: Operation) -> bool:
        views = [self.view(x) for x in op.inputs]
        order = views[0][1]
        if order == tuple(range(len(order))) or any(own != order for _, own in views):
            return False
        return self.emit(op, [base for base, _ in views], order, axis=order[op.options["axis"]])

    def padding(self, op: Operation) -> bool:
        base, order = self.view(op.inputs[0])
        widths = op.inputs[1]
        if order == tuple(range(len(order))) or widths is None or widths.data is None:
            return False
        moved = self.graph.constant(widths.data[list(_inverse(order))])
        return self.emit(op, [base, moved, *op.inputs[2:]], order)

    def reshape(self, op: Operation) -> bool:
        """Read the base itself where the transpose moves axes of size 1 only."""
        base, order = self.view(op.inputs[0])
        real = [axis for axis in order if base.shape[axis] != 1]
        if real != sorted(real):
            return False
        return self.emit(op, [base, op.inputs[1]], tuple(range(len(op.output.shape))))


def _inverse(order: Order) -> Order:
    return tuple(order.index(axis) for axis in range(len(order)))


def _values(tensor: Tensor | None) -> list[int]:
    assert tensor is not None
    assert tensor.data is not None
    return [int(n) for n in tensor.data]
