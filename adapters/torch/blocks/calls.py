"""Record the arguments of blocks sample by sample, to call the blocks again in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from .fingerprints import fingerprint
from .structure import Call, Structure, call_forward, return_inputs, run_around_blocks

__all__ = ["BlockCalls", "record"]

_HIDDEN = "hidden states"


class _Shared(NamedTuple):
    """A tensor of the pool that does not grow with the batch."""

    ref: int


class _Own(NamedTuple):
    """A tensor of each sample, joined along ``axis`` in a batch."""

    axis: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Template(NamedTuple):
    """The arguments of one call, with placeholders instead of tensors."""

    leaves: tuple[Any, ...]
    spec: TreeSpec


class BlockCalls:
    """The arguments of every block for every sample; equal tensors are kept once.

    Attributes
    ----------
    pool : list of tensors
        On the CPU.
    groups : list of lists of int
        Samples that can share a batch: same shapes, same shared tensors.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.pool: list[Tensor] = []
        self.groups: list[list[int]] = []
        self._digests: dict[str, int] = {}
        self._templates: list[_Template] = []
        self._of: list[list[tuple[int, dict[int, int]]]] = []  # [sample][block]
        self._keys: dict[Any, int] = {}
        self._placed: dict[tuple[int, tuple[torch.dtype, torch.dtype]], Tensor] = {}

    def add(self, calls: Sequence[Call]) -> None:
        """Add the calls of one more sample."""
        seen: dict[int, int] = {}
        entry = [self._entry(i, call, seen) for i, call in enumerate(calls)]
        hidden = calls[0].leaves[self.structure.hidden[0]]
        key = (tuple(hidden.shape), tuple(number for number, _ in entry))
        if key not in self._keys:
            self._keys[key] = len(self.groups)
            self.groups.append([])
        self.groups[self._keys[key]].append(len(self._of))
        self._of.append(entry)

    def _entry(self, i: int, call: Call, seen: dict[int, int]) -> tuple[int, dict[int, int]]:
        own: dict[int, int] = {}
        leaves: list[Any] = []
        for j, leaf in enumerate(call.leaves):
            if j == self.structure.hidden[i]:
                leaves.append(_HIDDEN)
            elif not torch.is_tensor(leaf):
                if hasattr(leaf, "get_seq_length"):
                    raise TypeError(f"model must run without a cache, got {type(leaf)!r}")
                leaves.append(leaf)
            else:
                ref = self._keep(leaf, seen)
                axis = self.structure.axes[i].get(j)
                if axis is None:
                    leaves.append(_Shared(ref))
                else:
                    own[j] = ref
                    leaves.append(_Own(axis, tuple(leaf.shape), leaf.dtype))
        template = _Template(tuple(leaves), call.spec)
        if template not in self._templates:
            self._templates.append(template)
        return self._templates.index(template), own

    def _keep(self, tensor: Tensor, seen: dict[int, int]) -> int:
        """Return the index of a tensor in the pool; add it if it is new."""
        if id(tensor) not in seen:
            plain = tensor.detach().to("cpu", copy=True).contiguous()
            ref = self._digests.setdefault(fingerprint([plain]), len(self.pool))
            if ref == len(self.pool):
                self.pool.append(plain)
            seen[id(tensor)] = ref
        return seen[id(tensor)]

    def arguments(
        self, i: int, samples: Sequence[int], hidden: Tensor, cast: tuple[torch.dtype, torch.dtype]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of block i for a batch of samples of one group.

        Floating tensors of the first dtype of ``cast`` are cast to the second.
        """
        template = self._templates[self._of[samples[0]][i][0]]
        leaves = list(template.leaves)
        for j, leaf in enumerate(leaves):
            if isinstance(leaf, str) and leaf is _HIDDEN:
                leaves[j] = hidden
            elif isinstance(leaf, _Shared):
                leaves[j] = self._on(hidden.device, leaf.ref, cast)
            elif isinstance(leaf, _Own):
                refs = [self._of[s][i][1][j] for s in samples]
                parts = [self._cast(self.pool[ref], cast) for ref in refs]
                joined = torch.cat(parts, dim=leaf.axis) if len(parts) > 1 else parts[0]
                leaves[j] = joined.to(hidden.device, non_blocking=True)
        args, kwargs = tree_unflatten(leaves, template.spec)
        return args, kwargs

    def _on(self, device: torch.device, ref: int, cast: tuple[torch.dtype, torch.dtype]) -> Tensor:
        key = ref, cast
        if key not in self._placed:
            self._placed[key] = self._cast(self.pool[ref], cast).to(device)
        return self._placed[key]

    @staticmethod
    def _cast(tensor: Tensor, cast: tuple[torch.dtype, torch.dtype]) -> Tensor:
        return tensor.to(cast[1]) if tensor.dtype == cast[0] else tensor

    def forget_placed(self) -> None:
        """Drop the copies of shared tensors on the device."""
        self._placed.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(tensor.nbytes for tensor in self.pool)


def record(
    model: nn.Module,
    name: str,
    blocks: Sequence[nn.Module],
    samples: Sequence[Mapping[str | None, Any]],
    structure: Structure,
    take: Callable[[int, Tensor], None],
) -> BlockCalls:
    """Record the arguments of every block; ``take(i, hidden)`` gets the first block's input."""
    calls = BlockCalls(structure)
    _, _, outputs, dependent = structure
    answer = call_forward if dependent else return_inputs(structure.hidden, outputs)
    for i, sample in enumerate(samples):
        found = run_around_blocks(model, name, blocks, sample, answer)
        calls.add(found)
        take(i, found[0].leaves[structure.hidden[0]])
    return calls
