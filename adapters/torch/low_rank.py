"""Fine-tune a sparse model by a low-rank change of its weights that keeps their zeros."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from safe_core import Layout, _checks
from safe_core._dtypes import wide_dtype

from .weights import ModelWeight, is_pruned, may_be_pruned, model_weights

__all__ = ["add_low_rank", "merge_low_rank"]


class _MaskedLowRank(nn.Module):
    """Parametrization ``W + M * (scale * B A)`` with the mask M of W."""

    mask: Tensor

    def __init__(self, weight: Tensor, layout: Layout | None, rank: int, scale: float) -> None:
        super().__init__()
        stacked = 0 if layout is None else len(layout.batch_axes)
        rows, *columns = weight.shape[stacked:]
        batch, dtype = weight.shape[:stacked], wide_dtype(torch, [weight])
        options = {"dtype": dtype, "device": weight.device}
        self.scale = scale
        self.a = nn.Parameter(torch.empty(*batch, rank, math.prod(columns), **options))
        self.b = nn.Parameter(torch.zeros(*batch, rows, rank, **options))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.register_buffer("mask", weight.detach() != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        change = (self.scale * (self.b @ self.a)).reshape(weight.shape)
        return (weight + torch.where(self.mask, change, 0)).to(weight.dtype)


def add_low_rank(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    where: Callable[[str, Tensor], bool] | None = None,
) -> list[str]:
    """Replace sparse weights W by ``W + M * (alpha / rank) B A``, and train only A and B.

    M is 1 where W is not zero, so the sum has the zeros of W at every step. Every parameter of the
    model is frozen. A starts at random as in `torch.nn.Linear` and B at zero, so the outputs do not
    change at first. Both are in float32 or wider. Train the parameters that require a gradient,
    with any optimizer or trainer, then call `merge_low_rank`.

    Parameters
    ----------
    model : torch.nn.Module
    rank : int
        Rows of A, shape (rank, inputs), and columns of B, shape (outputs, rank). A kernel counts
        as a matrix of outputs by all other axes. In a module of unknown type, three axes are a
        stack of matrices, each of which has its own A and B.
    alpha : float, optional
        Scale of the change; ``rank`` by default.
    where : callable, optional
        Function of name and parameter that selects weights. By default they are those whose zeros
        `safe_core.keep_zeros` keeps: weights of linear, convolution, attention and recurrent
        layers, and matrices of modules of unknown types, such as stacks of experts.

    Returns
    -------
    list of str
        Names of the changed weights.

    Raises
    ------
    TypeError, ValueError
        If no weight is selected, one is used by several modules or has fewer than two axes, or
        ``rank`` or ``alpha`` is out of range.

    Notes
    -----
    Files that are saved before the merge hold W, A and B apart.

    References
    ----------
    Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; Lu et al. 2024, "SPP:
    Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models".

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = model[0].weight.data[:, :2].zero_()
    >>> add_low_rank(model, rank=1)
    ['0.weight']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.parametrizations.weight.0.a', '0.parametrizations.weight.0.b']
    >>> merge_low_rank(model), int((model[0].weight == 0).sum())
    (['0.weight'], 4)
    """
    _checks.integer("rank", rank, low=1)
    scale = 1.0 if alpha is None else _checks.real("alpha", alpha, low=0.0) / rank
    known, held = model_weights(model), list(_parameters(model))
    uses = Counter(p for _, _, _, p in held)
    chosen = [
        (module, attribute, name, p)
        for module, attribute, name, p in held
        if (where(name, p) if where is not None else _is_sparse(p, known[p], uses[p]))
    ]
    _check(chosen)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module, attribute, _, p in chosen:
        change = _MaskedLowRank(p, _layout(p, known[p]), rank, scale)
        parametrize.register_parametrization(module, attribute, change)
    return [name for _, _, name, _ in chosen]


def _is_sparse(p: Tensor, known: ModelWeight, uses: int) -> bool:
    """Return whether a weight has zeros to keep, and none but known layers share it."""
    typed = not known.reason
    return (typed or uses == 1) and may_be_pruned(p, known) and is_pruned(p, typed)


def _layout(p: Tensor, known: ModelWeight) -> Layout | None:
    """Return the layout of a weight; three axes in a module of unknown type are a stack."""
    if not known.reason:
        return known.layout
    return Layout((2,), (1,), batch_axes=(0,)) if p.ndim == 3 else None


def merge_low_rank(model: nn.Module) -> list[str]:
    """Add the changes of `add_low_rank` to the weights, which keep their zeros.

    The merged weights have the dtype of the model, and no parameter of the model is frozen.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    list of str
        Names of the merged weights.

    Raises
    ------
    ValueError
        If the model has no such weight.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.0, 3.0]]))
    >>> names = add_low_rank(model, rank=1)
    >>> merge_low_rank(model), model.weight.tolist()
    (['weight'], [[0.0, 3.0]])
    """
    merged = []
    for path, module in list(model.named_modules()):
        for attribute in list(getattr(module, "parametrizations", ())):
            parts = module.parametrizations[attribute]
            if len(parts) == 1 and isinstance(parts[0], _MaskedLowRank):
                parametrize.remove_parametrizations(module, attribute)
                merged.append(f"{path}.{attribute}" if path else attribute)
    if not merged:
        raise ValueError("model must have weights of add_low_rank(), got none")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return merged


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Yield the module, attribute, name and value of every parameter, tied ones repeatedly."""
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                yield module, attribute, f"{path}.{attribute}" if path else attribute, p


def _check(chosen: list[tuple[nn.Module, str, str, nn.Parameter]]) -> None:
    if not chosen:
        raise ValueError(
            "model must have a weight with zeros, or where= must select one, got none: is the "
            "model sparse, and its change not added yet?"
        )
    names: dict[nn.Parameter, str] = {}
    for _, _, name, p in chosen:
        if p.ndim < 2:
            raise ValueError(
                f"where must select weights of two axes or more, got {name} {tuple(p.shape)}"
            )
        if p in names:
            raise ValueError(
                f"where must select weights of one module each, got {names[p]}, which is also "
                f"{name}: a change of one would untie them"
            )
        names[p] = name
