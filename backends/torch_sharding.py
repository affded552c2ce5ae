"""Sharded PyTorch tensors: local shards, and sums and maxima over all shards.

`is_sharded`, `local`, `sharded_like` and `summed` are the interface for the PyTorch
adapter. The other functions serve the backend.

Each process computes with its local shard, and one number per tensor is reduced over the
process groups that hold the other shards. A tensor is gathered only if the units of a pattern
fit no shards. Functions accept plain tensors too, which they treat as a single shard.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "alike",
    "index_along",
    "is_sharded",
    "local",
    "norms",
    "peaks",
    "regrouped",
    "resharded_as",
    "sharded_as",
    "sharded_like",
    "shardwise",
    "stacked",
    "summed",
    "whole",
]


_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(x: Any) -> bool:
    """Return whether ``x`` is a `torch.distributed.tensor.DTensor`."""
    # By attribute, so that programs on one process never import torch.distributed.tensor. Asked of
    # a plain tensor, it would raise and catch an error, and a step asks a thousand times.
    return type(x) not in _PLAIN and hasattr(x, "device_mesh")


def whole(x: Any) -> Tensor:
    """Return ``x`` as a plain tensor, gathered or summed over its shards; for small ones only."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Any) -> Tensor:
    """Return the local shard of ``x``, or ``x`` itself if it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def sharded_as(x: Any, mask: Tensor) -> Tensor:
    """Return the tensor with the local shard ``mask``, sharded as ``x``."""
    if not is_sharded(x):
        return mask
    return type(x).from_local(mask, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())


def sharded_like(x: Any, values: Tensor) -> Tensor:
    """Return ``values`` sharded as ``x``.

    Parameters
    ----------
    x : tensor
        A parameter, sharded or not.
    values : tensor
        Values that broadcast to ``x``, complete on every process. They are returned
        unchanged if ``x`` is not sharded, if they are sharded already, or if they have
        another number of axes.
    """
    if not is_sharded(x) or is_sharded(values) or values.ndim != x.ndim:
        return values
    from torch.distributed.tensor import Replicate, distribute_tensor

    # An axis along which values broadcast has length 1, and cannot be sharded.
    kept = [
        p if _is_shard(p) and values.shape[p.dim] == x.shape[p.dim] else Replicate()
        for p in x.placements
    ]
    # Every process holds the values, so none needs to send them.
    return distribute_tensor(values, x.device_mesh, kept, src_data_rank=None)


def index_along(x: Any, axis: int) -> Tensor:
    """Return the positions along an axis, within the whole tensor, of the local entries."""
    places = torch.arange(x.shape[axis], device=local(x).device)
    if not is_sharded(x):
        return places
    from torch.distributed.tensor import Replicate, distribute_tensor

    kept = [_moved(p, 0) if _is_shard(p) and p.dim == axis else Replicate() for p in x.placements]
    return local(distribute_tensor(places, x.device_mesh, kept, src_data_rank=None))


def regrouped(x: Any, *, units: Mapping[int, int]) -> Tensor:
    """Return ``x`` sharded so that no shard cuts a unit.

    ``units`` maps an axis to the length of a unit along it, or to 0 if the whole axis is a
    unit. Other axes may be cut anywhere. Where shards cut units, the processes shard another
    axis instead, so each holds as many entries as before.
    """
    if not is_sharded(x):
        return x
    cut = {p.dim for p in x.placements if _is_shard(p) and _cuts(x, p, units.get(p.dim, 1))}
    if not cut:
        return x
    return x.redistribute(placements=_uncut(x, cut, units))


def _uncut(x: Any, cut: Container[int], units: Mapping[int, int]) -> list[Any]:
    """Return placements for which no shard cuts a unit, the same for all axes in ``cut``.

    If there is no axis that units allow to shard, the processes hold copies.
    """
    from torch.distributed.tensor import Replicate, Shard

    def placed(new: Any) -> list[Any]:
        return [new if _is_shard(p) and p.dim in cut else p for p in x.placements]

    # Prefer an axis that may be cut anywhere, and then the longest.
    order = sorted(range(x.ndim), key=lambda axis: (units.get(axis, 1) != 1, -x.shape[axis]))
    for axis in order:
        found = placed(Shard(axis))
        held = [i for i, p in enumerate(found) if _is_shard(p) and p.dim == axis]
        if not any(_cuts(x, found[i], units.get(axis, 1), found) for i in held):
            return found
    return placed(Replicate())


def resharded_as(x: Any, result: Tensor) -> Tensor:
    """Return ``result``, which has the shape of ``x``, sharded as ``x``."""
    same = not is_sharded(x) or result.placements == x.placements  # type: ignore[attr-defined]
    return result if same else result.redistribute(placements=x.placements)  # type: ignore[attr-defined]


def shardwise(
    fn: Callable[..., Tensor], *arrays: Any, axes: Mapping[int, int] | None = None
) -> Tensor:
    """Return ``fn(*arrays)`` of the local shards, sharded as the first array.

    ``axes`` maps the axes of the first array to those of the result.
    """
    first = arrays[0]
    if not is_sharded(first):
        return fn(*arrays)
    # The meta device computes the shape of the whole result without its values.
    result = fn(*(local(x) for x in arrays))
    shape = fn(*(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in arrays)).shape
    moved = [
        _moved(p, p.dim if axes is None else axes[p.dim]) if _is_shard(p) else p
        for p in first.placements
    ]
    return type(first).from_local(
        result,
        first.device_mesh,
        moved,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def norms(arrays: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
    """Return the Euclidean norm of each tensor."""
    with torch.no_grad():
        found = stacked(torch._foreach_norm([local(x) for x in arrays], dtype=dtype))
    if not any(is_sharded(x) for x in arrays):
        return found
    return summed(found * found, arrays).sqrt()


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one tensor on the device of the first."""
    device = parts[0].device
    if any(part.device != device for part in parts):
        parts = [part.to(device) for part in parts]
    return torch.stack(list(parts))


def peaks(arrays: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor, 0 for one without entries."""
    parts = [local(x.detach()) for x in arrays]
    found = [part.abs().amax() if part.numel() else part.new_zeros(()) for part in parts]
    widest = max((value.dtype for value in found), key=lambda dtype: dtype.itemsize)
    values = torch.stack([value.to(found[0].device, widest) for value in found])
    return _reduced(values, arrays, "MAX")


def alike(scores: Sequence[Any]) -> list[list[int]]:
    """Return lists of the positions of tensors that are sharded alike, or not at all."""
    found: dict[Any, list[int]] = {}
    for position, x in enumerate(scores):
        place = (x.device_mesh, x.placements) if is_sharded(x) else x.device
        found.setdefault(place, []).append(position)
    return list(found.values())


def summed(values: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Return ``values`` summed over the shards of each tensor.

    Parameters
    ----------
    values : tensor of shape (len(like), ...)
        One value or row per tensor, computed from its local shard. May be overwritten.
    like : sequence of tensors
        The tensors that the values were computed from. Every process must pass them in the
        same order.
    """
    return _reduced(values, like, "SUM")


def _reduced(values: Tensor, like: Sequence[Tensor], operation: str) -> Tensor:
    # One call per process group serves all tensors, for each call costs a round trip.
    for group, members in _groups(like).items():
        everywhere = len(members) == len(like)
        part = values if everywhere else values[members]
        dist.all_reduce(part, getattr(dist.ReduceOp, operation), group=group)
        if not everywhere:
            values[members] = part
    return values


def _is_shard(placement: Any) -> bool:
    # PyTorch has a private class for an axis that FSDP shards on top of tensor parallelism.
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"


def _moved(placement: Any, axis: int) -> Any:
    """Return the placement moved to another axis."""
    if placement.is_shard():
        return type(placement)(axis)
    return type(placement)(axis, split_factor=placement.split_factor)


def _cuts(x: Any, placement: Any, unit: int, placements: Sequence[Any] | None = None) -> bool:
    """Return whether a shard can begin within a unit, under ``placements`` or those of x."""
    placements = list(x.placements) if placements is None else list(placements)
    if unit == 1:
        return False
    size, along = x.shape[placement.dim], [p for p in placements if _is_shard(p)]
    alone = placement.is_shard() and sum(p.dim == placement.dim for p in along) == 1
    if unit == 0 or not alone or size % unit:
        return True
    # PyTorch gives every process but the last ceil(size / count) entries.
    count = x.device_mesh.size(placements.index(placement))
    return bool(-(-size // count) % unit)


def _groups(scores: Sequence[Any]) -> dict[Any, list[int]]:
    """Map each process group to the positions of the tensors that are sharded over it."""
    groups: dict[Any, list[int]] = {}
    for position, x in enumerate(scores):
        for axis, placement in enumerate(getattr(x, "placements", ())):
            if _is_shard(placement):
                groups.setdefault(x.device_mesh.get_group(axis), []).append(position)
            elif not placement.is_replicate():
                raise ValueError(f"arrays must be sharded or replicated, got {placement}")
    return groups
