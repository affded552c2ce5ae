"""Select the largest entries of PyTorch tensors by counting, whole or sharded.

The threshold is the largest t that at least k keys reach. It is found digit by digit, from the
highest: a histogram counts the digits of all keys that agree with t in the digits before. Counts
of shards simply add up, where a sort would have to gather the parameters. So only a histogram for
every 16 bits travels between processes, and then the numbers of ties. The same search on the
row-major index cuts the ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_sharding import alike, index_along, local, sharded_as, stacked, summed

__all__ = ["keep_largest", "ordering_key"]

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of a digit. A histogram then takes half a megabyte.
_DIGIT = 16
# Extra bins for keys that are not counted. Atomic additions to a single bin would run one after
# another on a GPU.
_SPARE = 1024


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
    counts = stacked([torch.stack([a.sum(), t.sum()]) for a, t in pairs])
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

    ``keys`` are integers of ``bits`` bits from the local shards of ``like``. Negative ones do not
    count.
    """
    found = 0
    for shift in reversed(range(0, bits, _DIGIT)):
        counts = _histogram(keys, like, found, shift, min(_DIGIT, bits - shift))
        reach = counts.flip(0).cumsum(0).flip(0)
        digit = int((reach >= k).sum()) - 1
        k -= int(reach[digit] - counts[digit])
        found += digit << shift
    return found


def _histogram(
    keys: Sequence[Tensor], like: Sequence[Tensor], found: int, shift: int, width: int
) -> Tensor:
    """Return how many keys that start as ``found`` have each digit, over all shards.

    The digit has ``width`` bits and begins at bit ``shift``. The result is on the host.
    """
    groups, counts, size = alike(like), [], 2**width
    for members in groups:
        total = torch.zeros(size + _SPARE, dtype=torch.int64, device=keys[members[0]].device)
        one = torch.ones_like(total[:1])
        for i in members:
            digits = ((keys[i] >> shift) & (size - 1)).long()
            starts = keys[i] >> (shift + width) == found >> (shift + width)
            # A mask of other keys would have to be read by the host to count them.
            places = torch.where(starts, digits, size + (digits & (_SPARE - 1))).reshape(-1)
            total.scatter_add_(0, places, one.expand(places.shape))
        counts.append(total[:size])
    return summed(stacked(counts), [like[members[0]] for members in groups]).sum(0).cpu()


def _first(tied: Tensor, x: Any, quota: int) -> Tensor:
    """Keep the first ``quota`` entries of a mask in row-major order of the whole tensor."""
    if quota == 0:
        return torch.zeros_like(tied)
    bits = x.numel().bit_length()
    order = 2**bits - 1 - _index(x)  # the lowest index has the largest key
    kth = _kth_largest([torch.where(tied, order, -1)], [x], quota, bits=bits)
    return tied & (order >= kth)


def _index(x: Any) -> Tensor:
    """Return the row-major index, within the whole tensor, of each local entry."""
    at_hand = local(x)
    index = torch.zeros(at_hand.shape, dtype=torch.int64, device=at_hand.device)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :])
        index += (index_along(x, axis) * stride).reshape((-1,) + (1,) * (x.ndim - axis - 1))
    return index
