"""Share settings, recipe and sample order of block-wise pruning across frameworks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from . import _checks
from .patterns import ByName, Pattern, as_pattern
from .solvers.reconstruction import Reconstruction

__all__ = [
    "BlockSettings",
    "Reconstruction",
    "batches_at_random",
    "batches_in_order",
    "block_pattern",
    "block_patterns",
]


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """Settings of pruning block after block, in every framework.

    Block i with parameters x is pruned to minimise ``|block_x(h) - block_dense(h')|^2`` over the
    hidden states h and h' of the calibration samples.

    Attributes
    ----------
    propagate : {"pruned", "dense"}
        Whether h comes from the pruned or from the dense blocks before. With "dense" every
        block is pruned as if the others were dense, and h' = h.
    target_inputs : {"pruned", "dense"}
        Whether h', from which the targets are computed, comes from the pruned or from the dense
        blocks before.
    batch_size : int
        Samples in a forward pass. The batch size of training is the solver's.
    seed : int
        Seed of the order of samples.

    Raises
    ------
    TypeError, ValueError
        If a field is of another kind or out of its range.

    Examples
    --------
    >>> BlockSettings(target_inputs="dense").two_streams
    True
    """

    propagate: Literal["pruned", "dense"] = "pruned"
    target_inputs: Literal["pruned", "dense"] = "pruned"
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("propagate", "target_inputs"):
            _checks.choice(name, getattr(self, name), ("pruned", "dense"))
        _checks.integer("batch_size", self.batch_size, low=1)
        _checks.integer("seed", self.seed, low=0)

    @property
    def two_streams(self) -> bool:
        """Whether hidden states of dense blocks are kept beside those of pruned ones."""
        return self.target_inputs == "dense" and self.propagate == "pruned"


def changed(settings: Any, changes: dict[str, Any]) -> Any:
    """Return settings with some fields changed.

    Raises
    ------
    TypeError
        If a name is not that of a field.

    Examples
    --------
    >>> changed(BlockSettings(), {"seed": 3}).seed
    3
    >>> changed(BlockSettings(), {"seeds": 3})
    Traceback (most recent call last):
    TypeError: settings must be batch_size, propagate, seed or target_inputs, got 'seeds'
    """
    names = sorted(field.name for field in fields(settings))
    for name in changes:
        if name not in names:
            known = f"{', '.join(names[:-1])} or {names[-1]}"
            raise TypeError(f"settings must be {known}, got {name!r}")
    given = {name: getattr(settings, name) for name in names}
    return type(settings)(**given | changes)


def block_pattern(sparsity: Any, scope: Literal["tensor", "row"] = "tensor") -> Pattern:
    """Return the pattern for blocks that are pruned one after the other; numbers are per weight.

    Parameters
    ----------
    sparsity : float, str or pattern
        As for `safe_core.project`.
    scope : {"tensor", "row"}
        Where entries compete, if ``sparsity`` is a number.

    Raises
    ------
    TypeError, ValueError
        If it is not a pattern, compares entries of different weights, or distributes zeros over
        them.

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


def block_patterns(
    sparsity: Any, weights: Mapping[str, Any], scope: Literal["tensor", "row"] = "tensor"
) -> dict[str, Pattern]:
    """Return the pattern of each weight of a model that is pruned block by block.

    Parameters
    ----------
    sparsity : float, str, pattern, mapping or callable
        One sparsity for all weights; or a mapping of names to sparsities; or a function
        ``sparsity(name, weight)`` that returns a sparsity, or None.
    weights : mapping of str to array
        The weights that can be pruned, by full name.
    scope : {"tensor", "row"}
        Where entries compete, if a sparsity is a number.

    Returns
    -------
    dict of str to Pattern
        The pattern of each weight to prune. Weights that the mapping does not name, or for which
        the function returns None, are left out and stay dense.

    Raises
    ------
    TypeError, ValueError
        If a name of the mapping is not that of a weight, or `block_pattern` refuses a sparsity.

    Examples
    --------
    >>> weights = {"0.up": None, "0.down": None}
    >>> block_patterns({"0.up": "2:4"}, weights)
    {'0.up': NM(n=2, m=4, ragged='error')}
    """
    if isinstance(sparsity, Mapping):
        strange = [name for name in sparsity if name not in weights]
        if strange:
            raise ValueError(
                f"sparsity must name weights of the blocks, such as {next(iter(weights), 'none')}, "
                f"got {strange[0]!r}{_checks.weight_meant(strange[0], weights)}"
            )
        chosen = {name: sparsity[name] for name in weights if name in sparsity}
    elif callable(sparsity) and not isinstance(sparsity, type):
        found = {name: sparsity(name, weight) for name, weight in weights.items()}
        chosen = {name: value for name, value in found.items() if value is not None}
    elif isinstance(sparsity, ByName):
        sparsity.check_names(list(weights))
        chosen = {name: sparsity.of(name) for name in weights}
    else:
        whole = block_pattern(sparsity, scope)  # also without weights, to check it
        return dict.fromkeys(weights, whole)
    patterns = {}
    for name, value in chosen.items():
        try:
            patterns[name] = block_pattern(value, scope)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return patterns


def batches_in_order(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Cut each group of samples into batches; the last of a group may be smaller.

    Parameters
    ----------
    groups : sequence of sequence of int
        Samples that can share a batch, such as those of one length.
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
    """Return the batches of an epoch: each group's samples shuffled, then cut as in order.

    They are the same in every framework and depend on the arguments only, so that a run can be
    resumed at any block. Batches of several groups are shuffled too.

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
