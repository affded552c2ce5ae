"""Move the parameters to the perturbed point x + e, where the loss is higher."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from safe_core._calls import level_of_caller
from safe_core.direction import Direction, norm

from .run import Run, Scalar, by_value

__all__ = ["ascend"]


@torch.no_grad()
def ascend(run: Run, params: list[Tensor], loss_scale: Scalar) -> list[Tensor]:
    """Move parameters along their gradients, and keep copies in `Run.moved` to restore them.

    Parameters
    ----------
    loss_scale : float or scalar tensor
        The factor of the gradients, such as that of a `GradScaler`.

    Returns
    -------
    list of tensors
        The norm of the gradients if the radius depends on their growth, otherwise nothing.

    Raises
    ------
    ValueError
        If a gradient is a sparse tensor.
    """
    perturbation = run.method.perturbation
    gradients = [p.grad for p in params if p.grad is not None]
    if any(g.is_sparse for g in gradients):
        raise ValueError("gradients must be dense to be perturbed along, got a sparse one")
    radii = run.signed("rho", params)
    if perturbation is not None and not perturbation.is_scale_free:
        # e is proportional to the gradient here, so it also carries the loss scale.
        scaled = {rho: rho / loss_scale for rho in set(radii)}
        radii = [scaled[rho] for rho in radii]
    if run.scheduled is None:  # a step that is recorded can read no value
        _warn_of_rounding(run, params, gradients, max(map(abs, radii)))
    direction = _direction(run, params, gradients)
    # The norm is shared by all groups; only the length differs.
    by_radius = {rho: direction._replace(rho=rho) for rho in set(radii)}
    copies = run.moved.prepare(params)
    if run.compiled is not None:
        by_factor = {rho: found.factor for rho, found in by_radius.items()}
        factors = [by_factor[rho] for rho in radii]
        run.compiled.ascend(params, copies, direction.vectors, factors, direction.usable)
        run.moved.mark_saved(params, copies)
    else:
        moves = by_value(radii, zip(params, copies, direction.vectors, strict=True))
        for rho, mine in moves.items():
            some, into, vectors = zip(*mine, strict=True)
            run.moved.move(some, into, by_radius[rho]._replace(vectors=vectors))
    return [direction.length] if perturbation is not None and perturbation.max_growth else []


def _direction(run: Run, params: list[Tensor], gradients: list[Tensor]) -> Direction:
    layouts, motion = _layouts(run, params), run.motion()
    return run.method.direction(params, gradients, run.steps, layouts=layouts, motion=motion)


def _layouts(run: Run, params: list[Tensor]) -> list[Any]:
    return [run.selected[p].layout if p in run.selected else None for p in params]


def _warn_of_rounding(
    run: Run, params: list[Tensor], gradients: list[Tensor], widest: float
) -> None:
    """Warn once, at the first perturbation, if rounding to 16 bits removes most of it."""
    if run.checked_rounding or widest == 0 or all(p.element_size() > 2 for p in params):
        return
    layouts, motion = _layouts(run, params), run.motion()
    steps = run.method.perturb(
        params, gradients, run.steps, rho=widest, layouts=layouts, motion=motion
    )
    length = float(norm(steps))
    if length == 0:  # the gradient is zero or not finite: check at a later step
        return
    run.checked_rounding = True
    moves = [(p + e).to(p.dtype).float() - p for p, e in zip(params, steps, strict=True)]
    moved = float(norm(moves))
    if moved < length / 2:
        warnings.warn(
            f"16-bit parameters round the perturbation away: |(x + e) - x| = {moved:.3g} for "
            f"|e| = {length:.3g}; keep the parameters in float32 and use autocast",
            stacklevel=level_of_caller(),
        )
