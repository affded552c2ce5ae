"""Read the axis roles of kernels from the Flax modules that own them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, struct
from flax.core import meta

from safe_core.layout import Layout

from ..axes import stack_axes
from ..weights import name_of

__all__ = ["layouts_of"]

PyTree = Any
Roles = tuple[str, ...]  # one of "in", "out", "batch" and "window" per axis


def layouts_of(model: Any, *inputs: Any, rngs: Any = None, **kwargs: Any) -> dict[str, Layout]:
    """Return the axis roles of the kernels of a Flax model, for ``layout=``.

    Shapes do not always tell a stack of layers from attention heads or from the window of a
    convolution; modules do. This reads every dense, einsum and convolution layer of Flax,
    those inside of attention, recurrent cells and `flax.linen.scan` too. Kernels of other
    modules are not in the result, and neither are those of stacked NNX modules whose shapes
    leave open along which axis they are stacked.

    Parameters
    ----------
    model : flax.linen.Module or flax.nnx.Module
        A Linen module is traced by its ``init``, which computes nothing.
    *inputs : array or jax.ShapeDtypeStruct
        Arguments of ``model.init`` after the random keys. An NNX module needs none.
    rngs : optional
        Random keys of ``model.init``. The default has ``params`` and ``dropout``.
    **kwargs
        Further arguments of ``model.init``, such as ``train=False``.

    Returns
    -------
    dict of str to Layout
        By the paths of kernels in ``variables["params"]``, or in ``nnx.state(model)``. As
        ``layout=``, it also serves trees that begin with the collection ``params``.

    Raises
    ------
    TypeError
        If ``model`` is no Flax module, or inputs are given for an NNX module.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> layouts_of(nn.Conv(8, (3,), use_bias=False), jnp.ones((1, 5, 4)))
    {'kernel': Layout(input_axes=(1,), output_axes=(2,), batch_axes=())}
    >>> layouts_of(nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0)))
    {'kernel': Layout(input_axes=(0,), output_axes=(1, 2), batch_axes=())}
    """
    if isinstance(model, nn.Module):
        return _of_linen(model, inputs, rngs, kwargs)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Flax module, of Linen or NNX, got {type(model)!r}")
    if inputs or kwargs or rngs is not None:
        raise TypeError("inputs must be left out for an NNX module, whose parameters exist")
    return _of_nnx(model)


class _Kernel(struct.PyTreeNode, meta.AxisMetadata[Any]):  # type: ignore[no-untyped-call]
    """A kernel with the roles of its axes, to which Flax's transforms add their own axis."""

    value: Any
    roles: Roles = struct.field(pytree_node=False)  # type: ignore[no-untyped-call]

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> _Kernel:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> _Kernel:
        place = index if index >= 0 else index + len(self.roles) + 1
        return self.replace(roles=(*self.roles[:place], "batch", *self.roles[place:]))

    def remove_axis(self, index: int, params: Any) -> _Kernel:
        place = index % len(self.roles)
        return self.replace(roles=(*self.roles[:place], *self.roles[place + 1 :]))


def _of_linen(model: nn.Module, inputs: Any, rngs: Any, kwargs: Any) -> dict[str, Layout]:
    if rngs is None:
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    traced = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def init(rngs: Any, arrays: Sequence[Any]) -> PyTree:
        given = iter(arrays)
        args, options = jax.tree.unflatten(
            treedef,
            [next(given) if flag else x for x, flag in zip(leaves, traced, strict=True)],
        )
        with nn.intercept_methods(_box_kernel):
            return model.init(rngs, *args, **options)

    arrays = [x for x, flag in zip(leaves, traced, strict=True) if flag]
    params = jax.eval_shape(init, rngs, arrays).get("params", {})
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_kernel)
    return {
        name_of(path): _layout(box.roles)
        for path, box in boxes
        if _is_kernel(box) and len(box.roles) == len(box.value.shape)
    }


def _box_kernel(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Call a method of a module; then box the kernel of a layer that was initialised by it."""
    result, layer = next_fn(*args, **kwargs), context.module
    if context.method_name == "__call__" and layer.has_variable("params", "kernel"):
        kernel = nn.unbox(layer.get_variable("params", "kernel"))
        equation = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
        roles = _linen_roles(layer, kernel.ndim, equation)
        if roles is not None and layer.is_mutable_collection("params"):
            layer.put_variable("params", "kernel", _Kernel(kernel, roles))
    return result


def _is_kernel(node: Any) -> bool:
    return isinstance(node, _Kernel)


def _linen_roles(layer: nn.Module, ndim: int, equation: str | None) -> Roles | None:
    """Return the roles of the kernel's axes for one layer of Linen, None for other modules."""
    if isinstance(layer, nn.DenseGeneral):
        batch, outputs = (
            1 if isinstance(n, int) else len(n) for n in (layer.batch_dims, layer.features)
        )
        return ("batch",) * batch + ("in",) * (ndim - batch - outputs) + ("out",) * outputs
    if isinstance(layer, nn.Einsum):
        return einsum_roles(equation or layer.einsum_str or "")
    if isinstance(layer, nn.ConvTranspose):
        return _window(ndim, swapped=layer.transpose_kernel)
    if isinstance(layer, nn.ConvLocal):
        return ("batch",) * (ndim - 2) + ("in", "out")
    if isinstance(layer, (nn.Dense, nn.Conv, nn.recurrent.DenseParams)):
        return _window(ndim)
    return None


def _of_nnx(model: nnx.Module) -> dict[str, Layout]:
    found = {}
    layer: Any
    for path, layer in nnx.iter_modules(model):
        described = _nnx_roles(layer)
        if described is None:
            continue
        roles, single = described
        bias = getattr(layer, "bias", None)
        outputs = tuple(n for n, role in zip(single, roles, strict=True) if role == "out")
        stack = stack_axes(
            layer.kernel.shape, single, None if bias is None else bias.shape, outputs
        )
        if stack is not None:
            rest = iter(roles)
            every = ["batch" if i in stack else next(rest) for i in range(layer.kernel.ndim)]
            found["/".join(map(str, (*path, "kernel")))] = _layout(tuple(every))
    return found


def _nnx_roles(layer: Any) -> tuple[Roles, tuple[int, ...]] | None:
    """Return the roles of one layer of NNX, and the shape of its kernel if it is not stacked."""
    if isinstance(layer, nnx.Linear):
        return ("in", "out"), (layer.in_features, layer.out_features)
    if isinstance(layer, nnx.LinearGeneral):
        batch = tuple(dict(layer.batch_axis).values())
        inputs, outputs = tuple(layer.in_features), tuple(layer.out_features)
        roles = ("batch",) * len(batch) + ("in",) * len(inputs) + ("out",) * len(outputs)
        return roles, batch + inputs + outputs
    if isinstance(layer, nnx.Einsum):
        found = einsum_roles(layer.einsum_str or "")
        return None if found is None else (found, tuple(layer.kernel_shape))
    if isinstance(layer, (nnx.Conv, nnx.ConvTranspose)):
        shape = tuple(layer.kernel_shape)
        swapped = isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel
        return _window(len(shape), swapped=swapped), shape
    return None


def _window(ndim: int, *, swapped: bool = False) -> Roles:
    return ("window",) * (ndim - 2) + (("out", "in") if swapped else ("in", "out"))


def einsum_roles(equation: str) -> Roles | None:
    """Return the roles of the axes of the second operand, None if the equation is no product.

    Output axes on both sides of the inputs, such as the heads in ``"btd,ndh->btnh"``, cannot
    be merged to one axis. The outer ones count as a stack of matrices.

    Examples
    --------
    >>> einsum_roles("btd,ndh->btnh")
    ('batch', 'in', 'out')
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    inputs, comma, kernel = terms.partition(",")
    if not (arrow and comma) or "." in kernel or len(set(kernel)) != len(kernel):
        return None
    roles = []
    for letter in kernel:
        if letter in result:
            roles.append("batch" if letter in inputs else "out")
        elif letter in inputs:
            roles.append("in")
        else:
            return None
    last = len(roles) - 1 - roles[::-1].index("out") if "out" in roles else -1
    start = last
    while start > 0 and roles[start - 1] == "out":
        start -= 1
    roles = ["batch" if r == "out" and i < start else r for i, r in enumerate(roles)]
    places = [i for i, role in enumerate(roles) if role == "in"]
    adjacent = places == list(range(places[0], places[-1] + 1)) if places else False
    return tuple(roles) if adjacent and last >= 0 else None


def _layout(roles: Roles) -> Layout:
    places = partial(_places, roles)
    return Layout(places("in"), places("out"), places("batch"))


def _places(roles: Roles, role: str) -> tuple[int, ...]:
    return tuple(axis for axis, held in enumerate(roles) if held == role)
