"""Take the operations of a step in-place, in the order of the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from safe_core import Operation
from safe_core._calls import level_of_caller
from safe_core.constraints.splitting import rescale_dual
from safe_core.finalization import LONG_RUN, FinalizeWarning, other_length, planned_steps
from safe_core.motion import is_measured, next_shrinkage, with_lengths, with_shrinkage

from . import kernels
from .after_finalize import warn_of_moved_zeros
from .importance import second_moments
from .lost_steps import begin_window, end_window
from .run import Run, Scalar, by_value, fill_gradients, gradients_of

__all__ = ["take_step", "warn_of_long_run"]


@torch.no_grad()
def take_step(run: Run, first: dict[Tensor, Tensor], norms: Sequence[Tensor] = ()) -> None:
    """Take the operations of a step after its gradients are known, and restore x.

    ``first`` holds the gradients at x if the method reuses a direction, and ``norms`` those of
    the gradients at x and at x + e if the radius depends on them.
    """
    if not run.has_gradient():
        return  # optimizers of torch also skip parameters without a gradient
    warn_of_moved_zeros(run)
    run.gradients.note(run.active())
    _Step(run, norms).take(first)
    run.steps += 1
    warn_of_long_run(run)


def warn_of_long_run(run: Run) -> None:
    """Warn once, after a step, if a run exceeds 1.5 times the steps of its method.

    The number may have been one of epochs.
    """
    constraint = run.method.constraint
    planned = planned_steps(constraint, constraint.penalty)
    if planned is None or run.frozen or run.finalized_at is not None:
        return
    if run.steps == int(LONG_RUN * planned) + 1:
        warnings.warn(
            f"step: {other_length(run.steps, planned)}",
            FinalizeWarning,
            stacklevel=level_of_caller(),
        )


class _Step:
    """Take one step. Public methods are named after the members of `safe_core.Operation`."""

    def __init__(self, run: Run, norms: Sequence[Tensor]) -> None:
        self.run = run
        self.norms = norms
        self.plan = run.plan
        self.sparse = run.sparse()
        self.due = run.due(self.sparse)
        self.penalties: list[Scalar] = []  # what a compiled base step is to add
        self.pulls: dict[Tensor, Tensor] = {}
        self.before: list[Tensor] = []  # local shards of x before a base step that is measured

    def take(self, first: dict[Tensor, Tensor]) -> None:
        self.run.mask_gradients(self.sparse)
        if self.plan.reuses:
            self._reuse_direction(first)
        for operation in self.plan.operations:
            getattr(self, operation.name.lower())()

    def _reuse_direction(self, first: dict[Tensor, Tensor]) -> None:
        """Store the direction of a perturbed gradient, or add the stored one to the gradient."""
        run, method = self.run, self.run.method
        if first:
            flat = method.flat_direction(list(first.values()), gradients_of(first))
            if run.scheduled is not None:
                flat = run.scheduled.kept(flat, [run.state[p]["flat_direction"] for p in first])
            for p, direction in zip(first, flat, strict=True):
                run.state[p]["flat_direction"] = direction
            return
        held = {p: run.state.get(p, {}).get("flat_direction") for p in run.trainable()}
        for p, direction in held.items():
            if p.grad is None and direction is not None:
                p.grad = torch.zeros_like(p)
        known = [(p.grad, direction) for p, direction in held.items() if p.grad is not None]
        gradients = [gradient for gradient, _ in known]
        directions = [torch.zeros_like(g) if d is None else d for g, d in known]
        if gradients:
            kernels.copy_(gradients, method.reuse(gradients, directions))

    # Operations

    def observe_gradients(self) -> None:
        self._refresh_importance("gradients")

    def rescale_dual(self) -> None:
        run, parameters = self.run, self.run.parameters
        split = parameters.split(self.sparse)
        if run.scheduled is None:
            split = run.method.constraint.rescale(split, run.steps)
        else:
            split = rescale_dual(split, run.scheduled.dual_ratio)
        parameters.store(self.sparse, split)

    def add_penalty(self) -> None:
        run = self.run
        penalties = run.signed("penalty", self.sparse)
        # Without a gradient the base would skip the parameter. The penalty would then not act,
        # while u would grow at every dual update.
        fill_gradients(self.sparse)
        if run.compiled is not None:
            self.penalties = penalties  # `base_step` adds it, in one program with the base step
            return
        for penalty, mine in by_value(penalties, self.sparse).items():
            for some in run.parameters.portions(mine):
                gradients, anchors = gradients_of(some), run.parameters.anchors(some)
                # One pass restores x and adds the penalty there.
                copies = run.moved.copies(some)
                kernels.add_penalty_(gradients, some, anchors, penalty, copies)
                run.moved.mark_restored(some)

    def measure_pull(self) -> None:
        run, selected = self.run, self.run.selected
        # Measure at x, before the base step changes it.
        fill_gradients(self.sparse)
        run.moved.restore()
        penalties = dict(zip(self.sparse, run.magnitudes("penalty", self.sparse), strict=True))
        for group in run.groups:
            mine = [p for p in group["params"] if p in selected and p.requires_grad]
            if mine:
                rate = group["lr"]  # torch accepts a tensor with one entry and any shape
                rate = rate.reshape(()) if torch.is_tensor(rate) else rate
                factor = rate * penalties[mine[0]]
                found = kernels.pulls(mine, run.parameters.anchors(mine), factor)
                self.pulls.update(zip(mine, found, strict=True))

    def base_step(self) -> None:
        run = self.run
        if self._measures:
            self.before = self._start_of_base()
        begin_window(run, self.sparse)
        self._descend()
        end_window(run)

    def _descend(self) -> None:
        """Restore x where it is perturbed, and take the step of the base."""
        run = self.run
        with nullcontext() if run.scheduled is None else run.scheduled.skipping_base():
            self._descend_within()

    def _descend_within(self) -> None:
        run = self.run
        if run.compiled is None or run.frozen:
            run.moved.restore()
            run.base.step()
            return
        penalised: Sequence[Tensor] = self.sparse if self.penalties else []
        anchors = run.parameters.anchors(penalised)
        copies = run.moved.copies(penalised) if penalised else None
        run.moved.restore(but=penalised)
        gradients = gradients_of(penalised)
        run.compiled.descend(gradients, penalised, anchors, self.penalties, copies)
        run.moved.mark_restored(penalised)

    def _start_of_base(self) -> list[Tensor]:
        """Return local shards of x, where the base starts."""
        # Where the parameters are perturbed, the copies hold x until the next block.
        copies = self.run.moved.copies(self.sparse) or [None] * len(self.sparse)
        shards = kernels.local_shards(self.sparse)
        missing = [x for x, copy in zip(shards, copies, strict=True) if copy is None]
        new = iter(kernels.clones(missing))
        return [next(new) if copy is None else copy for copy in copies]

    @property
    def _measures(self) -> bool:
        measured = Operation.MEASURE_STEP in self.plan.operations and is_measured(self.run.steps)
        return bool(self.sparse) and measured

    def measure_step(self) -> None:
        if not self.norms and not self._measures:
            return
        run, parameters = self.run, self.run.parameters
        found = parameters.motions(self.sparse)
        if self.norms and self.sparse:
            # Every parameter holds the same shrinkage, so that each can be saved by itself.
            # One that joined late has not shrunk yet.
            perturbation = run.method.perturbation
            assert perturbation is not None
            first, second = self.norms
            before = found[:, 2].amax()
            now = next_shrinkage(before, first, second, perturbation.max_growth)
            if run.scheduled is not None:
                (now,) = run.scheduled.kept([now], [before])
            found = with_shrinkage(found, now)
        if self._measures:
            lengths = kernels.step_lengths(self.sparse, self.before)
            self.before = []
            found = with_lengths(found, lengths, run.steps)
        parameters.store_motions(self.sparse, found)

    def apply_pull(self) -> None:
        kernels.subtract_(self.sparse, [self.pulls[p] for p in self.sparse])

    def pull(self) -> None:
        run = self.run
        penalties = run.magnitudes("penalty", self.sparse)
        for penalty, mine in by_value(penalties, self.sparse).items():
            kernels.pull_(mine, run.parameters.split(mine), penalty)

    def mask_parameters(self) -> None:
        self.run.mask(self.sparse, self.sparse)

    def update_state(self) -> None:
        if not self.due:
            return
        run, parameters = self.run, self.run.parameters
        self._refresh_importance("params", "model", "second_moments")
        constraint = run.method.constraint
        for pattern, members in parameters.pools(self.due):
            split = constraint.update(
                [p.detach() for p in members],
                parameters.split(members),
                pattern,
                parameters.info(members),
                run.steps,
                run.metric(pattern, members),
                workspace=run.moved.workspace(members) if constraint.has_anchor else None,
            )
            parameters.store(members, split)

    def project_parameters(self) -> None:
        self.run.mask(self.due, self.due)

    def _refresh_importance(self, *kinds: str) -> None:
        """Refresh the importance of due parameters, if it reads values of these kinds."""
        run, source = self.run, self.run.source
        if source is None or source.reads not in kinds or not self.due:
            return
        # Functions, because most of these lists would be built in vain.
        values: dict[str, Callable[[], list[Tensor]]] = {
            "gradients": lambda: gradients_of(self.due),
            "params": lambda: self.due,
            "model": run.trainable,
            "second_moments": lambda: second_moments(run.base, self.due),
        }
        held = run.parameters.importance(self.due) or []
        found = source.refresh(held, values[source.reads]())
        run.parameters.store_importance(self.due, found)
