"""Blocks from Flax modules, Linen and NNX, and Gram matrices of their layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.tracers import TraceState

from safe_core.solvers import Gram

from ..blocks import Block

__all__ = ["linen_block", "linen_grams", "nnx_block", "nnx_grams"]

PyTree = Any


def linen_block(module: nn.Module, variables: PyTree) -> Block:
    """Return a Flax Linen module as a block of `prune_blocks`.

    Blocks of equal modules share compiled programs, if they have no variables but parameters.

    Parameters
    ----------
    module : flax.linen.Module
    variables : mapping of collection to pytree
        As for ``module.apply``. Collections other than ``"params"`` do not change.

    Returns
    -------
    Block
        Its function takes an array, or a tuple of the arguments of ``module.apply``.

    Raises
    ------
    TypeError, ValueError
        If ``module`` is not a Linen module, or ``variables`` has no ``"params"``.

    Examples
    --------
    >>> block = linen_block(nn.Dense(2), {"params": {"kernel": jnp.ones((3, 2))}})
    >>> list(block.params)
    ['kernel']
    """
    _check_linen(module)
    if "params" not in variables:
        raise ValueError(f"variables must hold 'params', got {', '.join(variables) or 'none'}")
    rest = {name: held for name, held in variables.items() if name != "params"}
    call = _LinenCall(module, _other_state(rest))
    return Block(call, variables["params"], _Grams(call))


def nnx_block(module: nnx.Module) -> Block:
    """Return a Flax NNX module as a block of `prune_blocks`, in evaluation mode.

    The module itself does not change. Put the pruned parameters back by ``nnx.update(module,
    pruned.params)``. Blocks of equal structure share compiled programs, if they have no state
    but parameters; the random streams of dropout are other state.

    Parameters
    ----------
    module : flax.nnx.Module

    Returns
    -------
    Block
        Its parameters are ``nnx.as_pure(nnx.state(module, nnx.Param))``; its function takes an
        array, or a tuple of the arguments of the module.

    Raises
    ------
    TypeError
        If ``module`` is no NNX module.

    Examples
    --------
    >>> block = nnx_block(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> block.apply_fn(block.params, jnp.ones((5, 3))).shape
    (5, 2)
    """
    graph, params, rest = nnx.split(_in_evaluation_mode(module), nnx.Param, ...)  # type: ignore[misc]
    call = _NnxCall(graph, _other_state(nnx.as_pure(rest)))
    return Block(call, nnx.as_pure(params), _Grams(call))


def linen_grams(module: nn.Module, variables: PyTree, inputs: PyTree) -> dict[str, Gram]:
    """Return the Gram matrices of the inputs of every dense layer of a Flax Linen module.

    Parameters
    ----------
    module : flax.linen.Module
    variables : pytree
        As for ``module.apply``.
    inputs : array or tuple of arrays
        The arguments of ``module.apply(variables, *inputs)``.

    Returns
    -------
    dict of str to Gram
        Keyed by the paths of kernels in ``variables["params"]``, for `flax.linen.Dense` and
        `flax.linen.DenseGeneral`, which attention uses. The importance of Wanda, the mean
        squares of the inputs, is ``gram.mean_squares()``.

    Raises
    ------
    TypeError, ValueError
        If ``module`` is not a Linen module, a layer has batch axes, or a layer is called inside
        `flax.linen.scan` or another transform.

    Examples
    --------
    >>> module = nn.Dense(2)
    >>> variables = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    >>> grams = linen_grams(module, variables, jnp.ones((5, 3)))
    >>> grams["kernel"].matrix.tolist()[0], grams["kernel"].count
    ([5.0, 5.0, 5.0], 5)
    """
    _check_linen(module)
    seen = _GramRecorder()

    def watch(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, (nn.Dense, nn.DenseGeneral)) and context.method_name == "__call__":
            name = "/".join((*layer.path, "kernel"))
            _check_no_batch(name, getattr(layer, "batch_dims", ()))
            axes = getattr(layer, "axis", -1)
            seen.add(name, args[0], (axes,) if isinstance(axes, int) else axes)
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(watch):
        module.apply(variables, *_arguments(inputs))
    return seen.grams


def nnx_grams(module: nnx.Module, *inputs: Any) -> dict[str, Gram]:
    """Return the Gram matrices of the inputs of every dense layer of a Flax NNX module.

    A copy of the module runs in evaluation mode; the module itself does not change.

    Parameters
    ----------
    module : flax.nnx.Module
    *inputs : array
        The arguments of ``module(*inputs)``.

    Returns
    -------
    dict of str to Gram
        Keyed by the paths of kernels in ``nnx.state(module)``, for `flax.nnx.Linear`,
        `flax.nnx.LinearGeneral`, which attention uses, and `flax.nnx.Einsum`. Features are in
        the order of the kernel's axes. Pass ``layout=`` for an Einsum whose kernel is not
        (input, output).

    Raises
    ------
    TypeError, ValueError
        If ``module`` is not an NNX module, a layer has batch axes or an equation that is not a
        matrix product, or a layer is called inside `flax.nnx.scan` or another transform.

    Examples
    --------
    >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> grams = nnx_grams(module, jnp.ones((5, 3)))
    >>> grams["kernel"].matrix.tolist()[0], grams["kernel"].count
    ([5.0, 5.0, 5.0], 5)
    """
    watched, seen = _in_evaluation_mode(module), _GramRecorder()
    for path, layer in nnx.iter_modules(watched):
        name = "/".join(map(str, (*path, "kernel")))
        if isinstance(layer, nnx.Linear):
            layer.dot_general = seen.product(name, layer.dot_general)
        elif isinstance(layer, nnx.LinearGeneral):
            made = layer.dot_general_cls and layer.dot_general_cls()
            layer.dot_general = seen.product(name, made or layer.dot_general or jax.lax.dot_general)
            layer.dot_general_cls = None
        elif isinstance(layer, nnx.Einsum):
            layer.einsum_op = seen.einsum(name, layer.einsum_op)
    watched(*inputs)
    return seen.grams


class _GramRecorder:
    """Gram matrices of the inputs of layers, by the names of their kernels."""

    def __init__(self) -> None:
        self.grams: dict[str, Gram] = {}
        self._trace = TraceState()  # type: ignore[no-untyped-call]

    def add(self, name: str, x: jax.Array, axes: Sequence[int]) -> None:
        """Add inputs that a layer contracts over some axes, in the kernel's order."""
        if not self._trace.is_valid():
            raise ValueError(
                f"{name} must be called outside of scan, vmap, remat and the like, in which its "
                "inputs cannot be read, got a call inside one"
            )
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        x = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
        self.grams[name] = self.grams[name].add(x) if name in self.grams else Gram.of(x)

    def product(self, name: str, dot_general: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `jax.lax.dot_general` of inputs and kernel that records the inputs."""

        def watched(x: Any, kernel: Any, numbers: Any, *args: Any, **kwargs: Any) -> Any:
            (axes, _), (batch, _) = numbers
            _check_no_batch(name, batch)
            self.add(name, x, axes)
            return dot_general(x, kernel, numbers, *args, **kwargs)

        return watched

    def einsum(self, name: str, einsum: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `jax.numpy.einsum` of inputs and kernel that records the inputs."""

        def watched(equation: str, x: Any, kernel: Any, **kwargs: Any) -> Any:
            self.add(name, x, _contracted(name, equation))
            return einsum(equation, x, kernel, **kwargs)

        return watched


def _contracted(name: str, equation: str) -> list[int]:
    """Return the input axes that an equation contracts with a kernel, in the kernel's order."""
    terms, result = equation.replace(" ", "").split("->")
    inputs, kernel = terms.split(",")
    shared = [letter for letter in kernel if letter in inputs]
    summed_alone = set(inputs + kernel) - set(shared) - set(result)
    repeated = len(set(inputs) - {"."}) + len(set(kernel)) != len(inputs.replace(".", "") + kernel)
    if "." in kernel or repeated or summed_alone or not shared or set(shared) & set(result):
        raise ValueError(
            f"{name} must be a matrix of which inputs contract all axes that they share, got the "
            f"equation {equation!r}"
        )
    head, _, tail = inputs.partition("...")
    return [head.index(s) if s in head else tail.index(s) - len(tail) for s in shared]


def _hash_of(module: Any, rest: Any) -> int:
    """Return a hash of a module and its other state, or one of its identity.

    A module with a list among its fields has no hash. Calls of it are then compiled by themselves.
    """
    try:
        return hash((module, rest))
    except TypeError:
        return id(module)


@dataclass(frozen=True)
class _LinenCall:
    """A Linen module as a function of parameters and inputs; equal ones compile alike."""

    module: nn.Module
    rest: _OtherState | None

    def __hash__(self) -> int:
        return _hash_of(self.module, self.rest)

    def __call__(self, params: PyTree, inputs: PyTree) -> Any:
        return self.module.apply(self._variables(params), *_arguments(inputs))

    def grams(self, params: PyTree, inputs: PyTree) -> dict[str, Gram]:
        return linen_grams(self.module, self._variables(params), inputs)

    def _variables(self, params: PyTree) -> PyTree:
        return {"params": params, **({} if self.rest is None else self.rest.tree)}


@dataclass(frozen=True)
class _NnxCall:
    """An NNX module as a function of parameters and inputs; equal ones compile alike."""

    graph: Any
    rest: _OtherState | None

    def __hash__(self) -> int:
        return _hash_of(self.graph, self.rest)

    def __call__(self, params: PyTree, inputs: PyTree) -> Any:
        return self._module(params)(*_arguments(inputs))

    def grams(self, params: PyTree, inputs: PyTree) -> dict[str, Gram]:
        return nnx_grams(self._module(params), *_arguments(inputs))

    def _module(self, params: PyTree) -> Any:
        return nnx.merge(self.graph, params, *(() if self.rest is None else (self.rest.tree,)))


@dataclass(frozen=True)
class _Grams:
    call: _LinenCall | _NnxCall

    def __call__(self, params: PyTree, inputs: PyTree) -> dict[str, Gram]:
        return self.call.grams(params, inputs)


class _OtherState:
    """Arrays of a block besides its parameters, compared by identity."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree


def _other_state(tree: PyTree) -> _OtherState | None:
    return _OtherState(tree) if jax.tree.leaves(tree) else None


def _arguments(inputs: PyTree) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _in_evaluation_mode(module: Any) -> Any:
    """Return a copy of an NNX module in evaluation mode, with the same arrays."""
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a flax.nnx.Module, got {type(module)!r}")
    copy = nnx.merge(*nnx.split(module))
    copy.eval()  # type: ignore[no-untyped-call]
    return copy


def _check_linen(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module)!r}")


def _check_no_batch(name: str, batch_axes: Sequence[int]) -> None:
    if batch_axes:
        raise ValueError(f"{name} must have no batch axes, got {tuple(batch_axes)!r}")
