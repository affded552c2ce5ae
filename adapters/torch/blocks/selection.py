"""Choose the weights of a model's blocks to prune, and say why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from safe_core.layout import Layout
from safe_core.patterns import Pattern
from safe_core.reconstruction import block_patterns

from .routing import choosing_weights
from .statistics import block_weights
from .structure import Call, block_name

__all__ = ["Selection", "refuse_quantised", "select_weights"]


class Selection(NamedTuple):
    """The weights of a model's blocks.

    Attributes
    ----------
    weights : list of dict of str to Layout or None
        For each block, the weights to prune by their names in it, with their layouts.
    patterns : dict of str to Pattern
        The pattern of each weight to prune, by full name.
    dense : dict of str to str
        The matrices that stay dense, by full name, with the reason.
    """

    weights: list[dict[str, Layout | None]]
    patterns: dict[str, Pattern]
    dense: dict[str, str]


def select_weights(
    name: str,
    blocks: Sequence[nn.Module],
    calls: Sequence[Call],
    sparsity: Any,
    scope: Literal["tensor", "row"],
    where: Callable[[str, Tensor], bool] | None,
    outside: Collection[int],
) -> Selection:
    """Choose the weights to prune.

    Parameters
    ----------
    name : str
        The name of the list of blocks.
    blocks : sequence of torch.nn.Module
    calls : sequence of Call
        The arguments of each block for one sample.
    sparsity, scope
        As for `safe_core.reconstruction.block_patterns`.
    where : callable, optional
        ``where(name, parameter) -> bool``.
    outside : collection of int
        Ids of the parameters that are used outside the blocks too.
    """
    params = {
        f"{block_name(name, i)}.{key}": (i, key, p)
        for i, block in enumerate(blocks)
        for key, p in block.named_parameters()
        if p.ndim >= 2
    }
    prunable = [block_weights(block) for block in blocks]
    dense = {
        f"{block_name(name, i)}.{key}": "its weight is quantised or computed"
        for i, block in enumerate(blocks)
        for key in _without_weight(block)
    }
    followed: list[list[str]] = [[] for _ in blocks]
    for full, (i, key, p) in params.items():
        reason = _unsuitable(p, key, blocks[i], prunable[i], outside)
        if not reason and where is not None and not where(full, p):
            reason = "where= leaves it out"
        if reason:
            dense[full] = reason
        elif not (isinstance(sparsity, Mapping) and full in sparsity):  # asked for by name
            followed[i].append(key)
    for i, chosen in enumerate(choosing_weights(blocks, followed, calls)):
        reason = "its outputs choose or weigh experts"
        dense |= {f"{block_name(name, i)}.{key}": reason for key in chosen}
    free = {full: p for full, (_, _, p) in params.items() if full not in dense}
    patterns = block_patterns(sparsity, free, scope)
    dense |= {full: "sparsity gives it no pattern" for full in free if full not in patterns}
    weights: list[dict[str, Layout | None]] = [{} for _ in blocks]
    for full in patterns:
        i, key, _ = params[full]
        weights[i][key] = prunable[i][key]
    return Selection(weights, patterns, dense)


def _unsuitable(
    p: Tensor,
    name: str,
    block: nn.Module,
    prunable: Mapping[str, Any],
    outside: Collection[int],
) -> str:
    """Return why a matrix of a block cannot be pruned, or an empty string."""
    if name in prunable:
        return "it is used outside the blocks too" if id(p) in outside else ""
    owner = block.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _ConvNd):
        return "it is the weight of a convolution"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "it is an embedding"
    return "it is no weight of a linear layer, nor a stack of experts"


def _without_weight(block: nn.Module) -> Iterator[str]:
    """Yield the names of layers with inputs and outputs, but without a matrix as a parameter."""
    for name, module in block.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            held = [p for p in module.parameters() if p.ndim >= 2 and p.is_floating_point()]
            if not held:
                yield f"{name}.weight" if name else "weight"


def refuse_quantised(name: str, blocks: Sequence[nn.Module]) -> None:
    """Raise for weights in fewer than 16 bits, whose stored numbers are not their values."""
    for i, block in enumerate(blocks):
        for key, p in block.named_parameters():
            if p.ndim >= 2 and p.dtype.itemsize < 2:
                raise ValueError(
                    "model must hold its weights in 16 bits or more, because a quantised weight "
                    f"also has scales; load it dequantised. Got {p.dtype} for "
                    f"{block_name(name, i)}.{key}"
                )
