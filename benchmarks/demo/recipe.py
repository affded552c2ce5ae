"""The protocol of the demo: Appendix B.2 of the SAFE paper, on digits, and SAFE without numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import safe_core

__all__ = ["CHOSEN", "TRAINED", "Recipe", "Run"]

CHOSEN = {"gmp": "rise", "admm": "penalty", "published": "penalty"}
"""Map each tuned method to the name of its one setting, which is chosen on held-out images."""

TRAINED = (*CHOSEN, "safe")
"""The sparse methods that start from the initial weights."""


@dataclass(frozen=True)
class Run:
    """One network to train.

    Attributes
    ----------
    method : {"dense", "fine-tuned", "gmp", "admm", "published", "safe"}
        "published" is SAFE as in its paper, "safe" the form that needs no number.
    noise : float
        Fraction of training labels replaced by uniform draws.
    seed : int
        Seed of the initial weights, the order of the batches and the noise.
    sparsity : float or None
        Fraction of zero weights over all layers together.
    setting : float or None
        For a method in `CHOSEN`: the final penalty of ADMM and published SAFE, or the fraction of
        the steps over which the sparsity of GMP rises.
    held_out : bool
        Whether a fifth of the training set is held out, to choose the setting.
    """

    method: str
    noise: float
    seed: int
    sparsity: float | None = None
    setting: float | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Recipe:
    """The settings of the protocol.

    ``ascent_share`` is the fraction of each batch that the perturbation is computed from.
    ``dual_update_interval`` is also the number of steps between two masks of GMP. ``penalties``
    and ``rises`` are the candidates for the settings in `CHOSEN`.
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
    rises: tuple[float, ...] = (0.5, 0.8)
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99)
    noises: tuple[float, ...] = (0.0, 0.5)
    seeds: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def quick(cls) -> Recipe:
        """Return a short protocol: one seed and two sparsities.

        The settings in `CHOSEN` are tuned here too.
        """
        return cls(sparsities=(0.9, 0.98), seeds=(0,))

    def candidates(self, method: str) -> tuple[float, ...]:
        """Return the values that the setting of a method is chosen from, in ascending order."""
        return tuple(sorted({"rise": self.rises, "penalty": self.penalties}[CHOSEN[method]]))

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at a step: linear warm-up, then a cosine to zero."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def method(self, run: Run, steps: int) -> safe_core.Method:
        """Return the method of a sparse run.

        ADMM and published SAFE have the same cosine penalty. GMP raises the sparsity along a
        cubic. SAFE gets the sparsity and the number of steps. A "fine-tuned" network trains
        under the mask of its largest initial weights.
        """
        if run.sparsity is None:
            raise ValueError(f"sparsity must be given for a sparse run, got {run!r}")
        if run.method == "fine-tuned":
            largest = safe_core.schedules.linear_sparsity(run.sparsity, 1, initial=run.sparsity)
            return safe_core.gmp(largest)
        if run.method == "safe":
            if run.setting is not None:
                raise ValueError(f"setting must be None for safe, got {run!r}")
            return safe_core.safe(run.sparsity, steps=steps)
        if run.setting is None:
            raise ValueError(f"setting must be given for {run.method}, got {run!r}")
        every = self.dual_update_interval
        if run.method == "gmp":
            rise = every * max(1, round(run.setting * steps / every))  # in whole intervals
            return safe_core.gmp(safe_core.schedules.cubic(run.sparsity, steps=rise, every=every))
        penalty = safe_core.schedules.cosine(run.setting, steps=steps)
        if run.method == "published":
            return safe_core.safe(
                run.sparsity, rho=self.rho, penalty=penalty, dual_update_interval=every
            )
        return safe_core.admm(run.sparsity, penalty=penalty, dual_update_interval=every)
