"""Read the leaves of Flax modules, and make modules with fewer channels."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from safe_core import _checks

from ..traced_program import Program
from ..weights import name_of
from .sparse_model import evaluation_copy, layers_of

__all__ = ["Changed", "LinenChannels", "NnxChannels", "ShrunkLinen", "channel_model"]

PyTree = Any
_LINEN = (nn.Dense, nn.Conv, nn.ConvTranspose, nn.BatchNorm)
_NNX = (nnx.Linear, nnx.Conv, nnx.ConvTranspose, nnx.BatchNorm)


class ShrunkLinen(NamedTuple):
    """A Linen module that runs with fewer features than it declares.

    To be independent of it, declare a module with the numbers in ``features`` instead.

    Attributes
    ----------
    module : flax.linen.Module
        The module with the larger layers.
    features : dict of str to int
        Number of features of the smaller layers, by the path of the layer.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> smaller = ShrunkLinen(nn.Sequential([nn.Dense(3)]), {"layers_0": 2})
    >>> variables = {"params": {"layers_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}}
    >>> smaller.apply(variables, jnp.ones((1, 4))).tolist()
    [[4.0, 4.0]]
    """

    module: nn.Module
    features: dict[str, int]

    def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        """Return ``module.apply(variables, *args, **kwargs)`` of the smaller network.

        All options of Linen work, such as ``mutable``, and it can be compiled by `jax.jit`.
        """

        def resize(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            size = self.features.get(_joined(layer.path))
            if size is None or not isinstance(layer, _LINEN):
                return next_fn(*args, **kwargs)
            declared = layer.features
            # A module is frozen outside of its setup.
            object.__setattr__(layer, "features", size)
            try:
                return next_fn(*args, **kwargs)
            finally:
                object.__setattr__(layer, "features", declared)

        with nn.intercept_methods(resize):
            return self.module.apply(variables, *args, **kwargs)


class Changed(NamedTuple):
    """A model with other arrays.

    Attributes
    ----------
    model : flax.nnx.Module or ShrunkLinen
    variables : pytree or None
        Those of a Linen module.
    features : dict of str to int
        Number of features of layers that are smaller now, by the path of the layer.
    """

    model: Any
    variables: PyTree
    features: dict[str, int]


class NnxChannels:
    """The arrays of an NNX module.

    Attributes
    ----------
    leaves : list of array
    names : list of str
        Paths of the leaves.
    trainable : list of bool
        Whether each leaf is a parameter.
    """

    def __init__(self, given: nnx.Module) -> None:
        self._definition, state = nnx.split(given)
        found, self._structure = jax.tree.flatten_with_path(state)
        params = jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(given, nnx.Param)))
        own = {name_of(path) for path, _ in params}
        self.leaves = [leaf for _, leaf in found]
        self.names = [name_of(path) for path, _ in found]
        self.trainable = [name in own for name in self.names]
        self._evaluated, _ = nnx.split(evaluation_copy(given))
        self._kinds = {_joined(path): type(layer) for path, layer in nnx.iter_modules(given)}

    def call(self, leaves: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model in evaluation mode."""
        model: Any = nnx.merge(self._evaluated, jax.tree.unflatten(self._structure, leaves))
        return model(*args, **kwargs)

    def traced(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Program:
        """Return the program of a function of the leaves and inputs."""
        return Program(function, *self.leaves, *inputs)

    def fixed(self) -> dict[int, str]:
        """Return the leaves that must keep their shapes, and why."""
        known = {name for name, kind in self._kinds.items() if issubclass(kind, _NNX)}
        return _fixed(self.names, known)

    def changed(self, leaves: Sequence[Any]) -> Changed:
        """Return a copy of the module with other arrays."""
        model: nnx.Module = nnx.merge(self._definition, jax.tree.unflatten(self._structure, leaves))
        features = {}
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, _NNX):
                size = _resize(layer)
                if size is not None:
                    features[_joined(path)] = size
        return Changed(model, None, features)

    def run(self, changed: Changed, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of a changed model in evaluation mode."""
        return evaluation_copy(changed.model)(*args, **kwargs)


def _resize(layer: Any) -> int | None:
    """Set the sizes that a layer declares to those of its arrays; return a new number of outputs.

    Layers in a stack have arrays with more axes and stay as they are.
    """
    if isinstance(layer, nnx.BatchNorm):
        layer.num_features = layer.mean[...].size
        return None
    shape, before = layer.kernel[...].shape, layer.out_features
    if isinstance(layer, nnx.Linear):
        if len(shape) == 2:
            layer.in_features, layer.out_features = shape
        return layer.out_features if layer.out_features != before else None
    if len(shape) == len(layer.kernel_shape):
        inputs, outputs = shape[-2:]
        if isinstance(layer, nnx.ConvTranspose):
            if layer.transpose_kernel:
                inputs, outputs = outputs, inputs
        else:
            inputs *= layer.feature_group_count
        layer.kernel_shape, layer.in_features, layer.out_features = shape, inputs, outputs
    return layer.out_features if layer.out_features != before else None


class LinenChannels:
    """The arrays of a Linen module, with the attributes of `NnxChannels`."""

    def __init__(self, given: ShrunkLinen, variables: PyTree) -> None:
        self._given = given
        self._outputs: dict[str, int] = {}  # the output axis of the kernel of each known layer
        found, self._structure = jax.tree.flatten_with_path(variables)
        self.leaves = [leaf for _, leaf in found]
        self.names = [name_of(path[1:]) for path, _ in found]
        self.trainable = [name_of(path[:1]) == "params" for path, _ in found]

    def call(self, leaves: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model."""
        return self._given.apply(jax.tree.unflatten(self._structure, leaves), *args, **kwargs)

    def traced(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Program:
        """Return the program of a function of the leaves and inputs."""

        def watch(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            if isinstance(layer, _LINEN):
                swapped = getattr(layer, "transpose_kernel", False)
                self._outputs[_joined(layer.path)] = -2 if swapped else -1
            return next_fn(*args, **kwargs)

        with nn.intercept_methods(watch):
            return Program(function, *self.leaves, *inputs)

    def fixed(self) -> dict[int, str]:
        """Return the leaves that must keep their shapes, and why."""
        return _fixed(self.names, self._outputs)

    def changed(self, leaves: Sequence[Any]) -> Changed:
        """Return the module with other arrays."""
        features = {}
        for name, old, new in zip(self.names, self.leaves, leaves, strict=True):
            owner, _, last = name.rpartition("/")
            if last == "kernel" and owner in self._outputs:
                axis = self._outputs[owner]
                if new.shape[axis] != old.shape[axis]:
                    features[owner] = new.shape[axis]
        variables = jax.tree.unflatten(self._structure, leaves)
        every = {**self._given.features, **features}
        return Changed(self._given._replace(features=every), variables, features)

    def run(self, changed: Changed, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of a changed model."""
        return changed.model.apply(changed.variables, *args, **kwargs)


def _fixed(names: Sequence[str], known: Container[str]) -> dict[int, str]:
    """Return the leaves of modules that are none of some known ones, and the reason."""
    return {
        leaf: f"the parameter {name!r} belongs to no dense or convolution layer and no batch norm"
        for leaf, name in enumerate(names)
        if name.rpartition("/")[0] not in known
    }


def channel_model(model: Any, variables: PyTree) -> NnxChannels | LinenChannels:
    """Return the arrays of a Flax module, or raise a TypeError that names the argument."""
    given = model if isinstance(model, ShrunkLinen) else ShrunkLinen(model, {})
    layers_of(given.module, variables)
    if isinstance(model, nnx.Module):
        return NnxChannels(model)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            "variables must be a mapping with the entry 'params', as module.init returns it, got "
            f"{_checks.shown(variables)}"
        )
    return LinenChannels(given, variables)


def _joined(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))
