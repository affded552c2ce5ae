"""Insight into a run: how far each tensor is from the constraint, as tables and scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core import SplitState
from safe_core.backends.torch_shards import local, summed
from safe_core.schedules import Cubic
from safe_core.sparsity import NM, Pattern
from safe_core.splitting import recover

__all__ = ["Report", "TensorReport"]


class TensorReport(NamedTuple):
    """One sparse parameter, as seen from the step at hand.

    Attributes
    ----------
    name : str
    entries : int
    asked : float
        The sparsity of the pattern at its end, over all that are projected together.
    achieved : float
        The share of this tensor that `SparseOptimizer.finalize` would set to zero now.
    zeros : float
        The share of entries that are zero already.
    distance : float
        ``|x - proj(x)|_2``, what finalizing now would remove.
    churn : float
        The share of entries whose place on the support a dual update now would change,
        since the last one.
    primal_residual : float
        ``|x - z|_2``.
    dual_residual : float
        ``lambda * |z_now - z|_2``, of a dual update now.
    """

    name: str
    entries: int
    asked: float
    achieved: float
    zeros: float
    distance: float
    churn: float
    primal_residual: float
    dual_residual: float

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        pattern: Pattern,
        values: Sequence[Tensor],
        split: SplitState,
        update: SplitState,
        final: Sequence[Tensor],
        penalties: Sequence[float],
    ) -> list[TensorReport]:
        """Compute the figures of tensors that are projected together; reads once."""
        z, z_now = recover(split)[0], recover(update)[0]
        lists = (values, final, split.support, update.support, z, z_now)
        sums = [
            torch.stack(
                [
                    _count(~kept),
                    _count(x == 0),
                    _squares(torch.where(kept, 0, x)),
                    _count(old != new),
                    _squares(x - a),
                    _squares(b - a),
                ]
            )
            for x, kept, old, new, a, b in zip(
                *([local(t) for t in tensors] for tensors in lists), strict=True
            )
        ]
        table = torch.stack([row.to(sums[0].device) for row in sums])
        rows, asked = [], _asked(pattern)
        for name, x, penalty, found in zip(
            names, values, penalties, summed(table, values).tolist(), strict=True
        ):
            off, zeros, distance, churned, primal, dual = found
            n = max(x.numel(), 1)
            norms = distance**0.5, churned / n, primal**0.5, penalty * dual**0.5
            rows.append(cls(name, x.numel(), asked, off / n, zeros / n, *norms))
        return rows


class Report(NamedTuple):
    """All sparse parameters at one step.

    Attributes
    ----------
    step : int
        Base steps taken.
    tensors : list of TensorReport

    Examples
    --------
    >>> row = TensorReport("0.weight", 8, 0.5, 0.5, 0.0, 3.0, 0.25, 4.0, 0.1)
    >>> Report(7, [row]).scalars()["distance"]
    3.0
    """

    step: int
    tensors: list[TensorReport]

    def scalars(self) -> dict[str, float]:
        """Return totals and every figure by tensor, flat, for a logger."""
        entries = sum(row.entries for row in self.tensors)
        found = {
            key: sum(row.entries * getattr(row, key) for row in self.tensors) / max(entries, 1)
            for key in ("achieved", "zeros", "churn")
        }
        for key in ("distance", "primal_residual", "dual_residual"):
            found[key] = sum(getattr(row, key) ** 2 for row in self.tensors) ** 0.5
        for row in self.tensors:
            for key in TensorReport._fields[3:]:
                found[f"{key}/{row.name}"] = getattr(row, key)
        return found

    def log(self, writer: Any, prefix: str = "safe_core") -> None:
        """Write `scalars` to a `torch.utils.tensorboard.SummaryWriter` or its like."""
        for key, value in self.scalars().items():
            writer.add_scalar(f"{prefix}/{key}", value, self.step)

    def table(self) -> Any:
        """Return a `rich.table.Table`, to be printed by `rich.print`; needs rich."""
        from rich.table import Table

        table = Table(title=f"step {self.step}", padding=(0, 0))
        table.add_column("name", overflow="fold", ratio=1)
        for key in TensorReport._fields[1:]:
            table.add_column(key.removesuffix("_residual"), justify="right", no_wrap=True)
        for row in self.tensors:
            table.add_row(row.name, f"{row.entries:,}", *(f"{value:.3g}" for value in row[2:]))
        return table


def _asked(pattern: Pattern) -> float:
    if isinstance(pattern, NM):
        return 1 - pattern.n / pattern.m
    return float(
        pattern.sparsity.value if isinstance(pattern.sparsity, Cubic) else pattern.sparsity
    )


def _count(mask: Tensor) -> Tensor:
    return mask.sum(dtype=torch.float32)


def _squares(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.float() ** 2
