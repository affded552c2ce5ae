"""Which leaves of a Flax parameter tree are weights to prune, and the roles of their axes.

Known by path, for a leaf does not say what module it belongs to. Flax names the weight
of every linear, convolution and attention layer ``kernel``, and stores it as
(..., input, output).
"""

from __future__ import annotations

from typing import Any

from safe_core.layout import Layout

__all__ = ["is_prunable", "keys_of", "layout_of"]

_INPUT_OUTPUT = Layout(input_axes=(-2,), output_axes=(-1,))
_INTO_HEADS = Layout(input_axes=(0,), output_axes=(1, 2))
_FROM_HEADS = Layout(input_axes=(0, 1), output_axes=(2,))
_BOXES = ("value", "raw_value")  # how NNX shows the array within a variable


def keys_of(path: str) -> list[str]:
    """The keys of a path, without that of the box in which NNX holds an array."""
    keys = path.split("/")
    return keys[:-1] if keys[-1] in _BOXES else keys


def is_prunable(path: str, array: Any) -> bool:
    """Whether a leaf is the kernel of a linear, convolution or attention layer.

    Parameters
    ----------
    path : str
        Keys from the root, joined by ``/``.
    array : array
        The leaf.

    Examples
    --------
    >>> import numpy
    >>> is_prunable("params/Dense_0/kernel", numpy.ones((4, 2)))
    True
    >>> is_prunable("params/Dense_0/bias", numpy.ones(2))
    False
    """
    return keys_of(path)[-1] == "kernel" and array.ndim >= 2


def layout_of(path: str, array: Any) -> Layout | None:
    """Roles of the axes of a kernel; None where the path does not tell them.

    A kernel of two axes is (input, output). With more axes the module's name decides:
    a convolution is (window..., input, output), the query, key and value of attention
    (input, heads, head size), and its output projection (heads, head size, output). A
    stack of layers looks like a convolution and is not told apart: pass ``layout=``.

    Parameters
    ----------
    path : str
        Keys from the root, joined by ``/``.
    array : array
        The leaf.

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
    if not is_prunable(path, array):
        return None
    module = keys_of(path)[-2].lower() if len(keys_of(path)) > 1 else ""
    if array.ndim == 2 or "conv" in module:
        return _INPUT_OUTPUT
    if array.ndim == 3 and module in ("query", "key", "value"):
        return _INTO_HEADS
    if array.ndim == 3 and module == "out":
        return _FROM_HEADS
    return None
