"""Which axis of an array plays which role.

A torch weight is (output, input, ...), a Flax kernel (..., input, output), and
neither can be told from the shape alone. Patterns therefore speak of roles, and a
`Layout` maps roles to the axes of one array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from array_api_compat import array_namespace, is_array_api_obj

from . import _checks
from ._dtypes import wide_dtype

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Roles of the axes of one array.

    Axes that are named in no role, such as the window of a convolution, belong to
    every output's row but are no direction for N:M groups or blocks.

    Attributes
    ----------
    input_axes : tuple of int
        Axes that the weight contracts with its input, in storage order. Several for an
        attention projection that takes (heads, head size).
    output_axes : tuple of int
        Axes that index the outputs, in storage order.
    batch_axes : tuple of int
        Axes along which independent weights are stacked: scanned layers, experts. Each
        slice is a tensor of its own.

    Negative axes count from the end, so ``Layout((-2,), (-1,))`` fits every Flax
    ``Dense`` and ``Conv`` kernel.

    Raises
    ------
    TypeError, ValueError
        If an axis is not an integer or is named twice.

    Examples
    --------
    >>> Layout(input_axes=(1,), output_axes=(0,))  # torch.nn.Linear
    Layout(input_axes=(1,), output_axes=(0,), batch_axes=())
    """

    input_axes: tuple[int, ...] = ()
    output_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named: list[int] = []
        for role in ("input_axes", "output_axes", "batch_axes"):
            given = getattr(self, role)
            axes = tuple(given) if isinstance(given, (tuple, list)) else (None,)
            if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in axes):
                raise TypeError(f"{role} must be a tuple of integers, got {given!r}")
            object.__setattr__(self, role, axes)
            named += axes
        if len(set(named)) != len(named):
            raise ValueError(f"each axis may be named once, got {self!r}")


OUTPUT_INPUT = Layout(input_axes=(1,), output_axes=(0,))
"""(output, input, ...): what bare arrays of two or more axes are taken for."""

ROW = Layout(input_axes=(0,))
"""What a bare vector is taken for: the inputs of one output."""


def default_layout(ndim: int) -> Layout | None:
    """The layout of a bare array: (output, input, ...), or one row."""
    if ndim == 0:
        return None
    return ROW if ndim == 1 else OUTPUT_INPUT


def resolve(layout: Layout, ndim: int, name: str) -> Layout:
    """Return ``layout`` with non-negative axes, checked against an array of ``ndim`` axes."""

    def resolved(role: str) -> tuple[int, ...]:
        axes = getattr(layout, role)
        if any(not -ndim <= axis < ndim for axis in axes):
            raise ValueError(f"{role} of {name} must lie in an array of {ndim} axes, got {axes!r}")
        positive = tuple(axis % ndim for axis in axes)
        if list(positive) != sorted(positive):
            raise ValueError(f"{role} of {name} must be in storage order, got {axes!r}")
        return positive

    roles = resolved("input_axes"), resolved("output_axes"), resolved("batch_axes")
    if len(set(sum(roles, ()))) != sum(map(len, roles)):
        raise ValueError(f"layout of {name} must name each of {ndim} axes once, got {layout!r}")
    return Layout(*roles)


def merge(shape: tuple[int, ...], axes: tuple[int, ...], name: str) -> tuple[tuple[int, ...], int]:
    """Merge adjacent ``axes`` into one: the new shape and the place of the merged axis."""
    first, last = axes[0], axes[-1]
    if axes != tuple(range(first, last + 1)):
        raise ValueError(f"axes of one role in {name} must be adjacent, got {axes!r}")
    merged = math.prod(shape[first : last + 1])
    return (*shape[:first], merged, *shape[last + 1 :]), first


def rows_first(layout: Layout, ndim: int, *, by_output: bool) -> tuple[int, ...]:
    """The permutation that brings batch (and output) axes to the front, others in order."""
    front = layout.batch_axes + (layout.output_axes if by_output else ())
    return front + tuple(axis for axis in range(ndim) if axis not in front)


def inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes ``permutation``."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def chosen_layout(name: str, x: Any, given: Any, known: Layout | None) -> Layout | None:
    """What a user's ``layout=`` says of one array, or else what is known of it."""
    if given is None or isinstance(given, Layout):
        return given or known
    found = given.get(name, known) if isinstance(given, Mapping) else given(name, x)
    if found is not None and not isinstance(found, Layout):
        raise TypeError(f"layout of {name} must be a Layout or None, got {_checks.shown(found)}")
    return found


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether an array of ``shape`` is a scalar or broadcasts axis by axis."""
    same_axes = len(shape) == len(full)
    return not shape or (same_axes and all(n in (1, m) for n, m in zip(shape, full, strict=True)))


def place_importance(importance: Any, x: Any, layout: Layout | None, name: str) -> Any:
    """Give ``importance`` the axes of ``x``, so that the two broadcast.

    Accepted are a scalar, an array with the axes of ``x`` (size 1 broadcasts), and one
    value per input feature, which goes to the input axes wherever they are stored.
    """
    xp = array_namespace(x)
    if isinstance(importance, Real):
        return xp.asarray(float(importance), dtype=wide_dtype(xp, [x]))
    if not is_array_api_obj(importance) or array_namespace(importance) is not xp:
        raise TypeError(
            f"importance of {name} must be a number or, as the array itself, of {xp.__name__}, "
            f"got {type(importance)!r}"
        )
    if xp.isdtype(importance.dtype, "complex floating"):
        raise TypeError(f"importance of {name} must be real, got dtype {importance.dtype}")
    shape = tuple(importance.shape)
    if broadcasts(shape, x.shape):
        return importance
    if len(shape) != x.ndim and layout is not None and layout.input_axes:
        axes = resolve(layout, x.ndim, name).input_axes
        inputs = tuple(x.shape[axis] for axis in axes)
        if shape in (inputs, (math.prod(inputs),)):
            return xp.reshape(
                importance, tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
            )
    features = "unknown" if layout is None else f"on axes {layout.input_axes}"
    raise ValueError(
        f"importance of {name} must be a scalar, broadcast to shape {tuple(x.shape)} axis by axis, "
        f"or hold one value per input feature ({features}), got shape {shape}"
    )
