"""The networks in PyTorch, for images of shape (batch, channels, height, width)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from .architectures import VGG19, Architecture, LeNet, ResNet
from .weights import to_state_dict

__all__ = ["Normalised", "build"]

Modules = OrderedDict[str, nn.Module]


def build(architecture: Architecture, variables: Mapping[str, Any]) -> nn.Sequential:
    """Return the network with given weights, such as those of `initial_variables`.

    Parameters
    ----------
    architecture : Architecture
    variables : mapping
        Variables in Flax's layout. The model takes their dtype.

    Returns
    -------
    torch.nn.Sequential
        In training mode, on the CPU.

    Raises
    ------
    ValueError
        If an array is missing or has the wrong shape.

    Examples
    --------
    >>> from safe_core.study.models import ResNet, initial_variables
    >>> network = ResNet(depth=8, width=0.25)
    >>> model = build(network, initial_variables(network, seed=0))
    >>> tuple(model(torch.ones(2, 3, 32, 32)).shape)
    (2, 10)
    """
    if isinstance(architecture, LeNet):
        modules = _lenet(architecture)
    elif isinstance(architecture, VGG19):
        modules = _vgg(architecture)
    else:
        modules = _resnet(architecture)
    arrays = to_state_dict(architecture, variables)
    state = {name: torch.from_numpy(x) for name, x in arrays.items()}
    model = nn.Sequential(modules).to(next(iter(state.values())).dtype)
    model.load_state_dict(model.state_dict() | state)  # which also has the batch counters
    return model


class Block(nn.Module):
    """A residual block: two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.new_channels = stride, outputs - inputs
        self.projection = stride > 1 and projection
        if self.projection:
            self.shortcut_conv = _conv(inputs, outputs, window=1, stride=stride)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y))
        if self.projection:
            x = self.shortcut_norm(self.shortcut_conv(x))
        elif self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return (x + y).relu()


class Normalised(nn.Module):
    """A model preceded by ``(x - mean) / std`` for each channel, the second axis.

    With the normalisation inside the model, its inputs are pixels in [0, 1].

    Examples
    --------
    >>> model = Normalised(nn.Identity(), mean=[0.5], std=[0.25])
    >>> model(torch.ones(1, 1, 1, 1)).tolist()
    [[[[2.0]]]]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: ArrayLike, std: ArrayLike) -> None:
        super().__init__()
        self.model = model
        for name, statistic in (("mean", mean), ("std", std)):
            by_channel = torch.tensor(np.asarray(statistic)).reshape(1, -1, 1, 1)
            self.register_buffer(name, by_channel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x - self.mean.to(x.dtype)) / self.std.to(x.dtype))
        return out


def _conv(inputs: int, outputs: int, *, window: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, window, stride, padding=window // 2, bias=False)


def _lenet(network: LeNet) -> Modules:
    modules: Modules = OrderedDict(flatten=nn.Flatten())
    for i, (name, layer) in enumerate(network.layers().items()):
        if i:
            modules[f"relu{i}"] = nn.ReLU()
        modules[name] = nn.Linear(layer.inputs, layer.outputs)
    return modules


def _resnet(network: ResNet) -> Modules:
    first, last = network.channels[0], network.channels[-1]
    modules: Modules = OrderedDict(
        conv=_conv(network.image[2], first), norm=nn.BatchNorm2d(first), relu=nn.ReLU()
    )
    for name, inputs, outputs, stride in network.blocks():
        modules[name] = Block(inputs, outputs, stride, network.shortcut == "projection")
    modules["mean"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["dense"] = nn.Linear(last, network.classes)
    return modules


def _vgg(network: VGG19) -> Modules:
    modules: Modules = OrderedDict()
    inputs = network.image[2]
    for stage, (count, outputs) in enumerate(network.stages, 1):
        for i in range(1, count + 1):
            modules[f"stage{stage}_conv{i}"] = _conv(inputs, outputs)
            modules[f"stage{stage}_norm{i}"] = nn.BatchNorm2d(outputs)
            modules[f"stage{stage}_relu{i}"] = nn.ReLU()
            inputs = outputs
        modules[f"stage{stage}_pool"] = nn.MaxPool2d(2)
    modules["flatten"] = nn.Flatten()
    modules["dense"] = nn.Linear(network.classifier.inputs, network.classes)
    return modules
