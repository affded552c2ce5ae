"""Save a model as a LiteRT file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from safe_core import _checks
from safe_core.adapters.model_calls import naming_inputs
from safe_core.litert import LiteRTReport, UnsupportedError
from safe_core.litert.build import Builder
from safe_core.litert.export import check_settings, save_graph
from safe_core.litert.graph import Tensor, as_stored, stored_type

from .litert_operations import ENTRYWISE, OPERATIONS, Call, as_tensor
from .traced_program import called

__all__ = ["litert_graph", "save_litert"]

PyTree = Any


def save_litert(
    model: Any,
    example_inputs: Any,
    path: str | Path,
    weights: str = "float32",
    *,
    batch_size: int | None = 1,
    compute: str = "fastest",
    tolerance: float | None = None,
) -> LiteRTReport:
    """Save a model as a LiteRT file (``.tflite``) whose runtime can skip zeros in blocks.

    LiteRT has kernels for linear layers whose zeros are in blocks of 1x4 inputs (float32) or 1x16
    (int8). Train such zeros with ``Block((1, 4), 0.9)`` or ``Block((1, 16), 0.9)``. Other zeros
    make the file smaller, and the report says so. Batch norm is folded into the layer before it.

    A process of its own then runs the file on all samples, compares the outputs with those of the
    model, and times it. The file appears at ``path`` only if they agree.

    Parameters
    ----------
    model : callable
        An NNX module, a bound Linen module, or a function of arrays, such as
        ``lambda x: module.apply(variables, x, train=False)``. NNX modules are traced in
        evaluation mode.
    example_inputs : array or tuple of arrays
        Samples: one argument, or all positional ones. For int8 they should be real data, because
        they set the ranges of all tensors.
    path : str or Path
    weights : str
        ``"float32"``, or ``"int8"`` for weights and activations of layers in 8 bits.
    batch_size : int, optional
        Samples that the file takes at once. It must divide the first axis of all inputs. None
        keeps the shapes of ``example_inputs``.
    compute : str
        ``"sparse"`` skips zeros in blocks, ``"dense"`` never does; ``"fastest"`` is the faster
        one of both on this machine.
    tolerance : float, optional
        The largest relative error allowed; by default 0.001 for float32 and 0.25 for int8.

    Returns
    -------
    LiteRTReport
        Formats of layers, sizes, error and times; print it for a table.

    Raises
    ------
    ModuleNotFoundError
        If ai-edge-litert is missing, which the extra ``litert`` installs.
    TypeError
        If an argument is of another kind.
    UnsupportedError
        If LiteRT cannot express an operation. The message names it, and its module where JAX
        knows it. This is a ValueError.
    ValueError
        If an argument is out of range, the model is in float16 or bfloat16 or cannot take
        ``example_inputs``, or the file computes something else than the model.

    Examples
    --------
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import safe_core
    >>> dense = jax.random.normal(jax.random.key(0), (32, 64))
    >>> kernel = safe_core.project(dense, safe_core.Block((1, 4), 0.9)).values.T
    >>> samples = jax.random.normal(jax.random.key(1), (8, 64))
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> report = save_litert(lambda x: jax.nn.relu(x @ kernel), samples, path, compute="sparse")
    >>> [layer.format for layer in report.layers]
    ['1x4']
    """
    settings = check_settings(
        "save_litert", weights=weights, batch_size=batch_size, compute=compute, tolerance=tolerance
    )
    given = list(example_inputs) if isinstance(example_inputs, (tuple, list)) else [example_inputs]
    for x in given:
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"example_inputs must hold arrays only, got {_checks.shown(x)}")
    shapes = [tuple(np.shape(x)) for x in given]
    batches = [[x[part] for x in given] for part in settings.batches(shapes)]
    traced = _Traced(model)
    traced.check_dtypes()
    traced.check(given, batches[0])
    graph = traced.graph(batches[0])
    jitted = jax.jit(traced.function)
    expected = [[as_stored(y) for y in jax.tree.leaves(jitted(traced.leaves, *b))] for b in batches]
    samples = [[as_stored(x) for x in batch] for batch in batches]
    return save_graph(graph, samples, expected, path, settings)


def litert_graph(model: Any, inputs: Sequence[Any]) -> tuple[Builder, list[Any]]:
    """Return the graph of a model, and the inputs as its file takes them.

    Raises
    ------
    UnsupportedError
        If LiteRT cannot express an operation.
    """
    return _Traced(model).graph(list(inputs)), [as_stored(x) for x in inputs]


class _Traced:
    """A model as a function of its parameters and inputs."""

    def __init__(self, model: Any) -> None:
        self.function, self.leaves, self.names = _function(model)

    def check_dtypes(self) -> None:
        """Raise an error if parameters have fewer digits than the file."""
        for name, leaf in zip(self.names, self.leaves, strict=True):
            dtype = getattr(leaf, "dtype", np.dtype(bool))
            if jax.numpy.issubdtype(dtype, np.floating) and dtype.itemsize < 4:
                place = f" in {name}" if name else ""
                raise ValueError(
                    f"model must be in float32, got {dtype}{place}: pass a model with float32 "
                    "parameters, because the file is float32"
                )

    def check(self, given: list[Any], inputs: list[Any]) -> None:
        """Raise an error that shows what was given unless the model can take the inputs."""
        # Those of values that are not known while tracing, which no inputs cause.
        traced = jax.errors.JAXTypeError, jax.errors.JAXIndexError
        with naming_inputs(given, other=traced):
            jax.eval_shape(self.function, self.leaves, *inputs)

    def graph(self, inputs: list[Any]) -> Builder:
        """Return the graph for inputs of these shapes."""
        closed = jax.make_jaxpr(self.function)(self.leaves, *inputs)
        return _Trace(self.names).run(closed, self.leaves, inputs)


def _function(model: Any) -> tuple[Callable[..., Any], list[Any], list[str]]:
    """Return a function of parameters and inputs, and the parameters with their names."""
    # The caller may have imported one of them alone, or neither.
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if nnx is not None and isinstance(model, nnx.Module):
        copied = nnx.merge(*nnx.split(model))
        copied.eval()
        definition, variables = nnx.split(copied)

        def call(values: PyTree, *inputs: Any) -> Any:
            return nnx.merge(definition, values)(*inputs)

    elif linen is not None and isinstance(model, linen.Module):
        if model.scope is None:
            raise TypeError("model must be bound, as by module.bind(variables), got an unbound one")
        module, variables = model.unbind()

        def call(values: PyTree, *inputs: Any) -> Any:
            return module.apply(values, *inputs)

    elif callable(model):
        return lambda _, *inputs: model(*inputs), [], []
    else:
        raise TypeError(f"model must be callable, got {_checks.shown(model)}")
    found, structure = jax.tree.flatten_with_path(variables)
    names = [_name(path) for path, _ in found]
    leaves = [leaf for _, leaf in found]
    return (
        lambda values, *inputs: call(jax.tree.unflatten(structure, values), *inputs),
        leaves,
        names,
    )


def _name(path: Sequence[Any]) -> str:
    """Return the path of the module of a parameter, without its collection."""
    keys = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    keys = [key for key in keys if key not in ("params", "batch_stats", "value", "raw_value")]
    return "/".join(keys[:-1])


class _Trace:
    """Translate the operations of a function, as JAX traces them, into a graph.

    ``values`` maps a variable to a tensor or a constant array. It may have axes of size 1 where
    JAX has larger ones, along which it would be repeated.
    """

    def __init__(self, names: list[str]) -> None:
        self.graph = Builder()
        self.values: dict[Any, Any] = {}
        self.names = names
        self.named: dict[Any, str] = {}

    def run(self, closed: Any, leaves: list[Any], inputs: list[Any]) -> Builder:
        """Return the graph.

        Raises
        ------
        UnsupportedError
            If LiteRT cannot express an operation.
        """
        jaxpr = closed.jaxpr
        self.values.update(zip(jaxpr.constvars, closed.consts, strict=True))
        count = len(leaves)
        self.values.update(zip(jaxpr.invars[:count], leaves, strict=True))
        self.named.update(zip(jaxpr.invars[:count], self.names, strict=True))
        for i, variable in enumerate(jaxpr.invars[count:]):
            kind = stored_type(variable.aval.dtype)
            self.values[variable] = self.graph.input(f"x{i}", variable.aval.shape, kind)
        self.equations(jaxpr, "")
        self.graph.outputs = [as_tensor(self.graph, self.whole(x)) for x in jaxpr.outvars]
        return self.graph

    def equations(self, jaxpr: Any, scope: str) -> None:
        for equation in jaxpr.eqns:
            stack = str(equation.source_info.name_stack)
            place = "/".join(filter(None, (scope, stack)))
            inner = called(equation)
            if inner is not None:
                found = self.inlined(equation, *inner, place)
            else:
                found = self.call(equation, place)
            self.values.update(zip(equation.outvars, found, strict=True))

    def inlined(self, equation: Any, jaxpr: Any, consts: Sequence[Any], place: str) -> list[Any]:
        """Return the results of a function that is called, such as one under jit."""
        self.values.update(zip(jaxpr.constvars, consts, strict=True))
        for outer, variable in zip(equation.invars, jaxpr.invars, strict=True):
            self.values[variable] = self.read(outer)
            if (name := self.name_of(outer)) is not None:
                self.named[variable] = name
        self.equations(jaxpr, place)
        return [self.read(x) for x in jaxpr.outvars]

    def read(self, variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else self.values[variable]

    def name_of(self, variable: Any) -> str | None:
        return None if isinstance(variable, Literal) else self.named.get(variable)

    def whole(self, variable: Any) -> Any:
        """Return a value with all of its entries."""
        value, shape = self.read(variable), variable.aval.shape
        if isinstance(value, Tensor):
            return self.graph.broadcast(value, shape)
        return value if np.shape(value) == shape else np.broadcast_to(np.asarray(value), shape)

    def call(self, equation: Any, place: str) -> list[Any]:
        """Return the results of a primitive: constants, or outputs of operations of the graph."""
        kind = equation.primitive.name
        names = [self.name_of(x) for x in equation.invars]
        known = next((name for name in names if name is not None), None)
        if not any(isinstance(self.read(x), Tensor) for x in equation.invars):
            return self.constants(equation, known)
        if known is not None or place or not self.graph.source:
            self.graph.source = known or place or kind
        rule = OPERATIONS.get(kind)
        if rule is None:
            raise UnsupportedError(
                f"LiteRT must be able to express every operation, got {kind} in {self.place(place)}"
            )
        lazy = kind in ("broadcast_in_dim",) or self.entrywise(equation)
        operands = [self.read(x) if lazy else self.whole(x) for x in equation.invars]
        output = equation.outvars[0].aval
        call = Call(operands, output.shape, np.dtype(output.dtype), equation.params)
        try:
            found = rule(self.graph, call)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.place(place)}: {error}") from None
        return found if equation.primitive.multiple_results else [found]

    def constants(self, equation: Any, known: str | None) -> list[Any]:
        """Return the results of a primitive of constants."""
        if equation.primitive.name == "broadcast_in_dim":
            shape = [1] * len(equation.outvars[0].aval.shape)
            held = np.asarray(self.whole(equation.invars[0]))
            for axis, n in zip(equation.params["broadcast_dimensions"], held.shape, strict=True):
                shape[axis] = n
            found: Any = held.reshape(shape)
        else:
            operands = [self.whole(x) for x in equation.invars]
            found = equation.primitive.bind(*operands, **equation.params)
        results = list(found) if equation.primitive.multiple_results else [found]
        if known is not None:
            self.named.update(dict.fromkeys(equation.outvars, known))
        return results

    def entrywise(self, equation: Any) -> bool:
        """Return whether operands may broadcast, since all have the rank of the result."""
        rank = len(equation.outvars[0].aval.shape)
        ranks = {len(np.shape(self.read(x))) for x in equation.invars}
        return equation.primitive.name in ENTRYWISE and ranks <= {0, rank}

    def place(self, place: str) -> str:
        return f"module {place!r}" if place else f"the model, after {self.graph.source!r}"
