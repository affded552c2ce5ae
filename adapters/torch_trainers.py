"""Trainers that wrap optimizers, or run the loop themselves: Accelerate, Hugging Face.

Lightning needs nothing of this: `configure_optimizers` returns a `SparseOptimizer`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from .torch import SparseOptimizer
from .torch_modules import RandomState

__all__ = ["SparseTrainerMixin", "perturbed", "unwrap"]


def unwrap(optimizer: Any) -> SparseOptimizer:
    """Return the `SparseOptimizer` within an optimizer that a trainer has wrapped.

    Parameters
    ----------
    optimizer : SparseOptimizer, or a wrapper with an attribute ``optimizer``
        As `accelerate.Accelerator.prepare` returns it.

    Returns
    -------
    SparseOptimizer

    Raises
    ------
    TypeError
        If there is none within.

    Examples
    --------
    >>> unwrap(object())
    Traceback (most recent call last):
        ...
    TypeError: optimizer must be or wrap a SparseOptimizer, got <class 'object'>
    """
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:  # Lightning's wrapper is a copy of ours
        inner = inner.optimizer
    if not isinstance(inner, SparseOptimizer):
        raise TypeError(f"optimizer must be or wrap a SparseOptimizer, got {type(optimizer)!r}")
    return inner


def perturbed(
    optimizer: Any, replay: RandomState | None = None
) -> AbstractContextManager[None, bool | None]:
    """`SparseOptimizer.perturbed` of an optimizer that a trainer has wrapped.

    Parameters
    ----------
    optimizer : SparseOptimizer, or a wrapper of one
    replay : RandomState, optional
        As for `SparseOptimizer.perturbed`.

    Returns
    -------
    context manager

    Raises
    ------
    TypeError, ValueError
        As `unwrap` and `SparseOptimizer.perturbed`.

    Examples
    --------
    >>> perturbed(object())
    Traceback (most recent call last):
        ...
    TypeError: optimizer must be or wrap a SparseOptimizer, got <class 'object'>
    """
    return unwrap(optimizer).perturbed(replay)


class SparseTrainerMixin:
    """Let `transformers.Trainer` take the second gradient, over all accumulated batches.

    ``class SparseTrainer(SparseTrainerMixin, Trainer): pass``, made with
    ``optimizers=(SparseOptimizer(...), scheduler)``. When `train` returns the weights are
    projected. Checkpoints written before hold the weights from before: load one together
    with its optimizer state, and call `SparseOptimizer.finalize`.

    Raises
    ------
    TypeError
        At the first step, if the trainer's optimizer is no `SparseOptimizer`.
    """

    _micro_batches: list[Any]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute the gradients of one micro-batch; after the last replay all at x + e."""
        step = super().training_step  # type: ignore[misc]
        loss = step(model, inputs, num_items_in_batch)
        seen = [*getattr(self, "_micro_batches", []), (inputs, num_items_in_batch)]
        last = self.accelerator.sync_gradients  # type: ignore[attr-defined]
        self._micro_batches = [] if last else seen
        optimizer = unwrap(self.optimizer)  # type: ignore[attr-defined]
        if last and optimizer.perturbs:
            with optimizer.perturbed():
                for batch, items in seen:
                    step(model, batch, items)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then project the weights."""
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        unwrap(self.optimizer).finalize()  # type: ignore[attr-defined]
        return result
