"""The networks in Flax Linen, for images of shape (batch, height, width, channels)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from .architectures import VGG19, Architecture, LeNet, ResNet

__all__ = ["BatchNorm", "Network", "normalised"]


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with the conventions of PyTorch.

    The batch is normalised with its biased variance. The running variance uses the unbiased
    one, unlike `flax.linen.BatchNorm`:
    ``running = momentum * running + (1 - momentum) * batch``. PyTorch calls ``1 - momentum``
    the momentum. Computations use float32 or wider.

    Attributes
    ----------
    momentum : float
        0.9, where PyTorch's is 0.1.
    epsilon : float
        Added to the variance.

    Examples
    --------
    >>> x = jnp.asarray([[0.0], [2.0]], dtype=jnp.float32)
    >>> norm = BatchNorm()
    >>> _, after = norm.init_with_output(jax.random.key(0), x, train=False)
    >>> _, after = norm.apply(after, x, train=True, mutable=["batch_stats"])
    >>> {name: round(float(s[0]), 4) for name, s in after["batch_stats"].items()}
    {'mean': 0.1, 'var': 1.1}
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = running_mean.value, running_var.value
        if train:
            axes, count = tuple(range(x.ndim - 1)), x.size // channels
            if count < 2:
                raise ValueError(
                    f"x must have at least 2 values of each channel in training, got {count}"
                )
            mean, var = wide.mean(axes), wide.var(axes)
            if not self.is_initializing():
                unbiased = var * (count / (count - 1))
                for running, batch in ((running_mean, mean), (running_var, unbiased)):
                    kept = self.momentum * running.value
                    running.value = (kept + (1 - self.momentum) * batch).astype(running.value.dtype)
        normalised = (wide - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return normalised.astype(x.dtype)


class Network(nn.Module):
    """The network of an `Architecture`.

    Use the variables of `initial_variables`; ``init`` draws different ones. In training,
    ``apply(variables, images, train=True, mutable=["batch_stats"])`` also returns the new batch
    statistics.

    Attributes
    ----------
    architecture : Architecture

    Examples
    --------
    >>> from safe_core.study.models import LeNet, initial_variables
    >>> network = LeNet()
    >>> variables = initial_variables(network, seed=0)
    >>> Network(network).apply(variables, jnp.ones((2, 28, 28, 1), jnp.float32)).shape
    (2, 10)
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if isinstance(self.architecture, LeNet):
            return _lenet(self.architecture, x)
        if isinstance(self.architecture, VGG19):
            return _vgg(self.architecture, x, train)
        return _resnet(self.architecture, x, train)


class Block(nn.Module):
    """A residual block: two convolutions and a shortcut."""

    outputs: int
    stride: int
    projection: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = _conv(self.outputs, "conv1", stride=self.stride)(x)
        y = nn.relu(BatchNorm(name="norm1")(y, train=train))
        y = _conv(self.outputs, "conv2")(y)
        y = BatchNorm(name="norm2")(y, train=train)
        if self.stride > 1 and self.projection:
            x = _conv(self.outputs, "shortcut_conv", window=1, stride=self.stride)(x)
            x = BatchNorm(name="shortcut_norm")(x, train=train)
        elif self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.outputs - x.shape[-1])))
        return nn.relu(x + y)


def _conv(outputs: int, name: str, *, window: int = 3, stride: int = 1) -> nn.Conv:
    # Padding by "SAME" is not PyTorch's at stride 2.
    return nn.Conv(
        outputs,
        (window, window),
        strides=(stride, stride),
        padding=window // 2,
        use_bias=False,
        name=name,
    )


def _lenet(network: LeNet, x: jax.Array) -> jax.Array:
    x = x.reshape(len(x), -1)
    for i, (name, layer) in enumerate(network.layers().items()):
        x = nn.Dense(layer.outputs, name=name)(nn.relu(x) if i else x)
    return x


def _resnet(network: ResNet, x: jax.Array, train: bool) -> jax.Array:
    x = _conv(network.channels[0], "conv")(x)
    x = nn.relu(BatchNorm(name="norm")(x, train=train))
    for name, _, outputs, stride in network.blocks():
        projection = network.shortcut == "projection"
        x = Block(outputs, stride, projection, name=name)(x, train=train)
    return nn.Dense(network.classes, name="dense")(x.mean((1, 2)))


def _vgg(network: VGG19, x: jax.Array, train: bool) -> jax.Array:
    for stage, (count, outputs) in enumerate(network.stages, 1):
        for i in range(1, count + 1):
            x = _conv(outputs, f"stage{stage}_conv{i}")(x)
            x = nn.relu(BatchNorm(name=f"stage{stage}_norm{i}")(x, train=train))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))  # type: ignore[no-untyped-call]
    return nn.Dense(network.classes, name="dense")(x.reshape(len(x), -1))


def normalised(fn: Callable[..., Any], mean: ArrayLike, std: ArrayLike) -> Callable[..., Any]:
    """Return ``(x, *args) -> fn((x - mean) / std, *args)``, for each channel, the last axis.

    With the normalisation inside the model, its inputs are pixels in [0, 1].

    Examples
    --------
    >>> fn = normalised(lambda x: x, mean=[0.5], std=[0.25])
    >>> fn(jnp.asarray([[1.0]])).tolist()
    [[2.0]]
    """

    def of_pixels(x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        low, scale = (jnp.asarray(np.asarray(s), x.dtype) for s in (mean, std))
        return fn((x - low) / scale, *args, **kwargs)

    return of_pixels
