"""Detect whether a closure clears, accumulates or ignores existing gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from safe_core.backends.torch_sharding import is_sharded, local

from .watching import GradientWatch

__all__ = ["ClosureProbe"]


class ClosureProbe:
    """Tell a closure that clears the gradients from one that adds to them or ignores them.

    A step calls its closure again, so a closure that accumulates would count its first
    gradients twice. Optimizers cannot see what a closure does, so the probe watches the first
    accumulation, see `GradientWatch`. Gradients that are zero before, as after
    ``zero_grad(set_to_none=False)``, may be added to.

    Autograd does not accumulate the gradients of sharded parameters, so there a `_Marker` is
    added.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.sum().backward()
    >>> probe = ClosureProbe([p])
    >>> p.sum().backward()
    >>> probe.added, probe.ignored
    (True, False)
    >>> probe.stop()
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        self._watch = GradientWatch(params)
        self._marker = _Marker([p for p in params if p.grad is not None and is_sharded(p.grad)])
        # torch counts in-place writes in `_version`, so a closure that wrote to no gradient
        # shows the same numbers afterwards.
        found = [(p, p.grad) for p in params if p.grad is not None]
        self._versions = [(p, g, g._version) for p, g in found]

    @property
    def ignored(self) -> bool:
        """Whether the closure left all gradients untouched."""
        return bool(self._versions) and all(
            p.grad is gradient and gradient._version == version
            for p, gradient, version in self._versions
        )

    @property
    def added(self) -> bool:
        """Whether the closure added to existing gradients without clearing them."""
        return self._watch.was_added_to or (self._marker.is_kept and not self.ignored)

    def stop(self) -> None:
        """Remove the hooks and the marker."""
        self._watch.stop()
        self._marker.put_back()


class _Marker:
    """A number too large for a sum to change, in the place of the smallest gradient."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        # The smallest gradient costs least to replace and to look at.
        sizes = {p: local(p.grad).numel() for p in params}
        self._parameter = min((p for p in sizes if sizes[p]), key=sizes.__getitem__, default=None)
        if self._parameter is not None and self._parameter.grad is not None:
            self._gradient = self._parameter.grad
            self._large = torch.finfo(self._gradient.dtype).max / 2
            self._mark = torch.full_like(self._gradient, self._large)
            self._parameter.grad = self._mark

    @property
    def is_kept(self) -> bool:
        """Whether the closure kept the number."""
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is None or (gradient is not self._mark and gradient is not self._gradient):
            return False
        # The gradient may have been averaged with those of other processes: allow a factor.
        return bool((local(gradient).abs() >= self._large / 64).all())

    def put_back(self) -> None:
        """Put the gradient back, unless the closure cleared or replaced it."""
        if self._parameter is not None and self.is_kept:
            self._parameter.grad = self._gradient
