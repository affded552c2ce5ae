"""Support trainers that wrap the optimizer or own the loop: Accelerate, Hugging Face, Lightning.

No trainer is imported here: a user combines a mixin with the class of the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .modules import RandomState
from .optimizer import SparseOptimizer

__all__ = ["SparseTrainerMixin", "perturbed", "unwrap"]

_UNPROJECTED = "unprojected_weights.pt"


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


def to_evaluation(optimizer: SparseOptimizer) -> None:
    """Call ``eval()`` of an optimizer that has it."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


@contextmanager
def at_sparse_weights(optimizers: list[SparseOptimizer]) -> Iterator[None]:
    """Enter `SparseOptimizer.sparse_weights` of each, and restore the mode of its base."""
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(_evaluated(optimizer))
            stack.enter_context(optimizer.sparse_weights())
        yield


@contextmanager
def _evaluated(optimizer: SparseOptimizer) -> Iterator[None]:
    """Call `eval` of a schedule-free base within the block; then restore the parameters.

    They are restored from copies, because `train` of the base rounds.
    """
    if not hasattr(optimizer, "eval") or optimizer.evaluates:
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.inference_mode(False), torch.no_grad():
        copies = [local.clone() for local in kernels.local_shards(params)]
        optimizer.eval()
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            optimizer.train()
            kernels.copy_(params, copies)


def weights_at_both(
    optimizers: list[SparseOptimizer], state_of: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of the tensors of a state dict that differ between x and C(x), at both."""
    at_x = {k: v.detach().clone() for k, v in state_of().items() if torch.is_tensor(v)}
    with at_sparse_weights(optimizers):
        found = {k: v.detach() for k, v in state_of().items() if k in at_x}
        sparse = {k: v.clone() for k, v in found.items() if not torch.equal(v, at_x[k])}
    return {key: at_x[key] for key in sparse}, sparse


def load_unprojected(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what `weights_at_both` returned for x, over a projected model."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(
            f"the unprojected weights of the checkpoint must be those of the model, got {unknown}"
        )


class SparseTrainerMixin:
    """Let `transformers.Trainer` train with a `SparseOptimizer`, evaluate and save sparse models.

    Declare ``class SparseTrainer(SparseTrainerMixin, Trainer): pass`` and pass it
    ``optimizers=(SparseOptimizer(...), scheduler)``. It computes every gradient of a step, with
    gradient accumulation.

    During training, evaluation, checkpoints and the best model use the projected weights, as in
    `SparseOptimizer.sparse_weights`. A checkpoint holds the weights x that training resumes
    from in ``unprojected_weights.pt``; FSDP keeps them in files of its own. `train` projects
    the weights at the end.

    Raises
    ------
    TypeError
        At the first step, if the trainer's optimizer is not a `SparseOptimizer`.
    """

    _micro_batches: list[Any]
    optimizer: Any
    model: Any
    args: Any

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute the gradient of one micro-batch; after the last, replay all at x + e or C(x)."""
        step, accelerator = super().training_step, self.accelerator  # type: ignore[misc, attr-defined]
        seen = [*getattr(self, "_micro_batches", []), (inputs, num_items_in_batch)]
        self._micro_batches = []  # an error must not leave batches for the next step
        loss = step(model, inputs, num_items_in_batch)
        if not accelerator.sync_gradients:
            self._micro_batches = seen
            return loss
        optimizer = unwrap(self.optimizer)
        blocks: list[Callable[[], AbstractContextManager[Any]]] = []
        if optimizer.perturbs:
            blocks.append(partial(perturbed, self.optimizer))
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
        optimizer = unwrap(self.optimizer)
        to_evaluation(optimizer)
        optimizer.finalize()
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, on the projected weights during training."""
        with self._sparse_weights():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, with the projected weights during training.

        For a checkpoint, also save the unprojected weights that training resumes from.
        """
        with self._sparse_weights():
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        resumes = _internal_call and not self.args.save_only_model
        if self._training and resumes and not self.is_fsdp_enabled:  # type: ignore[attr-defined]
            dense, _ = weights_at_both([unwrap(self.optimizer)], self.model.state_dict)
            if self.args.should_save:
                torch.save(dense, Path(output_dir or self.args.output_dir) / _UNPROJECTED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        path = Path(resume_from_checkpoint) / _UNPROJECTED
        if path.exists():
            dense = torch.load(path, map_location="cpu", weights_only=True)
            load_unprojected(self.model if model is None else model, dense)

    def _load_best_model(self) -> None:
        # A schedule-free base would take the loaded weights for those that it trains.
        to_evaluation(unwrap(self.optimizer))
        super()._load_best_model()  # type: ignore[misc]

    @property
    def _training(self) -> bool:
        return bool(self.is_in_train)  # type: ignore[attr-defined]

    @contextmanager
    def _sparse_weights(self) -> Iterator[None]:
        if not self._training:  # the weights are final, or those of a checkpoint
            yield
            return
        with at_sparse_weights([unwrap(self.optimizer)]):
            yield
