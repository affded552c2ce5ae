"""Support trainers that wrap the optimizer or own the loop: Accelerate and Hugging Face.

Lightning needs none of this: return a `SparseOptimizer` from `configure_optimizers`.
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
    """Return the `SparseOptimizer` inside a trainer's wrapper.

    A wrapper can hide the attributes of the optimizer, such as `SparseOptimizer.finalize`.

    Parameters
    ----------
    optimizer : SparseOptimizer, or a wrapper with an attribute ``optimizer``
        Such as the result of `accelerate.Accelerator.prepare`.

    Returns
    -------
    SparseOptimizer

    Raises
    ------
    TypeError
        If it wraps no `SparseOptimizer`.

    Examples
    --------
    >>> unwrap(object())
    Traceback (most recent call last):
        ...
    TypeError: optimizer must be or wrap a SparseOptimizer, got <class 'object'>
    """
    inner = optimizer
    # Lightning's wrapper copies our class and attributes, so isinstance cannot tell it from
    # ours; only its attribute `optimizer` shows that it is a wrapper.
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
    """Enter `SparseOptimizer.perturbed` of an optimizer that a trainer has wrapped.

    Parameters
    ----------
    optimizer : SparseOptimizer, or a wrapper of one
    replay : RandomState, optional
        As for `SparseOptimizer.perturbed`.
    loss_scale : float, optional
        As for `SparseOptimizer.perturbed`. The default is the scale of Accelerate's gradient
        scaler. In Lightning, pass that of ``trainer.precision_plugin.scaler``.

    Returns
    -------
    context manager

    Raises
    ------
    TypeError, ValueError
        As for `unwrap` and `SparseOptimizer.perturbed`; also if Accelerate is within an
        accumulated batch. Enter the block after its last micro-batch, and replay all of them.

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
            "perturbed() must be entered once per accumulated batch and replay all of its "
            "micro-batches, got accelerator.sync_gradients=False"
        )
    inner, scaler = unwrap(optimizer), getattr(optimizer, "scaler", None)
    perturbation = inner.method.perturbation
    if loss_scale is None:
        loss_scale = 1.0
        # Read only if e depends on it, because reading waits for the accelerator.
        if scaler is not None and perturbation is not None and not perturbation.is_scale_free:
            loss_scale = scaler.get_scale()
    return inner.perturbed(replay, loss_scale=loss_scale)


class SparseTrainerMixin:
    """Let `transformers.Trainer` compute every gradient of a step, with gradient accumulation.

    Declare ``class SparseTrainer(SparseTrainerMixin, Trainer): pass`` and pass it
    ``optimizers=(SparseOptimizer(...), scheduler)``. `train` projects the weights at the end.
    Checkpoints written during training hold unprojected weights: load one together with its
    optimizer state, and call `SparseOptimizer.finalize`.

    Raises
    ------
    TypeError
        At the first step, if the trainer's optimizer is not a `SparseOptimizer`.
    """

    _micro_batches: list[Any]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute the gradient of one micro-batch; after the last, replay all at x + e or C(x)."""
        step, accelerator = super().training_step, self.accelerator  # type: ignore[misc, attr-defined]
        seen = [*getattr(self, "_micro_batches", []), (inputs, num_items_in_batch)]
        self._micro_batches = []  # an error must not leave batches for the next step
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
