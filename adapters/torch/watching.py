"""Tell whether gradients were cleared before the next backward pass added to them."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from safe_core.backends.torch_sharding import local

__all__ = ["Found", "GradientWatch", "is_capturing"]

# Gradients to look at. One alone could be zero throughout, which tells nothing.
_SAMPLES = 3


class Found(enum.Enum):
    """Name what the first backward pass of a watch found in ``.grad``."""

    NOTHING_YET = "no backward pass has come"
    KEPT = "the gradients, unchanged"
    CHANGED = "gradients, but others"
    CLEARED = "no gradients, or zeros"
    UNKNOWN = "gradients that tell nothing"


class GradientWatch:
    """Watch the smallest gradients until a backward pass accumulates into one of them.

    Hooks run just before autograd adds to a gradient, so they see whether it was cleared,
    however that was done. A gradient that is all zero tells nothing. Nor does one of FSDP2,
    which accumulates without autograd. The host waits for the device only if a gradient was
    there.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.sum().backward()
    >>> watch = GradientWatch([p])
    >>> p.sum().backward()
    >>> watch.found
    <Found.KEPT: 'the gradients, unchanged'>
    >>> watch.stop()
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.found = Found.NOTHING_YET
        smallest = (p for p in sorted(params, key=Tensor.numel) if _has_entries(p.grad))
        self._samples = [_Sample(p, weakref.ref(self)) for p in islice(smallest, _SAMPLES)]

    @property
    def is_decided(self) -> bool:
        """Whether `found` says whether the gradients were cleared."""
        return self.found not in (Found.NOTHING_YET, Found.UNKNOWN)

    @property
    def was_added_to(self) -> bool:
        """Whether a backward pass added to gradients that were not cleared."""
        return self.found in (Found.KEPT, Found.CHANGED)

    @property
    def is_present(self) -> bool:
        """Whether a gradient is still the tensor that it was."""
        return any(sample.is_present for sample in self._samples)

    def stop(self) -> None:
        """Remove the hooks."""
        for sample in self._samples:
            sample.stop()


class _Sample:
    """One watched gradient."""

    # References are weak: the hook belongs to the parameter, which must not refer to itself.
    def __init__(self, p: Tensor, watch: weakref.ref[GradientWatch]) -> None:
        assert p.grad is not None
        self._p, self._watch = weakref.ref(p), watch
        self._gradient, self._copy = p.grad, local(p.grad).clone()
        self._seen, self._is_over = Found.UNKNOWN, False
        # The first hook also runs for `torch.autograd.grad`, which accumulates nothing.
        self._hooks = [
            p.register_hook(self._look),  # type: ignore[no-untyped-call]
            p.register_post_accumulate_grad_hook(self._accept),  # type: ignore[no-untyped-call]
        ]

    @property
    def is_present(self) -> bool:
        p = self._p()
        return p is not None and p.grad is self._gradient

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, incoming: Any) -> None:
        p, watch = self._p(), self._watch()
        if not (p is None or watch is None or watch.is_decided or self._is_over):
            self._seen = self._compare(p.grad)

    def _accept(self, p: Tensor) -> None:
        watch = self._watch()
        if not (watch is None or watch.is_decided or self._is_over):
            watch.found = self._seen
        self._is_over = True  # later passes say nothing about the first

    @torch.no_grad()
    def _compare(self, gradient: Tensor | None) -> Found:
        if gradient is None:
            return Found.CLEARED
        if gradient.is_sparse or is_capturing(gradient):
            return Found.UNKNOWN
        now, before = local(gradient), self._copy
        flags = torch.stack([before.any(), now.any(), (now == before).all()])
        had_entries, has_entries, same = flags.tolist()  # the only read of the device
        if not had_entries:
            return Found.UNKNOWN
        if not has_entries:
            return Found.CLEARED
        return Found.KEPT if same else Found.CHANGED


def _has_entries(gradient: Tensor | None) -> bool:
    """Return whether a gradient is dense, can be read, and is not an empty shard."""
    if gradient is None or gradient.is_sparse or is_capturing(gradient):
        return False
    return local(gradient).numel() > 0


def is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, during which no value can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
