"""Time a report of the distance to the constraint against a step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
import torch
from torch import nn

from safe_core.adapters.optax import report, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

from .devices import torch_device
from .steps import METHOD, SmallResNet, give, resnet50_shapes
from .timing import Result, interleaved

__all__ = ["reports"]


def reports(*, width: int, batch: int, repeats: int) -> list[Result]:
    """Time a report in both frameworks, without the evaluation that a user may add."""
    return [*_small_resnet(batch, repeats), *_torch(width, repeats), *_jax(width, repeats)]


def _small_resnet(batch: int, repeats: int) -> list[Result]:
    device = torch_device()
    inputs = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    model = SmallResNet().to(device)
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = SparseOptimizer(base, METHOD, model=model)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    candidates: dict[str, Callable[[], Any]] = {
        "a step of training, PyTorch": lambda: optimizer.step(closure),
        "a report": optimizer.report,
    }
    case = "a report against a step of a small ResNet with 0.27M parameters"
    return interleaved(case, candidates, repeats=repeats)


def _torch(width: int, repeats: int) -> list[Result]:
    device = torch_device()
    params = [nn.Parameter(torch.randn(s, device=device) / 50) for s in resnet50_shapes(width)]
    gradients = [torch.randn_like(p) / 100 for p in params]
    base = torch.optim.SGD(params, lr=1e-5, momentum=0.9)
    optimizer = SparseOptimizer(base, METHOD, where=lambda name, p: p.ndim > 1)

    def step() -> None:
        optimizer.step(lambda: give(params, gradients))

    candidates: dict[str, Callable[[], Any]] = {
        "the optimizer's own step, PyTorch": step,
        "a report": optimizer.report,
    }
    return interleaved(_CASE, candidates, repeats=repeats)


def _jax(width: int, repeats: int) -> list[Result]:
    shapes = [(*s[2:], *s[1::-1]) for s in resnet50_shapes(width)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [jax.random.normal(k, s) / 50 for k, s in zip(keys, shapes, strict=True)]
    tx = sparse_optimizer(optax.sgd(1e-5, momentum=0.9), METHOD, where=lambda path, x: x.ndim > 1)
    state = tx.init(params)

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params, grad_fn=lambda params: params)
        return optax.apply_updates(params, updates), state

    stepped = jax.jit(step)
    reported = jax.jit(lambda params, state: report(params, state, METHOD))
    candidates: dict[str, Callable[[], Any]] = {
        "the optimizer's own step, JAX": lambda: stepped(params, state),
        "a compiled report": lambda: reported(params, state),
    }
    return interleaved(_CASE, candidates, repeats=repeats)


_CASE = "a report without a model, shapes of ResNet-50"
