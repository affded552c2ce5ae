"""The recipe by which SAFE prunes one block of a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from . import _checks
from .method import Method
from .methods import safe
from .patterns import Pattern, as_pattern

__all__ = ["Reconstruction", "batches_at_random", "batches_in_order", "block_pattern"]


@dataclass(frozen=True)
class Reconstruction:
    """Minimise the reconstruction error of a block under a sparsity constraint, by SAFE.

    ``f(x) = mean((block_x(inputs) - targets)**2)`` over all parameters x of the block, of which
    the weights are made sparse and biases and norms follow. The defaults are those of the
    paper: Adam, a linearly decaying rate after a linear warm-up, rho 2e-4, K = 32 and a
    constant penalty of 1e-3.

    Attributes
    ----------
    method : Method, optional
        In the place of ``safe_core.safe(sparsity, rho=2e-4)``, such as ADMM or another radius;
        its sparsity is replaced by the one that is asked for, which must be a schedule for
        `safe_core.gmp` and `safe_core.imp_sam`.
    learning_rate : float
        The highest.
    betas : pair of float
        Of Adam.
    epochs : int
        Passes over the samples.
    warmup_epochs : int, optional
        How many of them the rate rises for; by default two, or half of them if they are fewer
        than four: ``min(2, epochs // 2)``.
    batch_size : int
        Samples in a step.
    importance : {None, "wanda"}
        P of the projection: 1 (SAFE), or the mean square of each input feature in the dense
        block (SAFE+).

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", section 4.3,
    appendix B.4 and table 5.

    Examples
    --------
    >>> safe_plus = Reconstruction(importance="wanda")
    >>> safe_plus.rate(0, 16), safe_plus.rate(32, 16), safe_plus.rate(256, 16)
    (6.25e-06, 0.0002, 0.0001)
    """

    method: Method | None = None
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epochs: int = 30
    warmup_epochs: int | None = None
    batch_size: int = 8
    importance: Literal["wanda"] | None = None

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, Method):
            raise TypeError(
                f"method must be a safe_core.Method or None, got {_checks.shown(self.method)}"
            )
        _checks.real("learning_rate", self.learning_rate, low=0.0)
        if not isinstance(self.betas, tuple | list):
            raise TypeError(f"betas must be a pair of numbers, got {_checks.shown(self.betas)}")
        if len(self.betas) != 2 or not all(0 <= _checks.real("betas", b) < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        _checks.integer("epochs", self.epochs, low=1)
        if _checks.integer("warmup_epochs", self.warmup, low=0) > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs={self.epochs}, got {self.warmup_epochs!r}"
            )
        _checks.integer("batch_size", self.batch_size, low=1)
        _checks.choice("importance", self.importance, (None, "wanda"))
        if self.importance is not None and self.method is not None and self.method.importance:
            raise ValueError(
                f"importance must be None where the method has {self.method.importance!r}, got "
                f"{self.importance!r}"
            )

    @property
    def warmup(self) -> int:
        """The epochs that the rate rises for."""
        return min(2, self.epochs // 2) if self.warmup_epochs is None else self.warmup_epochs

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate at a step: up to its highest, and down to zero after the last."""
        rising, steps = (n * steps_per_epoch for n in (self.warmup, self.epochs))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        falling = self.learning_rate * (steps - step) / max(1, steps - rising)
        return min(self.learning_rate, falling)

    def bound(self, sparsity: Pattern) -> Method:
        """The method under a sparsity."""
        if self.method is None:
            return safe(sparsity, rho=2e-4)
        if self.method.constraint.masks_gradients and sparsity.schedule is None:
            raise ValueError(
                "sparsity must change over time for a method of masks, such as "
                f"schedules.cubic(0.5, steps=1000), got {sparsity!r}"
            )
        return replace(self.method, sparsity=sparsity)


def block_pattern(sparsity: Any, scope: Literal["tensor", "row"] = "tensor") -> Pattern:
    """The pattern of blocks that are pruned one after the other: a number is per weight.

    Parameters
    ----------
    sparsity : float, str or pattern
        As for `safe_core.project`.
    scope : {"tensor", "row"}
        Where entries compete under a number.

    Raises
    ------
    TypeError, ValueError
        If it is no pattern, or one that compares entries of different weights or spreads a
        sparsity over them.

    Examples
    --------
    >>> block_pattern(0.5).scope
    'tensor'
    """
    pattern = as_pattern(sparsity, scope)
    if pattern.couples_arrays:
        raise ValueError(
            "sparsity must not compare entries of different weights, nor distribute zeros over "
            f"them, because blocks are pruned one after the other, got {pattern!r}"
        )
    return pattern


def batches_in_order(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Cut each group of samples into batches; the last of a group may be smaller.

    Parameters
    ----------
    groups : sequence of sequence of int
        Samples that may be together in a batch, as those of one length.
    size : int
        Samples in a batch, at least 1.

    Examples
    --------
    >>> batches_in_order([[0, 1, 2], [3]], 2)
    [[0, 1], [2], [3]]
    """
    return [list(group[k : k + size]) for group in groups for k in range(0, len(group), size)]


def batches_at_random(
    groups: Sequence[Sequence[int]], size: int, *, seed: int, block: int = 0, epoch: int = 0
) -> list[list[int]]:
    """The batches of an epoch: the samples of each group in random order, cut as in order.

    They are the same in every framework, and those of an epoch of a block do not depend on
    what was drawn before, so that a run may begin anywhere. The batches of several groups are
    mixed.

    Parameters
    ----------
    groups, size
        As for `batches_in_order`.
    seed, block, epoch : int
        Not negative.

    Examples
    --------
    >>> batches_at_random([range(5)], 2, seed=0)
    [[2, 4], [3, 0], [1]]
    """
    random = np.random.default_rng((seed, block, epoch))
    batches = batches_in_order([random.permutation(group).tolist() for group in groups], size)
    if len(groups) > 1:
        batches = [batches[k] for k in random.permutation(len(batches))]
    return batches
