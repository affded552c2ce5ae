"""Networks as lists of layers, which define the models, parameter counts and weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from safe_core import _checks

__all__ = ["VGG19", "Architecture", "Conv", "Dense", "LeNet", "Norm", "ResNet", "architecture"]

Image = tuple[int, int, int]
STAGES = 3


class Conv(NamedTuple):
    """A square convolution without bias; padding keeps the size at stride 1."""

    window: int
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.window**2 * self.inputs * self.outputs


class Norm(NamedTuple):
    """Batch normalisation with scale and bias; its statistics are not parameters."""

    channels: int

    @property
    def size(self) -> int:
        """Number of parameters."""
        return 2 * self.channels


class Dense(NamedTuple):
    """A linear layer with bias.

    ``image`` is the (height, width, channels) that a layer flattens first, else None.
    """

    inputs: int
    outputs: int
    image: Image | None = None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return (self.inputs + 1) * self.outputs


Layer = Conv | Norm | Dense


@dataclass(frozen=True)
class LeNet:
    """LeNet-300-100: dense layers with ReLU between, on the flattened image.

    Attributes
    ----------
    hidden : tuple of int
        Units of the hidden layers.
    classes : int
    image : tuple of int
        Height, width and channels.

    References
    ----------
    LeCun et al. 1998; Lee et al. 2025, appendix B.2.

    Examples
    --------
    >>> LeNet().parameters
    266610
    """

    hidden: tuple[int, ...] = (300, 100)
    classes: int = 10
    image: Image = (28, 28, 1)

    def __post_init__(self) -> None:
        for units in self.hidden:
            _checks.integer("units of a hidden layer", units, low=1)
        _check_ends(self.classes, self.image)

    def layers(self) -> dict[str, Dense]:
        """Return the layers by name, in the order of the forward pass."""
        sizes = (math.prod(self.image), *self.hidden, self.classes)
        return {
            f"dense{i + 1}": Dense(m, n, None if i else self.image)
            for i, (m, n) in enumerate(itertools.pairwise(sizes))
        }

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return _count(self.layers())

    def weights(self, without: Collection[str] = ()) -> int:
        """Return the number of weights, without biases, normalisation and some layers."""
        return _weights(self.layers(), without)


@dataclass(frozen=True)
class ResNet:
    """The residual network for CIFAR of ``6 n + 2`` layers: ResNet-20, ResNet-32 and so on.

    Three stages of n blocks, with 16, 32 and 64 channels times ``width``, after a first
    convolution; then the mean over the image and a linear layer.

    Attributes
    ----------
    depth : int
        Number of layers, such as 20 or 32.
    width : float
        Multiplies the channels; 2 in the SAFE paper.
    classes : int
    image : tuple of int
        Height, width and channels. Height and width are arbitrary.
    shortcut : {"identity", "projection"}
        The shortcut where the channels double: zeros for the new channels, as published for
        CIFAR (option A), or a 1x1 convolution with normalisation (option B).

    References
    ----------
    He et al. 2016, section 4.2; Lee et al. 2025, section 4.2.

    Examples
    --------
    >>> ResNet(20).parameters, ResNet(32).parameters, ResNet(20, width=2).parameters
    (269722, 464154, 1073962)
    """

    depth: int = 20
    width: float = 1
    classes: int = 10
    image: Image = (32, 32, 3)
    shortcut: str = "identity"

    def __post_init__(self) -> None:
        if _checks.integer("depth", self.depth, low=8) % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2, such as 20 or 32, got {self.depth}")
        _check_width(self.width, 16)
        _checks.choice("shortcut", self.shortcut, ("identity", "projection"))
        _check_ends(self.classes, self.image)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the three stages."""
        return tuple(round(16 * self.width) * 2**stage for stage in range(STAGES))

    def blocks(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, inputs, outputs and stride of the residual blocks."""
        inputs = self.channels[0]
        for stage, outputs in enumerate(self.channels):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage and not block else 1
                yield f"stage{stage + 1}_block{block + 1}", inputs, outputs, stride
                inputs = outputs

    def layers(self) -> dict[str, Layer]:
        """Return the layers by name, in the order of the forward pass."""
        first, last = self.channels[0], self.channels[-1]
        layers: dict[str, Layer] = {"conv": Conv(3, self.image[2], first), "norm": Norm(first)}
        for name, inputs, outputs, stride in self.blocks():
            layers[f"{name}/conv1"] = Conv(3, inputs, outputs)
            layers[f"{name}/norm1"] = Norm(outputs)
            layers[f"{name}/conv2"] = Conv(3, outputs, outputs)
            layers[f"{name}/norm2"] = Norm(outputs)
            if stride > 1 and self.shortcut == "projection":
                layers[f"{name}/shortcut_conv"] = Conv(1, inputs, outputs)
                layers[f"{name}/shortcut_norm"] = Norm(outputs)
        layers["dense"] = Dense(last, self.classes)
        return layers

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return _count(self.layers())

    def weights(self, without: Collection[str] = ()) -> int:
        """Return the number of weights, without biases, normalisation and some layers."""
        return _weights(self.layers(), without)


@dataclass(frozen=True)
class VGG19:
    """VGG-19 with batch normalisation, as used for CIFAR: 16 convolutions, a linear layer.

    Five stages of convolutions, each followed by 2x2 max pooling. An image of 32 by 32 pixels
    becomes a single pixel, which is flattened for the linear layer.

    Attributes
    ----------
    width : float
        Multiplies the channels.
    classes : int
    image : tuple of int
        Height, width and channels; the first two at least 32.

    References
    ----------
    Simonyan and Zisserman 2015, table 1, E; Lee et al. 2025, appendix B.3.

    Examples
    --------
    >>> VGG19().parameters
    20035018
    """

    width: float = 1
    classes: int = 10
    image: Image = (32, 32, 3)

    def __post_init__(self) -> None:
        _check_width(self.width, 64)
        _check_ends(self.classes, self.image)
        if min(self.image[:2]) < 32:
            raise ValueError(f"image must be at least 32 by 32 for VGG-19, got {self.image}")

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Number of convolutions and channels of each stage."""
        base = round(64 * self.width)
        return tuple(zip((2, 2, 4, 4, 4), (base * m for m in (1, 2, 4, 8, 8)), strict=True))

    def layers(self) -> dict[str, Layer]:
        """Return the layers by name, in the order of the forward pass."""
        layers: dict[str, Layer] = {}
        inputs = self.image[2]
        for stage, (count, outputs) in enumerate(self.stages, 1):
            for i in range(1, count + 1):
                layers[f"stage{stage}_conv{i}"] = Conv(3, inputs, outputs)
                layers[f"stage{stage}_norm{i}"] = Norm(outputs)
                inputs = outputs
        layers["dense"] = self.classifier
        return layers

    @property
    def classifier(self) -> Dense:
        """The last layer."""
        height, width, _ = self.image
        image = (height // 32, width // 32, self.stages[-1][1])
        return Dense(math.prod(image), self.classes, image)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return _count(self.layers())

    def weights(self, without: Collection[str] = ()) -> int:
        """Return the number of weights, without biases, normalisation and some layers."""
        return _weights(self.layers(), without)


Architecture = LeNet | ResNet | VGG19


def architecture(
    name: str, *, classes: int = 10, image: Image = (32, 32, 3), width: float = 1
) -> Architecture:
    """Return a network by its name.

    Parameters
    ----------
    name : {"lenet-300-100", "resnet-20", "resnet-32", "vgg-19"}
    classes : int
    image : tuple of int
        Height, width and channels.
    width : float
        Multiplies the channels, or the hidden units of LeNet.

    Raises
    ------
    TypeError, ValueError
        If the name is unknown, or the network does not support the size.

    Examples
    --------
    >>> architecture("resnet-20", width=2)
    ResNet(depth=20, width=2, classes=10, image=(32, 32, 3), shortcut='identity')
    """
    names = ("lenet-300-100", "resnet-20", "resnet-32", "vgg-19")
    _checks.choice("name", name, names)
    if name == "vgg-19":
        return VGG19(width, classes, image)
    if name == "lenet-300-100":
        _check_width(width, 100)
        return LeNet((round(300 * width), round(100 * width)), classes, image)
    return ResNet(int(name.removeprefix("resnet-")), width, classes, image)


def _count(layers: Mapping[str, Layer]) -> int:
    return sum(layer.size for layer in layers.values())


def _weights(layers: Mapping[str, Layer], without: Collection[str]) -> int:
    kept = [layer for name, layer in layers.items() if name not in without]
    biases = sum(layer.outputs for layer in kept if isinstance(layer, Dense))
    return sum(layer.size for layer in kept if not isinstance(layer, Norm)) - biases


def _check_width(width: float, channels: int) -> None:
    _checks.real("width", width)
    if round(channels * width) < 1:
        raise ValueError(f"width must leave at least one of {channels} channels, got {width!r}")


def _check_ends(classes: int, image: Image) -> None:
    _checks.integer("classes", classes, low=1)
    if len(image) != 3:
        raise ValueError(f"image must be (height, width, channels), got {image!r}")
    for size in image:
        _checks.integer("each size of image", size, low=1)
