"""Keep running statistics and random state fixed in the second pass; recalibrate batch norm."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim.swa_utils import update_bn

from safe_core import _checks

__all__ = ["RandomState", "forget_copies", "recalibrate", "statistics_kept"]


class RandomState(NamedTuple):
    """States of torch's random number generators, to draw the same numbers again.

    Attributes
    ----------
    cpu : uint8 tensor
    cuda : list of uint8 tensors
        One state per device; empty if CUDA is not initialised.

    Examples
    --------
    >>> state = RandomState.record()
    >>> first = torch.rand(3)
    >>> with RandomState.replayed(state):
    ...     second = torch.rand(3)
    >>> bool((first == second).all())
    True
    """

    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def record(cls) -> RandomState:
        """Return the current states."""
        # Asking for CUDA states would initialise CUDA, which takes memory and time.
        on_device = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_device else [])

    @staticmethod
    @contextmanager
    def replayed(state: RandomState | None) -> Iterator[None]:
        """Draw from ``state`` within the block, and restore the current states on exit.

        With None, do nothing.
        """
        if state is None:
            yield
            return
        before = RandomState.record()
        state._restore()
        try:
            yield
        finally:
            before._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def forget_copies(model: nn.Module | None) -> None:
    """Drop cached copies of parameters after they were moved in-place.

    Otherwise the next forward pass would use the old values: autocast caches 16-bit casts until
    its outermost block ends, and FSDP can keep the parameters that it has gathered.
    """
    torch.clear_autocast_cache()
    # No model is sharded by FSDP unless its module is imported, and importing it is slow.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is not None and fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


@contextmanager
def statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Keep the running statistics of normalisation layers fixed within the block.

    The layers still normalise by the statistics of the batch, as in training mode.
    """
    layers = [] if model is None else [m for m in model.modules() if isinstance(m, _NormBase)]
    layers = [m for m in layers if m.training and m.track_running_stats]
    batch = [m for m in layers if not isinstance(m, _InstanceNorm)]
    # Instance normalisation updates its buffers even if track_running_stats is False.
    buffers = [b for m in layers if isinstance(m, _InstanceNorm) for b in m.buffers()]
    saved = [b.clone() for b in buffers]
    try:
        for layer in batch:
            layer.track_running_stats = False
        yield
    finally:
        for layer in batch:
            layer.track_running_stats = True
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Recompute the running statistics of batch normalisation after `finalize`.

    Pruning shifts the activations, so the old statistics no longer fit. This resets them to
    the plain averages over ``batches``, by `torch.optim.swa_utils.update_bn`.

    Parameters
    ----------
    model : torch.nn.Module
        A model without batch normalisation does not change.
    batches : iterable
        Input tensors, or tuples or lists whose first entry is the input.
    samples : int, optional
        Stop after the batch that reaches this number of inputs. The default uses all batches.
    device : torch.device, optional
        Move the inputs to this device.

    Raises
    ------
    TypeError, ValueError
        If ``samples`` is not a positive integer, or ``batches`` is empty or holds no tensors.

    References
    ----------
    Lee et al. 2025, section 5.1 and appendix F.2 (batch-norm tuning, with 10000 samples).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> recalibrate(model, [torch.ones(8, 4)] * 10, samples=16)
    >>> int(model[1].num_batches_tracked)
    2
    """
    if samples is not None:
        _checks.integer("samples", samples, low=1)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    first, rest = _first(batches)
    batches = itertools.chain([first], rest)
    update_bn(batches if samples is None else _limited(batches, samples), model, device)


def _first(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    rest = iter(batches)
    for first in rest:
        if not torch.is_tensor(_inputs(first)):
            raise TypeError(
                "batches must be tensors, or tuples or lists that begin with one, got "
                f"{type(_inputs(first))!r}"
            )
        return first, rest
    raise ValueError("batches must not be empty, because the statistics are reset, got none")


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (list, tuple)) else batch


def _limited(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(_inputs(batch))
        if seen >= samples:
            return
