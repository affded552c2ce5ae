"""Infer the roles of a kernel's axes from the shapes of the arrays beside it.

A shape does not tell a stack of layers from attention heads or from a convolution window. The
bias of the layer does in most cases: it has the stack's axes and the output axes of its kernel.
Every reading of a kernel that its bias allows is listed here. If all of them agree, the roles
are known; else they are not. The name of a module can rule readings out or cast doubt on one,
but never picks one of several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, combinations

from safe_core.layout import Layout

__all__ = ["Evidence", "infer_layout", "stack_axes"]

Shape = tuple[int, ...]

_ATTENTION = ("query", "key", "value", "out")
_INTO_HEADS = Layout(input_axes=(0,), output_axes=(1, 2))
_FROM_HEADS = Layout(input_axes=(0, 1), output_axes=(2,))
_INPUT_OUTPUT = Layout(input_axes=(-2,), output_axes=(-1,))
_OUTPUT_INPUT = Layout(input_axes=(-1,), output_axes=(-2,))


class Evidence:
    """Shapes of all leaves of a model, by path."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self._vectors: dict[str, set[int]] | None = None

    def beside(self, path: str, *names: str) -> Shape | None:
        """Return the shape of the first of ``names`` in the module of the leaf at ``path``."""
        module = path.rpartition("/")[0]
        found = (self.shapes.get(f"{module}/{name}" if module else name) for name in names)
        return next((shape for shape in found if shape is not None), None)

    def vectors_around(self, path: str) -> set[int]:
        """Return the lengths of the vectors in the modules beside the module of a leaf."""
        if self._vectors is None:
            self._vectors = {}
            for other, shape in self.shapes.items():
                # Haiku's norms have further axes, of length 1.
                if shape and math.prod(shape) == max(shape):
                    self._vectors.setdefault(_parent(other), set()).add(max(shape))
        return self._vectors.get(_parent(path), set())


def infer_layout(path: str, evidence: Evidence) -> Layout | None:
    """Return the axis roles of a kernel of Flax or Haiku, or None if several are possible."""
    keys, shape = path.split("/"), evidence.shapes[path]
    module = keys[-2].lower() if len(keys) > 1 else ""
    haiku = keys[-1] != "kernel"
    bias = evidence.beside(path, "b" if haiku else "bias")
    if not haiku and module in _ATTENTION and len(shape) == 3:
        known, layout = _in_attention(keys, evidence)
        if known:
            return layout
    transposed = "transpose" in module or "deconv" in module
    convolution = "conv" in module
    if "einsum" in module and (bias is None or len(shape) > 2):
        return None
    if bias is not None and math.prod(bias) > 1:
        orders = "swapped" if haiku and transposed else "both" if transposed else "plain first"
        return _by_bias(shape, bias, convolution, "both" if "einsum" in module else orders)
    if len(shape) == 2:
        return _INPUT_OUTPUT
    if not (convolution and _is_single(path, shape, evidence)):
        return None
    if transposed:  # in Flax an option swaps the axes of the kernel
        return _OUTPUT_INPUT if haiku else None
    return _INPUT_OUTPUT


def stack_axes(
    shape: Shape, single: Shape, bias: Shape | None = None, single_bias: Shape | None = None
) -> Shape | None:
    """Return the axes along which weights of shape ``single`` are stacked.

    The biases decide if several positions fit. Return None if no position or several are left.
    """
    count = len(shape) - len(single)
    if count == 0:
        return ()
    found = []
    for axes in combinations(range(len(shape)), max(count, 0)):
        if tuple(n for axis, n in enumerate(shape) if axis not in axes) == single:
            found.append(axes)
    if len(found) > 1 and bias is not None and single_bias is not None and count == 1:
        found = [
            (axis,)
            for (axis,) in found
            if bias in _inserted(single_bias, shape[axis], axis, len(shape))
        ]
    return found[0] if len(found) == 1 else None


def _is_single(path: str, shape: Shape, evidence: Evidence) -> bool:
    """Return whether a convolution without bias is certainly no stack of smaller ones.

    A transform that stacks the module around it would stack the vectors beside it too, such as
    the scale of a norm. Only a transform of this convolution alone would not; along the first
    axis, it would have to make a stack as long as the window is wide.
    """
    window = shape[:-2]
    vectors = evidence.vectors_around(path) - {shape[0]}
    return len(set(window)) == 1 and bool(vectors & set(shape[-2:]))


def _by_bias(shape: Shape, bias: Shape, convolution: bool, orders: str) -> Layout | None:
    """Return the only layout for which the bias has the shape given; None if there are several."""
    vector = (math.prod(bias),)
    # Haiku's biases may have axes of length 1 for the window.
    given = {bias, vector} if max(bias) == vector[0] else {bias}
    plain = {layout for layout, own in _readings(shape, convolution) if own in given}
    swapped = {layout for layout, own in _swapped(shape, convolution) if own in given}
    found = {"plain first": plain or swapped, "swapped": swapped, "both": plain | swapped}[orders]
    if len(found) != 1:
        return None
    (layout,) = found
    last = len(shape) - 1
    if layout == Layout((last - 1,), (last,)):
        return _INPUT_OUTPUT
    if layout == Layout((last,), (last - 1,)):
        return _OUTPUT_INPUT
    # An einsum can look like a stack along an inner axis, but not like one along the first.
    return layout if _leading(layout.batch_axes) == len(layout.batch_axes) else None


def _readings(shape: Shape, convolution: bool) -> Iterator[tuple[Layout, Shape]]:
    """Yield every way to read a kernel as (..., inputs, outputs), and the bias that it implies."""
    for stack, axes in _stacks(len(shape)):
        layers = [Layout(axes[-2:-1], axes[-1:], stack)]
        if not convolution:
            splits = range(1, len(axes)) if len(axes) > 2 else ()
            layers += [Layout(axes[:k], axes[k:], stack) for k in splits]
        yield from chain.from_iterable(_with_bias(shape, layer) for layer in layers)


def _swapped(shape: Shape, convolution: bool) -> Iterator[tuple[Layout, Shape]]:
    """Yield the same for (..., outputs, inputs).

    A transposed convolution can store its kernel so, stacked or not, and an einsum its matrix.
    """
    for stack, axes in _stacks(len(shape)):
        if convolution or len(shape) == 2:
            yield from _with_bias(shape, Layout(axes[-1:], axes[-2:-1], stack))


def _with_bias(shape: Shape, layout: Layout) -> Iterable[tuple[Layout, Shape]]:
    """Return the layout with each shape that a bias stacked along the same axes can have."""
    outputs = tuple(shape[axis] for axis in layout.output_axes)
    lead = _leading(layout.batch_axes)
    found = {outputs}
    for axis in layout.batch_axes[lead:]:  # at most one
        found = _inserted(outputs, shape[axis], axis - lead, len(shape) - lead)
    return [(layout, (*shape[:lead], *bias)) for bias in found]


def _leading(stack: Shape) -> int:
    """Return how many axes of a stack are the first ones of the array."""
    return next((i for i, axis in enumerate(stack) if i != axis), len(stack))


def _inserted(bias: Shape, length: int, axis: int, ndim: int) -> set[Shape]:
    """Return the shapes of a bias stacked like a kernel of ``ndim`` axes along ``axis``.

    A transform counts the position of its axis from the start or from the end.
    """
    places = {axis, axis - ndim + len(bias) + 1}
    return {(*bias[:place], length, *bias[place:]) for place in places if 0 <= place <= len(bias)}


def _stacks(ndim: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield the axes along which layers may be stacked, and the axes that are left for a layer.

    They are the first axes, as many as leave a matrix, and at most one other.
    """
    for lead in range(ndim - 1):
        first = tuple(range(lead))
        inner = range(lead, ndim) if lead < ndim - 2 else ()
        # The axis right after the first ones extends them, so a larger `lead` covers it.
        for stack in (first, *((*first, axis) for axis in inner if axis > lead)):
            yield stack, tuple(axis for axis in range(ndim) if axis not in stack)


def _in_attention(keys: list[str], evidence: Evidence) -> tuple[bool, Layout | None]:
    """Return whether a kernel is one of Flax's attention, and its layout if that is certain.

    The kernels of attention are (inputs, heads, size), three times, and (heads, size, outputs),
    where the four agree on heads and size. Four stacks of matrices can only agree by chance,
    and then share the length of one axis.
    """
    parent = keys[:-2]
    shapes = [evidence.shapes.get("/".join([*parent, name, "kernel"])) for name in _ATTENTION]
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return False, None
    *into, out = [shape for shape in shapes if shape is not None]
    heads = out[:2]
    paths = ["/".join([*parent, name, "kernel"]) for name in _ATTENTION]
    *biases, last = [evidence.beside(path, "bias") for path in paths]
    fits = all(shape[1:] == heads for shape in into) and last in (None, out[2:])
    if not fits or any(bias not in (None, heads) for bias in biases):
        return False, None
    stacked = any(len({shape[axis] for shape in (*into, out)}) == 1 for axis in range(3))
    if last is None and stacked:
        return True, None
    return True, _FROM_HEADS if keys[-2] == "out" else _INTO_HEADS


def _parent(path: str) -> str:
    """Return the module around the module of a leaf; lists of modules count as no module."""
    module = path.split("/")[:-1]
    while module and module[-1].isdigit():
        module.pop()
    return "/".join(module[:-1])
