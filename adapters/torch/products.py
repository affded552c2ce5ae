"""Compute Hessian products, add them up over a step, and average them over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safe_core.backends.torch_sharding import is_sharded
from safe_core.sassha import estimates

__all__ = ["HessianEstimates", "check_differentiable", "hessian_products"]


class HessianEstimates:
    """Estimates ``h = z * (H z)`` of the diagonal of the Hessian, for one step.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
        Processes to average over. None is all of them if torch.distributed is initialised.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    >>> held, z = HessianEstimates(None), torch.tensor([1.0, -1.0])
    >>> held.add((torch.tensor([2.0, -1.0]) * p**2).sum(), [p], [z], loss_scale=1.0)
    >>> held.of([p])
    [tensor([ 4., -2.])]
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._held: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_group": self._group, "_held": {}}

    def add(
        self, loss: Tensor, params: Sequence[Tensor], probes: Sequence[Tensor], loss_scale: float
    ) -> None:
        """Add the estimates for one loss, whose graph is kept for its backward pass."""
        with torch.enable_grad():
            # A graph of its own, apart from the backward pass: DDP does not average gradients
            # that have a graph, and a gradient in `.grad` would refer back to its parameter.
            gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            products = hessian_products(gradients, params, probes)
        with torch.no_grad():
            for p, h in zip(params, estimates(probes, products), strict=True):
                h = h / loss_scale
                self._held[p] = self._held[p] + h if p in self._held else h

    def missing(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters that have no estimate."""
        return [p for p in params if p not in self._held]

    def of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the estimates of parameters."""
        return [self._held[p] for p in params]

    def clear(self) -> None:
        """Discard all estimates."""
        self._held = {}

    @torch.no_grad()
    def average(self) -> None:
        """Average over processes, by one reduction for each device and dtype.

        Every process must hold estimates of the same parameters, in the same order.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        processes = dist.get_world_size(self._group)
        alike: dict[Any, list[Tensor]] = {}
        for h in self._held.values():
            alike.setdefault((h.device, h.dtype), []).append(h)
        for parts in alike.values() if processes > 1 else ():
            flat = torch.cat([h.reshape(-1) for h in parts])
            dist.all_reduce(flat, group=self._group)
            flat /= processes
            averaged = torch.split(flat, [h.numel() for h in parts])
            for h, mean in zip(parts, averaged, strict=True):
                h.copy_(mean.view(h.shape))


def hessian_products(
    gradients: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the products ``H r`` with vectors, from gradients that have a graph.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    >>> gradients = torch.autograd.grad((p**3).sum(), [p], create_graph=True)
    >>> hessian_products(gradients, [p], [torch.tensor([1.0, -1.0])])
    (tensor([18., -6.]),)
    """
    depends = [(g, r) for g, r in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not depends:  # a linear loss
        return [torch.zeros_like(p) for p in params]
    outputs, weights = zip(*depends, strict=True)
    return torch.autograd.grad(outputs, params, weights, retain_graph=True, materialize_grads=True)


def check_differentiable(p: Tensor) -> None:
    """Raise unless a parameter is a real floating tensor on one device."""
    if not p.is_floating_point():
        raise TypeError(f"params must be real floating, got dtype {p.dtype}")
    if is_sharded(p):
        raise TypeError("params must be whole tensors, to multiply by the Hessian, got a DTensor")
