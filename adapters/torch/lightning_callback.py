"""Let Lightning validate and save the sparse network. Lightning itself is not imported."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor

from safe_core.backends.torch_sharding import is_sharded

from .optimizer import SparseOptimizer
from .trainers import at_sparse_weights, load_unprojected, to_evaluation, weights_at_both

__all__ = ["SparseCallbackMixin"]

_UNPROJECTED = "safe_unprojected_weights"


class SparseCallbackMixin:
    """Let Lightning validate on the sparse network, save it, and resume from x.

    Declare ``class SparseCallback(SparseCallbackMixin, lightning.Callback): pass`` and pass
    ``SparseCallback()`` to the trainer, for modules that return a `SparseOptimizer` from
    ``configure_optimizers``.

    During ``fit``, validation runs within `SparseOptimizer.sparse_weights`. Every checkpoint
    holds the projected weights in ``"state_dict"``, so ``load_from_checkpoint``, ``test`` and
    ``predict`` use the sparse network. One that can resume also holds the weights x, from which
    ``fit(ckpt_path=...)`` continues bit for bit, if it is given the callback again. When
    training ends, the callback calls `SparseOptimizer.finalize`.

    Raises
    ------
    TypeError
        When training starts, if no optimizer is a `SparseOptimizer`.
    ValueError
        If parameters are sharded, or another callback exchanges the weights, such as
        ``WeightAveraging``.
    """

    _view: ExitStack | None = None
    _unprojected: dict[str, Tensor] | None = None

    # Set up

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take part in the saving of checkpoints during ``fit``."""
        super().setup(trainer, pl_module, stage)  # type: ignore[misc]
        self._detach(pl_module)
        if stage != "fit":
            return
        original = pl_module.on_save_checkpoint

        # The module's hook and not the callback's, which is not called for files of weights
        # alone. It also runs last, so it sees what the other hooks have changed.
        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            self._project(trainer, checkpoint)

        on_save_checkpoint.owner = self  # type: ignore[attr-defined]
        pl_module.on_save_checkpoint = on_save_checkpoint

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        super().teardown(trainer, pl_module, stage)  # type: ignore[misc]
        self._detach(pl_module)
        self._unprojected = None

    def state_dict(self) -> dict[str, Any]:
        """Return a state, so that Lightning warns where a run resumes without the callback."""
        return {"projects": True}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers."""
        super().on_fit_start(trainer, pl_module)  # type: ignore[misc]
        for optimizer in _sparse(trainer):
            if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
                raise ValueError(
                    "the callback needs whole parameters, because it cannot save sharded "
                    f"checkpoints, got sharded ones from {type(trainer.strategy).__name__}"
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Call ``train()`` of the optimizers that have it."""
        super().on_train_start(trainer, pl_module)  # type: ignore[misc]
        for optimizer in _sparse(trainer):
            if hasattr(optimizer, "train"):
                optimizer.train()

    # Validation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the parameters to C(x)."""
        super().on_validation_start(trainer, pl_module)  # type: ignore[misc]
        if trainer.state.fn == "fit":
            self._view = ExitStack()
            self._view.enter_context(at_sparse_weights(_sparse(trainer)))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check once that what is validated is sparse."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)  # type: ignore[misc]
        if self._view is not None and batch_idx == dataloader_idx == 0:
            _check(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore x."""
        super().on_validation_end(trainer, pl_module)  # type: ignore[misc]
        view, self._view = self._view, None
        if view is not None:
            view.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore x."""
        super().on_exception(trainer, pl_module, exception)  # type: ignore[misc]
        view, self._view = self._view, None
        if view is not None:
            view.__exit__(type(exception), exception, exception.__traceback__)

    # The end

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finalize, and keep x for a last checkpoint that may resume."""
        super().on_train_end(trainer, pl_module)  # type: ignore[misc]
        optimizers = _sparse(trainer)
        for optimizer in optimizers:
            to_evaluation(optimizer)
        dense, _ = weights_at_both(optimizers, trainer.strategy.lightning_module_state_dict)
        for optimizer in optimizers:
            optimizer.finalize()
        self._unprojected = dense

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Check that no other callback has exchanged the weights since."""
        super().on_fit_end(trainer, pl_module)  # type: ignore[misc]
        self._unprojected = None
        _check(trainer)

    # Checkpoints

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load x where training resumes."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)  # type: ignore[misc]
        if trainer.state.fn == "fit" and _UNPROJECTED in checkpoint:
            load_unprojected(pl_module, checkpoint[_UNPROJECTED])

    def _project(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """Replace x in a checkpoint by C(x), and keep x beside it if the run can resume."""
        held = checkpoint["state_dict"]
        dense, sparse = weights_at_both(
            _sparse(trainer), trainer.strategy.lightning_module_state_dict
        )
        checkpoint["state_dict"] = held.copy()
        checkpoint["state_dict"].update(
            {key: value.to(held[key]) for key, value in sparse.items() if key in held}
        )
        if "optimizer_states" in checkpoint:
            kept = dense if self._unprojected is None else self._unprojected
            checkpoint[_UNPROJECTED] = {k: v for k, v in kept.items() if k in held}

    def _detach(self, pl_module: Any) -> None:
        hook = vars(pl_module).get("on_save_checkpoint")
        if getattr(hook, "owner", None) is self:
            del pl_module.on_save_checkpoint


def _sparse(trainer: Any) -> list[SparseOptimizer]:
    """Return the sparse ones among the optimizers of a trainer."""
    found = [o for o in trainer.optimizers if isinstance(o, SparseOptimizer)]
    if not found:
        names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
        raise TypeError(f"configure_optimizers must return a SparseOptimizer, got {names}")
    return found


def _check(trainer: Any) -> None:
    try:
        for optimizer in _sparse(trainer):
            optimizer.check_sparsity()
    except ValueError as error:
        raise ValueError(
            f"{error}: another callback, such as WeightAveraging or StochasticWeightAveraging, "
            "must not exchange the weights that are validated or kept"
        ) from None
