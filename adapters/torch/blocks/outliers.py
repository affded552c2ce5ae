"""Measure the outliers of every block of a dense model, and set its sparsity by them (OWL)."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core._dtypes import wide_dtype
from safe_core.patterns import Unstructured, outlier_weighed
from safe_core.patterns.distribution import round_to_sum
from safe_core.reconstruction import changed

from .pruning import plan_pruning
from .run import Run
from .settings import PruningSettings, writing_nothing
from .solver import BlockProblem
from .statistics import InputStatistics

__all__ = ["BlockSparsity", "OutlierSparsities", "outlier_sparsities"]

_DEFAULTS = PruningSettings()


class BlockSparsity(NamedTuple):
    """The outliers of a block and the sparsity that follows.

    Attributes
    ----------
    name : str
    outliers : float
        Fraction of the entries of its weights that are outliers.
    sparsity : float
        Fraction of zeros in its weights.
    """

    name: str
    outliers: float
    sparsity: float


class OutlierSparsities(NamedTuple):
    """The result of `outlier_sparsities`.

    Attributes
    ----------
    patterns : dict of str to Unstructured
        The pattern of each weight to prune, by full name, for the ``sparsity`` of `prune_blocks`.
    blocks : tuple of BlockSparsity
    """

    patterns: dict[str, Unstructured]
    blocks: tuple[BlockSparsity, ...]


class _Weight(NamedTuple):
    name: str
    entries: int
    pools: int  # number of outputs, over all experts


def outlier_sparsities(
    model: nn.Module,
    batches: Any,
    sparsity: float,
    *,
    threshold: float = 5.0,
    reach: float = 0.08,
    scope: Literal["tensor", "row"] = "tensor",
    settings: PruningSettings = _DEFAULTS,
    **changes: Any,
) -> OutlierSparsities:
    """Return a sparsity for each block by its outliers, with a given mean (OWL).

    An entry of a weight W with inputs X is an outlier if ``A_ij = |W_ij| * ||X_j||_2`` exceeds
    ``threshold`` times the mean of A over all weights of its block. Blocks with more outliers are
    pruned less, see `safe_core.patterns.outlier_weighed`. The model is run once, and stays as
    it is.

    Parameters
    ----------
    model, batches, settings, **changes
        As for `prune_blocks`. ``where`` selects the weights.
    sparsity : float
        Fraction of zeros in all weights together. It is exact: together they have
        ``floor(sparsity * n)`` zeros of n entries.
    threshold : float
        M of the paper, which uses 5 or 7.
    reach : float
        Lambda of the paper: the largest difference between the sparsity of a block and the mean,
        before it is rounded to whole entries.
    scope : {"tensor", "row"}
        Where entries compete. With "row", each output of a weight has the same number of zeros.
        Then the total is below ``floor(sparsity * n)``, by less than the most outputs of a weight.

    Returns
    -------
    OutlierSparsities

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind or out of its range, or as `prune_blocks`.

    References
    ----------
    Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning
    LLMs to High Sparsity". As in the published code, the mean of A is that of a whole block.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> with torch.no_grad():
    ...     model[1].weight[0] *= 20
    >>> found = outlier_sparsities(model, torch.randn(4, 8), 0.5, reach=0.1, blocks="")
    >>> [(block.outliers, block.sparsity) for block in found.blocks]
    [(0.0, 0.59375), (0.078125, 0.40625)]
    >>> sum(pattern.sparsity * 64 for pattern in found.patterns.values())
    Fraction(64, 1)
    """
    _checks.real("threshold", threshold, low=0.0)
    outlier_weighed([], [], sparsity, reach)  # raises before the model runs
    settings = changed(settings, changes)
    pattern = Unstructured(sparsity, scope=scope)
    # Wanda needs the statistics that outliers need.
    plan = plan_pruning(model, batches, "wanda", pattern, settings=settings)
    dense = replace(settings, propagate="dense", target_inputs="pruned")
    blocks: list[tuple[str, list[_Weight], Fraction]] = []
    with writing_nothing(dense) as quiet:
        for problem in Run(plan.task._replace(settings=quiet), plan.memory, None).dense_problems():
            weights = [_weight(problem, key) for key in problem.statistics]
            blocks.append((problem.name, weights, _outliers(problem, threshold)))
    return _distributed(blocks, sparsity, reach, scope)


def _weight(problem: BlockProblem, key: str) -> _Weight:
    assert problem.dense is not None  # no solver has run
    shape = problem.dense.get_parameter(key).shape
    inputs = math.prod(shape[axis] for axis in problem.statistics[key].layout.input_axes)
    entries = math.prod(shape)
    return _Weight(f"{problem.name}.{key}", entries, entries // max(1, inputs))


@torch.no_grad()
def _outliers(problem: BlockProblem, threshold: float) -> Fraction:
    """Return the fraction of outliers among the entries of a block's weights."""
    assert problem.dense is not None  # no solver has run
    weights = {key: problem.dense.get_parameter(key) for key in problem.statistics}
    entries = sum(w.numel() for w in weights.values())
    if not entries:
        return Fraction(0)
    sums = [
        _scores(w, problem.statistics[key]).sum(dtype=torch.float64) for key, w in weights.items()
    ]
    limit = threshold * torch.stack(sums).sum() / entries
    counts = [(_scores(w, problem.statistics[key]) > limit).sum() for key, w in weights.items()]
    return Fraction(int(torch.stack(counts).sum()), entries)


def _scores(weight: Tensor, found: InputStatistics) -> Tensor:
    """Return ``|W_ij| * ||X_j||_2``, in float32 or wider."""
    assert found.sums is not None  # recorded as squares
    axes = (*found.layout.batch_axes, *found.layout.input_axes)
    shape = [n if axis in axes else 1 for axis, n in enumerate(weight.shape)]
    wide = weight.detach().to(wide_dtype(torch, [weight])).abs()
    return wide * found.sums.sqrt().reshape(shape)


def _distributed(
    blocks: list[tuple[str, list[_Weight], Fraction]],
    sparsity: float,
    reach: float,
    scope: Literal["tensor", "row"],
) -> OutlierSparsities:
    """Distribute the zeros over the blocks, and in each block evenly over its weights."""
    sizes = [sum(w.entries for w in weights) for _, weights, _ in blocks]
    shares = outlier_weighed([d for _, _, d in blocks], sizes, sparsity, reach)
    weights = [w for _, members, _ in blocks for w in members]
    exact = [
        share * w.entries
        for share, (_, members, _) in zip(shares, blocks, strict=True)
        for w in members
    ]
    units = [w.pools for w in weights] if scope == "row" else None
    counts = round_to_sum(exact, math.floor(sum(exact)), units)
    zeros = {w.name: n for w, n in zip(weights, counts, strict=True)}
    patterns = {
        w.name: Unstructured(Fraction(zeros[w.name], w.entries), scope=scope)  # type: ignore[arg-type]
        for w in weights
    }
    rows = [
        BlockSparsity(name, float(outliers), sum(zeros[w.name] for w in members) / max(1, size))
        for (name, members, outliers), size in zip(blocks, sizes, strict=True)
    ]
    return OutlierSparsities(patterns, tuple(rows))
