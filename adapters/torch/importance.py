"""Importances that take derivatives of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safe_core import _checks
from safe_core.importance import hutchinson

__all__ = ["hessian_diagonal"]


def hessian_diagonal(
    loss_fn: Callable[[], Tensor],
    params: Mapping[str, Tensor],
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Hessian of a loss, negative entries as 0: the importance of OBD.

    Hutchinson's estimate, see `safe_core.importance.hutchinson`, with products by a second
    backward pass. For ``importance=`` of `SparseOptimizer`, which calls its function at dual
    updates, with the loss on a batch at hand.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn()`` computes a scalar loss at the present parameters, twice differentiable.
    params : mapping of name to tensor
        As `SparseOptimizer.sparse_parameters` returns it.
    samples : int
        Vectors to average over; each costs a backward pass.
    generator : torch.Generator, optional
        Where the vectors are drawn from; on the device of the parameters.

    Returns
    -------
    dict of name to tensor
        Float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``loss_fn`` is not a function, ``samples`` not a positive integer, or there is no
        parameter.

    References
    ----------
    LeCun et al. 1989, "Optimal Brain Damage".

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    >>> hessian_diagonal(lambda: (torch.tensor([2.0, -1.0]) * w**2).sum(), {"w": w})
    {'w': tensor([4., 0.])}
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn)!r}")
    _checks.integer("samples", samples, low=1)
    if not params:
        raise ValueError("params must not be empty, got none")
    tensors = list(params.values())
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            loss_fn(), tensors, create_graph=True, materialize_grads=True
        )
        probes = [[_signs(p, generator) for p in tensors] for _ in range(samples)]
        products = [_products(gradients, tensors, r) for r in probes]
    by_parameter = zip(params, zip(*probes, strict=True), zip(*products, strict=True), strict=True)
    return {name: hutchinson(r, product).detach() for name, r, product in by_parameter}


def _signs(p: Tensor, generator: Any) -> Tensor:
    drawn = torch.randint(0, 2, p.shape, generator=generator, device=p.device)
    return (2 * drawn - 1).to(p.dtype)


def _products(
    gradients: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """``H r``, of gradients that have a graph."""
    depends = [(g, r) for g, r in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not depends:  # a linear loss
        return [torch.zeros_like(p) for p in params]
    outputs, weights = zip(*depends, strict=True)
    return torch.autograd.grad(outputs, params, weights, retain_graph=True, materialize_grads=True)
