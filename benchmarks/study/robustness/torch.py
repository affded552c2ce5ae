"""Attacks on models in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn
from torch.nn import functional

from .pgd import PGD, check_inputs, start, step, within

__all__ = ["attacker"]

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each input."""
    return functional.cross_entropy(logits, labels, reduction="none")


def attacker(
    logits_fn: Callable[..., Tensor], attack: PGD, *, loss: Loss = cross_entropy
) -> Callable[..., Tensor]:
    """Return ``(inputs, labels, seed=0, *args) -> adversarial inputs`` against a model.

    Gradients are taken by the inputs alone: those of parameters stay as they are. The seed
    draws a start for each input of a call by itself: give every batch its own.

    Parameters
    ----------
    logits_fn : callable
        From inputs of shape (n, ...) to logits (n, classes), such as a model in evaluation
        mode that normalises its inputs, `safe_core.study.models.torch.Normalised`. Further
        ``args`` go to it.
    attack : PGD
    loss : callable
        From what ``logits_fn`` returns, and labels, to the loss of each input, (n,), which is
        increased.

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        When called with inputs that are out of range, or on a model in training mode, where
        inputs of a batch would not be attacked each by itself.

    Examples
    --------
    >>> model = nn.Linear(2, 2).eval()
    >>> fool = attacker(model, PGD("linf", 0.1))
    >>> moved = fool(torch.full((3, 2), 0.5), torch.tensor([0, 1, 1]))
    >>> bool(((moved - 0.5).abs() <= 0.1001).all())
    True
    """

    def attacked(inputs: Tensor, labels: Tensor, seed: int = 0, *args: Any) -> Tensor:
        if isinstance(logits_fn, nn.Module) and any(m.training for m in logits_fn.modules()):
            raise ValueError("logits_fn must be in evaluation mode, got a model in training mode")
        origin = inputs.detach()
        check_inputs(attack, float(origin.min()), float(origin.max()))
        x = origin + torch.as_tensor(start(attack, tuple(origin.shape), seed)).to(origin)
        x = within(attack, x, origin, xp=xp)
        for _ in range(attack.steps):
            with torch.enable_grad():
                at = x.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(loss(logits_fn(at, *args), labels).sum(), at)
            x = step(attack, x, origin, gradient, xp=xp)
        return x

    return attacked
