"""PyTorch: tensors of which a process holds a shard.

Parameters are never gathered: what is computed of the shards at hand is summed over the
process groups that hold the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_sharded", "local", "norms", "peaks", "sharded_as", "summed", "whole"]


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a `torch.distributed.tensor.DTensor`."""
    return hasattr(x, "device_mesh")


def whole(x: Any) -> Tensor:
    """A small tensor, gathered or summed over its shards."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Any) -> Tensor:
    """The entries at hand of a tensor."""
    return x.to_local() if is_sharded(x) else x


def sharded_as(x: Any, mask: Tensor) -> Tensor:
    """The tensor whose entries at hand are ``mask``, sharded as ``x``."""
    if not is_sharded(x):
        return mask
    return type(x).from_local(mask, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())


def norms(arrays: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The Euclidean norm of each tensor."""
    parts = torch._foreach_norm([local(x.detach()) for x in arrays], dtype=dtype)
    found = torch.stack([part.to(parts[0].device) for part in parts])
    if not any(is_sharded(x) for x in arrays):
        return found
    return summed(found * found, arrays).sqrt()


def peaks(arrays: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each tensor, 0 where it has no entries."""
    parts = [local(x.detach()) for x in arrays]
    found = [part.abs().amax() if part.numel() else part.new_zeros(()) for part in parts]
    values = torch.stack([value.to(found[0].device) for value in found])
    return _reduced(values, arrays, "MAX")


def summed(values: Tensor, like: Sequence[Tensor]) -> Tensor:
    """One value per tensor of ``like``, summed over the shards of that tensor."""
    return _reduced(values, like, "SUM")


def _reduced(values: Tensor, like: Sequence[Tensor], operation: str) -> Tensor:
    for group, members in _groups(like).items():
        part = values[members]
        dist.all_reduce(part, getattr(dist.ReduceOp, operation), group=group)
        values[members] = part
    return values


def _groups(scores: Sequence[Any]) -> dict[Any, list[int]]:
    """Process groups to sum over, each with the positions of the tensors sharded there."""
    groups: dict[Any, list[int]] = {}
    for position, x in enumerate(scores):
        for axis, placement in enumerate(getattr(x, "placements", ())):
            if placement.is_shard():
                groups.setdefault(x.device_mesh.get_group(axis), []).append(position)
            elif not placement.is_replicate():
                raise ValueError(
                    f"arrays must be sharded or replicated to be projected, got {placement}"
                )
    return groups
