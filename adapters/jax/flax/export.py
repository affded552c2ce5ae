"""Export sparse parameters as BCOO matrices, or as files that PyTorch can load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from safe_core._installed import require
from safe_core.layout import Layout, chosen_layout, inverse, resolve

from ..leaves import WITHOUT_KEYS, check_arrays
from ..tree import SparseTree, layout_by_path
from ..weights import is_prunable, known_layouts, name_of

__all__ = ["load_safetensors", "save_safetensors", "to_bcoo", "to_torch_names"]

PyTree = Any
_NAMES = {
    "kernel": "weight",
    "w": "weight",
    "b": "bias",
    "offset": "bias",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_COLLECTIONS = ("params", "batch_stats")


def to_bcoo(params: PyTree, *, where: Any = None) -> PyTree:
    """Return ``params`` with the sparse leaves as `jax.experimental.sparse.BCOO`.

    Parameters
    ----------
    params : pytree
        The result of `finalize`.
    where : callable or pytree of bool, optional
        Selects the leaves to convert, as for `sparse_optimizer`.

    Returns
    -------
    pytree
        The same tree. A converted leaf holds exactly its non-zero entries.

    Examples
    --------
    >>> sparse = to_bcoo({"kernel": jnp.asarray([[0.0, 2.0], [3.0, 0.0]])})
    >>> sparse["kernel"].nse, (jnp.ones(2) @ sparse["kernel"]).tolist()
    (2, [3.0, 2.0])
    """
    tree = SparseTree.read(params, where, None)
    return tree.replaced(tree.leaves(params), [BCOO.fromdense(x) for x in tree.sparse(params)])


def to_torch_names(variables: PyTree, *, layout: Any = None) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of Flax modules with PyTorch's names and axis order.

    ``Dense_0/kernel`` becomes ``Dense_0.weight`` with axes (output, input, window...). Several
    axes of one role, such as the heads of attention, are merged into one. A stack of layers stays
    one array, whose first axes are those of the stack. ``scale`` and
    ``embedding`` become ``weight``; ``mean`` and ``var`` become ``running_mean`` and
    ``running_var``. The names of the collections ``params`` and ``batch_stats`` are dropped.
    A dense layer after a flattened image keeps the input order of Flax, channels last, which
    differs from PyTorch's.

    Parameters
    ----------
    variables : pytree of arrays
        Nested mappings, such as the result of ``model.init`` or its ``params``.
    layout : Layout, mapping of path to Layout, or callable, optional
        Axis roles of kernels, such as from `layouts_of`. They override those inferred, see
        `safe_core.adapters.jax.layout_of`.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        If the axis roles of a kernel are unknown, a convolution is transposed (PyTorch mirrors
        its window), two arrays get the same name, or ``layout`` names an unknown path.

    Examples
    --------
    >>> found = to_torch_names({"params": {"Dense_0": {"kernel": jnp.ones((3, 2))}}})
    >>> {name: x.shape for name, x in found.items()}
    {'Dense_0.weight': (2, 3)}
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    for path, x, axes in _read(variables, layout):
        name = _torch_name(path)
        if name in found:
            raise ValueError(f"variables must get different names, got two arrays named {name!r}")
        moved = np.asarray(x).transpose(axes.order).reshape(axes.shape)
        # Not `ascontiguousarray`, which would add an axis to a scalar.
        found[name] = np.asarray(moved, order="C")
    return found


def save_safetensors(variables: PyTree, path: str | Path, *, layout: Any = None) -> None:
    """Write the result of `to_torch_names` to a file, by the package safetensors.

    In PyTorch, ``model.load_state_dict(safetensors.torch.load_file(path))`` reads it if the
    modules of the model have the same names.

    Parameters
    ----------
    variables : pytree of arrays
    path : str or Path
    layout : optional
        As for `to_torch_names`.

    Raises
    ------
    ValueError
        As for `to_torch_names`.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    >>> save_safetensors(params, path)
    >>> load_safetensors(path, like=params)["Dense_0"]["kernel"].shape
    (3, 2)
    """
    require("save_safetensors", "safetensors", extra="jax")
    from safetensors.numpy import save_file

    save_file(to_torch_names(variables, layout=layout), path)


def load_safetensors(path: str | Path, like: PyTree, *, layout: Any = None) -> PyTree:
    """Read a file from `save_safetensors`, or from a PyTorch model with the same names.

    Parameters
    ----------
    path : str or Path
    like : pytree of arrays
        Variables with the structure, shapes and dtypes of the result.
    layout : optional
        As for `to_torch_names`.

    Returns
    -------
    pytree of arrays

    Raises
    ------
    ValueError
        If an array is missing or of another shape. The message names it.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2))}}
    >>> save_safetensors(params, path)
    >>> load_safetensors(path, like=params)["Dense_0"]["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    require("load_safetensors", "safetensors", extra="jax")
    from safetensors.numpy import load_file

    held = load_file(path)
    leaves = []
    for name, x, axes in _read(like, layout):
        key = _torch_name(name)
        if key not in held or held[key].shape != axes.shape:
            given = f"shape {held[key].shape}" if key in held else "none"
            raise ValueError(f"the file must hold {key!r} of shape {axes.shape}, got {given}")
        unmerged = tuple(x.shape[axis] for axis in axes.order)
        whole = held[key].reshape(unmerged).transpose(inverse(axes.order))
        leaves.append(jnp.asarray(whole, dtype=x.dtype))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


class _Axes(NamedTuple):
    """Torch's axis order, and its shape, in which axes of one role are merged."""

    order: tuple[int, ...]
    shape: tuple[int, ...]


def _read(variables: PyTree, layout: Any) -> list[tuple[str, Any, _Axes]]:
    """Return path, array and torch's axes of every leaf."""
    paths = jax.tree_util.tree_leaves_with_path(variables)
    named = [(name_of(path), x) for path, x in paths]
    check_arrays("variables", named, WITHOUT_KEYS)
    given = layout_by_path(layout, [name for name, _ in named], "variables")
    known = known_layouts(named, [None] * len(named))
    layouts = {
        name: _kernel_layout(name, x, chosen_layout(name, x, given, own))
        for (name, x), own in zip(named, known, strict=True)
        if is_prunable(name, x)
    }
    return [(name, x, _axes(name, x, layouts)) for name, x in named]


def _kernel_layout(path: str, x: Any, known: Layout | None) -> Layout:
    """Return the layout of a kernel that torch can hold; raise for others."""
    transposed = any(word in path.lower() for word in ("transpose", "deconv"))
    if known is None and not transposed:
        raise ValueError(
            f"layout of {path} must be known, whose shape is {tuple(x.shape)}: pass layout="
            f"{{{path!r}: safe_core.Layout(...)}}, or that of layouts_of(model, inputs), got None"
        )
    layout = resolve(known or Layout(), x.ndim, path)
    window = x.ndim > sum(map(len, (layout.input_axes, layout.output_axes, layout.batch_axes)))
    if transposed or (window and layout.output_axes < layout.input_axes):
        raise ValueError(f"{path} must not be of a transposed convolution, got shape {x.shape}")
    return layout


def _torch_name(path: str) -> str:
    keys = path.split("/")
    keys = keys[1:] if keys[0] in _COLLECTIONS and len(keys) > 1 else keys
    return ".".join([*keys[:-1], _NAMES.get(keys[-1], keys[-1])])


def _axes(path: str, x: Any, layouts: Mapping[str, Layout]) -> _Axes:
    """Return the axes of one array from the layouts of all kernels."""
    axes = tuple(range(x.ndim))
    if path not in layouts:
        layout = layouts.get(f"{path.removesuffix('bias')}kernel")
        if layout is None or not path.endswith("bias") or len(layout.output_axes) == 1:
            return _Axes(axes, tuple(x.shape))
        stack = x.shape[: len(layout.batch_axes)]
        return _Axes(axes, (*stack, math.prod(x.shape[len(stack) :])))
    layout = layouts[path]
    stack, *roles = layout.batch_axes, layout.output_axes, layout.input_axes
    window = tuple(axis for axis in axes if axis not in sum(roles, stack))
    merged = [math.prod(x.shape[axis] for axis in role) for role in roles]
    lengths = tuple(x.shape[axis] for axis in stack), tuple(x.shape[axis] for axis in window)
    return _Axes((*sum(roles, stack), *window), (*lengths[0], *merged, *lengths[1]))
