"""Trainers that wrap optimizers, or run the loop themselves: Accelerate, Hugging Face.

Lightning needs nothing of this: `configure_optimizers` returns a `SparseOptimizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from .modules import RandomState
from .optimizer import SparseOptimizer

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
    # Lightning's wrapper is a copy of ours that has ours within.
    while getattr(inner, "optimizer", inner) not in (None, inner):
        inner = inner.optimizer
    if not isinstance(inner, SparseOptimizer):
        within = "" if inner is optimizer else f" of {type(inner)!r}"
        raise TypeError(
            f"optimizer must be or wrap a SparseOptimizer, got {type(optimizer)!r}{within}"
        )
    return inner


def perturbed(
    optimizer: Any, replay: RandomState | None = None, *, loss_scale: float | None = None
) -> AbstractContextManager[None, bool | None]:
    """`SparseOptimizer.perturbed` of an optimizer that a trainer has wrapped.

    Parameters
    ----------
    optimizer : SparseOptimizer, or a wrapper of one
    replay : RandomState, optional
        As for `SparseOptimizer.perturbed`.
    loss_scale : float, optional
        As there. By default that of the scaler that Accelerate puts beside the optimizer;
        Lightning keeps it apart, as ``trainer.precision_plugin.scaler``.

    Returns
    -------
    context manager

    Raises
    ------
    TypeError, ValueError
        As `unwrap` and `SparseOptimizer.perturbed`. If Accelerate is in the middle of an
        accumulated batch: the block must replay all of it, when gradients are synchronised.

    Examples
    --------
    >>> perturbed(object())
    Traceback (most recent call last):
        ...
    TypeError: optimizer must be or wrap a SparseOptimizer, got <class 'object'>
    """
    state = getattr(optimizer, "gradient_state", None)
    if state is not None and not state.sync_gradients:
        raise ValueError(
            "perturbed() must come once an accumulated batch, with all its micro-batches replayed "
            "in the block, got it where accelerator.sync_gradients is False"
        )
    inner, scaler = unwrap(optimizer), getattr(optimizer, "scaler", None)
    perturbation = inner.method.perturbation
    if loss_scale is None:
        loss_scale = 1.0
        # Not read where e does not depend on it: an accelerator would be waited for.
        if scaler is not None and perturbation is not None and not perturbation.is_scale_free:
            loss_scale = scaler.get_scale()
    return inner.perturbed(replay, loss_scale=loss_scale)


class SparseTrainerMixin:
    """Let `transformers.Trainer` take every gradient of a step, over all accumulated batches.

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
        """Compute the gradients of one micro-batch; after the last replay all elsewhere."""
        step, accelerator = super().training_step, self.accelerator  # type: ignore[misc, attr-defined]
        seen = [*getattr(self, "_micro_batches", []), (inputs, num_items_in_batch)]
        self._micro_batches = []  # also if what follows raises
        loss = step(model, inputs, num_items_in_batch)
        if not accelerator.sync_gradients:
            self._micro_batches = seen
            return loss
        optimizer = unwrap(self.optimizer)  # type: ignore[attr-defined]
        blocks: list[Callable[[], AbstractContextManager[Any]]] = []
        if optimizer.perturbs:
            blocks.append(partial(perturbed, self.optimizer))  # type: ignore[attr-defined]
        if optimizer.projects:
            blocks.append(optimizer.projected)
        for block in blocks:
            with block():
                for i, (batch, items) in enumerate(seen, 1):
                    with nullcontext() if i == len(seen) else accelerator.no_sync(model):
                        step(model, batch, items)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then project the weights."""
        self._micro_batches = []
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        unwrap(self.optimizer).finalize()  # type: ignore[attr-defined]
        return result
