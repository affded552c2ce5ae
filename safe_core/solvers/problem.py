"""Read and check the arguments of the solvers: a layer and the statistics of its inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of

from .. import _checks
from .._dtypes import check_real_floating, wide_dtype, widened
from ..arguments import refuse
from ..layout import Layout, default_layout, merge, place_importance, resolve
from ..patterns import Pattern, as_pattern
from ..projection import Projection, select
from .gram import Gram

__all__ = [
    "Form",
    "finished",
    "live_diagonal",
    "mean_diagonal",
    "read_form",
    "read_matrices",
    "read_pattern",
    "read_squares",
    "rescaled",
    "unit_scaled",
]

_ASYMMETRY = 1e-3  # of the largest diagonal entry: far above rounding, far below a mistake


class Form(NamedTuple):
    """The storage of a layer's weights, and its conversion to a matrix (outputs, inputs)."""

    name: str
    layout: Layout
    shape: tuple[int, ...]
    before: int  # outputs whose axes are stored before the inputs'
    inputs: int
    after: int  # outputs whose axes are stored after the inputs'

    @property
    def outputs(self) -> int:
        return self.before * self.after

    def matrix(self, x: Array) -> Array:
        """Return the matrix (outputs, inputs) of an array."""
        return self.columns(array_namespace(x).reshape(x, (self.before, self.inputs, self.after)))

    def array(self, matrix: Array) -> Array:
        """Return the array that has this matrix."""
        return array_namespace(matrix).reshape(self.stored(matrix), self.shape)

    def stored(self, columns: Array) -> Array:
        """Return columns of a matrix in storage order, (before, columns, after)."""
        xp = array_namespace(columns)
        cube = xp.reshape(columns, (self.before, self.after, columns.shape[1]))
        return xp.permute_dims(cube, (0, 2, 1))

    def columns(self, stored: Array) -> Array:
        """Return the columns (outputs, columns) of an array in storage order."""
        xp = array_namespace(stored)
        return xp.reshape(xp.permute_dims(stored, (0, 2, 1)), (self.outputs, stored.shape[1]))

    def select(self, x: Array, pattern: Pattern, importance: Array | None = None) -> Array:
        """Return the support of an array, given P for each input."""
        if importance is not None:
            importance = place_importance(importance, x, self.layout, self.name)
        return select(
            [x], pattern, importance=[importance], layouts=[self.layout], names=[self.name]
        )[0]


def read_form(weight: Any, layout: Any, name: str = "weight") -> Form:
    """Read the roles and sizes of the axes of a linear layer, each an input or an output."""
    if not is_array_api_obj(weight):
        raise TypeError(f"{name} must be an array, got {type(weight)!r}")
    check_real_floating(array_namespace(weight), weight, name)
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {_checks.shown(layout)}")
    if weight.ndim == 0:
        raise ValueError(f"{name} must have an input axis, got a scalar")
    roles = resolve(layout or default_layout(weight.ndim) or Layout(), weight.ndim, name)
    if not roles.input_axes or len(roles.input_axes + roles.output_axes) != weight.ndim:
        raise ValueError(
            f"layout of {name} must name input_axes, and each of its {weight.ndim} axes an input "
            f"or an output (stacked layers are solved one by one), got {roles!r}"
        )
    sizes, axis = merge(tuple(weight.shape), roles.input_axes, name)
    before, after = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
    return Form(name, roles, tuple(weight.shape), before, sizes[axis], after)


def read_matrices(
    weight: Any, gram: Any, layout: Any, *, name: str = "weight"
) -> tuple[Array, Array, Form]:
    """Return ``W`` (outputs, inputs), ``H`` (inputs, inputs) in one wide dtype, and W's form."""
    form = read_form(weight, layout, name)
    xp = array_namespace(weight)
    matrix = gram.matrix if isinstance(gram, Gram) else gram
    if not is_array_api_obj(matrix) or array_namespace(matrix) is not xp:
        raise TypeError(
            f"gram must be a Gram or an array, of the library of {name} ({xp.__name__}), "
            f"got {type(matrix)!r}"
        )
    check_real_floating(xp, matrix, "gram")
    if tuple(matrix.shape) != (form.inputs, form.inputs):
        raise ValueError(
            f"gram must have shape (inputs, inputs) = {(form.inputs, form.inputs)} for {name} of "
            f"shape {form.shape} with {form.layout!r}, got shape {tuple(matrix.shape)}"
        )
    dtype = wide_dtype(xp, [weight, matrix])
    w, h = (widened(xp, backend_of(x).detached(x), dtype) for x in (form.matrix(weight), matrix))
    _check_values(xp, w, h, name)
    return w, (h + h.mT) / 2, form


def read_squares(weight: Any, statistics: Any, layout: Any) -> tuple[Array, Form]:
    """Return the sum of squares of each input, from a Gram matrix or as given, and W's form."""
    if not is_array_api_obj(statistics) or statistics.ndim != 1:
        _, h, form = read_matrices(weight, statistics, layout)
        return array_namespace(h).linalg.diagonal(h), form
    form = read_form(weight, layout)
    xp = array_namespace(weight)
    if array_namespace(statistics) is not xp:
        raise TypeError(
            f"gram must be an array of {xp.__name__}, as weight, got {type(statistics)!r}"
        )
    check_real_floating(xp, statistics, "gram")
    if tuple(statistics.shape) != (form.inputs,):
        raise ValueError(
            f"gram must have shape (inputs,) = ({form.inputs},) or be a Gram matrix, got shape "
            f"{tuple(statistics.shape)}"
        )
    dtype = wide_dtype(xp, [weight, statistics])
    squares = widened(xp, backend_of(statistics).detached(statistics), dtype)
    if form.inputs:
        peak = xp.max(squares)
        rules = {
            "weight must be finite": (weight, ~xp.isfinite(weight)),
            "gram must be finite": (squares, ~xp.isfinite(squares)),
            "gram must have no negative entry": (squares, squares < 0),
            "gram must have a positive entry, from a layer that has seen inputs": (peak, peak <= 0),
        }
        refuse(list(rules.values()), list(rules))
    return squares, form


def _check_values(xp: Any, w: Array, h: Array, name: str) -> None:
    """Refuse values of no layer or Gram matrix, if values can be read; reads one flag."""
    if 0 in h.shape:
        return
    diagonal = xp.linalg.diagonal(h)
    peak, gap = xp.max(diagonal), h - h.mT
    rules = {
        f"{name} must be finite": (w, ~xp.isfinite(w)),
        "gram must be finite": (h, ~xp.isfinite(h)),
        "gram must have no negative diagonal entry": (diagonal, diagonal < 0),
        "gram must have a positive diagonal entry, from a layer that has seen inputs": (
            peak,
            peak <= 0,
        ),
        "gram must be symmetric, and not differ from its transpose": (
            gap,
            xp.abs(gap) > _ASYMMETRY * peak,
        ),
    }
    refuse(list(rules.values()), list(rules))


def read_pattern(sparsity: Any, solver: Any) -> Pattern:
    """Return the pattern for ``sparsity``, or raise for one that needs several layers."""
    pattern = as_pattern(sparsity)
    if pattern.couples_arrays and not pattern.joint:
        raise ValueError(
            f"sparsity must have no distribution for {type(solver).__name__}, which sees one "
            f"layer, got {pattern!r}"
        )
    return pattern


def unit_scaled(xp: Any, x: Array) -> tuple[Array, Array]:
    """Return x times the power of two that brings its largest entry below 1, and the exponent.

    Squares of the result cannot overflow, whatever the unit of x. `rescaled` undoes it.
    """
    if 0 in x.shape:
        return x, xp.zeros((), dtype=xp.int32)
    exponent = backend_of(x).exponents([x])[0]
    return rescaled(xp, x, -exponent), exponent


def rescaled(xp: Any, x: Array, exponent: Array) -> Array:
    """Return ``x * 2**exponent``."""
    magnitude = backend_of(x).scaled(x, -exponent, dtype=x.dtype)
    return xp.where(x < 0, -magnitude, magnitude)


def finished(form: Form, values: Array, support: Array, weight: Array) -> Projection:
    """Return the pruned layer in the form of the weights; raise if their dtype is too narrow."""
    xp = array_namespace(weight)
    largest = float(xp.finfo(weight.dtype).max)
    rule = f"pruned values of {form.name} must be finite in its dtype {weight.dtype}"
    refuse([(values, ~(xp.abs(values) <= largest))], [rule])
    return Projection(form.array(xp.astype(values, weight.dtype)), form.array(support))


def mean_diagonal(xp: Any, h: Array) -> Array:
    """Return the mean of the non-zero entries of ``diag(H)``."""
    live, diagonal = live_diagonal(xp, h)
    total = xp.sum(xp.where(live, diagonal, xp.zeros_like(diagonal)))
    return total / xp.sum(xp.astype(live, h.dtype))


def live_diagonal(xp: Any, h: Array) -> tuple[Array, Array]:
    """Return which inputs are ever non-zero, and ``diag(H)`` with 1 for the others."""
    diagonal = xp.linalg.diagonal(h)
    live = diagonal > 0
    return live, xp.where(live, diagonal, xp.ones_like(diagonal))
