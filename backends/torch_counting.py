"""Select the largest entries of PyTorch tensors by counting, whole or sharded.

The threshold is the largest t that at least k keys reach. It is found digit by digit, from the
highest: a histogram counts the keys with each digit, and only keys with the digit of t remain
for the next one. Counts of shards simply add up, where a sort would have to gather the parameters.
So only two histograms travel between processes, four for float64, and then the numbers of ties.
The same search on the row-major index cuts the ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_sharding import alike, index_along, local, sharded_as, summed

__all__ = ["keep_largest", "ordering_key"]

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of a digit. A histogram then takes half a megabyte.
_DIGIT = 16


def ordering_key(x: Tensor) -> Tensor:
    # IEEE 754 places the exponent above the mantissa, so non-negative floats order as their
    # bits do, subnormal numbers included.
    return x.detach().abs().view(_INTEGER[x.element_size()])


def keep_largest(scores: Sequence[Tensor], *, k: int) -> list[Tensor]:
    """Return masks of the ``k`` largest magnitudes, sharded as the scores are."""
    keys = [ordering_key(local(x)) for x in scores]
    threshold = _kth_largest(keys, scores, k, bits=8 * keys[0].element_size() - 1)
    above, tied = [key > threshold for key in keys], [key == threshold for key in keys]
    pairs = zip(above, tied, strict=True)
    counts = torch.stack([torch.stack([a.sum(), t.sum()]) for a, t in pairs])
    found = summed(counts, scores).tolist()
    missing = k - sum(count for count, _ in found)
    masks = []
    # Earlier tensors give their ties first. Each gives all, none, or in one tensor some.
    for x, a, t, (_, available) in zip(scores, above, tied, found, strict=True):
        quota = min(missing, available)
        missing -= quota
        kept = a | (t if quota == available else _first(t, x, quota))
        masks.append(sharded_as(x, kept))
    return masks


def _kth_largest(keys: Sequence[Tensor], like: Sequence[Tensor], k: int, *, bits: int) -> int:
    """Return the largest key that at least ``k`` keys reach, over all shards.

    ``keys`` are non-negative integers of that many bits, from the local shards of ``like``.
    """
    found = 0
    for shift in reversed(range(0, bits, _DIGIT)):
        size = 2 ** min(_DIGIT, bits - shift)
        digits = [(key >> shift) & (size - 1) for key in keys]
        counts = _histogram(digits, like, size)
        reach = counts.flip(0).cumsum(0).flip(0)
        digit = int((reach >= k).sum()) - 1
        k -= int(reach[digit] - counts[digit])
        found += digit << shift
        if shift:
            keys = [key[own == digit] for key, own in zip(keys, digits, strict=True)]
    return found


def _histogram(digits: Sequence[Tensor], like: Sequence[Tensor], size: int) -> Tensor:
    """Return the number of entries of each digit on the host, over all tensors and shards."""
    groups, counts = alike(like), []
    for members in groups:
        total = torch.zeros(size, dtype=torch.int64, device=digits[members[0]].device)
        one = torch.ones_like(total[:1])
        for i in members:
            places = digits[i].reshape(-1).long()
            total.scatter_add_(0, places, one.expand(places.shape))
        counts.append(total)
    return summed(torch.stack(counts), [like[members[0]] for members in groups]).sum(0).cpu()


def _first(tied: Tensor, x: Any, quota: int) -> Tensor:
    """Keep the first ``quota`` entries of a mask in row-major order of the whole tensor."""
    if quota == 0:
        return torch.zeros_like(tied)
    index, bits = _index(x), x.numel().bit_length()
    last = 2**bits - 1  # the lowest index becomes the largest key
    return tied & (index <= last - _kth_largest([last - index[tied]], [x], quota, bits=bits))


def _index(x: Any) -> Tensor:
    """Return the row-major index, within the whole tensor, of each local entry."""
    at_hand = local(x)
    index = torch.zeros(at_hand.shape, dtype=torch.int64, device=at_hand.device)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :])
        index += (index_along(x, axis) * stride).reshape((-1,) + (1,) * (x.ndim - axis - 1))
    return index
