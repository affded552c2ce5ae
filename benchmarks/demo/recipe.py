"""The protocol of the demo: Appendix B.2 of the SAFE paper, on digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import safe_core

__all__ = ["Recipe", "Run"]


@dataclass(frozen=True)
class Run:
    """One network to train.

    Attributes
    ----------
    method : {"dense", "fine-tuned", "admm", "safe"}
    noise : float
        Fraction of training labels replaced by uniform draws.
    seed : int
        Seed of the initial weights, the order of the batches and the noise.
    sparsity : float or None
        Fraction of zero weights over all layers together.
    penalty : float or None
        The penalty parameter, or its final value under a schedule.
    held_out : bool
        Whether a fifth of the training set is held out, to choose the penalty.
    """

    method: str
    noise: float
    seed: int
    sparsity: float | None = None
    penalty: float | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Recipe:
    """The settings of the protocol.

    ``ascent_share`` is the fraction of each batch that the perturbation is computed from.
    """

    hidden: tuple[int, ...] = (300, 100)
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 0.1
    warmup_epochs: int = 5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    rho: float = 0.1
    ascent_share: float = 1.0
    dual_update_interval: int = 32
    penalties: tuple[float, ...] = (0.01, 0.1)
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99)
    noises: tuple[float, ...] = (0.0, 0.5)
    seeds: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def quick(cls) -> Recipe:
        """Return a short protocol: one seed and two sparsities.

        Penalties are chosen all the same. One that suits SAFE would not suit ADMM.
        """
        return cls(sparsities=(0.9, 0.98), seeds=(0,))

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at a step: linear warm-up, then a cosine to zero."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def method(self, run: Run, steps: int) -> safe_core.Method:
        """Return the method of a sparse run.

        It is SAFE with a cosine penalty, ADMM with a constant one, or for "fine-tuned" training
        under the mask of the largest weights, which are those that training starts from.
        """
        if run.sparsity is None:
            raise ValueError(f"sparsity must be given for a sparse run, got {run!r}")
        if run.method == "fine-tuned":
            largest = safe_core.schedules.linear_sparsity(run.sparsity, 1, initial=run.sparsity)
            return safe_core.gmp(largest)
        if run.penalty is None:
            raise ValueError(f"penalty must be given for a sparse run, got {run!r}")
        if run.method == "safe":
            return safe_core.safe(
                sparsity=run.sparsity,
                rho=self.rho,
                penalty=safe_core.schedules.cosine(run.penalty, steps=steps),
                dual_update_interval=self.dual_update_interval,
            )
        return safe_core.admm(
            sparsity=run.sparsity,
            penalty=run.penalty,
            dual_update_interval=self.dual_update_interval,
        )
