"""List the operations of a function that JAX has traced, without the calls around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

__all__ = ["Operation", "Program", "called"]

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Primitives that call a function once; a loop has a function among its parameters, too.
_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)


def called(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """Return the program that an equation calls once, with its constants, or None."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = next(equation.params[key] for key in _INNER if key in equation.params)
    return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())


class Operation(NamedTuple):
    """An operation on numbered values."""

    primitive: Any
    params: Mapping[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]


class Program:
    """A traced function as a list of operations on numbered values.

    JAX shares the program of a function that is called twice, with its variables. Numbers tell
    the values of the two calls apart.

    Attributes
    ----------
    operations : list of Operation
    inputs, outputs : list of int
        Numbers of the values that the function takes and returns.
    constants : dict of int to array
    shapes : list of tuple of int
        Shape of each value.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> program = Program(lambda x: jax.nn.relu(x) + 1, jnp.ones(2))
    >>> [operation.primitive.name for operation in program.operations]
    ['max', 'add']
    """

    def __init__(self, function: Callable[..., Any], *inputs: Any) -> None:
        closed = jax.make_jaxpr(function)(*inputs)
        self.operations: list[Operation] = []
        self.constants: dict[int, Any] = {}
        self.shapes: list[tuple[int, ...]] = []
        jaxpr = closed.jaxpr
        self.inputs = [self._number(x) for x in jaxpr.invars]
        self.outputs = self._inline(jaxpr, closed.consts, self.inputs)

    def run(self, inputs: Sequence[Any]) -> dict[int, Any]:
        """Return all values for some inputs, by number."""
        values = {**self.constants, **dict(zip(self.inputs, inputs, strict=True))}
        for operation in self.operations:
            # Other versions of JAX pass the functions of a loop beside its parameters.
            bound = operation.primitive.get_bind_params(operation.params)
            functions, params = bound if isinstance(bound, tuple) else ((), bound)
            found = operation.primitive.bind(
                *functions, *(values[i] for i in operation.operands), **params
            )
            results = found if operation.primitive.multiple_results else [found]
            values.update(zip(operation.results, results, strict=True))
        return values

    def _number(self, variable: Any) -> int:
        self.shapes.append(tuple(getattr(variable.aval, "shape", ())))
        return len(self.shapes) - 1

    def _constant(self, variable: Any, value: Any) -> int:
        number = self._number(variable)
        self.constants[number] = value
        return number

    def _inline(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        """Append the operations of a program and return the numbers of its outputs."""
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[variable] = self._constant(variable, value)

        def read(x: Any) -> int:
            return self._constant(x, x.val) if isinstance(x, Literal) else numbers[x]

        for equation in jaxpr.eqns:
            operands = [read(x) for x in equation.invars]
            inner = called(equation)
            if inner is None:
                results = [self._number(x) for x in equation.outvars]
                self.operations.append(
                    Operation(equation.primitive, equation.params, tuple(operands), tuple(results))
                )
            else:
                results = self._inline(*inner, operands)
            numbers.update(zip(equation.outvars, results, strict=True))
        return [read(x) for x in jaxpr.outvars]
