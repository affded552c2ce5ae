"""The layers of a model that write to channels, and which of these channels are always zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .example_inputs import tensors
from .weights import prunable_weights

__all__ = ["ChannelLayers"]

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class ChannelLayers:
    """Linear and convolution layers of a model, and its batch norms.

    Attributes
    ----------
    modules : dict of str to torch.nn.Module
        The layers and norms, by name.
    axes : dict of str to int
        Axis of the output channels in the weight of each module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        layouts = prunable_weights(model)
        self.modules: dict[str, nn.Module] = {}
        self.axes: dict[str, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                if module.weight is None and module.running_mean is None:
                    continue  # it has nothing to cut
                self.modules[name], self.axes[name] = module, 0
            elif isinstance(module, _LAYERS):
                weight = module._parameters.get("weight")
                layout = None if weight is None else layouts.get(weight)
                if layout is not None:
                    self.modules[name], self.axes[name] = module, layout.output_axes[0]

    def is_norm(self, name: str) -> bool:
        """Return whether a module is a batch norm."""
        return isinstance(self.modules[name], _BatchNorm)

    def zero(self) -> dict[str, set[int]]:
        """Return the output channels of every layer whose weights are all zero."""
        found = {}
        for name in self.modules:
            if self.is_norm(name):
                continue
            nonzero = self._by_channel(name).count_nonzero(dim=1)
            indices = set((nonzero == 0).nonzero().flatten().tolist())
            if indices:
                found[name] = indices
        return found

    def _by_channel(self, name: str) -> Tensor:
        weight: Tensor = self.modules[name].weight  # type: ignore[assignment]
        return weight.detach().movedim(self.axes[name], 0).flatten(1)

    def quiet(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, constants: bool
    ) -> dict[str, list[bool]]:
        """Return whether each channel is zero for all inputs, for the modules that are called.

        ``constants`` says whether biases and the means and shifts of norms count.
        """
        twin, found = self._positive_twin(constants), dict[str, Tensor]()
        for name, module in twin.modules.items():
            module.register_forward_hook(_recorder(name, module, found))
        twin.model(*_positive(args), **_positive(kwargs))
        return {name: zero.tolist() for name, zero in found.items()}

    def have_effect(
        self, constants: Mapping[str, Sequence[int]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Return whether outputs depend on what `drop` sets to zero."""
        twin, given = self._positive_twin(constants=True), (_positive(args), _positive(kwargs))
        before = list(tensors(twin.model(*given[0], **given[1])))
        twin.drop(constants)
        after = tensors(twin.model(*given[0], **given[1]))
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def _positive_twin(self, constants: bool) -> ChannelLayers:
        """Return a copy with positive weights, whose layers get positive inputs.

        Nothing cancels in it and no ReLU is inactive, so a channel is zero only if no weight
        leads to it.
        """
        twin = ChannelLayers(copy.deepcopy(self.model))
        for parameter in twin.model.parameters():
            parameter.abs_()
        for name, module in twin.modules.items():
            twin._make_positive(name, constants)
            module.register_forward_pre_hook(lambda _, given: _positive(given))
        return twin

    def _make_positive(self, name: str, constants: bool) -> None:
        module: Any = self.modules[name]
        if not self.is_norm(name):
            # Outputs no larger than the inputs, so that deep networks do not overflow.
            largest = self._by_channel(name).sum(dim=1).amax()
            module.weight.div_(torch.where(largest > 0, largest, 1))
        elif module.running_mean is not None:
            # Negative, because it is subtracted.
            module.running_mean.abs_().mul_(-1 if constants else 0)
            module.running_var.fill_(1)
        if not constants and module.bias is not None:
            module.bias.zero_()

    def drop(self, constants: Mapping[str, Sequence[int]]) -> None:
        """Set biases, and the scales and shifts of norms, to zero for some channels."""
        for name, indices in constants.items():
            module: Any = self.modules[name]
            values = [module.bias]
            if self.is_norm(name):
                # Without a scale the mean makes the channel constant.
                values.append(module.running_mean if module.weight is None else module.weight)
            for value in values:
                if value is not None:
                    value[list(indices)] = 0


def _positive(value: Any) -> Any:
    """Return nested values with positive floating tensors."""
    if torch.is_tensor(value):
        return value.abs() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _positive(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_positive, value))
    return value


def _recorder(name: str, module: nn.Module, found: dict[str, Tensor]) -> Any:
    """Return a hook that notes which channels of a module's output are all zero."""
    weight: Any = module.weight
    # From the end, because a convolution takes images with or without a batch.
    axis = 1 if isinstance(module, _BatchNorm) else 1 - weight.ndim

    def record(module: nn.Module, given: Any, output: Tensor) -> None:
        zero = (output == 0).movedim(axis, 0).flatten(1).all(dim=1)
        found[name] = found[name] & zero if name in found else zero

    return record
