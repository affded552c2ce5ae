"""Work on an accelerator, where starting a kernel costs more than reading a small tensor.

Small tensors are joined, so that many of them take as few kernels as one. Large ones stay alone,
because they keep the device busy, and joining them would copy them.

To select, a sample brackets the threshold. The few percent of all entries inside the bracket
are sorted, and two comparisons classify the others. The host waits for the device once, to learn
how many entries are in the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .torch_counting import ordering_key
from .torch_sharding import is_sharded

__all__ = ["elementwise", "is_small", "keep_largest", "on_host", "widened"]

# Entries that are joined at most, and selected from at once, 128 MB in float32.
_CHUNK = 2**25
# Entries of a tensor that is joined to others. Copying more takes longer than starting a kernel.
_SMALL = 2**20
# Entries of the sample that brackets the threshold.
_SAMPLE = 2**17
# Sort at most this many candidates, or an eighth of all entries if that is more. Counting
# is faster than sorting a larger share.
_CANDIDATES = 2**14


def on_host(x: Tensor) -> bool:
    """Return whether ``x`` is a tensor of the CPU. Tests replace this to run the other code."""
    return x.is_cpu


def is_small(x: Tensor) -> bool:
    """Return whether starting a kernel for ``x`` costs more than copying ``x`` to join it."""
    return x.numel() <= _SMALL


def elementwise(
    fn: Callable[..., Tensor], *lists: Sequence[Tensor], out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return ``[fn(*arrays) for arrays in zip(*lists)]`` with few kernels.

    ``fn`` gets small tensors joined, as vectors. Their results are views of one allocation, unless
    they are written to ``out``.
    """
    results: list[Tensor] = []
    for i in _runs(lists):
        members = [arrays[i] for arrays in lists]
        if i.stop - i.start == 1:
            found: Sequence[Tensor] = [fn(*(arrays[0] for arrays in members))]
        else:
            joined = fn(*(_joined([x.reshape(-1) for x in arrays]) for arrays in members))
            found = _apart(joined, members[0])
        if out is None:
            results += found
        else:
            torch._foreach_copy_(list(out[i]), list(found))
    return results if out is None else list(out)


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of less than 32 bits in float32, cast by one kernel; others as they are."""
    found, targets, sources = [], [], []
    for x in tensors:
        if x.element_size() > 2:
            found.append(x)
        elif is_sharded(x):
            found.append(x.float())
        else:
            found.append(torch.empty_like(x, dtype=torch.float32, requires_grad=False))
            targets.append(found[-1])
            sources.append(x.detach())
    if targets:
        torch._foreach_copy_(targets, sources)
    return found


def _runs(lists: Sequence[Sequence[Tensor]]) -> Iterator[slice]:
    """Yield slices of neighbours that can be joined in every list."""
    start, size, kind = 0, 0, None
    for stop, arrays in enumerate(zip(*lists, strict=True)):
        # A result keeps the strides of its tensor. Joined it could not, unless it is contiguous.
        plain = all(x.is_contiguous() and not is_sharded(x) for x in arrays)
        own = tuple((x.dtype, x.device) for x in arrays) if plain else None
        own = own if is_small(arrays[0]) else None
        joins = own is not None and own == kind and size + arrays[0].numel() <= _CHUNK
        if not joins:
            if stop > start:
                yield slice(start, stop)
            start, size, kind = stop, 0, own
        size += arrays[0].numel()
    if lists[0]:
        yield slice(start, len(lists[0]))


def keep_largest(scores: Sequence[Tensor], *, k: int) -> list[Tensor] | None:
    """Return masks of the ``k`` largest magnitudes, for k between 0 and the number of entries.

    The scores share a dtype and a device. Ties go to the first tensor and within it to the lowest
    row-major index. Return None where the bracket fails, because too many entries are equal.
    """
    flat = [x.reshape(-1) for x in scores]
    n = sum(x.numel() for x in flat)
    low, high = _bracket(flat, n, k)
    # The level of an entry is 0 below the bracket, 1 in it and 2 above it.
    levels = torch.empty(n, dtype=torch.uint8, device=flat[0].device)
    chunks = _chunks(flat, levels)
    # They are read twice, so joined chunks are kept if they fit into one together.
    keeps = sum(level.numel() for parts, level in chunks if len(parts) > 1) <= _CHUNK
    sums = []
    for parts, level in chunks:
        joined = _joined(parts)
        if keeps:
            parts[:] = [joined]
        keys = ordering_key(joined)
        torch.ge(keys, low, out=level.view(torch.bool))
        above = keys >= high
        sums += [level.sum(), above.sum()]
        level += above
    found = torch.stack(sums).tolist()  # wait for the device here, and nowhere else
    inside = [reach - above for reach, above in zip(found[::2], found[1::2], strict=True)]
    missing = k - sum(found[1::2])
    if not (0 <= missing <= sum(inside) <= max(_CANDIDATES, n // 8)):
        return None
    places, candidates = [], []
    for (parts, level), size in zip(chunks, inside, strict=True):
        # With its size given, `nonzero_static` need not ask the device for it.
        place = torch.nonzero_static(level == 1, size=size)[:, 0]
        places.append(place)
        candidates.append(ordering_key(_joined(parts)[place]))
    # A stable sort leaves equal keys in the order of the tensors, so the ties that are kept
    # are those of the lowest index.
    order = torch.cat(candidates).argsort(descending=True, stable=True)
    ranks = torch.ones_like(order, dtype=torch.uint8)
    ranks[:missing].fill_(2)
    kept = torch.empty_like(ranks)
    kept[order] = ranks
    for (_, level), place, chosen in zip(chunks, places, torch.split(kept, inside), strict=True):
        level[place] = chosen
    return _apart(levels.eq_(2).view(torch.bool), scores)


def _chunks(flat: Sequence[Tensor], levels: Tensor) -> list[tuple[list[Tensor], Tensor]]:
    """Return parts of the vectors with up to `_CHUNK` entries together, and their levels.

    Neighbours are together if they are small.
    """
    found: list[list[Tensor]] = []
    size = 0  # of the last list
    for x in flat:
        for part in torch.split(x, _CHUNK):
            if not found or not is_small(part) or size + part.numel() > _CHUNK:
                found.append([])
                size = 0
            found[-1].append(part)
            size += part.numel() if is_small(part) else _CHUNK  # nothing joins a large tensor
    own = torch.split(levels, [sum(x.numel() for x in parts) for parts in found])
    return list(zip(found, own, strict=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _apart(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a vector in the shapes of tensors."""
    parts = torch.split(joined, [x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def _bracket(flat: Sequence[Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return keys with ``low <= kth < high``, almost certainly, for the k-th largest of n keys.

    Both stay on the device as scalar tensors.
    """
    # An odd stride shares no factor with rows whose length is a power of two, and so visits
    # every column.
    stride = n // _SAMPLE | 1
    sample = ordering_key(torch.cat([x[::stride] for x in flat])).sort(descending=True).values
    size = sample.numel()
    rank = k * size // n
    # The rank of the threshold in a random sample is binomial. Four standard deviations
    # contain it almost always. The 16 more cover small samples and rounding.
    slack = 16 + int(4 * math.sqrt(size * (k / n) * (1 - k / n)))
    top, bottom = rank - slack, rank + slack
    zero = torch.zeros_like(sample[0])
    return (
        sample[bottom] if bottom < size else zero,
        sample[top] if top >= 0 else zero + torch.iinfo(sample.dtype).max,
    )
