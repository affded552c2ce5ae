"""Attack models in PyTorch."""

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
    """Return the loss of each input."""
    return functional.cross_entropy(logits, labels, reduction="none")


def attacker(
    logits_fn: Callable[..., Tensor], attack: PGD, *, loss: Loss = cross_entropy
) -> Callable[..., Tensor]:
    """Return a function ``(inputs, labels, seed=0, *args) -> adversarial inputs``.

    It leaves the gradients of parameters unchanged. The seed draws the starting points; give
    every batch a different one.

    Parameters
    ----------
    logits_fn : callable
        Maps inputs of shape (n, ...), and ``args``, to logits (n, classes). A model must be in
        evaluation mode and normalise its inputs itself; see
        `safe_core.study.models.torch.Normalised`.
    attack : PGD
    loss : callable
        Maps logits and labels to the loss of each input, (n,), which the attack increases.

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        When the returned function gets inputs out of range, or the model is in training mode,
        in which the inputs of a batch influence each other.

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
