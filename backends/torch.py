"""The backend of PyTorch, which selects by NumPy on the CPU and by a sample on CUDA.

On the CPU, NumPy reads the memory of the tensors without a copy, and one thread of it
is faster than PyTorch for these passes. For CUDA see `torch_accelerator`. For sharded tensors, for
other devices, and where many entries are equal, `torch_counting` finds the threshold by counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from . import (
    hashing,
    selects_on_host,
    threshold,
    torch_accelerator,
    torch_counting,
    torch_sharding,
)
from . import numpy as numpy_backend
from .standard import as_program, cond
from .torch_accelerator import widened
from .torch_counting import ordering_key
from .torch_sharding import is_sharded as on_several_devices
from .torch_sharding import norms, peaks, regrouped, resharded_as, shardwise

__all__ = [
    "as_program",
    "blockwise",
    "cond",
    "detached",
    "exponents",
    "exponents_along",
    "has_bfloat16",
    "has_nan",
    "is_concrete",
    "joins",
    "keep_largest",
    "keep_largest_per_row",
    "known_finite",
    "linalg_errors",
    "norms",
    "on_several_devices",
    "ordering_key",
    "peaks",
    "positions",
    "regrouped",
    "resharded_as",
    "scaled",
    "shardwise",
    "stochastic_bfloat16",
    "unreadable",
    "where_kept",
    "widened",
]

# Entries of a piece, 2 MB in float32. It stays in the cache between the passes over it.
# Smaller pieces would cost more in calls, which are slower here than in NumPy.
_PIECE = 2**19
# Bits of the largest finite float32.
_LARGEST = 0x7F7FFFFF


def unreadable(x: Tensor) -> str:
    # A nested tensor has a strided layout too, but rows of several lengths.
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        return f"a dense tensor, such as x.to_dense(), got layout {kind}"
    if x.is_quantized:
        return f"a dequantized tensor, such as x.dequantize(), got dtype {x.dtype}"
    return ""


def is_concrete(x: Tensor) -> bool:
    return x.device.type != "meta"


def detached(x: Tensor) -> Tensor:
    return x.detach()


def has_nan(arrays: Sequence[Tensor]) -> bool:
    if all(_is_plain(x) and x.dtype != torch.bfloat16 for x in arrays):
        return numpy_backend.has_nan([_numpy(x.detach()) for x in arrays])
    # A sum of squares is NaN only if an entry is: no infinities cancel.
    wide = any(x.dtype == torch.float64 for x in arrays)
    return bool(norms(arrays, dtype=torch.float64 if wide else torch.float32).isnan().any())


def exponents(arrays: Sequence[Tensor]) -> Tensor:
    return _exponents(peaks([_finite(x) for x in arrays]))


def exponents_along(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    return _exponents(_finite(x).abs().amax(axes, keepdim=True))


def _finite(x: Tensor) -> Tensor:
    x = x.detach()
    return torch.where(x.isinf(), 0, x)


def _exponents(peaks: Tensor) -> Tensor:
    return torch.where(peaks > 0, torch.frexp(peaks)[1], threshold.NO_EXPONENT)


def scaled(x: Tensor, exponents: Tensor, *, dtype: torch.dtype) -> Tensor:
    x = x.detach().abs().to(dtype)
    wide = dtype == torch.float64
    integer, bias, shift = (torch.int64, 1023, 52) if wide else (torch.int32, 127, 23)
    for part in threshold.parts(exponents.to(integer), wide=wide, xp=torch):
        # Powers from their bits are exact, which those of the library need not be on a GPU.
        x = x * ((bias - part) << shift).view(dtype)
    return torch.where(x < torch.finfo(dtype).smallest_normal, 0, x)


def where_kept(arrays: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        # Apart, so that a gradient of one array does not reach the others.
        return [torch.where(mask, x, 0) for x, mask in zip(arrays, masks, strict=True)]
    if not all(_is_plain(x) for x in arrays):
        return torch_accelerator.elementwise(lambda x, m: torch.where(m, x, 0), arrays, masks)
    # One thread of NumPy finishes before PyTorch has woken its several.
    values = [x.detach() for x in arrays]
    kept = numpy_backend.where_kept([_numpy(x) for x in values], [m.numpy() for m in masks])
    return [torch.from_numpy(v).view(x.dtype) for v, x in zip(kept, values, strict=True)]


def known_finite(arrays: Sequence[Tensor]) -> bool:
    # Only where NumPy can look: an answer from an accelerator would have to be waited for.
    readable = all(_is_plain(x) and x.dtype != torch.bfloat16 for x in arrays)
    return readable and numpy_backend.known_finite([_numpy(x.detach()) for x in arrays])


def joins(arrays: Sequence[Tensor]) -> bool:
    whole = not any(torch_accelerator.on_host(x) or torch_sharding.is_sharded(x) for x in arrays)
    return whole and len({x.device for x in arrays}) == 1


def blockwise(
    fn: Callable[..., Tensor],
    *lists: Sequence[Tensor],
    static: tuple[Any, ...] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    fn = partial(fn, *static or ())
    if not all(_is_plain(x) for arrays in lists for x in arrays):
        lists = tuple([x.detach() for x in arrays] for arrays in lists)
        return torch_accelerator.elementwise(fn, *lists, out=out)
    if out is None:
        out = _allocate(lists[0])
    for arrays in zip(*lists, out, strict=True):
        for *pieces, result in _pieces([x.detach() for x in arrays]):
            result.copy_(fn(*pieces))
    return list(out)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=torch.int32, device=x.device)


def has_bfloat16() -> bool:
    return True


def stochastic_bfloat16(
    arrays: Sequence[Tensor], *, step: int, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    if out is None:
        out = [torch.empty_like(x, dtype=torch.bfloat16) for x in arrays]
    # On the CPU, whatever the default device: the salt is read, and must not be waited for.
    salt = int(hashing.mix(torch.tensor(step, dtype=torch.int32, device="cpu")))
    arrays, targets = ([torch_sharding.local(t.detach()) for t in ts] for ts in (arrays, out))
    if not all(map(torch_accelerator.on_host, arrays)):
        torch_accelerator.elementwise(lambda x: _dithered(x, salt), arrays, out=targets)
        return list(out)
    for pair in zip(arrays, targets, strict=True):
        for piece, target in _pieces(pair):
            target.copy_(_dithered(piece, salt))
    return list(out)


def _dithered(x: Tensor, salt: int) -> Tensor:
    # bfloat16 is the upper half of float32. Adding a uniform 16-bit number to the bits
    # carries into that half with the probability of the lower half, which is what
    # stochastic rounding asks for.
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # A shift copies the sign of a signed integer into the upper bits, so clear them.
    dither = (hashing.mix(magnitude ^ salt) >> 16) & 0xFFFF
    # The sum fits int32: the bits of infinity and 16 bits more stay below 2**31. The clamp
    # keeps what is finite from being rounded up to infinity.
    rounded = (magnitude + dither).clamp_(max=_LARGEST) >> 16
    # Shifted as signed, the sign fills all bits above the magnitude of 15 bits.
    rounded |= (bits >> 16) & ~0x7FFF
    return rounded.to(torch.int16).view(torch.bfloat16)


def keep_largest(scores: Sequence[Tensor], *, counts: tuple[int, ...], stage: int) -> list[Tensor]:
    k = counts[stage]
    scores = [x.detach() for x in scores]
    if any(torch_sharding.is_sharded(x) for x in scores):
        if selects_on_host():
            raise ValueError("the host cannot select from sharded tensors, got a DTensor")
        return torch_counting.keep_largest(scores, k=k)
    if selects_on_host() or _is_plain(scores[0]):
        masks = numpy_backend.keep_largest([_numpy(x) for x in scores], counts=(k,), stage=0)
        return [torch.from_numpy(mask).to(x.device) for mask, x in zip(masks, scores, strict=True)]
    if k in (0, sum(x.numel() for x in scores)) or not is_concrete(scores[0]):
        return [torch.full_like(x, k > 0, dtype=torch.bool) for x in scores]
    devices = {x.device for x in scores}
    # Only CUDA, and the CPU, have the operations that a sample needs.
    sampled = len(devices) == 1 and scores[0].device.type in ("cuda", "cpu")
    found = torch_accelerator.keep_largest(scores, k=k) if sampled else None
    return torch_counting.keep_largest(scores, k=k) if found is None else found


def keep_largest_per_row(scores: Tensor, *, counts: tuple[int, ...], stage: int) -> Tensor:
    k, scores = counts[stage], scores.detach()
    if selects_on_host() or _is_plain(scores):
        mask = numpy_backend.keep_largest_per_row(_numpy(scores), counts=(k,), stage=0)
        return torch.from_numpy(mask).to(scores.device)
    keys = ordering_key(scores)
    return threshold.keep_largest_per_row(
        keys, k=k, kth_largest=_kth_largest_per_row, xp=xp, can_branch=False
    )


def _kth_largest_per_row(keys: Tensor, k: int) -> Tensor:
    return keys.kthvalue(keys.shape[1] - k + 1, dim=1, keepdim=True).values


def _allocate(like: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialised tensors of these shapes and dtypes in one allocation."""
    arrays = [_numpy(x.detach()) for x in like]
    memory = numpy_backend.allocate([x.shape for x in arrays], [x.dtype for x in arrays])
    return [torch.from_numpy(m).view(x.dtype) for m, x in zip(memory, like, strict=True)]


def _pieces(arrays: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Return matching pieces of tensors of one shape; small ones and strided ones come whole."""
    if arrays[0].numel() <= _PIECE or not all(x.is_contiguous() for x in arrays):
        return iter([arrays])
    return zip(*(torch.split(x.view(-1), _PIECE) for x in arrays), strict=True)


def _is_plain(x: Tensor) -> bool:
    """Return whether NumPy can read ``x`` in place."""
    return torch_accelerator.on_host(x) and not torch_sharding.is_sharded(x)


def _numpy(x: Tensor) -> Any:
    # NumPy has no bfloat16. Seen as int16 its magnitudes order alike, and NumPy's backend
    # handles all scores as integers of their bits. A tensor whose sign is still to be changed,
    # such as the imaginary part of a conjugate, has no memory that NumPy could read.
    x = x.cpu().resolve_neg()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def linalg_errors() -> tuple[type[Exception], ...]:
    return (torch.linalg.LinAlgError,)  # type: ignore[attr-defined]
