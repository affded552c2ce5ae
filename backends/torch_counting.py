"""Select the largest entries of PyTorch tensors by counting, whole or sharded.

The threshold is the largest t that at least k keys reach. It is found bit by bit, from
the highest: a pass over the keys counts those that reach a candidate. Counts of shards
simply add up, where a sort would have to gather the parameters, so only a few numbers
travel between processes. The same search on the row-major index cuts the ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_sharding import index_along, local, sharded_as, summed

__all__ = ["keep_largest", "ordering_key"]

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordering_key(x: Tensor) -> Tensor:
    # IEEE 754 places the exponent above the mantissa, so non-negative floats order as their
    # bits do, subnormal numbers included.
    return x.detach().abs().view(_INTEGER[x.element_size()])


def keep_largest(scores: Sequence[Tensor], *, k: int) -> list[Tensor]:
    """Return masks of the ``k`` largest magnitudes, sharded as the scores are.

    The host waits for the device once, to learn whether ties must be cut within a tensor.
    """
    keys = [ordering_key(local(x)) for x in scores]
    kth = _kth_largest(keys, scores, k)
    above, tied = [key > kth for key in keys], [key == kth for key in keys]
    available = _counts(tied, scores)
    missing = k - _counts(above, scores).sum()
    # Earlier tensors give their ties first. Each gives all, none, or in one tensor some.
    earlier = available.cumsum(0) - available
    quotas = (missing - earlier).clamp(min=0).minimum(available)
    if bool(((quotas > 0) & (quotas < available)).any()):
        tied = _cut(tied, scores, quotas)
    else:
        tied = [mask & (quota > 0) for mask, quota in zip(tied, quotas, strict=True)]
    masks = [a | t for a, t in zip(above, tied, strict=True)]
    return [sharded_as(x, mask) for x, mask in zip(scores, masks, strict=True)]


def _kth_largest(keys: Sequence[Tensor], scores: Sequence[Tensor], k: int) -> Tensor:
    """Return the largest key that at least ``k`` keys reach."""
    # The sign bit of a key is 0. A bit of the result is 1 if enough keys reach the candidate
    # with that bit set.
    found = torch.zeros((), dtype=keys[0].dtype, device=keys[0].device)
    for bit in reversed(range(8 * found.element_size() - 1)):
        candidate = found | (1 << bit)
        enough = _counts([key >= candidate for key in keys], scores).sum() >= k
        found = torch.where(enough, candidate, found)
    return found


def _cut(tied: Sequence[Tensor], scores: Sequence[Tensor], quotas: Tensor) -> list[Tensor]:
    """Keep the first ``quota`` entries of each mask in row-major order."""
    indices = [_index(x) for x in scores]
    # The largest end with at most `quota` ties before it has exactly `quota`.
    ends = torch.zeros_like(quotas)
    for bit in reversed(range(max(x.numel() for x in scores).bit_length())):
        candidates = ends | (1 << bit)
        before = [t & (i < end) for t, i, end in zip(tied, indices, candidates, strict=True)]
        ends = torch.where(_counts(before, scores) <= quotas, candidates, ends)
    return [t & (i < end) for t, i, end in zip(tied, indices, ends, strict=True)]


def _index(x: Any) -> Tensor:
    """Return the row-major index, within the whole tensor, of each local entry."""
    at_hand = local(x)
    index = torch.zeros(at_hand.shape, dtype=torch.int64, device=at_hand.device)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :])
        index += (index_along(x, axis) * stride).reshape((-1,) + (1,) * (x.ndim - axis - 1))
    return index


def _counts(masks: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return the number of entries in the mask of each tensor, over all shards."""
    return summed(torch.stack([mask.sum() for mask in masks]), scores)
