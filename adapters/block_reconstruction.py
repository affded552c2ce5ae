"""SAFE and SAFE+ on the reconstruction error of one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import safe_core
from safe_core import Method, _checks
from safe_core.layout import Layout
from safe_core.sparsity import Pattern

from .torch import SparseOptimizer

__all__ = ["SafeReconstruction"]


@dataclass(frozen=True)
class SafeReconstruction:
    """Minimise the reconstruction error of a block under a sparsity constraint, by SAFE.

    ``f(x) = mean((block_x(inputs) - targets)**2)`` over all parameters x of the block, of which
    the weights are made sparse and biases and norms follow. The defaults are those of the
    paper: Adam, a linearly decaying rate after a linear warm-up, rho 2e-4, K = 32 and a
    constant penalty of 1e-3.

    Attributes
    ----------
    method : Method, optional
        In the place of ``safe_core.safe(sparsity, rho=2e-4)``, such as ADMM or another radius;
        its sparsity is replaced by the one asked of `prune_blocks`.
    learning_rate : float
        The highest.
    betas : pair of float
        Of Adam.
    epochs, warmup_epochs : int
        Passes over the samples, and how many of them the rate rises for.
    batch_size : int
        Samples in a step.
    importance : {None, "wanda"}
        P of the projection: 1 (SAFE), or the mean square of each input feature in the dense
        block (SAFE+).
    autocast : bool, optional
        Whether to compute in bfloat16, with parameters in float32. By default on a GPU for
        models in 16 bits.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", section 4.3,
    appendix B.4 and table 5.

    Examples
    --------
    >>> safe_plus = SafeReconstruction(importance="wanda")
    >>> safe_plus.rate(0, 16), safe_plus.rate(32, 16), safe_plus.rate(256, 16)
    (6.25e-06, 0.0002, 0.0001)
    """

    method: Method | None = None
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epochs: int = 30
    warmup_epochs: int = 2
    batch_size: int = 8
    importance: Literal["wanda"] | None = None
    autocast: bool | None = None

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, Method):
            raise TypeError(f"method must be a safe_core.Method or None, got {self.method!r}")
        _checks.real("learning_rate", self.learning_rate, low=0.0)
        if len(self.betas) != 2 or not all(0 <= _checks.real("betas", b) < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        _checks.integer("epochs", self.epochs, low=1)
        if _checks.integer("warmup_epochs", self.warmup_epochs, low=0) > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs={self.epochs}, got {self.warmup_epochs!r}"
            )
        _checks.integer("batch_size", self.batch_size, low=1)
        _checks.choice("importance", self.importance, (None, "wanda"))
        if self.importance is not None and self.method is not None and self.method.importance:
            raise ValueError(
                f"importance must be None where the method has {self.method.importance!r}, got "
                f"{self.importance!r}"
            )

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate at a step: up to its highest, and down to zero after the last."""
        rising, steps = (n * steps_per_epoch for n in (self.warmup_epochs, self.epochs))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        falling = self.learning_rate * (steps - step) / max(1, steps - rising)
        return min(self.learning_rate, falling)

    def autocasts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model in ``dtype`` is computed in bfloat16 on a device."""
        if self.autocast is not None:
            return self.autocast
        return device.type == "cuda" and dtype.itemsize == 2

    def bound(self, sparsity: Pattern) -> Method:
        """The method under a sparsity."""
        if self.method is not None:
            return replace(self.method, sparsity=sparsity)
        return safe_core.safe(sparsity, rho=2e-4)

    def solve(
        self,
        block: nn.Module,
        weights: Mapping[str, Layout],
        importance: Mapping[str, Tensor] | None,
        sparsity: Pattern,
        epoch: Callable[[int], Iterable[tuple[Callable[[nn.Module], Tensor], Tensor]]],
        steps_per_epoch: int,
        report: Callable[[int, float], None],
        *,
        name: str = "block",
        autocast: bool = False,
    ) -> dict[str, Tensor]:
        """Train a block in place and project it; the supports by name.

        Parameters
        ----------
        block : torch.nn.Module
            In float32, on its device.
        weights : mapping of name to Layout
        importance : mapping of name to tensor, optional
        sparsity : pattern
        epoch : callable
            ``epoch(k)`` yields pairs of a function, which runs the block on a batch, and the
            targets of that batch.
        steps_per_epoch : int
        report : callable
            ``report(epoch, loss)`` after each epoch, with the mean loss at x.
        name : str
            For messages.
        autocast : bool

        Raises
        ------
        ValueError
            If the loss is not finite after an epoch.
        """
        optimizer = self._optimizer(block, weights, importance, sparsity)
        device = next(block.parameters()).device
        step = 0
        for k in range(self.epochs):
            total, count = torch.zeros((), device=device), 0
            for run, target in epoch(k):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(step, steps_per_epoch)

                def loss_of(run: Any = run, target: Tensor = target) -> Tensor:
                    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                        output = run(block)
                    return nn.functional.mse_loss(output.float(), target.float())

                total, count = total + _step(optimizer, loss_of), count + 1
                step += 1
            mean = float(total) / count  # the only value that is read from the device
            if not math.isfinite(mean):
                raise ValueError(
                    "learning_rate must be low enough for a finite loss, got "
                    f"{self.learning_rate!r} and a loss of {mean} in epoch {k} of {name}"
                )
            report(k, mean)
        optimizer.finalize(freeze=True)
        named = optimizer.sparse_parameters()
        return {name: optimizer.state[p]["support"] for name, p in named.items()}

    def _optimizer(
        self,
        block: nn.Module,
        weights: Mapping[str, Layout],
        importance: Mapping[str, Tensor] | None,
        sparsity: Pattern,
    ) -> SparseOptimizer:
        trained = [(name, p) for name, p in block.named_parameters() if p.requires_grad]
        fused = trained[0][1].device.type == "cuda"
        base = torch.optim.Adam(
            trained, lr=self.learning_rate, betas=self.betas, fused=fused or None
        )
        return SparseOptimizer(
            base,
            self.bound(sparsity),
            where=lambda name, p: name in weights,
            layout=dict(weights),
            importance=importance,
        )


def _step(optimizer: SparseOptimizer, loss_of: Callable[[], Tensor]) -> Tensor:
    """One step of the method; the loss at x, which is not read."""
    optimizer.zero_grad()
    loss = loss_of()
    loss.backward()  # type: ignore[no-untyped-call]
    if optimizer.perturbs:
        with optimizer.perturbed():
            loss_of().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()
