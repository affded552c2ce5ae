"""Alternatives to compare with, written as they are in wide use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import torch
from torch import Tensor

__all__ = [
    "ForeachSAM",
    "MinimalSAM",
    "TwoArrayADMM",
    "by_kthvalue",
    "by_sort",
    "by_sort_jax",
    "by_topk",
]


def by_sort(arrays: list[Tensor], kept: int) -> list[Tensor]:
    """Project as published: sort all magnitudes, read the threshold, multiply by a mask."""
    flat = torch.cat([x.abs().reshape(-1) for x in arrays])
    threshold = flat.sort().values[flat.numel() - kept]
    return [x * (x.abs() >= threshold) for x in arrays]


def by_kthvalue(arrays: list[Tensor], kept: int) -> list[Tensor]:
    """Project with `torch.kthvalue` instead of a sort."""
    flat = torch.cat([x.abs().reshape(-1) for x in arrays])
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    return [x * (x.abs() >= threshold) for x in arrays]


def by_topk(arrays: list[Tensor], kept: int) -> list[Tensor]:
    """Project with `torch.topk` instead of a sort."""
    flat = torch.cat([x.abs().reshape(-1) for x in arrays])
    threshold = flat.topk(kept, sorted=False).values.min()
    return [x * (x.abs() >= threshold) for x in arrays]


def by_sort_jax(arrays: list[Any], kept: int) -> list[Any]:
    """Project as published, in JAX."""
    flat = jnp.concatenate([jnp.abs(x).reshape(-1) for x in arrays])
    threshold = jnp.sort(flat)[flat.size - kept]
    return [x * (jnp.abs(x) >= threshold) for x in arrays]


class MinimalSAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as a loop over tensors."""

    def __init__(self, params: Iterable[Tensor], base: Any, rho: float, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """Move to x + e, and keep x."""
        params = [p for group in self.param_groups for p in group["params"]]
        length = torch.stack([p.grad.norm() for p in params]).norm()
        for group in self.param_groups:
            scale = group["rho"] / (length + 1e-12)
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        """Restore x, and take a step of the base optimizer."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()


class ForeachSAM(MinimalSAM):
    """`MinimalSAM` with foreach kernels, which are few on a GPU."""

    @torch.no_grad()
    def first_step(self) -> None:
        """Move to x + e, and keep x."""
        self.params = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in self.params]
        length = torch.stack(torch._foreach_norm(gradients)).norm()
        self.old = [torch.empty_like(p) for p in self.params]
        torch._foreach_copy_(self.old, self.params)
        scale = self.param_groups[0]["rho"] / (length + 1e-12)
        torch._foreach_add_(self.params, torch._foreach_mul(gradients, scale))

    @torch.no_grad()
    def second_step(self) -> None:
        """Restore x, and take a step of the base optimizer."""
        torch._foreach_copy_(self.params, self.old)
        self.base.step()


class TwoArrayADMM:
    """ADMM with z and u as two dense lists, projected by a full sort."""

    def __init__(
        self, params: list[Tensor], base: Any, *, sparsity: float, penalty: float, interval: int
    ) -> None:
        self.params, self.base = params, base
        self.sparse = [p for p in params if p.ndim > 1]
        self.kept = round((1 - sparsity) * sum(p.numel() for p in self.sparse))
        self.penalty, self.interval, self.steps = penalty, interval, 0
        self.z = by_sort([p.detach() for p in self.sparse], self.kept)
        self.u = [torch.zeros_like(p) for p in self.sparse]

    @torch.no_grad()
    def step(self) -> None:
        """Add the penalty, take a step, and update z and u when due."""
        for p, z, u in zip(self.sparse, self.z, self.u, strict=True):
            p.grad.add_(self.penalty * (p - z + u))
        self.base.step()
        self.steps += 1
        if self.steps % self.interval == 0:
            v = [p + u for p, u in zip(self.sparse, self.u, strict=True)]
            self.z = by_sort(v, self.kept)
            self.u = [a - z for a, z in zip(v, self.z, strict=True)]
