"""Train a causal language model on windows of a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .corpus import windows

__all__ = ["fit"]


def fit(
    model: nn.Module,
    optimizer: Any,
    tokens: Tensor,
    steps: int,
    *,
    batch: int,
    length: int,
    clip: float | None = None,
) -> None:
    """Train with a learning rate that rises over ten steps and falls linearly to 0.

    Step t takes the windows that seed t draws, so all methods see the same batches. ``clip`` is
    the largest norm of a gradient.
    """
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min((step + 1) / 10, 1 - step / steps)
        rows = windows(tokens, batch, length, seed=step).to(device)
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    model.eval()
