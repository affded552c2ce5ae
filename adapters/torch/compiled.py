"""Compile the two parts of a step by `torch.compile`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from safe_core._dtypes import wide_dtype

from . import kernels

__all__ = ["CompiledStep"]


class CompiledStep:
    """Run the perturbation, and the penalty fused with the base step, as compiled programs."""

    def __init__(self, base: Optimizer) -> None:
        self.ascend = torch.compile(kernels.move_traced_)
        self._base = base
        # Two programs: `_bare` calls the step below its decorators, which compiles without a
        # graph break; `_hooked` keeps them for a base whose hooks must run.
        self._bare = torch.compile(partial(_descend, inspect.unwrap(type(base).step)))
        self._hooked = torch.compile(partial(_descend, _hooked_step))

    def descend(
        self,
        gradients: Sequence[Tensor],
        params: Sequence[Tensor],
        anchors: Sequence[Tensor],
        penalties: Sequence[float | Tensor],
        copies: Sequence[Tensor | None] | None,
    ) -> None:
        """Restore x, add the gradient of the penalty and take a base step."""
        program = self._bare if _is_bare(self._base) else self._hooked
        program(self._base, gradients, params, anchors, _scalars(penalties, params), copies)


def _descend(
    step: Callable[[Optimizer], Any],
    base: Optimizer,
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    penalties: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None,
) -> None:
    kernels.add_penalty_traced_(gradients, params, anchors, penalties, copies)
    step(base)


def _hooked_step(base: Optimizer) -> None:
    base.step()


def _is_bare(base: Optimizer) -> bool:
    """Return whether `base.step` has no hooks or wrappers.

    Hooks, and the step counter that a scheduler patches in, are Python wrappers. They cause a
    graph break, which would split the compiled program in two.
    """
    hooks = (
        base._optimizer_step_pre_hooks,
        base._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    return not any(hooks) and "step" not in vars(base) and not base.defaults.get("differentiable")


def _scalars(values: Sequence[float | Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return numbers as tensors, so that a compiled program takes them as arguments.

    A Python number would be a constant of the program, and each new value would recompile it.
    Parameters with the same value, dtype and device share one tensor.
    """
    made: dict[Any, Tensor] = {}
    pairs = zip(values, params, strict=True)
    keys = [(value, wide_dtype(torch, [p]), p.device) for value, p in pairs]
    for value, dtype, device in dict.fromkeys(keys):
        if torch.is_tensor(value):
            made[value, dtype, device] = value.to(device, dtype)
        else:
            made[value, dtype, device] = torch.full((), value, dtype=dtype, device=device)
    return [made[key] for key in keys]
