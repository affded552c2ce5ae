"""Replace the linear layers of a Flax model that a measurement shows to be faster in BCSR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.sparse import BCSR

from safe_core import _checks
from safe_core.adapters.layer_timing import (
    HALF,
    LayerTiming,
    interleaved,
    processor,
    timing_of,
)
from safe_core.adapters.model_calls import naming_inputs
from safe_core.adapters.sparse_report import SparseModules, decided

from ..outputs import compare
from ..weights import is_prunable, name_of

__all__ = [
    "Layer",
    "LinenLayers",
    "NnxLayers",
    "SparseLinear",
    "SparseLinen",
    "bcsr",
    "evaluation_copy",
    "layers_of",
    "product",
    "sparse_modules",
    "timed",
    "waiting",
]

PyTree = Any


class SparseLinear(nnx.Module):
    """A linear layer of NNX with its kernel in BCSR, for inference."""

    def __init__(self, layer: nnx.Linear) -> None:
        kernel = bcsr(layer.kernel[...])
        self.shape = kernel.shape
        self.data, self.indices = nnx.Param(kernel.data), nnx.Variable(kernel.indices)
        self.starts = nnx.Variable(kernel.indptr)
        self.bias = layer.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x @ kernel + bias``."""
        arrays = self.data[...], self.indices[...], self.starts[...]
        kernel = BCSR(arrays, shape=self.shape)
        return product(kernel, None if self.bias is None else self.bias[...], x)


class SparseLinen(NamedTuple):
    """A Linen module whose variables hold kernels in BCSR, for inference.

    Attributes
    ----------
    module : flax.linen.Module
    variables : pytree
        Those of the module, with `jax.experimental.sparse.BCSR` as some kernels, which are
        transposed.
    """

    module: nn.Module
    variables: PyTree

    def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        """Return ``module.apply(variables, *args, **kwargs)``; it can be compiled by `jax.jit`."""
        with nn.intercept_methods(_sparse_dense):
            return self.module.apply(variables, *args, **kwargs)


def sparse_modules(
    model: Any, example_inputs: Any, *, variables: PyTree = None, repeats: int = 9
) -> SparseModules:
    """Return a model for inference whose linear layers skip zeros where that is faster here.

    Each `flax.nnx.Linear` or `flax.linen.Dense` is timed, compiled, on inputs of the shape that
    it gets from ``example_inputs``: dense, and in BCSR, `jax.experimental.sparse`. The two take
    turns. BCSR replaces the layer if its median time is at least a tenth below that of the dense
    layer. Then the outputs of the whole model are compared, and its time under `jax.jit`: if that
    is not a tenth shorter, nothing is replaced. The call of `flax.nnx.jit` itself takes longer than
    a small model, so serve an NNX module under `jax.jit`, after `flax.nnx.split`.

    The result holds for this machine and the batch size of ``example_inputs``, so pass inputs
    like those to serve. ``model`` and ``variables`` stay as they are: save these.

    Parameters
    ----------
    model : flax.nnx.Module or flax.linen.Module
    example_inputs : array or tuple of arrays
        The arguments of the model.
    variables : pytree, optional
        Those of a Linen module.
    repeats : int
        Measurements of each form.

    Returns
    -------
    SparseModules
        Print it for a table. Its ``model`` is an NNX module in evaluation mode, or a
        `SparseLinen` with ``variables`` and a function ``apply``; the one that was given if
        nothing is replaced.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If the model cannot take ``example_inputs``, or the outputs differ.

    Examples
    --------
    >>> import safe_core
    >>> layer = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
    >>> layer.kernel[...] = safe_core.project(layer.kernel[...], 0.95).values
    >>> model, x = nnx.Sequential(layer, jax.nn.relu), jnp.ones((32, 256))
    >>> found = sparse_modules(model, x, repeats=3)
    >>> bool(abs(found.model(x) - model(x)).max() < 1e-5)
    True
    >>> [(each.name, round(each.sparsity, 2)) for each in found.layers]
    [('layers/0/kernel', 0.95)]
    """
    _checks.integer("repeats", repeats, low=1)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return _replaced(layers_of(model, variables), inputs, repeats)


def layers_of(model: Any, variables: PyTree) -> NnxLayers | LinenLayers:
    """Return the linear layers of a Flax module, or raise a TypeError that names the argument."""
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables must be left out for an NNX module, which holds its own")
        return NnxLayers(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Flax module, of Linen or NNX, got {type(model)!r}")
    if variables is None:
        raise TypeError("variables must be given for a Linen module, got None")
    return LinenLayers(model, variables)


class Layer(NamedTuple):
    """A linear layer: kernel, bias, and the shapes of its inputs with the number of calls."""

    kernel: jax.Array
    bias: jax.Array | None
    calls: Counter[tuple[tuple[int, ...], Any]]


def _replaced(
    model: NnxLayers | LinenLayers, inputs: tuple[Any, ...], repeats: int
) -> SparseModules:
    described = f"{processor()}, {jax.default_backend()}"
    layers = []
    with naming_inputs(inputs):
        found = model.layers(inputs)
    for name, kernel in model.kernels().items():
        zeros = 1 - float(jnp.count_nonzero(kernel)) / max(1, kernel.size)
        if zeros:
            layer = LayerTiming(name, tuple(kernel.shape), zeros)
            layers.append(timed(layer, found.get(name), repeats))
    chosen = [layer.name for layer in layers if layer.form != "dense"]
    if not chosen:
        return SparseModules(model.given, layers, {}, described)
    sparse: Any = model.replaced(chosen)
    runs = {"dense": model.call(None, inputs), "sparse": model.call(sparse, inputs)}
    compare(
        runs["dense"](),
        runs["sparse"](),
        "model must compute the same with sparse layers, got other outputs for "
        "example_inputs: are they the same at every call?",
    )
    return decided(model.given, sparse, layers, interleaved(runs, repeats), described)


def timed(layer: LayerTiming, found: Layer | str | None, repeats: int) -> LayerTiming:
    """Time a layer on random inputs of the shapes that it gets."""
    if not isinstance(found, Layer):
        return layer._replace(reason=found or "it has no sparse kernel")
    if layer.sparsity < HALF:
        return layer._replace(reason="fewer than half of the entries are zero")
    if not found.calls:
        return layer._replace(reason="the model does not call it")
    sparse, times, rows = bcsr(found.kernel), [], 0
    for (shape, dtype), calls in found.calls.items():
        x = jax.random.normal(jax.random.key(0), shape, dtype)
        runs = {
            form: waiting(jax.jit(product), kernel, found.bias, x)
            for form, kernel in (("dense", found.kernel), ("BCSR", sparse))
        }
        taken = interleaved(runs, repeats)
        times.append({form: [calls * t for t in each] for form, each in taken.items()})
        rows += calls * x.size // shape[-1]
    return timing_of(layer._replace(rows=rows), times, {})


def waiting(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a call that ends when its work is done."""
    return lambda: jax.block_until_ready(run(*args))  # type: ignore[no-untyped-call]


def _compiled(
    function: Callable[..., Any], values: PyTree, inputs: tuple[Any, ...]
) -> Callable[[], Any]:
    """Return a compiled call that ends when its work is done.

    It takes the leaves of ``values``: to flatten a module at each call can take longer than a
    small model, and hide what its layers take.
    """
    leaves, structure = jax.tree.flatten(values)
    run = jax.jit(lambda leaves, *given: function(jax.tree.unflatten(structure, leaves), *given))
    return waiting(run, leaves, *inputs)


def bcsr(kernel: jax.Array) -> BCSR:
    """Return a kernel as BCSR, transposed, because products take it on the left alone."""
    # In NumPy, because BCSR.fromdense compiles a program for every number of entries.
    dense = np.asarray(kernel).T
    kept = dense != 0
    starts = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
    columns = kept.nonzero()[1].astype(np.int32)
    with jax.default_device(next(iter(jnp.asarray(kernel).devices()))):
        arrays = jnp.asarray(dense[kept]), jnp.asarray(columns), jnp.asarray(starts)
    found: BCSR = BCSR(arrays, shape=dense.shape, indices_sorted=True, unique_indices=True)
    return found


def product(kernel: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return ``x @ kernel + bias``, where the kernel may be the result of `bcsr`."""
    if isinstance(kernel, BCSR):
        rows = x.reshape(-1, x.shape[-1])
        y = (kernel @ rows.T).T.reshape(*x.shape[:-1], kernel.shape[0])
    else:
        y = x @ kernel
    return y if bias is None else y + bias


class NnxLayers:
    """The linear layers of an NNX module."""

    def __init__(self, given: nnx.Module) -> None:
        self.given = given
        self.copy = evaluation_copy(given)

    def arrays(self) -> list[Any]:
        """Return all arrays of the model."""
        return jax.tree.leaves(nnx.as_pure(nnx.state(self.copy)))

    def params(self) -> dict[str, jax.Array]:
        """Return all parameters."""
        leaves = jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(self.copy, nnx.Param)))
        return {name_of(path): x for path, x in leaves}

    def kernels(self) -> dict[str, jax.Array]:
        """Return the kernels of all layers."""
        return {name: x for name, x in self.params().items() if is_prunable(name, x)}

    def layers(self, inputs: tuple[Any, ...]) -> dict[str, Layer | str]:
        """Return the layers that can be replaced, as the model calls them, or why not."""
        watched, found = evaluation_copy(self.given), dict[str, Layer | str]()
        layer: Any
        for path, layer in nnx.iter_modules(watched):
            if type(layer) is not nnx.Linear:
                continue
            name, kernel = "/".join(map(str, (*path, "kernel"))), layer.kernel[...]
            reason = _reason(kernel, layer) if path else "it is the whole model"
            if reason:
                found[name] = reason
                continue
            bias = None if layer.bias is None else layer.bias[...]
            found[name] = known = Layer(kernel, bias, Counter())
            layer.dot_general = _recording(layer.dot_general, known.calls)
        watched(*inputs)
        return found

    def replaced(self, names: list[str]) -> nnx.Module:
        """Return a copy in which some layers are sparse."""
        sparse = evaluation_copy(self.given)
        for name in names:
            *parents, last, _ = name.split("/")
            parent: Any = sparse
            for key in parents:
                parent = _child(parent, key)
            new = SparseLinear(_child(parent, last))
            if last.isdigit():
                parent[int(last)] = new
            else:
                setattr(parent, last, new)
        return sparse

    def call(self, sparse: nnx.Module | None, inputs: tuple[Any, ...]) -> Callable[[], Any]:
        """Return a compiled call of the model."""
        definition, state = nnx.split(self.copy if sparse is None else sparse)
        return _compiled(lambda state, *given: nnx.merge(definition, state)(*given), state, inputs)


def evaluation_copy(module: nnx.Module) -> nnx.Module:
    """Return a copy of a module in evaluation mode, with the same arrays."""
    copy: nnx.Module = nnx.merge(*nnx.split(module))
    copy.eval()  # type: ignore[no-untyped-call]
    return copy


def _child(parent: Any, key: str) -> Any:
    return parent[int(key)] if key.isdigit() else getattr(parent, key)


def _reason(kernel: jax.Array, layer: Any) -> str:
    """Return why a layer cannot be replaced, or nothing if it can."""
    if kernel.ndim != 2:
        return "it is a stack of layers"
    if layer.dtype not in (None, kernel.dtype):
        return f"it computes in {jnp.dtype(layer.dtype).name}, its kernel is {kernel.dtype}"
    own = (layer.dot_general, getattr(layer, "dot_general_cls", None), layer.precision)
    return (
        ""
        if own in ((jax.lax.dot_general, None, None), (None, None, None))
        else ("it has a product or a precision of its own")
    )


def _recording(given: Callable[..., Any], calls: Counter[Any]) -> Callable[..., Any]:
    def record(x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        calls[tuple(x.shape), x.dtype] += 1
        return given(x, *args, **kwargs)

    return record


class LinenLayers:
    """The dense layers of a Linen module."""

    def __init__(self, module: nn.Module, variables: PyTree) -> None:
        self.module, self.variables = module, variables
        self.given = SparseLinen(module, variables)

    def arrays(self) -> list[Any]:
        """Return all arrays of the model."""
        return jax.tree.leaves(nn.unbox(self.variables))

    def params(self) -> dict[str, jax.Array]:
        """Return all parameters."""
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(self.variables).get("params", {}))
        return {name_of(path): x for path, x in leaves}

    def kernels(self) -> dict[str, jax.Array]:
        """Return the kernels of all layers."""
        return {name: x for name, x in self.params().items() if is_prunable(name, x)}

    def layers(self, inputs: tuple[Any, ...]) -> dict[str, Layer | str]:
        """Return the layers that can be replaced, as the model calls them, or why not."""
        kernels, found = self.kernels(), dict[str, Layer | str]()

        def watch(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            if type(layer) is nn.Dense and context.method_name == "__call__":
                name = "/".join((*layer.path, "kernel"))
                own = kernels.get(name)
                reason = "" if own is None else _reason(own, layer)
                if own is None or reason:
                    found[name] = reason
                else:
                    bias = layer.get_variable("params", "bias") if layer.use_bias else None
                    known = found.setdefault(name, Layer(own, bias, Counter()))
                    known.calls[tuple(args[0].shape), args[0].dtype] += 1  # type: ignore[union-attr]
            return next_fn(*args, **kwargs)

        with nn.intercept_methods(watch):
            self.module.apply(self.variables, *inputs)
        return found

    def replaced(self, names: list[str]) -> SparseLinen:
        """Return the module with variables in which some kernels are sparse."""

        def sparse(path: Any, x: Any) -> Any:
            return bcsr(x) if name_of(path) in names else x

        params = jax.tree_util.tree_map_with_path(sparse, self.variables["params"])
        return SparseLinen(self.module, {**self.variables, "params": params})

    def call(self, sparse: SparseLinen | None, inputs: tuple[Any, ...]) -> Callable[[], Any]:
        """Return a compiled call of the model."""
        model = self.given if sparse is None else sparse
        return _compiled(model.apply, model.variables, inputs)


def _sparse_dense(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Compute a dense layer whose kernel is in BCSR; call all other methods."""
    layer = context.module
    if type(layer) is nn.Dense and context.method_name == "__call__":
        params: Mapping[str, Any] = layer.variables.get("params", {})
        if isinstance(params.get("kernel"), BCSR):
            return product(params["kernel"], params.get("bias"), *args)
    return next_fn(*args, **kwargs)
