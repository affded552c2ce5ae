"""Move the parameters to the points of a step where gradients are taken, in order.

The plan of the method names the points. A user visits them by the blocks
`SparseOptimizer.perturbed` and `SparseOptimizer.projected`. A closure is called at each point.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safe_core import Evaluation
from safe_core.direction import norm

from . import kernels
from .ascent import ascend
from .closures import ClosureProbe
from .modules import RandomState, statistics_kept
from .run import Run, Scalar, fill_gradients, gradients_of
from .watching import Found, GradientWatch

__all__ = ["Phase", "Phases"]

# A loop that misuses the blocks does so from its first steps on.
_WATCHED_STEPS = 3


class Phase(enum.Enum):
    """State of the gradients of a step."""

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
        Gradients at x, if the method reuses a direction; otherwise empty.
    norms : list of tensors
        Norms of the gradients at x and at x + e, if the radius depends on them.
    shows_sparse : bool
        Whether `SparseOptimizer.sparse_weights` is open.
    watch : GradientWatch or None
        Watches whether the gradients of the last block or step are cleared, in the first steps
        without a closure.
    """

    def __init__(self, run: Run, *, allow_unperturbed: bool, replay_rng: bool) -> None:
        self.run = run
        self.allow_unperturbed = allow_unperturbed
        self.replay_rng = replay_rng
        self.shows_sparse = False
        self.watch: GradientWatch | None = None
        self._steps = 0
        self.reset()

    def reset(self, *, lost: str = "") -> None:
        """Discard the gradients of the step. ``lost`` says for an error which were lost."""
        self.phase = Phase.START
        self._lost = lost
        self.first: dict[Tensor, Tensor] = {}
        self.norms: list[Tensor] = []
        self.stop_watching()

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts before the first block: its parameters have no gradients.
        return {**self.__dict__, "phase": Phase.START, "first": {}, "norms": [], "watch": None}

    def take(self) -> tuple[dict[Tensor, Tensor], list[Tensor]]:
        """Return the gradients at x and the norms, and reset for the next step."""
        taken = self.first, self.norms
        self.reset()
        return taken

    # Gradients that the user should or should not clear

    def watch_gradients(self) -> None:
        """Watch the gradients that a block or a step leaves, in the first steps."""
        self.stop_watching()
        if self._steps < _WATCHED_STEPS and self.phase in (
            Phase.START,
            Phase.READY,
            Phase.COMPLETE,
        ):
            self.watch = GradientWatch(self.run.trainable())

    def count_step(self) -> None:
        """Count a step without a closure, and watch whether its gradients are cleared."""
        self._steps += 1
        self.watch_gradients()

    def stop_watching(self) -> None:
        """Forget the gradients of the last block or step."""
        if self.watch is not None:
            self.watch.stop()
        self.watch = None

    def refuse_stale_gradients(self, call: str) -> None:
        """Raise if gradients were added to those that the last step left."""
        if self.phase is Phase.START and self.watch and self.watch.found is Found.KEPT:
            raise ValueError(
                f"{call} needs gradients of this step alone, got gradients added to those of the "
                "last step, which hold its penalty too: call optimizer.zero_grad() before the "
                "first backward() of every step"
            )

    def refuse_second_block(self) -> None:
        """Raise if a block would discard the gradients of the block before it."""
        watch = self.watch
        if self.phase not in (Phase.READY, Phase.COMPLETE) or watch is None:
            return
        replaced = watch.found in (Found.CLEARED, Found.UNKNOWN) or not watch.is_present
        if not replaced:
            raise ValueError(
                "perturbed() must be entered once per step, got a second block, which would "
                "discard the gradients of the first. To accumulate, run backward() for all "
                "micro-batches first, then open one block and run them all again in it; call "
                "optimizer.zero_grad() to start a step anew"
            )

    def refuse_lost_gradients(self, call: str) -> None:
        """Raise if the gradients of a block were cleared after it."""
        if self.phase not in (Phase.READY, Phase.COMPLETE):
            return
        lost = self.watch is not None and self.watch.found is Found.CLEARED
        if lost or not self.run.has_gradient():
            raise ValueError(
                f"{call} needs the gradients of the {self._last_block}() block, got gradients that "
                "were cleared after it, for example by model.zero_grad(): call "
                "optimizer.zero_grad() before the first backward() of a step, and do not clear "
                "gradients between the block and step()"
            )

    @property
    def _last_block(self) -> str:
        return "projected" if self.phase is Phase.COMPLETE else "perturbed"

    # Second-order bases

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Call ``backward`` of the base, without a Hessian product for a gradient at x alone.

        `at_perturbed_point` replaces that gradient, which only gives the perturbation.
        """
        run, evaluation = self.run, self.run.perturbed
        is_replaced = evaluation is not None and evaluation.combine == "replace"
        if self.phase is Phase.START and is_replaced and not self.allow_unperturbed:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            run.base.backward(loss, **options)  # type: ignore[attr-defined]

    # Blocks

    @property
    def block(self) -> str:
        """The name of the block that is open, or an empty string."""
        if self.shows_sparse:
            return "sparse_weights"
        return {Phase.PERTURBED: "perturbed", Phase.PROJECTED: "projected"}.get(self.phase, "")

    def refuse_within_block(self, call: str) -> None:
        """Raise if a block is open, because the parameters are not at x."""
        if self.block:
            raise ValueError(f"{call} must come after the {self.block}() block, not within it")

    def check_block(self, call: str, replay: Any) -> None:
        """Raise if a block is open already, or ``replay`` is not a RandomState."""
        if self.block:
            raise ValueError(f"{call} must not be entered within {self.block}()")
        if replay is not None and not isinstance(replay, RandomState):
            raise TypeError(f"replay must be a RandomState or None, got {replay!r}")
        if replay is not None and self.run.scheduled is not None:
            raise ValueError(
                "replay must be None within a CapturedStep, because a CUDA graph cannot set the "
                "states of random number generators"
            )

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Restore x on exit, bit for bit, also after an error."""
        try:
            yield
        finally:
            with torch.no_grad():
                self.run.moved.restore()
            self.run.forget_copies()

    @contextmanager
    def at_perturbed_point(
        self, replay: RandomState | None, loss_scale: Scalar = 1.0
    ) -> Iterator[None]:
        """Implement `SparseOptimizer.perturbed`; the caller restores x."""
        run = self.run
        params = [p for p in run.trainable() if p.grad is not None]
        if not params:
            raise ValueError(
                "perturbed() needs the gradients of a first loss.backward(), got None for "
                "every parameter; create the optimizer after its model is wrapped or sharded"
            )
        sparse = run.sparse()  # initialise z and u from x, not from x + e
        added: dict[Tensor, Tensor] = {}
        try:
            if run.perturbed is not None:
                params, added = self._leave_x(run.perturbed, sparse, params, loss_scale)
            run.zero_grad()
            if run.perturbed is None or run.perturbed.combine == "replace":
                run.discard_products()
            self.phase = Phase.PERTURBED
            run.forget_copies()
            with statistics_kept(run.model), RandomState.replayed(replay):
                yield
        except BaseException:
            self.reset()
            raise
        else:
            # Without backward() in the block, the step still lacks its gradient.
            if all(p.grad is None for p in params):
                self.reset(lost="a perturbed() block without backward()")
            else:
                self.phase = Phase.READY
                self._measure_growth(sparse)
                _add_back(added)

    @torch.no_grad()
    def _leave_x(
        self,
        evaluation: Evaluation,
        sparse: list[Tensor],
        params: list[Tensor],
        loss_scale: Scalar,
    ) -> tuple[list[Tensor], dict[Tensor, Tensor]]:
        """Move to the perturbed point; return what moved, and gradients to add afterwards."""
        run = self.run
        if evaluation.point.is_projected:  # the projection also moves those without a gradient
            fill_gradients(sparse)
            params = [p for p in run.trainable() if p.grad is not None]
        run.mask_gradients(sparse)
        self.norms = ascend(run, params, loss_scale)
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
        """Implement `SparseOptimizer.projected`; the caller restores x."""
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
        """Clear the gradients, and return clones of them.

        Clones, because DDP's gradients can be views of its buckets: the next backward pass
        writes to the same memory.
        """
        held = [p for p in self.run.trainable() if p.grad is not None]
        copies = kernels.clones(gradients_of(held))
        self.run.zero_grad()
        return dict(zip(held, copies, strict=True))

    def _project(self, sparse: list[Tensor]) -> None:
        """Set parameters to ``C(x)``."""
        run = self.run
        for pattern, members in run.parameters.pools(sparse):
            metric = run.metric(pattern, members)
            kept = run.support_at(pattern, members, run.steps, metric)
            kernels.mask_([p.detach() for p in members], kept)

    @torch.no_grad()
    def _measure_growth(self, sparse: list[Tensor]) -> None:
        """Add the norm of the perturbed gradient, before it is clipped."""
        if not self.norms:
            return
        run = self.run
        run.mask_gradients(sparse)
        found = [p.grad for p in run.trainable() if p.grad is not None]
        self.norms.append(norm(found))

    # Closures

    def call(self, closure: Callable[[], Any]) -> Any:
        """Call a closure at every point of the step, and stay at the last one.

        x is not restored here, because the base step restores it in the same pass over memory
        that adds the penalty.
        """
        run = self.run
        perturbs, projects = run.perturbed is not None, run.plan.projected is not None
        if not perturbs and not projects:
            with torch.enable_grad():
                loss = closure()
            self._check_closure(loss)
            return loss
        replay = RandomState.record() if self.replay_rng else None
        probe = ClosureProbe(run.trainable())
        try:
            with torch.enable_grad():
                loss = closure()
            ignored, added = probe.ignored, probe.added
        finally:
            probe.stop()
        if ignored:  # a trainer has called backward() itself and passes a closure without it
            self.check_step("a closure that leaves the gradients as they were")
            return loss
        self._check_closure(loss)
        if added:
            raise ValueError(
                "closure must clear the gradients before backward(), got one that accumulates. "
                "For gradient accumulation, the second pass must replay all micro-batches: write "
                "it out in `with optimizer.perturbed():`, which in Lightning requires "
                "manual optimization"
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

    def _check_closure(self, loss: Any) -> None:
        """Raise if a closure returns a loss and leaves no gradient.

        One that returns None skips the step, as Lightning's does where ``training_step`` returns
        None.
        """
        if loss is not None and self.run.trainable() and not self.run.has_gradient():
            raise ValueError(
                "closure must call loss.backward(): no parameter has a gradient after it; create "
                "the optimizer after its model is wrapped or sharded"
            )

    def check_step(self, got: str = "") -> None:
        """Raise unless the gradients are those that a step without a closure needs.

        ``got`` names what the user passed instead of such a closure.
        """
        if not self._may_go_unperturbed():
            self.refuse_lost_gradients("step()")
            self._check_blocks(got)
        self.refuse_stale_gradients("step()")

    def _check_blocks(self, got: str) -> None:
        if self.phase is Phase.COMPLETE:
            return
        if self.phase is not Phase.READY:
            self.check_perturbed("step()", got)
        if self.run.plan.projected is not None:
            raise ValueError(
                "step() needs a gradient at the projected point, because the method adds it: pass "
                "step(closure=...), or call loss.backward() within `with optimizer.projected():` "
                "last; allow_unperturbed=True turns this check off. "
                f"Got {got or self._lost or 'closure=None'}"
            )

    def check_perturbed(self, call: str, got: str = "") -> None:
        """Raise if the perturbed gradient is missing."""
        if self.run.perturbed is not None and not self._may_go_unperturbed():
            raise ValueError(
                f"{call} needs a gradient at the perturbed point, because the method has rho > 0: "
                "pass step(closure=...) with loss.backward() in it, or call loss.backward() within "
                "`with optimizer.perturbed():` first. If a trainer wraps the optimizer, use "
                "`with perturbed(optimizer):` from safe_core.adapters.torch; for Hugging Face "
                "use its SparseTrainerMixin. allow_unperturbed=True turns this check off. "
                f"Got {got or self._lost or 'closure=None'}"
            )

    def _may_go_unperturbed(self) -> bool:
        # With zero learning rates the parameters do not move: warm-ups and checkpointing
        # libraries take such steps.
        return self.allow_unperturbed or self.run.has_zero_rates()

    def only_initialises(self) -> bool:
        """Return whether a step would only initialise the state of the base optimizer.

        torch.distributed.checkpoint takes a step with zero learning rates and gradients
        before it saves or loads, unless `state` is filled. It must not count as a step, nor
        fix where z and u start.
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
    """Add the saved gradients to the current ones."""
    met = {p: g for p, g in held.items() if p.grad is not None}
    kernels.add_(gradients_of(met), list(met.values()))
    for p in held.keys() - met.keys():
        p.grad = held[p]
