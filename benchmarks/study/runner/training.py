"""The training settings of a study or of one of its methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .tables import choice, integer, key, number, several

__all__ = ["Training"]


@dataclass(frozen=True)
class Training:
    """``[training]``: the base optimizer and its learning rate.

    The learning rate rises linearly over ``warmup_epochs``. Then it stays constant, falls to
    zero as a cosine or a line, or is multiplied by ``decay`` at each of the ``milestones``
    (schedule ``step``).

    The optimizer ``sassha`` does not perturb by itself: its method does, such as ``dense`` with a
    ``rho``. ``eps`` is the constant of the denominator in ``adam``, ``adamw`` and ``sassha``, by
    default that of the optimizer.

    With ``dense_epochs``, a dense network is trained first, and every method starts from it.
    ``dense_learning_rate`` is its learning rate, by default the same.

    Examples
    --------
    >>> training = Training(epochs=2, batch_size=8, learning_rate=0.1)
    >>> [round(training.rate(step, steps_per_epoch=2), 4) for step in range(4)]
    [0.1, 0.0854, 0.05, 0.0146]
    """

    epochs: int = key(integer(1))
    batch_size: int = key(integer(2))
    learning_rate: float = key(number(0))
    optimizer: str = key(choice("sgd", "adam", "adamw", "sassha"), "sgd")
    schedule: str = key(choice("constant", "cosine", "linear", "step"), "cosine")
    warmup_epochs: int = key(integer(0), 0)
    milestones: tuple[int, ...] = key(several(integer(1), empty=True), ())
    decay: float = key(number(0), 0.1)
    momentum: float = key(number(0, 1, excluded=1), 0.9)
    second_moment: float = key(number(0, 1, excluded=1), 0.999)
    eps: float | None = key(number(0), None)
    weight_decay: float = key(number(0), 0.0)
    dense_epochs: int = key(integer(0), 0)
    dense_learning_rate: float | None = key(number(0), None)

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"training.warmup_epochs must be below the {self.epochs} epochs, got "
                f"{self.warmup_epochs}"
            )
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                'training.milestones must be given for the schedule "step" only, got '
                f"{list(self.milestones)} for {self.schedule!r}"
            )
        if max(self.milestones, default=0) >= self.epochs:
            raise ValueError(
                f"training.milestones must be below the {self.epochs} epochs, got "
                f"{list(self.milestones)}"
            )

        if self.eps is not None and self.optimizer == "sgd":
            raise ValueError(
                f"training.eps must come with an optimizer that has one, not sgd, got {self.eps}"
            )
        if self.dense_epochs and self.schedule == "step":
            raise ValueError(
                "training.dense_epochs must be 0 with milestones, which count the epochs of the "
                f"methods, got {self.dense_epochs}"
            )
        if self.dense_learning_rate is not None and not self.dense_epochs:
            raise ValueError(
                "training.dense_learning_rate must come with dense_epochs, got "
                f"{self.dense_learning_rate} without"
            )

    @property
    def dense(self) -> Training | None:
        """The settings of the dense training that comes first, or None without it.

        Examples
        --------
        >>> training = Training(epochs=2, batch_size=8, learning_rate=0.01, dense_epochs=20)
        >>> training.dense.epochs, training.dense.learning_rate, training.dense.dense
        (20, 0.01, None)
        """
        if not self.dense_epochs:
            return None
        rate = self.dense_learning_rate
        return replace(
            self,
            epochs=self.dense_epochs,
            learning_rate=self.learning_rate if rate is None else rate,
            warmup_epochs=min(self.warmup_epochs, self.dense_epochs - 1),
            dense_epochs=0,
            dense_learning_rate=None,
        )

    def changed(self, settings: Mapping[str, Any]) -> Training:
        """Return these settings with some replaced, such as those of one method.

        Examples
        --------
        >>> Training(epochs=2, batch_size=8, learning_rate=0.1).changed({"epochs": 3}).epochs
        3
        """
        return replace(self, **settings)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at a step."""
        warm, end = (n * steps_per_epoch for n in (self.warmup_epochs, self.epochs))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "step":
            passed = sum(step >= m * steps_per_epoch for m in self.milestones)
            return self.learning_rate * self.decay**passed
        progress = (step - warm) / (end - warm)
        share = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }
        return self.learning_rate * share[self.schedule]
