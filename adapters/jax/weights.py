"""Which leaves of a JAX model are weights to prune, and the roles of their axes.

A leaf does not say what module it belongs to. Flax and Haiku tell by its path: Flax names
the weight of every linear, convolution and attention layer ``kernel``, Haiku ``w``, and both
store it as (..., input, output). Equinox calls weights and embeddings alike ``weight``, but
its parameters are the modules themselves, so there the type of the module decides.
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
    """The keys of a path joined by ``/``, without the box in which Flax holds an array.

    So a leaf has one name, within `nnx.Optimizer` and in ``nnx.as_pure(...)``.
    """
    boxed = len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name in _BOXES
    return keystr(path[:-1] if boxed else path, simple=True, separator="/")


def owner_of(tree: Any, path: tuple[Any, ...]) -> Any:
    """The Equinox module that holds the leaf at a path of keys; None if another thing does."""
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
    """Whether a leaf is the weight of a linear, convolution, attention or recurrent layer.

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
    """Roles of the axes of a weight; None where path and owner do not tell them.

    In Flax and Haiku a weight of two axes is (input, output). With more axes the module's
    name decides: a convolution is (window..., input, output), in Haiku a transposed one
    (window..., output, input); the query, key and value of attention in Flax are (input,
    heads, head size), and its output projection (heads, head size, output). In Equinox weights
    are (output, input, window...), with the axes of `jax.vmap` in front. A depthwise
    convolution has one input for each output.

    Not told apart are a stack of convolutions and one of a larger window, and a
    ``ConvTranspose`` of Flax with ``transpose_kernel=True``: pass ``layout=``. The same holds
    for a convolution of NNX whose attribute is not named so.

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
    """The layer of Equinox that a module is or derives from."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("equinox.nn") and kind.__name__ in _EQUINOX:
            return kind.__name__
    return None
