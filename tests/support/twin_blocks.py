"""One block in PyTorch and in Flax Linen: two layers behind a norm, with biases."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

__all__ = ["JaxBlock", "TorchBlock", "for_linen", "torch_model"]


class TorchBlock(nn.Module):
    """The block in PyTorch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class JaxBlock(linen.Module):
    """The block in Flax."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        y = jnp.tanh(linen.Dense(2 * width, precision="highest", name="up")(y))
        return x + linen.Dense(width, precision="highest", name="down")(y)


class _Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TorchBlock(width), TorchBlock(width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def torch_model(width: int) -> Any:
    """Return two blocks, one after the other, in float64 and with the same weights every time."""
    torch.manual_seed(0)
    return _Model(width).double()


def for_linen(block: nn.Module) -> dict[str, dict[str, jax.Array]]:
    """Return a copy of the parameters of a block for `JaxBlock`."""
    tree: dict[str, dict[str, jax.Array]] = {}
    for name, p in block.named_parameters():
        array = p.detach().cpu().numpy().T
        module, leaf = name.split(".")
        kind = ("scale" if array.ndim == 1 else "kernel") if leaf == "weight" else leaf
        tree.setdefault(module, {})[kind] = jnp.asarray(np.array(array))
    return tree
