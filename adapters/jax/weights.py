"""Find the leaves of a JAX model that can be pruned, and the roles of their axes.

A leaf does not know its module. In Flax and Haiku the path decides which leaves can be pruned:
Flax names the weight of every linear, convolution and attention layer ``kernel``, and Haiku names
it ``w``. The biases beside them tell the roles of their axes, see `axes`. Equinox names weights
and embeddings alike ``weight``, but its parameter tree is the module itself, so the type of the
module decides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from safe_core.layout import Layout

from .axes import Evidence, infer_layout, stack_axes

__all__ = ["is_prunable", "known_layouts", "layout_of", "name_of", "owner_of"]

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


def layout_of(
    path: str, array: Any, owner: Any = None, *, leaves: Mapping[str, Any] | None = None
) -> Layout | None:
    """Return the axis roles of a weight, or None where they are not certain.

    In Equinox the module of the weight knows its single shape, (output, input, window...), so
    further axes are those of `jax.vmap`. In Flax and Haiku, these rules apply:

    - A kernel with two axes is (input, output), or (output, input) if its bias fits only that.
    - With more axes, the bias decides. It has the stack's axes and the output axes of its
      kernel, so it tells a stack of layers, (layers, input, output), from one layer. A kernel
      for which its bias allows several readings has no certain roles.
    - Only a module with "conv" in its name is a convolution, (window..., input, output). Without
      a bias it is one if its window has equal sides and a vector lies beside it, such as the
      scale of a norm; otherwise it may be a stack of smaller convolutions. If "transpose" is in
      the name too, the bias must tell inputs from outputs, except in Haiku, which stores
      (window..., output, input).
    - Kernels of ``query``, ``key``, ``value`` and ``out`` in one module are those of attention,
      (input, heads, head size) and (heads, head size, output), if their shapes and biases fit
      together, and do not fit four stacks of matrices, too.
    - Names with "einsum" are taken for einsum layers, which may order their axes in any way.

    These rules can be wrong in three cases only, each without a bias that shows it: a matrix of
    an einsum layer under another name; a transposed convolution under a name without
    "transpose"; and a stack of convolutions in the shape of a convolution whose window has
    equal sides, made by a transform of the convolution alone, beside a vector.
    `safe_core.adapters.jax.flax.layouts_of` reads the modules themselves and is always right.

    Parameters
    ----------
    path : str
        Keys from the root, joined by ``/``.
    array : array
        The leaf.
    owner : optional
        The Equinox module that holds it.
    leaves : mapping of path to array, optional
        All leaves of the model, among them the biases. The default is this leaf alone.

    Examples
    --------
    >>> import numpy
    >>> leaves = {"Conv_0/kernel": numpy.ones((3, 3, 8, 16)), "Conv_0/bias": numpy.ones(16)}
    >>> layout_of("Conv_0/kernel", leaves["Conv_0/kernel"], leaves=leaves)
    Layout(input_axes=(-2,), output_axes=(-1,), batch_axes=())
    >>> leaves = {"layers/kernel": numpy.ones((12, 8, 16)), "layers/bias": numpy.ones((12, 16))}
    >>> layout_of("layers/kernel", leaves["layers/kernel"], leaves=leaves)
    Layout(input_axes=(1,), output_axes=(2,), batch_axes=(0,))
    >>> layout_of("layers/kernel", leaves["layers/kernel"]) is None
    True
    """
    named = {**(leaves or {}), path: array}
    return _known(path, array, owner, Evidence(_shapes(named.items())))


def known_layouts(
    named: Sequence[tuple[str, Any]], owners: Sequence[Any], tree: Any = None
) -> list[Layout | None]:
    """Return `layout_of` for all leaves of a model, given as pairs of path and leaf.

    If ``tree`` is an NNX module, its layers know their axes.
    """
    evidence, read = Evidence(_shapes(named)), {}
    # No tree is an NNX module unless Flax is imported, and we must not import it.
    if "flax.nnx" in sys.modules and isinstance(tree, sys.modules["flax.nnx"].Module):
        from .flax.layouts import layouts_of

        read = layouts_of(tree)
    return [
        read.get(leaf[0]) or _known(*leaf, owner, evidence)
        for leaf, owner in zip(named, owners, strict=True)
    ]


def _shapes(named: Iterable[tuple[str, Any]]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(x.shape) for path, x in named if hasattr(x, "shape")}


def _known(path: str, array: Any, owner: Any, evidence: Evidence) -> Layout | None:
    if not hasattr(array, "ndim") or not is_prunable(path, array, owner):
        return None
    if owner is None:
        return infer_layout(path, evidence)
    single, single_bias = _equinox_shapes(owner, path.rpartition("/")[2])
    bias = getattr(owner, "bias", None)
    stack = stack_axes(
        tuple(array.shape), single, None if bias is None else tuple(bias.shape), single_bias
    )
    if stack is None:
        return None
    output, inputs, *_ = (axis for axis in range(array.ndim) if axis not in stack)
    return Layout((inputs,), (output,), stack)


def _equinox_shapes(owner: Any, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes that a weight and bias of an Equinox layer have if they are not stacked."""
    kind = _equinox_kind(owner)
    if kind in ("GRUCell", "LSTMCell"):
        gates = (3 if kind == "GRUCell" else 4) * owner.hidden_size
        return (gates, owner.input_size if name == "weight_ih" else owner.hidden_size), (gates,)
    if kind == "Linear":
        features = (owner.out_features, owner.in_features)
        outputs, inputs = (1 if n == "scalar" else n for n in features)
        return (outputs, inputs), (outputs,)
    outputs = owner.out_channels
    window = tuple(owner.kernel_size)
    bias = (outputs, *(1 for _ in window))
    return (outputs, owner.in_channels // owner.groups, *window), bias


def _equinox_kind(module: Any) -> str | None:
    """Return the name of the Equinox layer that a module is or derives from, or None."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("equinox.nn") and kind.__name__ in _EQUINOX:
            return kind.__name__
    return None
