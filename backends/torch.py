"""PyTorch: partition through a zero-copy view on the CPU, counting on accelerators.

On an accelerator a sample brackets the threshold; what lies in the bracket, a few
percent, is sorted and the rest is classified by one comparison. Where that fails, or
arrays are sharded, the threshold is found by counting (`torch_counting`). Arrays are
never concatenated, and at most one value is read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from . import numpy as numpy_backend
from . import selects_on_host, threshold, torch_counting, torch_shards
from .standard import cond
from .torch_counting import ordering_key
from .torch_shards import peaks, regrouped, resharded_as, shardwise

__all__ = [
    "blockwise",
    "cond",
    "detached",
    "frexp",
    "has_nan",
    "is_concrete",
    "keep_largest",
    "keep_largest_per_row",
    "known_finite",
    "linalg_errors",
    "norms",
    "ordering_key",
    "peaks",
    "regrouped",
    "resharded_as",
    "shardwise",
    "stochastic_bfloat16",
    "where_kept",
]

_PIECE = 2**19  # entries that the cache holds between the passes over them
_SAMPLE = 2**17  # entries that bracket the threshold
_LARGEST = 0x7F7FFFFF  # bits of the largest finite float32
_CANDIDATES = 2**14  # this many, and an eighth of all entries, are sorted without regret


def is_concrete(x: Tensor) -> bool:
    return x.device.type != "meta"


def detached(x: Tensor) -> Tensor:
    return x.detach()


def has_nan(arrays: Sequence[Tensor]) -> bool:
    if all(_is_plain(x) and x.dtype != torch.bfloat16 for x in arrays):
        return numpy_backend.has_nan([_numpy(x.detach()) for x in arrays])
    # A sum is NaN if an entry is, or if infinities cancel. It is one pass and no array.
    wide = [torch.promote_types(x.dtype, torch.float32) for x in arrays]
    sums = [x.detach().sum(dtype=dtype) for x, dtype in zip(arrays, wide, strict=True)]
    sums = [torch_shards.whole(x) for x in sums]
    return bool(torch.stack(sums).isnan().any()) and any(bool(x.isnan().any()) for x in arrays)


def frexp(x: Tensor) -> tuple[Tensor, Tensor]:
    mantissa, exponent = torch.frexp(x)
    return mantissa, exponent


def where_kept(arrays: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    in_graph = torch.is_grad_enabled() and any(x.requires_grad for x in arrays)
    if in_graph or not all(_is_plain(x) for x in arrays):
        return [torch.where(mask, x, 0) for x, mask in zip(arrays, masks, strict=True)]
    # One thread of NumPy's outruns the waking of several.
    values = [x.detach() for x in arrays]
    kept = numpy_backend.where_kept([_numpy(x) for x in values], [m.numpy() for m in masks])
    return [torch.from_numpy(v).view(x.dtype) for v, x in zip(kept, values, strict=True)]


def norms(arrays: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if all(_is_plain(x) and x.dtype == dtype and x.is_contiguous() for x in arrays):
        # On the CPU a dot product outruns the kernel of a norm.
        flat = [x.detach().view(-1) for x in arrays]
        return torch.stack([torch.dot(x, x) for x in flat]).sqrt()
    return torch_shards.norms(arrays, dtype)


def known_finite(arrays: Sequence[Tensor]) -> bool:
    readable = all(_is_plain(x) and x.dtype != torch.bfloat16 for x in arrays)
    return readable and numpy_backend.known_finite([_numpy(x.detach()) for x in arrays])


def blockwise(
    fn: Callable[..., Tensor], *lists: Sequence[Tensor], out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    if not all(_is_plain(x) for arrays in lists for x in arrays):
        results = [fn(*arrays) for arrays in zip(*lists, strict=True)]
        if out is not None:
            torch._foreach_copy_(list(out), results)
        return results if out is None else list(out)
    if out is None:
        out = _allocate(lists[0])
    for arrays in zip(*lists, out, strict=True):
        for *pieces, result in _pieces([x.detach() for x in arrays]):
            result.copy_(fn(*pieces))
    return list(out)


def stochastic_bfloat16(
    arrays: Sequence[Tensor], step: int, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    if out is None:
        out = [torch.empty_like(x, dtype=torch.bfloat16) for x in arrays]
    salt = int(_mixed(torch.tensor(step, dtype=torch.int32, device="cpu")))
    for x, result in zip(arrays, out, strict=True):
        for piece, target in _pieces([torch_shards.local(t.detach()) for t in (x, result)]):
            target.copy_(_dithered(piece, salt))
    return list(out)


def _dithered(x: Tensor, salt: int) -> Tensor:
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # A shift of a signed integer drags its sign along.
    dither = (_mixed(magnitude ^ salt) >> 16) & 0xFFFF
    rounded = (magnitude + dither).clamp_(max=_LARGEST) >> 16
    rounded |= (bits >> 16) & ~0x7FFF
    return rounded.to(torch.int16).view(torch.bfloat16)


def _mixed(h: Tensor) -> Tensor:
    """The finalizer of MurmurHash3; products of int32 wrap."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)


def keep_largest(scores: Sequence[Tensor], counts: tuple[int, ...], stage: int) -> list[Tensor]:
    k = counts[stage]
    scores = [x.detach() for x in scores]
    if any(torch_shards.is_sharded(x) for x in scores):
        if selects_on_host():
            raise ValueError("sharded arrays cannot be selected from on the host")
        return torch_counting.keep_largest(scores, k)
    if selects_on_host() or _is_plain(scores[0]):
        masks = numpy_backend.keep_largest([_numpy(x) for x in scores], (k,), 0)
        return [torch.from_numpy(mask).to(x.device) for mask, x in zip(masks, scores, strict=True)]
    if k in (0, sum(x.numel() for x in scores)) or not is_concrete(scores[0]):
        return [torch.full_like(x, k > 0, dtype=torch.bool) for x in scores]
    if scores[0].device.type == "cuda":
        return keep_largest_by_sample(scores, k)
    return torch_counting.keep_largest(scores, k)


def keep_largest_by_sample(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of the ``k`` largest; reads one vector of counts from the device."""
    keys = [ordering_key(x) for x in scores]
    low, high = _bracket(keys, k)
    above = [key >= high for key in keys]
    inside = [(key >= low) & ~mask for key, mask in zip(keys, above, strict=True)]
    sums = [mask.sum() for mask in above + inside]
    found = torch.stack(sums).tolist()  # the one synchronisation
    sizes = found[len(keys) :]
    missing = k - sum(found[: len(keys)])
    few = sum(sizes) <= max(_CANDIDATES, sum(key.numel() for key in keys) // 8)
    if not (0 <= missing <= sum(sizes) and few):
        return torch_counting.keep_largest(scores, k)
    places = [
        torch.nonzero_static(mask.reshape(-1), size=size)[:, 0]
        for mask, size in zip(inside, sizes, strict=True)
    ]
    candidates = [key.reshape(-1)[place] for key, place in zip(keys, places, strict=True)]
    # A stable sort keeps the order of equal keys, which is that of the arrays.
    order = torch.cat(candidates).argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:missing]] = True
    masks = [mask.contiguous() for mask in above]
    for mask, place, flags in zip(masks, places, torch.split(kept, sizes), strict=True):
        mask.view(-1)[place] = flags
    return masks


def keep_largest_per_row(scores: Tensor, counts: tuple[int, ...], stage: int) -> Tensor:
    k, scores = counts[stage], scores.detach()
    if selects_on_host() or _is_plain(scores):
        mask = numpy_backend.keep_largest_per_row(_numpy(scores), (k,), 0)
        return torch.from_numpy(mask).to(scores.device)
    keys = ordering_key(scores)
    return threshold.keep_largest_per_row(keys, k, _kth_largest_per_row, xp=xp, can_branch=False)


def _kth_largest_per_row(keys: Tensor, k: int) -> Tensor:
    return keys.kthvalue(keys.shape[1] - k + 1, dim=1, keepdim=True).values


def _bracket(keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Keys that the k-th largest lies between with near certainty: ``low <= kth < high``."""
    n = sum(key.numel() for key in keys)
    stride = n // _SAMPLE | 1  # odd, so as not to meet the same column of every row
    sample = torch.cat([key.reshape(-1)[::stride] for key in keys]).sort(descending=True).values
    size = sample.numel()
    rank = k * size // n
    slack = 16 + int(4 * math.sqrt(size * (k / n) * (1 - k / n)))
    top, bottom = rank - slack, rank + slack
    zero = torch.zeros_like(sample[0])
    return (
        sample[bottom] if bottom < size else zero,
        sample[top] if top >= 0 else zero + torch.iinfo(sample.dtype).max,
    )


def _allocate(like: Sequence[Tensor]) -> list[Tensor]:
    arrays = [_numpy(x.detach()) for x in like]
    memory = numpy_backend.allocate([x.shape for x in arrays], [x.dtype for x in arrays])
    return [torch.from_numpy(m).view(x.dtype) for m, x in zip(memory, like, strict=True)]


def _pieces(arrays: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tensors of one shape cut alike; whole on accelerators, where small or not contiguous."""
    small = arrays[0].numel() <= _PIECE or arrays[0].device.type != "cpu"
    if small or not all(x.is_contiguous() for x in arrays):
        return iter([arrays])
    return zip(*(torch.split(x.view(-1), _PIECE) for x in arrays), strict=True)


def _is_plain(x: Tensor) -> bool:
    """Whether NumPy can read ``x`` in place."""
    return x.device.type == "cpu" and not torch_shards.is_sharded(x)


def _numpy(x: Tensor) -> Any:
    x = x.cpu()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def linalg_errors() -> tuple[type[Exception], ...]:
    return (torch.linalg.LinAlgError,)
