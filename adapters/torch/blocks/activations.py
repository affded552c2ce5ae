"""Store the hidden states of all samples, and bring them to the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .processes import Move

__all__ = ["Activations", "prefetched"]

_Order = TypeVar("_Order")
_T = TypeVar("_T")


class Activations:
    """The hidden states of every sample, on the device, on the CPU or in a file.

    On the CPU, memory is pinned if the device is a GPU. Files are allocated at once, so that a
    full disk raises here and not in the middle of a run. One of several processes holds only its
    share of the samples.

    Parameters
    ----------
    device : torch.device
        The device that `take` returns tensors on.
    offload : {"cpu", "disk", "none"}
    folder : pathlib.Path, optional
        For ``"disk"``.
    name : str

    Examples
    --------
    >>> held = Activations(torch.device("cpu"), "cpu")
    >>> held.expect([0, 1, 2], torch.zeros(1, 2))
    >>> held.put([2, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> held.take([0, 2])
    tensor([[3., 4.],
            [1., 2.]])
    """

    def __init__(
        self,
        device: torch.device,
        offload: str,
        folder: Path | None = None,
        name: str = "activations",
    ) -> None:
        self.device = device
        self._offload, self._folder, self._name = offload, folder, name
        self._places: dict[int, tuple[Tensor, int]] = {}  # the buffer of a sample and its row
        self._buffers: list[tuple[list[int], list[int], Tensor]] = []
        self._files: list[Path] = []

    def expect(
        self, samples: Sequence[int], like: Tensor, held: Container[int] | None = None
    ) -> None:
        """Allocate memory for samples whose hidden states are like those of the first.

        Of samples that are not ``held``, only the shape is known. By default all are held.
        """
        mine = [sample for sample in samples if held is None or sample in held]
        shape, dtype = (len(mine), *like.shape), like.dtype
        if not mine or self._offload == "none":
            buffer = torch.empty(shape, dtype=dtype, device=self.device)
        elif self._offload == "cpu" or self._folder is None:
            buffer = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        else:
            buffer = self._in_file(self._folder, shape, dtype)
        self._buffers.append((list(samples), mine, buffer))
        self._places |= dict.fromkeys(samples, (buffer, len(mine)))  # beyond the end
        self._places |= {sample: (buffer, row) for row, sample in enumerate(mine)}

    def _in_file(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        path, size = folder / f"{self._name}-{len(self._files)}.bin", math.prod(shape)
        self._files.append(path)
        try:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on every system
                    os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                file.truncate(size * dtype.itemsize)
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"work_dir must have room for {size * dtype.itemsize} bytes of activations, got "
                f"{error.strerror} for {path}",
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)

    def alike(self, name: str) -> Activations:
        """Allocate memory for as many hidden states of the same shapes."""
        other = Activations(self.device, self._offload, self._folder, name)
        for samples, held, buffer in self._buffers:
            like = torch.empty(buffer.shape[1:], dtype=buffer.dtype, device="meta")
            other.expect(samples, like, held)
        return other

    def put(self, samples: Sequence[int], batch: Tensor) -> None:
        """Store the hidden states of samples, joined along the first axis."""
        for sample, part in zip(samples, batch.detach().chunk(len(samples)), strict=True):
            buffer, row = self._places[sample]
            buffer[row].copy_(part, non_blocking=True)

    def take(self, samples: Sequence[int]) -> Tensor:
        """Return the hidden states of samples of one shape on the device, joined."""
        joined = self._room_for(samples, len(samples))
        for sample, part in zip(samples, joined.chunk(len(samples)), strict=True):
            self._copy(sample, part)
        return joined

    def take_part(
        self, parts: Sequence[Sequence[int]], rank: int, owners: Sequence[int]
    ) -> tuple[Tensor, list[Move]]:
        """Return room for the part of a batch that a process computes, and how it is filled.

        Samples that the process holds are copied at once. Processes send each other the rest.

        Parameters
        ----------
        parts : sequence of sequences of int
            The samples of every process, of one shape.
        rank : int
            This process.
        owners : sequence of int
            The process that holds each sample.

        Examples
        --------
        >>> held = Activations(torch.device("cpu"), "cpu")
        >>> held.expect([0, 1], torch.zeros(1, 2), held=[0])
        >>> held.put([0], torch.ones(1, 2))
        >>> held.take_part([[0], [1]], rank=0, owners=[0, 1])
        (tensor([[1., 1.]]), [])
        """
        whole = [sample for part in parts for sample in part]
        joined, moves = self._room_for(whole, len(parts[rank])), []
        for target, part in enumerate(parts):
            for place, sample in enumerate(part):
                source = owners[sample]
                room = joined.chunk(len(part))[place] if target == rank else None
                if source != target:
                    sent = self.take([sample]) if source == rank else room
                    moves.append(Move(source, target, sent))
                elif room is not None:
                    self._copy(sample, room)
        return joined, moves

    def _room_for(self, samples: Sequence[int], count: int) -> Tensor:
        """Return uninitialised memory on the device for some samples of one shape."""
        like = self._places[samples[0]][0]
        shape = (count * like.shape[1], *like.shape[2:])
        return torch.empty(shape, dtype=like.dtype, device=self.device)

    def _copy(self, sample: int, room: Tensor) -> None:
        buffer, row = self._places[sample]
        kept = buffer[row]
        if self.device.type == "cuda" and not kept.is_cuda and not kept.is_pinned():
            kept = kept.pin_memory()
        room.copy_(kept, non_blocking=True)

    def copy_from(self, other: Activations) -> None:
        """Copy the hidden states of activations of the same shapes."""
        if self.device.type == "cuda":
            # The CPU copies pinned memory immediately, but the GPU may still be writing to it.
            torch.cuda.current_stream(self.device).synchronize()
        for (*_, mine), (*_, theirs) in zip(self._buffers, other._buffers, strict=True):
            mine.copy_(theirs)

    def close(self) -> None:
        """Free the memory and remove the files."""
        self._places.clear()
        self._buffers.clear()
        for path in self._files:
            path.unlink(missing_ok=True)


def prefetched(
    order: Iterable[_Order], load: Callable[[_Order], _T], device: torch.device
) -> Iterator[tuple[_Order, _T]]:
    """Yield ``(samples, load(samples))``; on a GPU, load the next batch in the background.

    Examples
    --------
    >>> list(prefetched([[0], [1]], lambda samples: samples[0] + 1, torch.device("cpu")))
    [([0], 1), ([1], 2)]
    """
    if device.type != "cuda":
        for samples in order:
            yield samples, load(samples)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # which may still be writing
    waiting: tuple[_Order, _T, torch.cuda.Event] | None = None
    for samples in order:
        with torch.cuda.stream(stream):
            loaded = load(samples)
            event = stream.record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = samples, loaded, event
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(samples: _Order, loaded: _T, event: torch.cuda.Event) -> tuple[_Order, _T]:
    current = torch.cuda.current_stream()  # that of the device: see `Run.run`
    current.wait_event(event)
    for leaf in tree_leaves(loaded):
        leaf.record_stream(current)
    return samples, loaded
