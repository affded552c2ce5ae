"""Export sparse parameters as BCOO matrices, or as files that PyTorch can load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from safe_core.layout import Layout, chosen_layout, inverse, resolve

from ..leaves import check_arrays
from ..tree import SparseTree, check_layout_paths
from ..weights import is_prunable, layout_of, name_of

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
_INTO_HEADS = (["query"], ["key"], ["value"])
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
    axes of one role, such as the heads of attention, are merged into one. ``scale`` and
    ``embedding`` become ``weight``; ``mean`` and ``var`` become ``running_mean`` and
    ``running_var``. The names of the collections ``params`` and ``batch_stats`` are dropped.
    A dense layer after a flattened image keeps the input order of Flax, channels last, which
    differs from PyTorch's.

    Parameters
    ----------
    variables : pytree of arrays
        Nested mappings, such as the result of ``model.init`` or its ``params``.
    layout : Layout, mapping of path to Layout, or callable, optional
        Axis roles of kernels, which override those inferred from the path.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        If the path of a kernel does not determine its axes, a convolution is transposed
        (PyTorch mirrors its window), two arrays get the same name, or ``layout`` names an
        unknown path.

    Examples
    --------
    >>> found = to_torch_names({"params": {"Dense_0": {"kernel": jnp.ones((3, 2))}}})
    >>> {name: x.shape for name, x in found.items()}
    {'Dense_0.weight': (2, 3)}
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    for path, x in _named(variables, layout):
        name = _torch_name(path)
        if name in found:
            raise ValueError(f"variables must get different names, got two arrays named {name!r}")
        order, shape, _ = _axes(path, x, layout)
        found[name] = np.ascontiguousarray(np.asarray(x).transpose(order).reshape(shape))
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
    from safetensors.numpy import load_file

    held = load_file(path)
    leaves = []
    for name, x in _named(like, layout):
        key = _torch_name(name)
        order, shape, unmerged = _axes(name, x, layout)
        if key not in held or held[key].shape != shape:
            given = f"shape {held[key].shape}" if key in held else "none"
            raise ValueError(f"the file must hold {key!r} of shape {shape}, got {given}")
        whole = held[key].reshape(unmerged).transpose(inverse(order))
        leaves.append(jnp.asarray(whole, dtype=x.dtype))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(variables: PyTree, layout: Any) -> list[tuple[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(variables)
    named = [(name_of(path), x) for path, x in paths]
    check_arrays("variables", named)
    check_layout_paths(layout, [name for name, _ in named], "variables")
    return named


def _torch_name(path: str) -> str:
    keys = path.split("/")
    keys = keys[1:] if keys[0] in _COLLECTIONS and len(keys) > 1 else keys
    return ".".join([*keys[:-1], _NAMES.get(keys[-1], keys[-1])])


def _axes(
    path: str, x: Any, given: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return torch's axis order, torch's shape, and the permuted shape before axes merge."""
    axes, keys = tuple(range(x.ndim)), path.split("/")
    if not is_prunable(path, x):
        heads = keys[-1] == "bias" and x.ndim == 2 and keys[-2:-1] in _INTO_HEADS
        return axes, (x.size,) if heads else x.shape, x.shape
    if any(word in path.lower() for word in ("transpose", "deconv")):
        raise ValueError(f"{path} must not be of a transposed convolution, got shape {x.shape}")
    known = chosen_layout(path, x, given, layout_of(path, x))
    if known is None:
        raise ValueError(
            f"the path {path!r} must determine the axes of its kernel, or layout= name them, got "
            f"shape {x.shape}"
        )
    layout: Layout = resolve(known, x.ndim, path)
    roles = (layout.output_axes, layout.input_axes)
    rest = tuple(axis for axis in axes if axis not in roles[0] + roles[1])
    order = roles[0] + roles[1] + rest
    merged = [math.prod(x.shape[axis] for axis in role) for role in roles]
    window = tuple(x.shape[axis] for axis in rest)
    return order, (*merged, *window), tuple(x.shape[axis] for axis in order)
