"""Compute a step in-place over lists of tensors, by foreach kernels.

`safe_core.perturbations` and `safe_core.constraints.splitting` define the formulas. The kernels
allocate no tensors for values that are only added. They act on local shards, because each
operation on a DTensor would pay for its dispatch, and these need no communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safe_core import SplitState
from safe_core.backends.torch_accelerator import elementwise, is_small, on_host, widened
from safe_core.backends.torch_sharding import is_sharded, stacked, summed
from safe_core.direction import Direction

__all__ = [
    "MovedParameters",
    "add_",
    "add_penalty_",
    "add_penalty_traced_",
    "clones",
    "copy_",
    "count_filled",
    "local_shards",
    "mask_",
    "move_traced_",
    "pull_",
    "pulls",
    "step_lengths",
    "subtract_",
]

# Entries per foreach call. A foreach operation reads a whole list before the next one starts.
# On the CPU a group must fit in cache, else each operation reads it from memory again. On an
# accelerator a group must keep the device busy for longer than its kernels take to start, and it
# bounds the temporary memory, 64 MB in float32 for each temporary.
_GROUP = 2**19
_LARGE_GROUP = 2**24
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MovedParameters:
    """Copies of parameters that were moved to ``x + e``, to restore x bit for bit.

    Subtracting e again would round, so x is copied. It is copied back into the same storage:
    swapping storages would break views, DDP buckets and compiled programs that refer to it.
    On the CPU, the memory of the copies is kept between steps, because page faults of new
    memory would cost more than the copying. An accelerator's allocator caches memory by
    itself. The copies of sharded parameters are plain tensors of the local shards.
    """

    def __init__(self) -> None:
        self._memory: dict[Tensor, Tensor] = {}
        self._saved: dict[Tensor, Tensor] = {}

    def prepare(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return uninitialised tensors for the copies of ``params``."""
        copies = []
        for p, x in zip(params, local_shards(params), strict=True):
            copy = self._memory.get(p)
            if copy is None or not _fits(copy, x):
                copy = torch.empty_like(x, requires_grad=False)
                if on_host(x):
                    self._memory[p] = copy
            copies.append(copy)
        return copies

    def release(self) -> None:
        """Free the kept memory, for example when parameters were replaced."""
        self._memory = {}

    def hold(self, params: Sequence[Tensor]) -> None:
        """Copy ``params`` before the caller changes them in-place."""
        params = list(params)
        copies = self.prepare(params)
        copy_(copies, params)
        self.mark_saved(params, copies)

    def move(
        self, params: Sequence[Tensor], copies: Sequence[Tensor], direction: Direction
    ) -> None:
        """Copy ``params`` into ``copies``, the result of `prepare`, and add e to ``params``."""
        params, copies = list(params), list(copies)
        values, vectors = local_shards(params), local_shards(direction.vectors)
        known = on_host(direction.length)
        # Reading a value from an accelerator would wait for all its pending work.
        scale = float(direction.factor) if known else 0.0
        if not known:
            copy_(copies, values)
            self.mark_saved(params, copies)
            values, vectors = _cut(values, vectors)
            for i in _groups(values):
                _add_rounded_(values[i], _written_out(vectors[i], direction))
            return
        for i in _groups(values):
            torch._foreach_copy_(copies[i], values[i])
            self.mark_saved(params[i], copies[i])
            if scale:  # 0 marks an unusable gradient, and 0 * NaN would be NaN
                torch._foreach_add_(values[i], vectors[i], alpha=scale)

    def mark_saved(self, params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        """Mark ``copies`` as holding x."""
        self._saved.update(zip(params, copies, strict=True))

    def workspace(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the kept memory of the copies of ``params`` as scratch space.

        Return None unless it exists for all of them, unsharded and in 32 bits or more.
        """
        plain = [p for p in params if p.element_size() > 2 and not is_sharded(p)]
        kept = [(p, self._memory.get(p)) for p in plain]
        found = [copy for p, copy in kept if copy is not None and _fits(copy, p)]
        return found if len(found) == len(params) else None

    def restore(self, but: Sequence[Tensor] = ()) -> None:
        """Restore x for all saved parameters ``but`` some, which stay saved."""
        left = {p: self._saved.pop(p) for p in but if p in self._saved}
        saved, self._saved = self._saved, left
        if saved:
            copy_(list(saved), list(saved.values()))

    def copies(self, params: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Return a copy, or None, for each of ``params``; None if nothing is saved."""
        return [self._saved.get(p) for p in params] if self._saved else None

    def mark_restored(self, params: Sequence[Tensor]) -> None:
        """Mark ``params`` as restored."""
        for p in params:
            self._saved.pop(p, None)


def add_penalty_(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    penalty: float | Tensor,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """Restore x from its copy, if any, then add the gradient of the penalty.

    This computes ``x <- copy`` and ``g <- g + penalty * (x - anchor)`` in one pass over x, in
    float32 or wider.
    """
    found = [None] * len(params) if copies is None else copies
    gradients, params, anchors = (local_shards(tensors) for tensors in (gradients, params, anchors))
    sources = [x if copy is None else copy for x, copy in zip(params, found, strict=True)]
    gradients, params, anchors, sources = _cut(gradients, params, anchors, sources)
    for i in _groups(params):
        if copies is not None:
            torch._foreach_copy_(params[i], sources[i])
        gaps = torch._foreach_sub(widened(params[i]), widened(anchors[i]))
        _add_rounded_(gradients[i], gaps, penalty)


def pulls(
    params: Sequence[Tensor], anchors: Sequence[Tensor], factor: float | Tensor
) -> list[Tensor]:
    """Return ``factor * (x - anchor)`` of the local shards, in float32 or wider."""
    params, anchors = local_shards(params), local_shards(anchors)
    differences = torch._foreach_sub(widened(params), widened(anchors))
    _multiply_(differences, factor)
    return list(differences)


def subtract_(params: Sequence[Tensor], pulled: Sequence[Tensor]) -> None:
    """Subtract the pulls, ``x <- x - pull``, computed in the dtype of the pull."""
    params, pulled = _cut(local_shards(params), pulled)
    for i in _groups(params):
        _add_rounded_(params[i], pulled[i], -1.0)


def pull_(params: Sequence[Tensor], split: SplitState, penalty: float | Tensor) -> None:
    """Move ``x <- x - (1 - exp(-penalty)) * (x - anchor)`` off the support.

    It computes in float32 or wider, see `safe_core.constraints.pull.pulled`.
    """
    factor = _pull_factor(penalty)
    shards = map(local_shards, (params, split.anchor, split.support))
    lists = _without_small(partial(_pulled, factor), *shards)
    params, anchors, supports = _cut(*lists)
    for i in _groups(params):
        wide = widened(params[i])
        gaps = torch._foreach_sub(wide, widened(anchors[i]))
        for gap, support in zip(gaps, supports[i], strict=True):
            gap.masked_fill_(support, 0)
        _add_multiple_(wide, gaps, factor)
        rounded = [(x, moved) for x, moved in zip(params[i], wide, strict=True) if moved is not x]
        if rounded:
            torch._foreach_copy_([x for x, _ in rounded], [moved for _, moved in rounded])


def _without_small(fn: Callable[..., Tensor], *lists: list[Tensor]) -> Sequence[list[Tensor]]:
    """Write ``fn`` of small tensors on an accelerator; return the lists without these tensors.

    The results go to the first list.
    """
    joined = [not on_host(x) and is_small(x) for x in lists[0]]
    if not any(joined):
        return lists
    small = [[x for x, flag in zip(xs, joined, strict=True) if flag] for xs in lists]
    elementwise(fn, *small, out=small[0])
    return [[x for x, flag in zip(xs, joined, strict=True) if not flag] for xs in lists]


def _pulled(factor: float | Tensor, x: Tensor, anchor: Tensor, support: Tensor) -> Tensor:
    wide = _widened(x)
    return torch.where(support, wide, _sum(wide, wide - anchor, factor))


def _pull_factor(penalty: float | Tensor) -> float | Tensor:
    return torch.expm1(-penalty) if torch.is_tensor(penalty) else math.expm1(-penalty)


def _sum(x: Tensor, added: Tensor, factor: float | Tensor) -> Tensor:
    """Return ``x + factor * added``."""
    if torch.is_tensor(factor):
        return x + factor.to(x.dtype) * added
    return torch.add(x, added, alpha=factor)


def _multiply_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply tensors of one dtype in-place; a factor of another dtype is cast."""
    if tensors:
        scalar = factor.to(tensors[0].dtype) if torch.is_tensor(factor) else factor
        torch._foreach_mul_(list(tensors), scalar)


def _add_multiple_(
    targets: Sequence[Tensor], added: Sequence[Tensor], factor: float | Tensor
) -> None:
    """Add ``factor * added`` in-place; if the factor is a tensor, ``added`` is overwritten."""
    if torch.is_tensor(factor):
        _multiply_(added, factor)
        factor = 1.0
    torch._foreach_add_(list(targets), list(added), alpha=factor)


def add_(tensors: Sequence[Tensor], added: Sequence[Tensor]) -> None:
    """Add to tensors in-place. Both lists must be sharded alike."""
    if tensors:
        torch._foreach_add_(local_shards(tensors), local_shards(added))


def add_penalty_traced_(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    penalties: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """Do the same as `add_penalty_`, in a form that the compiler fuses.

    Penalties are tensors, so that a new value does not recompile the program.
    """
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
    """Do the same as `MovedParameters.move`, in a form that the compiler fuses."""
    for x, copy, vector, factor in zip(params, copies, vectors, factors, strict=True):
        copy.copy_(x)
        x.add_(torch.where(usable, factor * vector, 0.0))


def _written_out(vectors: Sequence[Tensor], direction: Direction) -> list[Tensor]:
    """Return e on an accelerator; e is zero if the direction is not usable."""
    factor = direction.factor
    wide = widened(vectors)
    if any(v.dtype != factor.dtype for v in wide):
        wide = [v.to(factor.dtype) for v in wide]
    steps = torch._foreach_mul(wide, factor)
    # NaN * 0 is NaN, but the bits of NaN, read as an integer, times 0 are 0. This needs no
    # branch on a value that the host would have to read.
    bits = [step.view(_INTEGER[step.element_size()]) for step in steps]
    torch._foreach_mul_(bits, direction.usable.to(bits[0].dtype))
    return list(steps)


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy sources into targets. Both must be sharded alike, or be local shards."""
    if targets:
        torch._foreach_copy_(local_shards(targets), local_shards(sources))


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, sharded alike."""
    found = [torch.empty_like(x) for x in tensors]
    copy_(found, tensors)
    return found


def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set tensors to +0 where their masks are False."""
    # Not a product with the mask, which would leave -0 and NaN.
    shards = local_shards(tensors), local_shards(masks)
    lists = _without_small(lambda x, mask: torch.where(mask, x, 0), *shards)
    zeros: dict[Any, Tensor] = {}
    for x, mask in zip(*lists, strict=True):
        kind = x.dtype, x.device
        if kind not in zeros:
            zeros[kind] = x.new_zeros(())
        torch.where(mask, x, zeros[kind], out=x)


def count_filled(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> list[int]:
    """Return the number of non-zero entries outside the mask for each tensor.

    All counts are read from the device at once.
    """
    if not tensors:
        return []
    pairs = zip(local_shards(tensors), local_shards(masks), strict=True)
    counts = [((x != 0) & ~mask).sum() for x, mask in pairs]
    found = torch.stack([count.to(counts[0].device) for count in counts])
    return [int(count) for count in summed(found, tensors).tolist()]


@torch.no_grad()
def step_lengths(params: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Return ``|x - before|`` and ``|before|`` in a row for each parameter, in float32 or wider.

    ``before`` holds local shards. The norms run over all shards.
    """
    now, of_steps, of_x = local_shards(params), list[Tensor](), list[Tensor]()
    for i in _groups(now):
        wide = widened(before[i])
        of_steps += torch._foreach_norm(torch._foreach_sub(widened(now[i]), wide))
        of_x += torch._foreach_norm(wide)
    squares = torch.stack([stacked(of_steps), stacked(of_x)], dim=1).square()
    return summed(squares, params).sqrt()


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the local shard of each tensor; a plain tensor is its own shard.

    To change the shards of parameters in place, call it without gradients.
    """
    return [x.to_local() if is_sharded(x) else x for x in tensors]  # type: ignore[attr-defined]


def _add_rounded_(
    targets: Sequence[Tensor], added: Sequence[Tensor], factor: float | Tensor = 1.0
) -> None:
    """Add ``factor * added`` in-place, in the dtype of ``added``, and round the sums once.

    If the factor is a tensor, ``added`` is overwritten.
    """
    targets, added = list(targets), list(added)
    same = all(x.dtype == y.dtype for x, y in zip(targets, added, strict=True))
    if same or any(map(on_host, targets)):
        _add_multiple_(targets, added, factor)
        return
    # An accelerator has no foreach kernel for lists of two dtypes, except for copying.
    sums = [torch.empty_like(x, dtype=y.dtype) for x, y in zip(targets, added, strict=True)]
    torch._foreach_copy_(sums, targets)
    _add_multiple_(sums, added, factor)
    torch._foreach_copy_(targets, sums)


def _widened(x: Tensor) -> Tensor:
    return x if x.element_size() > 2 else x.float()


def _cut(*lists: Sequence[Tensor]) -> Sequence[list[Tensor]]:
    """Cut large tensors into views of the size of a group, alike in every list."""
    if all(x.numel() <= _group_size(x) for x in lists[0]):
        return [list(tensors) for tensors in lists]
    cut: list[list[Tensor]] = [[] for _ in lists]
    for tensors in zip(*lists, strict=True):
        pieces: Sequence[Sequence[Tensor]] = [[x] for x in tensors]
        size = _group_size(tensors[0])
        if tensors[0].numel() > size and all(x.is_contiguous() for x in tensors):
            pieces = [x.view(-1).split(size) for x in tensors]
        for found, more in zip(cut, pieces, strict=True):
            found += more
    return cut


def _group_size(x: Tensor) -> int:
    return _GROUP if on_host(x) else _LARGE_GROUP


def _groups(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of a list that group tensors up to the size that suits their device."""
    start, size = 0, 0
    for stop, tensor in enumerate(tensors, 1):
        size += tensor.numel()
        if size >= _group_size(tensor):
            yield slice(start, stop)
            start, size = stop, 0
    if start < len(tensors):
        yield slice(start, len(tensors))


def _fits(copy: Tensor, x: Tensor) -> bool:
    return (
        copy.shape == x.shape
        and copy.stride() == x.stride()
        and copy.dtype == x.dtype
        and copy.device == x.device
    )
