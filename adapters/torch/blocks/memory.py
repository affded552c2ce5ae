"""Memory of pruning: counted during a run, and predicted before it."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safe_core._dtypes import wide_dtype
from safe_core._readable import readable_bytes
from safe_core.backends.torch_sharding import local
from safe_core.layout import Layout

__all__ = [
    "BlockSize",
    "MemoryEstimate",
    "TensorBytes",
    "block_dtype",
    "copy_with",
    "forward_backward_bytes",
]


class MemoryEstimate(NamedTuple):
    """Peak memory of the tensors of a run, in bytes, without the model itself.

    Of several processes, it is that of this process.

    Attributes
    ----------
    device : int
        On the device that blocks are pruned on; if that is the CPU, all memory.
    host : int
        On the CPU otherwise: activations, recorded arguments, the block that is saved.
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
    """Count the bytes of tensors that operations in this context create or use.

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
        """Run an operation and count the tensors that it takes and returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in filter(torch.is_tensor, tree_leaves((args, kwargs, result))):
            storage = local(leaf).untyped_storage()
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


def copy_with(block: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of a block with the tensors ``make(tensor)``, without copying memory."""
    memo: dict[int, Any] = {id(b): make(b) for b in block.buffers()}
    for p in block.parameters():
        memo[id(p)] = nn.Parameter(make(p), requires_grad=p.is_floating_point())
    return copy.deepcopy(block, memo)


def block_dtype(block: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating parameter of a block, or else float32.

    Examples
    --------
    >>> block_dtype(nn.Linear(2, 2).double())
    torch.float64
    """
    return next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)


class BlockSize(NamedTuple):
    """Sizes that determine the memory of pruning a block.

    Attributes
    ----------
    entries, trained, sparse : int
        Entries of all floating parameters, of those that a solver may train, and of the weights
        that are pruned.
    stored : int
        Bytes of the block in its own dtypes.
    layers : tuple of (int, int)
        Outputs and inputs of each weight, or of one of its experts.
    gram, squares : int
        Entries of all Gram matrices together, and of their diagonals.
    number : int
        Bytes of a number in computations: 4, or 8 in a block in float64.
    dtype : torch.dtype
        Of the block's first floating parameter.
    device : torch.device
        The device that the block is pruned on.
    processes : int
        Number of processes that prune the block.
    shards : int
        Number of processes that share the state of an optimizer.
    """

    entries: int
    trained: int
    sparse: int
    stored: int
    layers: tuple[tuple[int, int], ...]
    gram: int
    squares: int
    number: int
    dtype: torch.dtype
    device: torch.device
    processes: int = 1
    shards: int = 1

    @classmethod
    def of(
        cls,
        block: nn.Module,
        weights: Mapping[str, Layout | None],
        trained: Collection[str],
        device: torch.device,
        processes: int = 1,
        *,
        shard: bool = False,
    ) -> BlockSize:
        """Return the sizes of a block whose ``weights`` are pruned, and ``trained`` trained."""
        params = dict(block.named_parameters())
        layers, gram, squares = [], 0, 0
        for name, layout in weights.items():
            p = params[name]
            experts = p.shape[0] if p.ndim == 3 else 1
            # The input axis of stacked experts is known only once they are used.
            n = max(p.shape[-2:]) if layout is None else p.shape[layout.input_axes[0]]
            gram, squares = gram + experts * n * n, squares + experts * n
            layers.append((p.numel() // max(1, experts * n), n))
        return cls(
            entries=sum(p.numel() for p in params.values() if p.is_floating_point()),
            trained=sum(params[name].numel() for name in trained),
            sparse=sum(params[name].numel() for name in weights),
            stored=sum(t.nbytes for t in (*params.values(), *block.buffers())),
            layers=tuple(layers),
            gram=gram,
            squares=squares,
            number=wide_dtype(torch, list(params.values())).itemsize,
            dtype=block_dtype(block),
            device=device,
            processes=processes,
            shards=processes if shard else 1,
        )

    @property
    def solutions(self) -> int:
        """Bytes of the values and the supports of all pruned weights."""
        return (self.number + 1) * self.sparse

    def reconstruction(self, work: int, *, perturbs: bool) -> int:
        """Return the bytes of SAFE on the block; a forward and backward pass takes ``work``.

        It holds the parameters in float32 or wider; gradients, two moments of Adam and, if it
        ``perturbs``, a copy of those that are trained; anchors and one-byte supports of those
        that are pruned. A dual update adds scores, or new anchors, and a second support, but holds
        no activations. It writes ``x + u`` where the copy for a perturbation was; without one,
        this is one more array of each weight.
        Beside shards of them all, each process holds whole parameters and gradients for a pass.
        """
        split = self.solutions  # the bytes of an anchor and a support are the same
        held = (4 if perturbs else 3) + (self.shards > 1)
        state = (self.number * held * self.trained + split) // self.shards
        whole = self.entries + (self.trained if self.shards > 1 else 0)
        dual = split if perturbs else split + self.number * self.sparse
        return self.number * whole + state + max(work, dual // self.shards)

    def statistics(self, kind: str) -> int:
        """Return the entries of all statistics of inputs: "gram", "squares" or none."""
        return {"gram": self.gram, "squares": self.squares}.get(kind, 0)


@contextmanager
def _without_logged_tracebacks() -> Iterator[None]:
    """Keep torch from logging a traceback for an operation without a shape function.

    Such an operation also raises an error, and the caller then runs the block for real.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def forward_backward_bytes(
    block: nn.Module,
    call: Callable[[nn.Module, Callable[[Tensor], Tensor]], Tensor],
    device: torch.device,
    *,
    backward: bool,
    trained: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
    fake: bool = True,
    recorder: Callable[[nn.Module], Any] | None = None,
) -> int:
    """Return the peak bytes of a forward (and backward) pass of a block, beside its parameters.

    The passes run on tensors without memory (`FakeTensorMode`), or with zeros.

    Parameters
    ----------
    block : torch.nn.Module
    call : callable
        ``call(block, make)`` returns the loss, of inputs made by ``make`` from real ones.
    device : torch.device
    backward : bool
    trained : collection of str, optional
        Names of the parameters with gradients; all floating ones by default.
    dtype : torch.dtype, optional
        Dtype of floating parameters, instead of their own.
    fake : bool
    recorder : callable, optional
        ``recorder(block)`` returns an `InputRecorder`, in which the pass runs. What it keeps is not
        counted, but what it computes is.

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

    mode = FakeTensorMode() if fake else nullcontext()
    with _without_logged_tracebacks(), mode, torch.set_grad_enabled(backward):
        model = copy_with(block, make)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and (trained is None or name in trained))
            if p.requires_grad:
                p.grad = torch.zeros_like(p)  # added to in place, as at a later step
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        seen: Any = nullcontext() if recorder is None else recorder(model)
        kept = [] if recorder is None else seen.begin()
        own = [*model.parameters(), *model.buffers(), *gradients, *kept]
        with TensorBytes(own) as counted, seen:
            loss = call(model, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device))
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
    return counted.peak
