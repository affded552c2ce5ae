"""PyTorch: partition through a zero-copy view on the CPU, counting on accelerators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import array_api_compat.torch as xp
import torch

from . import Array, threshold
from . import numpy as numpy_backend
from .standard import cond

__all__ = [
    "cond",
    "frexp",
    "is_concrete",
    "keep_largest",
    "keep_largest_per_row",
    "ordering_key",
]

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_concrete(x: Array) -> bool:
    return x.device.type != "meta"


def ordering_key(x: Array) -> Array:
    # Non-negative floats order as their bits do.
    return x.detach().abs().view(_INTEGER[x.element_size()])


def frexp(x: Array) -> tuple[Array, Array]:
    mantissa, exponent = torch.frexp(x)
    return mantissa, exponent


def _kth_largest_by_partition(keys: Array, k: int) -> Array:
    return torch.from_numpy(numpy_backend.kth_largest(keys.numpy(), k))


def _kth_largest_by_counting(keys: Array, k: int) -> Array:
    # The largest t with at least k keys >= t, bit by bit from the top. Neither a sort
    # nor a host synchronisation, and the same number of kernels at any size.
    found = torch.zeros((keys.shape[0], 1), dtype=keys.dtype, device=keys.device)
    for bit in reversed(range(8 * keys.element_size() - 1)):
        candidate = found | (1 << bit)
        enough = (keys >= candidate).sum(dim=1, keepdim=True) >= k
        found = torch.where(enough, candidate, found)
    return found


def _kth_largest(device: torch.device) -> tuple[Callable[[Array, int], Array], bool]:
    on_cpu = device.type == "cpu"
    return (_kth_largest_by_partition if on_cpu else _kth_largest_by_counting), on_cpu


def keep_largest(keys: Sequence[Array], counts: tuple[int, ...], stage: int) -> list[Array]:
    kth_largest, on_cpu = _kth_largest(keys[0].device)
    return threshold.keep_largest(keys, counts[stage], kth_largest, xp=xp, can_branch=on_cpu)


def keep_largest_per_row(keys: Array, counts: tuple[int, ...], stage: int) -> Array:
    kth_largest, on_cpu = _kth_largest(keys.device)
    return threshold.keep_largest_per_row(
        keys, counts[stage], kth_largest, xp=xp, can_branch=on_cpu
    )
