"""Reconstruct a block by IMP+SAM: iterative magnitude pruning while training with SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.blocks.reconstruction import SafeReconstruction
from safe_core.adapters.torch.blocks.solver import Batch
from safe_core.layout import Layout
from safe_core.patterns import Pattern, Unstructured

__all__ = ["IterativeSAM"]

_EVERY = 5  # epochs


class IterativeSAM(SafeReconstruction):
    """IMP+SAM: every five epochs, set more of the smallest weights permanently to zero.

    The sparsity follows a cubic schedule and reaches its target in the last round but one, so
    that the remaining weights can recover. Na et al. 2022; Lee et al. 2025, table 9.
    """

    def solve(
        self,
        block: nn.Module,
        weights: Mapping[str, Layout],
        importance: Mapping[str, Tensor] | None,
        sparsity: Pattern,
        epoch: Callable[[int], Iterable[Batch]],
        steps_per_epoch: int,
        report: Callable[[int, float], None],
        *,
        name: str = "block",
        autocast: bool = False,
        supports: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Tensor], None]:
        """Train a block in place, and return the supports by name; no start is kept."""
        if not isinstance(sparsity, Unstructured):
            raise TypeError(f"sparsity must be Unstructured for IMP+SAM, got {sparsity!r}")
        if supports is not None:
            raise ValueError(
                f"start must be 'dense' for IMP+SAM, whose masks begin full, got {self.start!r}"
            )
        params = {key: p for key, p in block.named_parameters() if key in weights}
        supports = {key: torch.ones_like(p, dtype=torch.bool) for key, p in params.items()}
        optimizer = SparseOptimizer(
            torch.optim.Adam(block.parameters(), lr=self.peak(0.0), betas=self.betas),
            safe_core.safe(0.0, rho=2e-4, penalty=0.0),
            where=lambda key, p: p is next(iter(params.values())),
            model=block,
        )
        rounds = max(1, self.epochs // _EVERY - 1)

        def masked(k: int) -> Iterator[Batch]:
            if k % _EVERY == 0 or k == self.epochs - 1:
                share = min(1.0, (k // _EVERY + 1) / rounds)
                level = float(sparsity.sparsity) * (1 - (1 - share) ** 3)
                supports.update(self._prune(params, level))
            for batch in epoch(k):
                yield batch
                with torch.no_grad():  # the step has been taken
                    for key, p in params.items():
                        p.masked_fill_(~supports[key], 0)

        self.train(
            optimizer, block, masked, steps_per_epoch, report,
            name=name, autocast=autocast, **options,
        )  # fmt: skip
        return supports, None

    def _prune(self, params: Mapping[str, nn.Parameter], level: float) -> dict[str, Tensor]:
        pattern = Unstructured(min(level, 1 - 1e-6), scope="tensor")
        found = safe_core.project({key: p.detach() for key, p in params.items()}, pattern)
        with torch.no_grad():
            for key, p in params.items():
                p.copy_(found.values[key])
        return found.support
