"""Map the roles input, output and batch to the axes of an array.

A torch weight is stored as (output, input, ...) and a Flax kernel as (..., input, output).
The shape alone cannot tell the two apart. Patterns are therefore defined on roles, and a
`Layout` maps the roles to the axes of one array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from array_api_compat import array_namespace, is_array_api_obj

from . import _checks
from ._dtypes import number_like

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Roles of the axes of one array.

    An axis without a role, such as the window of a convolution, is part of the row of every
    output. N:M groups and blocks do not run along it.

    Attributes
    ----------
    input_axes : tuple of int
        Axes that the weight contracts with its input, in storage order. An attention
        projection that takes (heads, head size) has two.
    output_axes : tuple of int
        Axes that index the outputs, in storage order.
    batch_axes : tuple of int
        Axes along which independent weights are stacked, such as scanned layers or experts.
        Every pattern treats each slice as a tensor of its own: its counts, rows, blocks and
        channels are those of the same weights stored apart.

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
"""Layout (output, input, ...), the default for arrays of two or more axes."""

ROW = Layout(input_axes=(0,))
"""Layout of the inputs of one output, the default for vectors."""


def default_layout(ndim: int) -> Layout | None:
    """Return the layout of an array that comes without one; None for a scalar."""
    if ndim == 0:
        return None
    return ROW if ndim == 1 else OUTPUT_INPUT


def resolve(layout: Layout, ndim: int, name: str) -> Layout:
    """Return ``layout`` with non-negative axes, checked against an array of ``ndim`` axes."""
    found, rule = _resolved(layout, ndim)
    if found is None:
        raise ValueError(rule.format(name=name))
    return found


@lru_cache(maxsize=1024)  # a model has many arrays and few layouts
def _resolved(layout: Layout, ndim: int) -> tuple[Layout | None, str]:
    """Return ``layout`` with non-negative axes; or None, and the message of the error."""
    roles: list[tuple[int, ...]] = []
    for role in ("input_axes", "output_axes", "batch_axes"):
        axes = getattr(layout, role)
        if any(not -ndim <= axis < ndim for axis in axes):
            return None, f"{role} of {{name}} must lie in an array of {ndim} axes, got {axes!r}"
        roles.append(tuple(axis % ndim for axis in axes))
        # Reshapes merge the axes of a role, and a reshape follows the storage order.
        if list(roles[-1]) != sorted(roles[-1]):
            return None, f"{role} of {{name}} must be in storage order, got {axes!r}"
    if len(set(sum(roles, ()))) != sum(map(len, roles)):
        rule = f"layout of {{name}} must name each of {ndim} axes once, got {layout!r}"
        return None, rule
    return Layout(*roles), ""


def merge(shape: tuple[int, ...], axes: tuple[int, ...], name: str) -> tuple[tuple[int, ...], int]:
    """Return the shape with adjacent ``axes`` merged into one, and the merged axis."""
    first, last = axes[0], axes[-1]
    if axes != tuple(range(first, last + 1)):
        raise ValueError(f"axes of one role in {name} must be adjacent, got {axes!r}")
    merged = math.prod(shape[first : last + 1])
    return (*shape[:first], merged, *shape[last + 1 :]), first


def rows_first(layout: Layout, ndim: int, *, by_output: bool) -> tuple[int, ...]:
    """Return the permutation that moves batch axes, and optionally output axes, to the front."""
    front = layout.batch_axes + (layout.output_axes if by_output else ())
    return front + tuple(axis for axis in range(ndim) if axis not in front)


def inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation that undoes ``permutation``."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def chosen_layout(name: str, x: Any, given: Any, known: Layout | None) -> Layout | None:
    """Return the layout of one array from the user's ``layout=``, else the known layout.

    ``given`` is a Layout for all arrays, a mapping of names to layouts, or a function of
    name and array.
    """
    if given is None or isinstance(given, Layout):
        return given or known
    found = given.get(name, known) if isinstance(given, Mapping) else given(name, x)
    if found is not None and not isinstance(found, Layout):
        raise TypeError(f"layout of {name} must be a Layout or None, got {_checks.shown(found)}")
    return found


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Return whether ``shape`` is that of a scalar, or broadcasts to ``full`` axis by axis.

    Shapes with fewer axes are refused, unlike in NumPy: broadcasting against the last axis
    would silently put one value per input of a torch weight on the outputs of a Flax kernel.
    """
    same_axes = len(shape) == len(full)
    return not shape or (same_axes and all(n in (1, m) for n, m in zip(shape, full, strict=True)))


def place_importance(importance: Any, x: Any, layout: Layout | None, name: str) -> Any:
    """Return ``importance`` with the axes of ``x``, so that the two broadcast.

    It may be a scalar, an array with the axes of ``x`` (where size 1 broadcasts), or one
    value per input feature, which is moved to the input axes of ``x``.
    """
    xp = array_namespace(x)
    if isinstance(importance, Real):
        return number_like(xp, float(importance), x, f"importance of {name}")
    if not is_array_api_obj(importance) or array_namespace(importance) is not xp:
        raise TypeError(
            f"importance of {name} must be a number or an array of its library {xp.__name__}, "
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
