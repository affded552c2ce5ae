"""Evaluate the sparse network during training, and switch schedule-free base optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from safe_core import _checks
from safe_core.backends.torch_sharding import local, summed

from . import kernels
from .phases import Phases
from .reporting import describe_final
from .run import LAST, Run

__all__ = ["at_both", "is_evaluating", "refuse_training_mode", "sparse_weights", "switch_of"]


@contextmanager
def sparse_weights(run: Run, phases: Phases) -> Iterator[None]:
    """Implement `SparseOptimizer.sparse_weights`."""
    phases.refuse_within_block("sparse_weights()")
    refuse_training_mode(run, "sparse_weights()")
    if run.sharded and run.model is None:
        # FSDP keeps gathered parameters after a forward pass, and only the model can drop them.
        raise ValueError("sparse_weights() needs model= for sharded parameters, got None")
    with ExitStack() as started:
        with _own_mode():
            params = started.enter_context(run.as_started())
            support = run.final_support(params, LAST)
            describe_final(run.parameters, params, support, run.steps)  # refuses NaN and infinity
            # Into the same storage: views, DDP buckets and compiled programs refer to it.
            copies = [local(p.detach()).clone() for p in params]
            kernels.mask_([p.detach() for p in params], support)
        run.forget_copies()
        phases.shows_sparse = True
        try:
            yield
            with _own_mode():
                changed = _changed(params, copies, support)
        finally:
            with _own_mode():
                kernels.copy_([p.detach() for p in params], copies)
            run.forget_copies()
            phases.shows_sparse = False
    if any(changed):
        names = [run.selected[p].name for p, found in zip(params, changed, strict=True) if found]
        raise ValueError(
            "parameters must not change within sparse_weights(), which restores them on exit: "
            f"load or edit them outside, got other values in {', '.join(names)}"
        )


def at_both(
    run: Run, phases: Phases, evaluate: Callable[[], Any], *, projects: bool = True
) -> tuple[float, float]:
    """Return the number that a function of the user returns at x, and at proj(x).

    The second is NaN unless ``projects``.
    """
    if not callable(evaluate):
        raise TypeError(f"evaluate must be a function without arguments, got {evaluate!r}")
    dense = _number(evaluate())
    if not projects:
        return dense, math.nan
    with sparse_weights(run, phases):
        sparse = _number(evaluate())
    return dense, sparse


def _number(value: Any) -> float:
    if torch.is_tensor(value) and value.numel() == 1:
        return float(value)
    if isinstance(value, Real):  # numbers of NumPy, too
        return float(value)
    raise TypeError(f"evaluate must return one number, got {_checks.shown(value)}")


@contextmanager
def _own_mode() -> Iterator[None]:
    """Compute without gradients, and outside `torch.inference_mode`.

    Trainers evaluate in inference mode. Tensors made there refuse changes outside of it, so none
    may reach the state.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def _changed(params: list[Tensor], copies: list[Tensor], support: list[Tensor]) -> list[int]:
    """Return how many entries of each parameter differ from its projection."""
    parts = zip(params, copies, support, strict=True)
    return _counts(
        [local(p.detach()) != torch.where(local(kept), copy, 0) for p, copy, kept in parts], params
    )


def _counts(flags: list[Tensor], params: list[Tensor]) -> list[int]:
    """Return the number of set flags over all shards, so that every process sees the same."""
    if not flags:
        return []
    counts = torch.stack([flag.sum().to(flags[0].device) for flag in flags])
    return [int(count) for count in summed(counts, params).tolist()]


# Base optimizers that train other parameters than they evaluate


def switch_of(run: Run, phases: Phases, name: str) -> Callable[[], None]:
    """Return ``train`` or ``eval`` of a `SparseOptimizer`, or raise AttributeError.

    Trainers look for these methods with ``hasattr``, so they exist only where the base
    optimizer has them.
    """
    switch = getattr(run.base, name)

    def call() -> None:
        # Trainers call these methods once more within blocks, where they have no effect.
        if phases.block and name == _mode(run):
            return
        phases.refuse_within_block(f"{name}()")
        if name == "train" and not run.frozen:
            run.method.refuse_averaging(type(run.base).__name__)
        switch()
        run.forget_copies()
        run.switched = name, run.steps

    return call


def is_evaluating(run: Run) -> bool:
    """Return whether `SparseOptimizer.eval` was called since the last step."""
    return _mode(run) == "eval"


def _mode(run: Run) -> str | None:
    """Return "train" or "eval", or None if it is unknown.

    Someone may call ``train()`` of the base itself, which the next step shows.
    """
    if run.switched is None:
        return None
    name, steps = run.switched
    return name if name == "train" or steps == run.steps else None


def refuse_training_mode(run: Run, call: str) -> None:
    """Raise if the parameters are those that the base trains and not those that it evaluates."""
    if callable(getattr(run.base, "eval", None)) and not is_evaluating(run):
        raise ValueError(
            f"{call} must come after eval() of this optimizer, because "
            f"{type(run.base).__name__} trains other parameters than it evaluates"
        )
