"""PyTorch: selection by counting over a list of tensors, each whole or sharded.

The largest t with at least k keys at or above it is found bit by bit. A pass counts
the keys of each tensor; the counts of its shards are summed, so parameters are never
gathered. Ties are cut by the same counting on the row-major index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_shards import index_along, local, sharded_as, summed

__all__ = ["keep_largest", "ordering_key"]

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordering_key(x: Tensor) -> Tensor:
    # Non-negative floats order as their bits do.
    return x.detach().abs().view(_INTEGER[x.element_size()])


def keep_largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of the ``k`` largest magnitudes, as sharded as the scores.

    Reads one flag from the device: whether ties must be cut within a tensor.
    """
    keys = [ordering_key(local(x)) for x in scores]
    kth = _kth_largest(keys, scores, k)
    above, tied = [key > kth for key in keys], [key == kth for key in keys]
    available = _counts(tied, scores)
    missing = k - _counts(above, scores).sum()
    earlier = available.cumsum(0) - available
    quotas = (missing - earlier).clamp(min=0).minimum(available)
    if bool(((quotas > 0) & (quotas < available)).any()):
        tied = _cut(tied, scores, quotas)
    else:
        tied = [mask & (quota > 0) for mask, quota in zip(tied, quotas, strict=True)]
    masks = [a | t for a, t in zip(above, tied, strict=True)]
    return [sharded_as(x, mask) for x, mask in zip(scores, masks, strict=True)]


def _kth_largest(keys: Sequence[Tensor], scores: Sequence[Tensor], k: int) -> Tensor:
    found = torch.zeros((), dtype=keys[0].dtype, device=keys[0].device)
    for bit in reversed(range(8 * found.element_size() - 1)):
        candidate = found | (1 << bit)
        enough = _counts([key >= candidate for key in keys], scores).sum() >= k
        found = torch.where(enough, candidate, found)
    return found


def _cut(tied: Sequence[Tensor], scores: Sequence[Tensor], quotas: Tensor) -> list[Tensor]:
    """Of each mask the first ``quota`` entries in row-major order."""
    indices = [_index(x) for x in scores]
    # The largest end with at most `quota` ties before it has exactly `quota`.
    ends = torch.zeros_like(quotas)
    for bit in reversed(range(max(x.numel() for x in scores).bit_length())):
        candidates = ends | (1 << bit)
        before = [t & (i < end) for t, i, end in zip(tied, indices, candidates, strict=True)]
        ends = torch.where(_counts(before, scores) <= quotas, candidates, ends)
    return [t & (i < end) for t, i, end in zip(tied, indices, ends, strict=True)]


def _index(x: Any) -> Tensor:
    """Row-major index, in the whole tensor, of the entries at hand."""
    at_hand = local(x)
    index = torch.zeros(at_hand.shape, dtype=torch.int64, device=at_hand.device)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :])
        index += (index_along(x, axis) * stride).reshape((-1,) + (1,) * (x.ndim - axis - 1))
    return index


def _counts(masks: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """How many entries of each tensor are in its mask."""
    return summed(torch.stack([mask.sum() for mask in masks]), scores)
