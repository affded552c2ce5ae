"""Small runs in PyTorch that derive their numbers from the steps, or pull at a fixed rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import safe_core
from safe_core import SAM, Method, Pull
from safe_core.adapters.torch import SparseOptimizer

STEPS = 40


class Run:
    """A small regression; equal arguments give equal runs."""

    def __init__(
        self,
        method: Method,
        base: Callable[..., Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        sign: int = 1,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
        self.data = torch.randn(32, 8).to(dtype), torch.randn(32, 4).to(dtype)
        self.sign = sign
        base = base or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
        self.optimizer = SparseOptimizer(
            base(self.model.parameters()), method, model=self.model, **options
        )

    def loss(self) -> Tensor:
        return self.sign * nn.functional.mse_loss(self.model(self.data[0]), self.data[1])

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def perturbation(self) -> list[Tensor]:
        """The perturbation of the next step."""
        params = list(self.model.parameters())
        before = [p.detach().clone() for p in params]
        self.closure()
        with self.optimizer.perturbed():
            moved = [p.detach() - old for p, old in zip(params, before, strict=True)]
        self.optimizer.zero_grad()
        return moved

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.ndim == 2]

    def state(self) -> list[Tensor]:
        split = self.optimizer.split()
        found = [*self.model.parameters(), *split.anchor, *split.support]
        return [t.detach().clone() for t in found]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def size(found: list[Tensor]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in found))


def first_step(run: Run, rate: float = 0.1) -> float:
    """The length of the first step of SGD on the sparse weights, which is taken without e."""
    run.closure()
    gradients = [p.grad.clone() for p in run.model.parameters() if p.ndim == 2]
    run.optimizer.zero_grad()
    return rate * size(gradients)


UNTUNED = safe_core.safe(0.75, steps=STEPS)
FIXED = Method(0.75, Pull(0.2, 4), perturbation=SAM(0.5, in_steps=True))
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5),
}
