"""The points of a step at which gradients are taken, and the order of visits to them.

The plan of the method names the points. A user visits them phase by phase, with
`SparseOptimizer.perturbed` and `SparseOptimizer.projected`; a closure is called at each.
"""

from __future__ import annotations

import enum
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safe_core import Evaluation
from safe_core.perturbations import norm

from . import kernels
from .closures import ClosureProbe
from .modules import RandomState, statistics_kept
from .run import Run, fill_gradients, gradients_of

__all__ = ["Phase", "Phases"]


class Phase(enum.Enum):
    """How far the gradients of a step have come."""

    START = "before any block"
    PERTURBED = "within perturbed()"
    READY = "after perturbed()"
    PROJECTED = "within projected()"
    COMPLETE = "after projected()"


class Phases:
    """Move the parameters of a run to the points of a step, and back.

    Attributes
    ----------
    run : Run
    phase : Phase
    first : dict of parameter to tensor
        Gradients at x, where a direction of the perturbed gradient is reused.
    """

    def __init__(self, run: Run, *, allow_unperturbed: bool, replay_rng: bool) -> None:
        self.run = run
        self.allow_unperturbed = allow_unperturbed
        self.replay_rng = replay_rng
        self.reset()

    def reset(self) -> None:
        """Give up the gradients of the step."""
        self.phase = Phase.START
        self.first: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "phase": Phase.START, "first": {}}

    def take_first(self) -> dict[Tensor, Tensor]:
        """Hand over the gradients at x, and begin anew."""
        first = self.first
        self.reset()
        return first

    # Blocks

    @property
    def block(self) -> str:
        """The name of the block that is open, or an empty string."""
        return {Phase.PERTURBED: "perturbed", Phase.PROJECTED: "projected"}.get(self.phase, "")

    def refuse_within_block(self, call: str) -> None:
        """Raise where a block is open."""
        if self.block:
            raise ValueError(f"{call} must come after the {self.block}() block, not within it")

    def check_block(self, call: str, replay: Any) -> None:
        """Refuse to open a block within another, or to replay what is no state."""
        if self.block:
            raise ValueError(f"{call} must not be entered within {self.block}()")
        if replay is not None and not isinstance(replay, RandomState):
            raise TypeError(f"replay must be a RandomState or None, got {replay!r}")

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Bring x back on exit, bit for bit, after an error too."""
        try:
            yield
        finally:
            with torch.no_grad():
                self.run.moved.restore()
            self.run.forget_copies()

    @contextmanager
    def at_perturbed_point(
        self, replay: RandomState | None, loss_scale: float = 1.0
    ) -> Iterator[None]:
        """Body of `SparseOptimizer.perturbed`; the caller restores x."""
        run = self.run
        params = [p for p in run.trainable() if p.grad is not None]
        if not params:
            raise ValueError(
                "perturbed() needs the gradients of a first loss.backward(), got None for "
                "every parameter; an optimizer must be made after its model is wrapped or sharded"
            )
        sparse = run.sparse()  # z and u start from x, not from x + e
        added: dict[Tensor, Tensor] = {}
        try:
            if run.perturbed is not None:
                params, added = self._leave_x(run.perturbed, sparse, params, loss_scale)
            run.zero_grad()
            self.phase = Phase.PERTURBED
            run.forget_copies()
            with statistics_kept(run.model), RandomState.replayed(replay):
                yield
        except BaseException:
            self.reset()
            raise
        else:
            # A block that only looked leaves the step without its gradient.
            if all(p.grad is None for p in params):
                self.reset()
            else:
                self.phase = Phase.READY
                _add_back(added)

    @torch.no_grad()
    def _leave_x(
        self,
        evaluation: Evaluation,
        sparse: list[Tensor],
        params: list[Tensor],
        loss_scale: float,
    ) -> tuple[list[Tensor], dict[Tensor, Tensor]]:
        """Move to the perturbed point; return what moved, and gradients to add afterwards."""
        run = self.run
        if evaluation.point.is_projected:  # which moves parameters without a gradient too
            fill_gradients(sparse)
            params = [p for p in run.trainable() if p.grad is not None]
        run.mask_gradients(sparse)
        self._ascend(params, loss_scale)
        if evaluation.point.is_projected:
            self._project(sparse)
        if run.plan.reuses:
            held = self._set_aside()
            self.first = {p: held[p] if p in held else torch.zeros_like(p) for p in run.trainable()}
        elif evaluation.combine == "add":
            return params, self._set_aside()
        return params, {}

    @contextmanager
    def at_projected_point(self, replay: RandomState | None) -> Iterator[None]:
        """Body of `SparseOptimizer.projected`; the caller restores x."""
        run, before = self.run, self.phase
        try:
            held = self._set_aside()
            with torch.no_grad():
                sparse = run.sparse()
                run.moved.hold(sparse)
                self._project(sparse)
            self.phase = Phase.PROJECTED
            run.forget_copies()
            with statistics_kept(run.model), RandomState.replayed(replay):
                yield
        except BaseException:
            self.reset()
            raise
        else:
            self.phase = Phase.COMPLETE if run.has_gradient() else before
            _add_back(held)

    def _set_aside(self) -> dict[Tensor, Tensor]:
        """Clear the gradients, and return copies.

        Copies, because a reducer may write the next gradients to the same memory.
        """
        held = {p: p.grad.clone() for p in self.run.trainable() if p.grad is not None}
        self.run.zero_grad()
        return held

    def _project(self, sparse: list[Tensor]) -> None:
        """Set parameters to ``C(x)``."""
        run = self.run
        for pattern, members in run.parameters.pools(sparse):
            metric = run.metric(pattern, members)
            kept = run.support_at(pattern, members, run.steps, metric)
            kernels.mask_([p.detach() for p in members], kept)

    def _ascend(self, params: list[Tensor], loss_scale: float) -> None:
        """Move the parameters to x + e, uphill in the loss."""
        run = self.run
        radii = self._radii(loss_scale)
        gradients = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in gradients):
            raise ValueError("gradients must be dense to be perturbed along, got a sparse one")
        self._warn_of_rounding(params, gradients, radii)
        direction = run.method.direction(
            params, gradients, run.steps, layouts=self._layouts(params)
        )
        by_radius = {rho: direction._replace(rho=rho) for rho in {radii[p] for p in params}}
        copies = run.moved.prepare(params)
        if run.compiled is not None:
            by_factor = {rho: found.factor for rho, found in by_radius.items()}
            factors = [by_factor[radii[p]] for p in params]
            run.compiled.ascend(params, copies, direction.vectors, factors, direction.usable)
            run.moved.mark_saved(params, copies)
            return
        for rho, found in by_radius.items():
            mine = [i for i, p in enumerate(params) if radii[p] == rho]
            run.moved.move(
                [params[i] for i in mine],
                [copies[i] for i in mine],
                found._replace(vectors=[direction.vectors[i] for i in mine]),
            )

    def _layouts(self, params: list[Tensor]) -> list[Any]:
        selected = self.run.selected
        return [selected[p].layout if p in selected else None for p in params]

    def _radii(self, loss_scale: float) -> dict[Tensor, float]:
        """Return the radius of every parameter, for gradients of a scaled loss."""
        radii, perturbation = self.run.signed("rho"), self.run.method.perturbation
        if perturbation is None or perturbation.is_scale_free:
            return radii
        return {p: rho / loss_scale for p, rho in radii.items()}

    def _warn_of_rounding(
        self, params: list[Tensor], gradients: list[Tensor], radii: dict[Tensor, float]
    ) -> None:
        """Warn once, at the first perturbation, where 16-bit parameters round it away."""
        run = self.run
        if run.checked_rounding or all(p.element_size() > 2 for p in params):
            return
        widest = max(abs(radii[p]) for p in params)
        if widest == 0:
            return
        layouts = self._layouts(params)
        steps = run.method.perturb(params, gradients, run.steps, rho=widest, layouts=layouts)
        length = float(norm(steps))
        if length == 0:  # as of a gradient that is zero or not finite
            return
        run.checked_rounding = True
        moves = [(p + e).to(p.dtype).float() - p for p, e in zip(params, steps, strict=True)]
        moved = float(norm(moves))
        if moved < length / 2:
            warnings.warn(
                f"16-bit parameters round the perturbation away: |(x + e) - x| = {moved:.3g} for "
                f"|e| = {length:.3g}; keep the parameters in float32 and use autocast",
                stacklevel=_level_of_caller(),
            )

    # Closures

    def call(self, closure: Callable[[], Any]) -> Any:
        """Call a closure at every point of the step, and stay at the last."""
        run = self.run
        perturbs, projects = run.perturbed is not None, run.plan.projected is not None
        if not perturbs and not projects:
            with torch.enable_grad():
                return closure()
        replay = RandomState.record() if self.replay_rng else None
        probe = ClosureProbe(run.trainable())
        try:
            with torch.enable_grad():
                loss = closure()
            ignored, added = probe.ignored, probe.added
        finally:
            probe.put_back()
        if ignored:  # as by that of a trainer that has called backward() by itself
            self.check_step()
            return loss
        if added:
            raise ValueError(
                "closure must clear the gradients before backward(), got one that adds to "
                "those before it. The second gradient of an accumulated batch needs all its "
                "parts again: take the phases, with `with optimizer.perturbed():`, which in "
                "Lightning means manual optimization"
            )
        if perturbs and run.has_gradient():
            with torch.enable_grad(), self.at_perturbed_point(replay):
                closure()
        if projects and run.has_gradient():
            run.moved.restore()
            with torch.enable_grad(), self.at_projected_point(replay):
                closure()
        return loss

    # Checks

    def check_step(self) -> None:
        """Refuse a step without its closure and phases."""
        if self.phase is Phase.COMPLETE or self._may_go_unperturbed():
            return
        if self.phase is not Phase.READY:
            self.check_perturbed("step()")
        if self.run.plan.projected is not None:
            raise ValueError(
                "step() needs a gradient at the projected point, for the method adds it: pass "
                "step(closure=...), or call loss.backward() within `with optimizer.projected():` "
                "last; allow_unperturbed=True lifts this. Got closure=None"
            )

    def check_perturbed(self, call: str) -> None:
        """Refuse to go on without the perturbed gradient."""
        if self.run.perturbed is not None and not self._may_go_unperturbed():
            raise ValueError(
                f"{call} needs a gradient at the perturbed point, for the method has rho > 0: "
                "pass step(closure=...), or call loss.backward() within "
                "`with optimizer.perturbed():` first, of an optimizer that a trainer has wrapped "
                "`with perturbed(optimizer):` from safe_core.adapters.torch, with Hugging "
                "Face its SparseTrainerMixin; allow_unperturbed=True lifts this. Got closure=None"
            )

    def _may_go_unperturbed(self) -> bool:
        return self.allow_unperturbed or self.run.has_zero_rates()

    def only_initialises(self) -> bool:
        """Return whether a step would only make the base optimizer create its state.

        torch.distributed.checkpoint takes one with zero learning rates and gradients
        before it saves or loads, unless `state` holds something. It is no step of the
        method.
        """
        run = self.run
        return (
            self.phase is Phase.START
            and run.steps == 0
            and run.has_zero_rates()
            and not any(bool(p.grad.any()) for p in run.trainable() if p.grad is not None)
        )


@torch.no_grad()
def _add_back(held: dict[Tensor, Tensor]) -> None:
    """Add gradients that were set aside to those that are there."""
    met = {p: g for p, g in held.items() if p.grad is not None}
    kernels.add_(gradients_of(met), list(met.values()))
    for p in held.keys() - met.keys():
        p.grad = held[p]


def _level_of_caller() -> int:
    """Return the stack level of the first frame outside this package and contextlib."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("safe_core.", "contextlib", "torch.")):
            break
        level, frame = level + 1, frame.f_back
    return level
