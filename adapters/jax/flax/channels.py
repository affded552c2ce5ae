"""Remove channels that are zero from a Flax network, which becomes smaller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import FlaxError

from safe_core.adapters.model_calls import naming_inputs, read_arguments

from ..channels import ChannelGroups, ZeroChannels, check_base_state, cut_state
from ..outputs import compare
from .channel_models import LinenChannels, NnxChannels, channel_model
from .channel_results import RemovedChannels, SilentChannels

__all__ = ["shrink", "silence_channels"]

PyTree = Any
_HINT = 'the first axis counts samples; pass flags by name, such as {"x": x, "train": False}'


def shrink(
    model: Any, example_inputs: Any, *, variables: PyTree = None, state: PyTree = None
) -> RemovedChannels:
    """Remove the output channels of dense and convolution layers whose kernels are all zero.

    Layers that read a channel lose their inputs for it, and batch norms and layers whose outputs
    are added to it lose it too, as the operations of the model show when JAX traces it. A channel
    goes only if nothing but zeros is written to it, so the outputs stay equal up to rounding.
    This is checked on ``example_inputs``.

    A bias, or the shift of a batch norm, makes a channel constant instead of zero. Masks of
    kernels leave them free. So call `silence_channels` first, and both before the last stage of
    training, which adapts to it.

    The arguments stay as they are. Create a `sparse_optimizer` for the smaller model afterwards.

    Parameters
    ----------
    model : flax.nnx.Module, flax.linen.Module or ShrunkLinen
    example_inputs : array, tuple or mapping
        One argument, all positional ones, or all by name. Random values will do.
    variables : pytree, optional
        Those of a Linen module.
    state : pytree, optional
        State of the optax optimizer of all parameters. Its arrays with the paths and shapes of
        parameters, such as momentum, keep the entries of the channels that stay. Of a
        `SparseOptimizerState`, its ``base``.

    Returns
    -------
    RemovedChannels
        Its ``model`` is an NNX module, or for Linen a `ShrunkLinen`, with ``variables``.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If the model cannot take ``example_inputs``, cannot be traced, has channels that are
        constant, or would compute something else; if ``example_inputs`` hold NaN; or if an array
        of the state has another shape than its parameter, or the state is that of other parameters.

    Examples
    --------
    >>> model = nnx.Sequential(
    ...     nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    ... )
    >>> model.layers[0].kernel[...] = model.layers[0].kernel[...].at[:, 1].set(0)
    >>> found = shrink(model, jnp.ones((5, 4)))
    >>> found.removed, found.model.layers[0].kernel.shape, found.model.layers[2].kernel.shape
    ({'layers/0': 1}, (4, 2), (2, 2))
    >>> print(found)
    16 of 23 parameters are left
    removed channels: 1 of 'layers/0'
    """
    if isinstance(state, nnx.Optimizer):
        raise TypeError(
            "state must be the opt_state of the nnx.Optimizer, or the base of the state of "
            "sparse_optimizer in it, got the nnx.Optimizer"
        )
    check_base_state(state)
    found = _Removable(model, example_inputs, variables)
    constants = found.counts(found.groups.silenced(found.source.leaves, found.constants()))
    if constants:
        counts = ", ".join(f"{count} of {name}" for name, count in constants.items())
        raise ValueError(
            "channels without weights must have no bias, and no scale and shift of a norm, got "
            f"constant channels: {counts}. Call silence_channels first to set these to zero"
        )
    leaves = [found.cut(i, leaf) for i, leaf in enumerate(found.source.leaves)]
    smaller = found.source.changed(leaves)
    found.check(smaller)
    size = _size(found.source, found.source.leaves), _size(found.source, leaves)
    return RemovedChannels(
        smaller.model,
        smaller.variables,
        found.cut_state(state),
        smaller.features,
        found.removed(),
        found.kept(),
        size,
    )


def silence_channels(
    model: Any, example_inputs: Any, *, variables: PyTree = None
) -> SilentChannels:
    """Return a model without what keeps channels without weights from being zero.

    A channel whose kernel is all zero still has the value of its bias, or of the shift of the
    batch norm after it. This sets such biases, and the scales and shifts of the norms, to zero,
    for the channels that `shrink` can take out. If a batch norm has no scale, its running
    statistics are set to zero, too. The outputs change, so do it before the last stage of
    training: either `shrink` the model then, or keep the zeros of all its parameters by
    `safe_core.keep_zeros`, with ``where=``.

    The arguments stay as they are.

    Parameters
    ----------
    model : flax.nnx.Module, flax.linen.Module or ShrunkLinen
    example_inputs : array, tuple or mapping
        One argument, all positional ones, or all by name. Random values will do.
    variables : pytree, optional
        Those of a Linen module.

    Returns
    -------
    SilentChannels

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If the model cannot take ``example_inputs``, they hold NaN, or it cannot be traced.

    Examples
    --------
    >>> model = nnx.Sequential(
    ...     nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    ... )
    >>> model.layers[0].kernel[...] = model.layers[0].kernel[...].at[:, 1].set(0)
    >>> model.layers[0].bias[...] += 1
    >>> found = silence_channels(model, jnp.ones((5, 4)))
    >>> found.silent, found.model.layers[0].bias[...].tolist()
    ({'layers/0': 1}, [1.0, 0.0, 1.0])
    """
    found = _Removable(model, example_inputs, variables)
    leaves = found.groups.silenced(found.source.leaves, found.zero)
    changed = found.source.changed(leaves)
    silent = model if isinstance(found.source, LinenChannels) else changed.model
    return SilentChannels(silent, changed.variables, found.counts(leaves))


class _Removable:
    """The channels of a model that can be removed.

    Attributes
    ----------
    source : NnxChannels or LinenChannels
    groups : ChannelGroups
    zero : ZeroChannels
    """

    def __init__(self, model: Any, example_inputs: Any, variables: PyTree) -> None:
        self.source: NnxChannels | LinenChannels = channel_model(model, variables)
        held = [*self.source.leaves, *jax.tree.leaves(example_inputs)]
        if any(isinstance(x, jax.core.Tracer) for x in held):
            raise TypeError(
                "model, variables and example_inputs must hold arrays that can be read, because "
                "zeros decide the shapes, got traced ones: call this outside of jax.jit"
            )
        given, self._structure = jax.tree.flatten(
            read_arguments(example_inputs, _is_array, "an array")
        )
        # Flags and other arguments that are no arrays must stay known while tracing.
        self._arrays = [_is_array(x) for x in given]
        self._given = given
        self._inputs = [x for x, flag in zip(given, self._arrays, strict=True) if flag]
        for x in self._inputs:
            if jnp.issubdtype(x.dtype, jnp.inexact) and bool(jnp.isnan(x).any()):
                raise ValueError(f"example_inputs must hold no NaN, got some in shape {x.shape}")
        count = len(self.source.leaves)

        def function(*values: Any) -> list[Any]:
            args, kwargs = self._filled(values[count:])
            return jax.tree.leaves(self.source.call(values[:count], *args, **kwargs))

        try:
            with naming_inputs(self._inputs, other=(jax.errors.JAXTypeError,), hint=_HINT):
                program = self.source.traced(function, self._inputs)
        except jax.errors.JAXTypeError as error:
            cause = str(error).splitlines()[0]
            raise ValueError(f"model must be one that JAX can trace, got {cause}") from error
        self.groups = ChannelGroups(program, self.source.trainable, self.source.fixed())
        self.zero = self.groups.zero(self.source.leaves, self._inputs)
        self._wanted = function

    def constants(self) -> ZeroChannels:
        """Return the channels that can go as soon as they are silent, alone."""
        return self.zero._replace(gone=np.zeros_like(self.zero.gone))

    def removed(self) -> dict[str, int]:
        """Return the number of output channels of layers that go."""
        return self._layers(self.groups.written & self.zero.gone)

    def kept(self) -> dict[str, str]:
        """Return the layers with channels that are zero and stay, and why."""
        found = {}
        for channel, reason in self.zero.kept.items():
            marked = np.zeros_like(self.zero.gone)
            marked[channel] = True
            found.update(dict.fromkeys(self._layers(marked), reason))
        return found

    def counts(self, leaves: Sequence[Any]) -> dict[str, int]:
        """Return the number of channels that differ in other leaves, by the path of the layer."""
        found: dict[str, set[int]] = {}
        for name, labels, old, new in zip(
            self.source.names, self.groups.labels, self.source.leaves, leaves, strict=True
        ):
            if new is old:
                continue
            differs = np.asarray(old != new)
            for axis, own in enumerate(labels):
                others = tuple(i for i in range(differs.ndim) if i != axis)
                silent = (self.zero.gone | self.zero.constant)[own] & differs.any(others)
                found.setdefault(_owner(name), set()).update(np.flatnonzero(silent).tolist())
        return {name: len(channels) for name, channels in sorted(found.items()) if channels}

    def cut(self, leaf: int, value: Any) -> Any:
        """Return an array of the shape of a leaf without the channels that go."""
        return self.groups.cut(leaf, value, self.zero.gone)

    def cut_state(self, state: PyTree) -> PyTree:
        """Return an optimizer state without the channels that go."""
        numbers = {
            name: i
            for i, (name, own) in enumerate(
                zip(self.source.names, self.source.trainable, strict=True)
            )
            if own
        }
        params = {name: self.source.leaves[i] for name, i in numbers.items()}
        return cut_state(state, params, lambda name, x: self.cut(numbers[name], x))

    def check(self, smaller: Any) -> None:
        """Raise an error unless a smaller network computes the same."""
        if not self.zero.gone.any():
            return
        wanted = jax.jit(self._wanted)(*self.source.leaves, *self._inputs)
        try:
            args, kwargs = self._filled(self._inputs)
            found = jax.tree.leaves(self.source.run(smaller, *args, **kwargs))
        except (TypeError, ValueError, IndexError, AssertionError, FlaxError) as error:
            cause = str(error).splitlines()[0]
            raise ValueError(
                "model must take its sizes from its arrays, so that it runs without its zero "
                f"channels, got {type(error).__name__}: {cause}"
            ) from error
        compare(
            wanted,
            found,
            "model must compute the same without its zero channels, got other outputs for "
            "example_inputs: does it compute with the number of its channels?",
        )

    def _filled(self, inputs: Sequence[Any]) -> Any:
        """Return the arguments of the model with other arrays."""
        left = iter(inputs)
        values = [
            next(left) if flag else x for x, flag in zip(self._given, self._arrays, strict=True)
        ]
        return jax.tree.unflatten(self._structure, values)

    def _layers(self, channels: Any) -> dict[str, int]:
        """Return the number of some channels by the path of their layer."""
        found: dict[str, int] = {}
        for name, labels in zip(self.source.names, self.groups.labels, strict=True):
            count = sum(int(channels[own].sum()) for own in labels)
            if count:
                found[_owner(name)] = found.get(_owner(name), 0) + count
        return found


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def _size(source: NnxChannels | LinenChannels, leaves: Sequence[Any]) -> int:
    return sum(int(jnp.size(x)) for x, own in zip(leaves, source.trainable, strict=True) if own)
