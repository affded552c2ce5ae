"""Read importances from the user, the base optimizer's second moments or the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safe_core import Method, _checks
from safe_core.importance import Computed, Given, Importance, hutchinson

from .low_bit import read_state
from .products import hessian_products
from .state import ParameterState

__all__ = ["hessian_diagonal", "importance_in_use", "second_moments"]

# Names of running averages of squared gradients, in torch.optim and torchao, and bitsandbytes.
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "state2")


def hessian_diagonal(
    loss_fn: Callable[[], Tensor],
    params: Mapping[str, Tensor],
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Hessian of a loss, with negative entries set to 0.

    This is the importance of Optimal Brain Damage. It uses Hutchinson's estimator, see
    `safe_core.importance.hutchinson`, and computes each Hessian-vector product by a second
    backward pass. Call it in a function that you pass as ``importance=`` of `SparseOptimizer`,
    which calls that function at dual updates.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn()`` returns a scalar loss at the current parameters, for example on the
        current batch. It must be twice differentiable.
    params : mapping of name to tensor
        Such as the result of `SparseOptimizer.sparse_parameters`.
    samples : int
        Number of random vectors to average over. Each costs a backward pass.
    generator : torch.Generator, optional
        Draws the random vectors. It must be on the device of the parameters.

    Returns
    -------
    dict of name to tensor
        In float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``loss_fn`` is not a function, ``samples`` is not a positive integer, or ``params``
        is empty.

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
        products = [hessian_products(gradients, tensors, r) for r in probes]
    by_parameter = zip(params, zip(*probes, strict=True), zip(*products, strict=True), strict=True)
    return {name: hutchinson(r, product).detach() for name, r, product in by_parameter}


def _signs(p: Tensor, generator: Any) -> Tensor:
    drawn = torch.randint(0, 2, p.shape, generator=generator, device=p.device)
    return (2 * drawn - 1).to(p.dtype)


def importance_in_use(
    handed: Any, method: Method, parameters: Callable[[], ParameterState]
) -> Importance | None:
    """Return the importance of a run: the one that the user passed, or that of the method.

    ``parameters`` is a function, because the selection may change between steps.
    """
    if handed is None:
        return method.importance
    if isinstance(handed, Mapping):
        return Given(lambda params: parameters().placed(handed, params))

    def compute(params: Sequence[Tensor]) -> list[Tensor]:
        state = parameters()
        named = {state.selected[p].name: p for p in params}
        return state.placed(handed(named), params)

    return Computed(compute)


def second_moments(base: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the base's running averages of squared gradients, in floating point.

    Raise a ValueError if the base keeps none for a parameter, as SGD does not.
    """
    found = []
    for p in params:
        held = base.state.get(p, {})
        key = next((key for key in _SECOND_MOMENTS if key in held), None)
        if key is None:
            raise ValueError(
                "base must keep second moments, as torch.optim.Adam does, for an importance that "
                f"reads them, got {type(base).__qualname__} with {', '.join(held) or 'no state'}"
            )
        found.append(read_state(held, key))
    return found
