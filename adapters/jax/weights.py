"""Find the leaves of a JAX model that can be pruned, and the roles of their axes.

A leaf does not know its module. In Flax and Haiku the path decides: Flax names the weight of every
linear, convolution and attention layer ``kernel``, and Haiku names it ``w``. Both store it as
(..., input, output). Equinox names weights and embeddings alike ``weight``, but its parameter
tree is the module itself, so the type of the module decides.
"""

from __future__ import annotations

import sys
from typing import Any

from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from safe_core.layout import Layout

__all__ = ["is_prunable", "layout_of", "name_of", "owner_of"]

_INPUT_OUTPUT = Layout(input_axes=(-2,), output_axes=(-1,))
_OUTPUT_INPUT = Layout(input_axes=(-1,), output_axes=(-2,))
_INTO_HEADS = Layout(input_axes=(0,), output_axes=(1, 2))
_FROM_HEADS = Layout(input_axes=(0, 1), output_axes=(2,))
_BOXES = ("value", "raw_value")  # the attribute of a variable of NNX, or of Linen's metadata
_HAIKU = ("w", "w_i", "w_h")
_EQUINOX = {
    "Linear": ("weight",),
    "Conv": ("weight",),
    "ConvTranspose": ("weight",),
    "GRUCell": ("weight_ih", "weight_hh"),
    "LSTMCell": ("weight_ih", "weight_hh"),
}


def name_of(path: tuple[Any, ...]) -> str:
    """Return the keys of a path joined by ``/``, without Flax's box around an array.

    Without the box, a leaf has the same name in `nnx.Optimizer` and in ``nnx.as_pure(...)``.
    """
    boxed = len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name in _BOXES
    return keystr(path[:-1] if boxed else path, simple=True, separator="/")


def owner_of(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the Equinox module that holds the leaf at a path; None for other containers."""
    # No tree holds Equinox modules unless Equinox is imported, and we must not import it.
    if "equinox" not in sys.modules:
        return None
    for key in path[:-1]:
        if isinstance(key, GetAttrKey):
            tree = getattr(tree, key.name)
        elif isinstance(key, (DictKey, SequenceKey)):
            tree = tree[key.key if isinstance(key, DictKey) else key.idx]
        else:
            return None
    return tree if _equinox_kind(tree) is not None else None


def is_prunable(path: str, array: Any, owner: Any = None) -> bool:
    """Return whether a leaf is a weight of a linear, convolution, attention or recurrent layer.

    Parameters
    ----------
    path : str
        Keys from the root, joined by ``/``.
    array : array
        The leaf.
    owner : optional
        The Equinox module that holds it.

    Examples
    --------
    >>> import numpy
    >>> is_prunable("params/Dense_0/kernel", numpy.ones((4, 2)))
    True
    >>> is_prunable("params/Dense_0/bias", numpy.ones(2))
    False
    >>> is_prunable("mlp/~/linear_0/w", numpy.ones((4, 2)))
    True
    """
    name = path.split("/")[-1]
    if owner is not None:
        return name in _EQUINOX[_equinox_kind(owner)]  # type: ignore[index]
    return array.ndim >= 2 and (name == "kernel" or name in _HAIKU)


def layout_of(path: str, array: Any, owner: Any = None) -> Layout | None:
    """Return the axis roles of a weight; None if path and owner do not determine them.

    In Flax and Haiku a weight with two axes is (input, output). With more axes the module's
    name decides. A convolution is (window..., input, output); a transposed one in Haiku is
    (window..., output, input). The query, key and value of attention in Flax are (input,
    heads, head size), and its output projection is (heads, head size, output). In Equinox
    weights are (output, input, window...), with the axes of `jax.vmap` in front. A depthwise
    convolution has one input for each output.

    Pass ``layout=`` for weights that neither path nor shape can identify: a stack of
    convolutions, which looks like one with a larger window; a ``ConvTranspose`` of Flax with
    ``transpose_kernel=True``; and a convolution of NNX in an attribute without "conv" in its
    name.

    Parameters
    ----------
    path : str
        Keys from the root, joined by ``/``.
    array : array
        The leaf.
    owner : optional
        The Equinox module that holds it.

    Examples
    --------
    >>> import numpy
    >>> layout_of("params/Conv_0/kernel", numpy.ones((3, 3, 8, 16)))
    Layout(input_axes=(-2,), output_axes=(-1,), batch_axes=())
    >>> layout_of("params/attention/query/kernel", numpy.ones((8, 2, 4)))
    Layout(input_axes=(0,), output_axes=(1, 2), batch_axes=())
    >>> layout_of("params/layers/kernel", numpy.ones((12, 8, 16))) is None
    True
    """
    if not is_prunable(path, array, owner):
        return None
    if owner is not None:
        batch = array.ndim - 2 - getattr(owner, "num_spatial_dims", 0)
        return Layout((batch + 1,), (batch,), tuple(range(batch)))
    keys = path.split("/")
    module = keys[-2].lower() if len(keys) > 1 else ""
    if keys[-1] != "kernel" and "conv" in module and "transpose" in module:
        return _OUTPUT_INPUT
    if array.ndim == 2 or "conv" in module:
        return _INPUT_OUTPUT
    if array.ndim == 3 and module in ("query", "key", "value"):
        return _INTO_HEADS
    if array.ndim == 3 and module == "out":
        return _FROM_HEADS
    return None


def _equinox_kind(module: Any) -> str | None:
    """Return the name of the Equinox layer that a module is or derives from, or None."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("equinox.nn") and kind.__name__ in _EQUINOX:
            return kind.__name__
    return None
