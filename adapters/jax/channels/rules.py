"""Follow channels through the primitives of JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..traced_program import Operation, Program
from .reshapes import RESHAPED, reshaped
from .sets import ANY, STAYS, ChannelSets, Labels, constant

__all__ = ["Axis", "Followed", "follow"]

_REDUCED = "a sum or another reduction over channels reads them, as in LayerNorm or softmax"
_GROUPED = "a convolution in groups reads or writes them"
_WINDOW = "a window of a convolution or of pooling covers them"
_ADDED = "a value that depends on the inputs is added to all of them, or selects among values"
_SLICED = "a slice or padding fixes positions along their axis"

_ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos",
    "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "optimization_barrier", "or", "pow", "real", "reduce_precision", "rem", "round",
    "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor",
))  # fmt: skip


class Axis(NamedTuple):
    """An axis of a numbered value of a program."""

    value: int
    axis: int


class Followed(NamedTuple):
    """Hold what is known of the channels of a program.

    Attributes
    ----------
    labels : dict of int to list of Labels
        By value, for each axis.
    writes : list of Axis
        Output axes of kernels, which are computed from the parameters alone.
    reads : list of pairs of Axis
        Axes of two operands over which a product sums.
    """

    program: Program
    sets: ChannelSets
    labels: dict[int, list[Labels]]
    parametric: set[int]
    writes: list[Axis]
    reads: list[tuple[Axis, Axis]]

    def shape(self, value: int) -> tuple[int, ...]:
        """Return the shape of a value."""
        return self.program.shapes[value]

    def keep_all(self, values: Sequence[int], reason: str) -> None:
        """Let all channels of some values stay."""
        for value in values:
            for labels in self.labels[value]:
                self.sets.keep(labels, reason)

    def stays(self, value: int) -> list[Labels]:
        """Return the labels of a value of which all positions must stay."""
        return [constant(STAYS, size) for size in self.shape(value)]


Rule = Callable[[Followed, Operation], list[Labels]]
_RULES: dict[str, Rule] = {}


def _primitive(*names: str) -> Callable[[Rule], Rule]:
    """Register the function that labels the results of primitives."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def follow(program: Program, sets: ChannelSets, parameters: dict[int, list[Labels]]) -> Followed:
    """Return the channels of all values of a program, from those of its parameters."""
    found = Followed(program, sets, dict(parameters), set(parameters), [], [])
    for value, array in program.constants.items():
        found.labels[value] = [constant(STAYS, size) for size in np.shape(array)]
        found.parametric.add(value)
    for value in program.inputs:
        found.labels.setdefault(value, found.stays(value))
    for operation in program.operations:
        _step(found, operation)
    found.keep_all(program.outputs, "they are outputs of the network")
    return found


def _step(found: Followed, operation: Operation) -> None:
    name = operation.primitive.name
    if found.parametric.issuperset(operation.operands):
        found.parametric.update(operation.results)
    rule = _elementwise if name in _ELEMENTWISE else _RULES.get(name)
    if rule is None or len(operation.results) > 1:
        found.keep_all(operation.operands, f"the operation {name} reads them")
        found.labels.update({value: found.stays(value) for value in operation.results})
    else:
        found.labels[operation.results[0]] = rule(found, operation)


def _elementwise(found: Followed, operation: Operation) -> list[Labels]:
    shape = found.shape(operation.results[0])
    labels = [constant(ANY, size) for size in shape]
    for value in operation.operands:
        for axis, own in enumerate(found.labels[value]):
            # JAX repeats an operand along its axes of size 1.
            if len(own) == shape[axis]:
                labels[axis] = found.sets.join(labels[axis], own)
    for value in _added(found, operation):
        for axis in _repeated(found, value, shape):
            found.sets.keep(labels[axis], _ADDED)
    return labels


def _added(found: Followed, operation: Operation) -> list[int]:
    """Return the operands that depend on the inputs and can make a zero something else."""
    operands = list(operation.operands)
    if operation.primitive.name in ("mul", "and"):
        return []
    if operation.primitive.name in ("div", "rem"):
        operands = operands[:1]
    return [value for value in operands if value not in found.parametric]


def _repeated(found: Followed, value: int, shape: Sequence[int]) -> list[int]:
    """Return the axes along which an operand has the same value for all channels."""
    labels = found.labels[value]
    return [
        axis
        for axis, size in enumerate(shape)
        if axis >= len(labels) or len(labels[axis]) != size or (labels[axis] == ANY).all()
    ]


@_primitive("broadcast_in_dim")
def _broadcast(found: Followed, operation: Operation) -> list[Labels]:
    labels = [constant(ANY, size) for size in found.shape(operation.results[0])]
    places = operation.params["broadcast_dimensions"]
    for own, axis in zip(found.labels[operation.operands[0]], places, strict=True):
        if len(own) == len(labels[axis]):
            labels[axis] = own
    return labels


@_primitive("transpose")
def _transpose(found: Followed, operation: Operation) -> list[Labels]:
    labels = found.labels[operation.operands[0]]
    return [labels[axis] for axis in operation.params["permutation"]]


@_primitive("rev")
def _reversed(found: Followed, operation: Operation) -> list[Labels]:
    turned = operation.params["dimensions"]
    labels = found.labels[operation.operands[0]]
    return [own[::-1] if axis in turned else own for axis, own in enumerate(labels)]


@_primitive("squeeze")
def _squeeze(found: Followed, operation: Operation) -> list[Labels]:
    gone = operation.params["dimensions"]
    labels = found.labels[operation.operands[0]]
    return [own for axis, own in enumerate(labels) if axis not in gone]


@_primitive("concatenate")
def _concatenate(found: Followed, operation: Operation) -> list[Labels]:
    place = operation.params["dimension"]
    labels = [found.labels[value] for value in operation.operands]
    joined = list(labels[0])
    for other in labels[1:]:
        for axis, own in enumerate(other):
            if axis != place:
                joined[axis] = found.sets.join(joined[axis], own)
    joined[place] = np.concatenate([own[place] for own in labels])
    return joined


@_primitive("slice", "dynamic_slice")
def _slice(found: Followed, operation: Operation) -> list[Labels]:
    """Channels of an axis that is cut stay, because the positions may be fixed numbers."""
    shape = found.shape(operation.results[0])
    labels = found.labels[operation.operands[0]]
    whole = [len(own) == size for own, size in zip(labels, shape, strict=True)]
    return _whole(found, operation, whole, _SLICED)


@_primitive("pad")
def _pad(found: Followed, operation: Operation) -> list[Labels]:
    added = operation.params["padding_config"]
    return _whole(found, operation, [tuple(each) == (0, 0, 0) for each in added], _SLICED)


def _whole(
    found: Followed, operation: Operation, whole: Sequence[bool], reason: str
) -> list[Labels]:
    """Return the labels of axes of which nothing changes; channels of others stay."""
    labels = found.stays(operation.results[0])
    for axis, own in enumerate(found.labels[operation.operands[0]]):
        if whole[axis]:
            labels[axis] = own
        else:
            found.sets.keep(own, reason)
    return labels


@_primitive(
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("argmax", "argmin"),
)
def _reduce(found: Followed, operation: Operation) -> list[Labels]:
    gone = operation.params["axes"]
    labels = found.labels[operation.operands[0]]
    for axis in gone:
        found.sets.keep(labels[axis], _REDUCED)
    return [own for axis, own in enumerate(labels) if axis not in gone]


@_primitive("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _pool(found: Followed, operation: Operation) -> list[Labels]:
    params = operation.params
    keys = "window_dimensions", "window_strides", "base_dilation", "window_dilation"
    settings = zip(*(params[key] for key in keys), params["padding"], strict=True)
    whole = [(*each[:4], *each[4]) == (1, 1, 1, 1, 0, 0) for each in settings]
    return _whole(found, operation, whole, _WINDOW)


@_primitive("dot_general")
def _product(found: Followed, operation: Operation) -> list[Labels]:
    summed, batch = operation.params["dimension_numbers"]
    left, right = operation.operands
    a, b = found.labels[left], found.labels[right]
    for i, j in zip(*summed, strict=True):
        _read(found, Axis(left, i), Axis(right, j))
    labels = [found.sets.join(a[i], b[j]) for i, j in zip(*batch, strict=True)]
    for value, own, side in ((left, a, 0), (right, b, 1)):
        used = (*summed[side], *batch[side])
        free = [axis for axis in range(len(own)) if axis not in used]
        _write(found, operation, value, free)
        labels += [own[axis] for axis in free]
    return labels


@_primitive("conv_general_dilated")
def _convolution(found: Followed, operation: Operation) -> list[Labels]:
    params = operation.params
    numbers = params["dimension_numbers"]
    inputs, kernels, outputs = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    x, kernel = operation.operands
    a, b = found.labels[x], found.labels[kernel]
    labels = found.stays(operation.results[0])
    for own in (*(a[axis] for axis in inputs[2:]), *(b[axis] for axis in kernels[2:])):
        found.sets.keep(own, _WINDOW)
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        found.keep_all(operation.operands, _GROUPED)
        _write(found, operation, kernel, [kernels[0]])
        return labels
    _read(found, Axis(x, inputs[1]), Axis(kernel, kernels[1]))
    _write(found, operation, kernel, [kernels[0]])
    _write(found, operation, x, [inputs[0]])
    labels[outputs[0]], labels[outputs[1]] = a[inputs[0]], b[kernels[0]]
    return labels


def _read(found: Followed, a: Axis, b: Axis) -> None:
    """Join two axes over which a product sums."""
    found.sets.join(found.labels[a.value][a.axis], found.labels[b.value][b.axis])
    found.reads.append((a, b))


def _write(found: Followed, operation: Operation, value: int, axes: Sequence[int]) -> None:
    """Note that a kernel writes channels, unless it is a part of a kernel."""
    if value in found.parametric and not found.parametric.issuperset(operation.operands):
        found.writes.extend(Axis(value, axis) for axis in axes)


@_primitive("reshape")
def _reshape(found: Followed, operation: Operation) -> list[Labels]:
    shape = found.shape(operation.results[0])
    if operation.params.get("dimensions") is not None:
        found.keep_all(operation.operands, RESHAPED)
        return found.stays(operation.results[0])
    return reshaped(found.sets, found.labels[operation.operands[0]], shape)
