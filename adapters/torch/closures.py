"""Detect whether a closure clears, accumulates or ignores existing gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from safe_core.backends.torch_sharding import local

__all__ = ["ClosureProbe"]


class ClosureProbe:
    """Tell a closure that clears the gradients from one that adds to them or ignores them.

    A step calls its closure again, so a closure that accumulates would count its first
    gradients twice. Optimizers cannot see what a closure does, so the probe replaces the
    smallest gradient by a number that is too large for a sum to change. After the call it looks
    for that number, but only if the closure kept the tensor, as
    ``zero_grad(set_to_none=False)`` does.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.grad = torch.ones(2)
    >>> probe = ClosureProbe([p])
    >>> _ = p.grad.add_(5.0)
    >>> probe.added, probe.ignored
    (True, False)
    >>> probe.put_back()
    >>> p.grad
    tensor([1., 1.])
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        found = {p: p.grad for p in params if p.grad is not None}
        # The smallest gradient costs least to replace and to look at.
        sizes = {p: local(g).numel() for p, g in found.items() if not g.is_sparse}
        self._parameter = min((p for p in sizes if sizes[p]), key=sizes.__getitem__, default=None)
        if self._parameter is not None:
            self._gradient = found[self._parameter]
            self._large = torch.finfo(self._gradient.dtype).max / 2
            found[self._parameter] = torch.full_like(self._gradient, self._large)
            self._parameter.grad = self._mark = found[self._parameter]
        # torch counts in-place writes in `_version`, so a closure that wrote to no gradient
        # shows the same numbers afterwards.
        self._versions = {p: (g, g._version) for p, g in found.items()}

    @property
    def ignored(self) -> bool:
        """Whether the closure left all gradients untouched."""
        return self._kept and all(
            p.grad is gradient and gradient._version == version
            for p, (gradient, version) in self._versions.items()
        )

    @property
    def added(self) -> bool:
        """Whether the closure added to existing gradients, in-place, without clearing them."""
        return self._kept and not self.ignored

    @property
    def _kept(self) -> bool:
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is None or (gradient is not self._mark and gradient is not self._gradient):
            return False
        # DDP may have averaged the number with those of other processes: allow a factor.
        return bool((local(gradient).abs() >= self._large / 64).all())

    def put_back(self) -> None:
        """Put the replaced gradient back, unless the closure cleared or replaced it."""
        if self._parameter is not None and self._kept:
            self._parameter.grad = self._gradient
