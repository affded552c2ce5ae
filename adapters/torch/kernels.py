"""The arithmetic of a step over lists of tensors, in place, by foreach kernels.

The formulas are those of `safe_core.perturbations` and `safe_core.constraints.splitting`.
They allocate no array for values that are only added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safe_core.backends.torch_sharding import is_sharded, local, summed
from safe_core.perturbations import Direction

__all__ = [
    "MovedParameters",
    "add_",
    "add_penalty_",
    "add_penalty_traced_",
    "copy_",
    "count_filled",
    "local_shards",
    "mask_",
    "move_traced_",
    "pulls",
    "subtract_",
]

_GROUP = 2**19  # entries that a CPU's cache holds between two passes over them
_LARGE_GROUP = 2**26  # entries for which an accelerator may keep what is only added
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MovedParameters:
    """Parameters at ``x + e``, and what is needed to restore x bit for bit.

    On the CPU the copies are kept from step to step, for page faults would cost more than
    copying; an accelerator's allocator keeps memory by itself. Of sharded parameters the
    copies are plain tensors of the shards at hand.
    """

    def __init__(self) -> None:
        self._memory: dict[Tensor, Tensor] = {}
        self._saved: dict[Tensor, Tensor] = {}

    def prepare(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors for the copies of ``params``."""
        copies = []
        for p in params:
            x, kept = local(p.detach()), self._memory.get(p)
            copies.append(kept if kept is not None and _fits(kept, x) else torch.empty_like(x))
        pairs = zip(params, copies, strict=True)
        self._memory |= {p: copy for p, copy in pairs if p.device.type == "cpu"}
        return copies

    def release(self) -> None:
        """Drop the memory of copies, as of parameters that may be gone."""
        self._memory = {}

    def hold(self, params: Sequence[Tensor]) -> None:
        """Copy ``params``, which are about to be changed in place."""
        params = list(params)
        copies = self.prepare(params)
        copy_(copies, params)
        self.mark_saved(params, copies)

    def move(
        self, params: Sequence[Tensor], copies: Sequence[Tensor], direction: Direction
    ) -> None:
        """Copy ``params`` into ``copies``, from `prepare`, and add e to them."""
        params, copies = list(params), list(copies)
        values, vectors = local_shards(params), local_shards(direction.vectors)
        on_host = direction.length.device.type == "cpu"
        # Not read from an accelerator, which would wait for it.
        scale = float(direction.factor) if on_host else 0.0
        for i in _groups(values):
            torch._foreach_copy_(copies[i], values[i])
            self.mark_saved(params[i], copies[i])
            if not on_host:
                torch._foreach_add_(values[i], _written_out(vectors[i], direction))
            elif scale:  # else the gradient may hold NaN
                torch._foreach_add_(values[i], vectors[i], alpha=scale)

    def mark_saved(self, params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        """Mark ``copies`` as holding x."""
        self._saved.update(zip(params, copies, strict=True))

    def workspace(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """The memory of the copies of ``params``, where it is kept and in 32 bits or more."""
        plain = [p for p in params if p.element_size() > 2 and not is_sharded(p)]
        kept = [(p, self._memory.get(p)) for p in plain]
        found = [copy for p, copy in kept if copy is not None and _fits(copy, p)]
        return found if len(found) == len(params) else None

    def restore(self, but: Sequence[Tensor] = ()) -> None:
        """Bring back x where it was saved, for all ``but`` some."""
        left = {p: self._saved.pop(p) for p in but if p in self._saved}
        saved, self._saved = self._saved, left
        if saved:
            copy_(list(saved), list(saved.values()))

    def copies(self, params: Sequence[Tensor]) -> list[Tensor | None] | None:
        """The copies of those of ``params`` that are to be restored; None if none is."""
        return [self._saved.get(p) for p in params] if self._saved else None

    def mark_restored(self, params: Sequence[Tensor]) -> None:
        """Mark ``params`` as restored."""
        for p in params:
            self._saved.pop(p, None)


def add_penalty_(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    penalty: float,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """``x <- copy`` where there is one, then ``g <- g + penalty * (x - anchor)``.

    Both in one pass over x, computed in float32 or wider.
    """
    found = [None] * len(params) if copies is None else copies
    gradients, params, anchors = (local_shards(tensors) for tensors in (gradients, params, anchors))
    sources = [x if copy is None else copy for x, copy in zip(params, found, strict=True)]
    gradients, params, anchors, sources = _cut(gradients, params, anchors, sources)
    for i in _groups(params):
        if copies is not None:
            torch._foreach_copy_(params[i], sources[i])
        wide = [_widened(x) for x in params[i]]
        torch._foreach_add_(gradients[i], torch._foreach_sub(wide, anchors[i]), alpha=penalty)


def pulls(
    params: Sequence[Tensor], anchors: Sequence[Tensor], factor: float | Tensor
) -> list[Tensor]:
    """``factor * (x - anchor)`` of the shards at hand, in float32 or wider."""
    params, anchors = local_shards(params), local_shards(anchors)
    differences = torch._foreach_sub([_widened(x) for x in params], anchors)
    torch._foreach_mul_(differences, factor)
    return list(differences)


def subtract_(params: Sequence[Tensor], pulled: Sequence[Tensor]) -> None:
    """``x <- x - pull``, computed in the dtype of the pull."""
    for x, pull in zip(local_shards(params), pulled, strict=True):
        x.copy_(_widened(x) - pull)


def add_(tensors: Sequence[Tensor], added: Sequence[Tensor]) -> None:
    """``tensor <- tensor + added``, of tensors that are sharded alike."""
    if tensors:
        torch._foreach_add_(local_shards(tensors), local_shards(added))


def add_penalty_traced_(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    penalties: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """`add_penalty_` in the form that a compiler fuses, for penalties that may change."""
    found = [None] * len(params) if copies is None else copies
    lists = (gradients, params, anchors, penalties, found)
    for g, x, anchor, penalty, copy in zip(*lists, strict=True):
        if copy is not None:
            x.copy_(copy)
        g.add_(penalty * (_widened(x) - anchor))


def move_traced_(
    params: Sequence[Tensor],
    copies: Sequence[Tensor],
    vectors: Sequence[Tensor],
    factors: Sequence[Tensor],
    usable: Tensor,
) -> None:
    """`MovedParameters.move` in the form that a compiler fuses."""
    for x, copy, vector, factor in zip(params, copies, vectors, factors, strict=True):
        copy.copy_(x)
        x.add_(torch.where(usable, factor * vector, 0.0))


def _written_out(vectors: Sequence[Tensor], direction: Direction) -> list[Tensor]:
    """e on an accelerator, zero where the direction is not usable."""
    factor = direction.factor
    steps = torch._foreach_mul([v.to(factor.dtype) for v in vectors], factor)
    # NaN times zero is NaN, but its bits times zero are zero.
    bits = [step.view(_INTEGER[step.element_size()]) for step in steps]
    torch._foreach_mul_(bits, direction.usable.to(bits[0].dtype))
    return list(steps)


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """``target <- source``, of tensors that are sharded alike, or shards at hand."""
    if targets:
        torch._foreach_copy_(local_shards(targets), local_shards(sources))


def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set tensors to +0 where their masks are false."""
    for tensor, mask in zip(local_shards(tensors), local_shards(masks), strict=True):
        tensor.masked_fill_(~mask, 0)


def count_filled(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> list[int]:
    """How many entries off its mask each tensor holds that are not zero; reads once."""
    if not tensors:
        return []
    pairs = zip(local_shards(tensors), local_shards(masks), strict=True)
    counts = [((x != 0) & ~mask).sum() for x, mask in pairs]
    found = torch.stack([count.to(counts[0].device) for count in counts])
    return [int(count) for count in summed(found, tensors).tolist()]


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The entries at hand of each tensor."""
    return [local(x.detach()) for x in tensors]


def _widened(x: Tensor) -> Tensor:
    return x if x.element_size() > 2 else x.float()


def _cut(*lists: Sequence[Tensor]) -> Sequence[list[Tensor]]:
    """Lists of tensors of equal shapes, with large ones on the CPU cut into views."""
    cut: list[list[Tensor]] = [[] for _ in lists]
    for tensors in zip(*lists, strict=True):
        pieces: Sequence[Sequence[Tensor]] = [[x] for x in tensors]
        on_host = tensors[0].device.type == "cpu"
        if on_host and tensors[0].numel() > _GROUP and all(x.is_contiguous() for x in tensors):
            pieces = [x.view(-1).split(_GROUP) for x in tensors]
        for found, more in zip(cut, pieces, strict=True):
            found += more
    return cut


def _groups(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of a list, of as many entries as suit its device."""
    start, size = 0, 0
    for stop, tensor in enumerate(tensors, 1):
        size += tensor.numel()
        if size >= (_GROUP if tensor.device.type == "cpu" else _LARGE_GROUP):
            yield slice(start, stop)
            start, size = stop, 0
    if start < len(tensors):
        yield slice(start, len(tensors))


def _fits(copy: Tensor, x: Tensor) -> bool:
    return (copy.shape, copy.dtype, copy.device) == (
        x.shape,
        x.dtype,
        x.device,
    ) and copy.stride() == x.stride()
