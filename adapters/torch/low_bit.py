"""Read and mask the states that a base optimizer keeps in 8 bits or fewer.

Two forms are known by their structure, whatever the library. One is a tensor subclass that
`dequantize` reads and `copy_` rounds to, as in torchao. The other is a tensor of codes ``state2``
next to a codebook ``qmap2`` and one scale per block of entries, ``absmax2``, as in bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from safe_core.backends.torch_sharding import is_sharded, local, sharded_as

from . import kernels

__all__ = ["mask_states", "read_state"]


def read_state(held: Mapping[str, Any], key: str) -> Tensor:
    """Return the state ``held[key]`` of a parameter in floating point.

    Raise a ValueError if it holds integers without their codebook.

    Examples
    --------
    >>> import torch
    >>> codes, codebook = torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0.0, 0.5])
    >>> held = {"state2": codes, "qmap2": codebook, "absmax2": torch.tensor([4.0])}
    >>> read_state(held, "state2")
    tensor([0., 2.])
    """
    state = held[key]
    codebook, scales = _codebook(held, key)
    if codebook is not None and scales is not None:
        return _decoded(state, codebook, scales)
    if _is_subclass(local(state)):
        return sharded_as(state, local(state).dequantize())
    if not state.is_floating_point():
        raise ValueError(
            "base must keep second moments in floating point, as a tensor with dequantize(), or "
            f"as codes with a codebook and scales by block, got {state.dtype} in {key!r}"
        )
    return state


def mask_states(held: Mapping[str, Any], mask: Tensor) -> None:
    """Set the states that are shaped as the mask to 0 where it is False."""
    for key, state in held.items():
        if not isinstance(state, Tensor) or state.shape != mask.shape:
            continue
        codebook, _ = _codebook(held, key)
        removed = ~local(mask)
        if codebook is not None:  # the code of 0 need not be 0
            state.masked_fill_(removed, int(codebook.abs().argmin()))
        elif _is_subclass(local(state)):
            low = local(state)
            low.copy_(low.dequantize().masked_fill(removed, 0))
        else:
            kernels.mask_([state], [mask])


def _is_subclass(x: Tensor) -> bool:
    return hasattr(x, "__tensor_flatten__") and not is_sharded(x)


def _codebook(held: Mapping[str, Any], key: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the codebook and the scales of ``state1`` or ``state2``, or None."""
    number = key.removeprefix("state")
    return held.get(f"qmap{number}"), held.get(f"absmax{number}")


def _decoded(codes: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    n, blocks = codes.numel(), scales.numel()
    # The length of a block is a power of two, so the number of blocks determines it.
    length = 1 << (-(-n // blocks) - 1).bit_length()
    factors = scales.repeat_interleave(length)[:n].reshape(codes.shape)
    return codebook[codes.long()] * factors
