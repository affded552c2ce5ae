"""What a closure does to the gradients that it finds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from safe_core.backends.torch_shards import local

__all__ = ["GradientWatch"]


class GradientWatch:
    """Tell a closure that clears the gradients from one that adds to them or ignores them.

    The smallest gradient is filled with a number so large that sums with it are itself,
    until the closure has run. Its values are read only where the closure has kept the
    tensor, as ``zero_grad(set_to_none=False)`` does.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.grad = torch.ones(2)
    >>> watch = GradientWatch([p])
    >>> _ = p.grad.add_(5.0)
    >>> watch.added
    True
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        found = [p for p in params if p.grad is not None]
        sizes = {p: local(p.grad).numel() for p in found if not p.grad.is_sparse}  # type: ignore[union-attr]
        self._marked = min((p for p in sizes if sizes[p]), key=sizes.__getitem__, default=None)
        if self._marked is not None:
            self._gradient = local(self._marked.grad)
            self._object = self._marked.grad
            self._kept = self._gradient.clone()
            self._mark = torch.finfo(self._gradient.dtype).max / 2
            self._gradient.fill_(self._mark)
        self._versions = {p: (p.grad, p.grad._version) for p in found}  # type: ignore[union-attr]

    @property
    def ignored(self) -> bool:
        """Whether no gradient was touched."""
        return bool(self._versions) and all(
            p.grad is gradient and gradient._version == version  # type: ignore[union-attr]
            for p, (gradient, version) in self._versions.items()
        )

    @property
    def added(self) -> bool:
        """Whether the gradients were not cleared."""
        return (
            self._marked is not None
            and self._marked.grad is self._object
            and bool((self._gradient == self._mark).all())
        )

    def put_back(self) -> None:
        """Undo the mark, unless the closure has."""
        if self._marked is not None and self.added:
            self._gradient.copy_(self._kept)
