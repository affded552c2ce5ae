"""How much memory pruning takes: counted as it runs, and predicted before."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safe_core._dtypes import wide_dtype
from safe_core.layout import Layout

from ...readable import readable_bytes

__all__ = ["BlockSize", "MemoryEstimate", "TensorBytes", "forward_backward_bytes", "hollow"]


class MemoryEstimate(NamedTuple):
    """Bytes of tensors that pruning needs at its peak, over those of the model itself.

    Attributes
    ----------
    device : int
        On the device that a block is pruned on; where that is the CPU, everything.
    host : int
        On the CPU beside it: activations, recorded arguments, the block that is saved.
    disk : int
        In memory-mapped files of activations.

    Examples
    --------
    >>> print(MemoryEstimate(device=3 * 2**30, host=2**20, disk=0))
    device 3.0 GiB, host 1.0 MiB, disk 0 B
    """

    device: int
    host: int
    disk: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {readable_bytes(n)}" for name, n in self._asdict().items())


class TensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the tensors that are made or used within, while they live.

    Parameters
    ----------
    known : iterable of tensors
        Not counted, such as a model's own.

    Attributes
    ----------
    live, peak : int

    Examples
    --------
    >>> with TensorBytes() as counted:
    ...     kept = torch.zeros(256) + 1
    >>> counted.live, counted.peak
    (1024, 2048)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and take note of what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in filter(torch.is_tensor, tree_leaves((args, kwargs, result))):
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def hollow(block: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a block whose tensors are ``make(tensor)``, so that no memory is copied."""
    memo: dict[int, Any] = {id(b): make(b) for b in block.buffers()}
    for p in block.parameters():
        memo[id(p)] = nn.Parameter(make(p), requires_grad=p.is_floating_point())
    return copy.deepcopy(block, memo)


class BlockSize(NamedTuple):
    """What the memory of pruning a block follows from.

    Attributes
    ----------
    entries, trained, sparse : int
        Entries of all floating parameters, of those that SAFE trains, and of the weights that
        are pruned.
    stored : int
        Bytes of the block in its own dtypes.
    largest : int
        Entries of the largest weight.
    gram : int
        Entries of all Gram matrices together.
    inputs : int
        The largest number of input features of a weight.
    number : int
        Bytes of a number that is computed with: 4, or 8 in a block in float64.
    """

    entries: int
    trained: int
    sparse: int
    stored: int
    largest: int
    gram: int
    inputs: int
    number: int

    @classmethod
    def of(
        cls, block: nn.Module, weights: Mapping[str, Layout | None], trained: Collection[str]
    ) -> BlockSize:
        """The sizes of a block of which ``weights`` are pruned, and ``trained`` by SAFE."""
        params = dict(block.named_parameters())
        gram = inputs = largest = 0
        for name, layout in weights.items():
            p = params[name]
            experts = p.shape[0] if p.ndim == 3 else 1
            # The inputs of stacked experts are not known before they are used.
            n = max(p.shape[-2:]) if layout is None else p.shape[layout.input_axes[0]]
            gram, inputs = gram + experts * n * n, max(inputs, n)
            largest = max(largest, p.numel() // experts)
        return cls(
            entries=sum(p.numel() for p in params.values() if p.is_floating_point()),
            trained=sum(params[name].numel() for name in trained),
            sparse=sum(params[name].numel() for name in weights),
            stored=sum(t.nbytes for t in (*params.values(), *block.buffers())),
            largest=largest,
            gram=gram,
            inputs=inputs,
            number=wide_dtype(torch, list(params.values())).itemsize,
        )

    def reconstruction(self, work: int) -> int:
        """Bytes of SAFE on the block, of which a forward and backward pass takes ``work``.

        Parameters in float32 or wider; of those that are trained gradients, a copy and two
        moments of Adam; of those that are pruned anchors, and a support of one byte. A dual
        update holds scores and a second support beside them, but no activations.
        """
        split = (self.number + 1) * self.sparse
        state = self.number * (self.entries + 4 * self.trained) + split
        return state + max(work, split)

    def layerwise(self, work: int, matrices: int = 3) -> int:
        """Bytes of a layer-wise solver: all Gram matrices, and the work on one weight.

        A solver is granted so many matrices of the Gram matrix's size and four of the weight's.
        """
        numbers = matrices * self.inputs**2 + 5 * self.largest
        solving = self.number * numbers + self.largest
        return self.stored + self.number * self.gram + max(work, solving)


def forward_backward_bytes(
    block: nn.Module,
    call: Callable[[nn.Module, Callable[[Tensor], Tensor]], Tensor],
    device: torch.device,
    *,
    backward: bool,
    trained: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
    fake: bool = True,
) -> int:
    """Bytes of what a forward pass, and the backward pass, of a block hold beside its parameters.

    Runs them on tensors without memory (`FakeTensorMode`), or with zeros.

    Parameters
    ----------
    block : torch.nn.Module
    call : callable
        ``call(block, make)`` returns the loss, of inputs made by ``make`` from real ones.
    device : torch.device
    backward : bool
    trained : collection of str, optional
        Names of the parameters that have gradients; by default all of floating numbers.
    dtype : torch.dtype, optional
        Of floating parameters, in the place of their own.
    fake : bool

    Examples
    --------
    >>> x = torch.zeros(4, 8)
    >>> forward_backward_bytes(
    ...     nn.Linear(8, 8), lambda m, make: m(make(x)).sum(), torch.device("cpu"), backward=False
    ... )
    256
    """

    def make(t: Tensor) -> Tensor:
        kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
        return torch.zeros(t.shape, dtype=kind, device=device)

    with FakeTensorMode() if fake else nullcontext(), torch.set_grad_enabled(backward):
        model = hollow(block, make)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and (trained is None or name in trained))
            if p.requires_grad:
                p.grad = torch.zeros_like(p)  # added to in place, as at a later step
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        own = [*model.parameters(), *model.buffers(), *gradients]
        with TensorBytes(own) as counted:
            loss = call(model, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device))
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
    return counted.peak
