"""Hold the data of a training run, apart from the interface of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safe_core import Coverage, Evaluation, FixedZeros, Importance, Method, StepPlan
from safe_core._dtypes import wide_dtype
from safe_core.backends.torch_accelerator import on_host
from safe_core.backends.torch_sharding import is_sharded
from safe_core.constraints.base import select_support
from safe_core.finalization import Finalized

from . import kernels
from .compiled import CompiledStep
from .coverage import coverage_of, refuse_dense
from .groups import GroupRules, settings_of
from .idle import GradientRecord
from .importance import importance_in_use
from .low_bit import mask_states
from .modules import forget_copies
from .scheduled import Scheduled
from .selection import Selected, Selection
from .state import ParameterState
from .weights import is_pruned

__all__ = ["Run", "by_value", "fill_gradients", "gradients_of", "known_rate"]

LAST = "last"
Scalar = Any  # a number, or a scalar tensor while a step is recorded


class Run:
    """Hold the parts of a run: base, method, selection, state and kernels.

    Attributes
    ----------
    base : torch.optim.Optimizer
    method : Method
    model, where, layout
        Arguments of `SparseOptimizer` that select the sparse parameters; several modules are
        one, see `modules.joined`.
    handed : mapping, callable or None
        The importance that the user passed.
    state : dict of parameter to entries
        The state of the `SparseOptimizer`, changed in-place. It is not ``base.state``, whose
        optimizer takes a parameter with any entry there for initialised.
    frozen : bool
        Whether the support is final.
    switched : (str, int) or None
        The last call of `SparseOptimizer.train` or ``eval``, and the step count then.
    finalized : Finalized or None
        What the last call of `SparseOptimizer.finalize` did.
    finalized_at : int or None
        The step count at that call, also if the state was loaded after it.
    gradients : GradientRecord
    selected : dict of parameter to Selected
    trained : set of parameter
        The selected parameters that required gradients when they were selected.
    of_model : set of parameter
        The parameters of ``model`` at every selection.
    moved : kernels.MovedParameters
        Copies of the parameters that are not at x.
    compiled : CompiledStep or None
    scheduled : Scheduled or None
        The values of schedules, while a `CapturedStep` records a step.
    """

    def __init__(
        self,
        base: Optimizer,
        method: Method,
        state: dict[Tensor, dict[str, Any]],
        *,
        model: torch.nn.Module | None,
        where: Any,
        layout: Any,
        importance: Any,
        compile: bool,
    ) -> None:
        self.base = base
        self.method = method
        self.state = state
        self.model = model
        self.where = where
        self.layout = layout
        self.handed = importance
        self.compile = compile
        self._steps = 0
        self.frozen = False
        self.switched: tuple[str, int] | None = None
        self.finalized: Finalized | None = None
        self.finalized_at: int | None = None
        self.gradients = GradientRecord()
        self.checked_rounding = False
        self.checked_steps = False
        self.window: Any = None  # of `lost_steps`
        self.warned_of_zeros = False
        self.selected: dict[Tensor, Selected]
        self.trained: set[Tensor] = set()
        self.of_model: set[Tensor] = set()
        self._prepare()
        self.select()

    def _prepare(self) -> None:
        """Create the parts that hold no training state and are not pickled."""
        self._rules = GroupRules.read({}, self.method)
        self.moved = kernels.MovedParameters()
        self.compiled = CompiledStep(self.base) if self.compile else None
        self._plans: dict[tuple[bool, bool], StepPlan] = {}
        self.scheduled: Scheduled | None = None
        self._read_steps: Callable[[], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.steps = self.steps  # read the number if it is still to be read
        # `_seen` holds ids of parameters, which differ in a copy.
        left_out = (
            "_rules",
            "moved",
            "compiled",
            "_plans",
            "_seen",
            "window",
            "scheduled",
            "_read_steps",
        )
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.window = None
        self._prepare()
        self._seen = self._groups_now()

    @property
    def source(self) -> Importance | None:
        """The importance in use; None where P = 1.

        It is created at each call. If stored, it would refer back to the run, and this
        reference cycle would keep the tensors of a finished run until garbage collection.
        """
        return importance_in_use(self.handed, self.method, lambda: self.parameters)

    @property
    def steps(self) -> int:
        """Number of base steps taken."""
        if self._read_steps is not None:
            self.steps = self._read_steps()
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps, self._read_steps = steps, None

    def count_later(self, read: Callable[[], int]) -> None:
        """Let ``read`` return the number of steps when it is needed, for which the host waits."""
        self._read_steps = read

    # The plan

    @property
    def plan(self) -> StepPlan:
        """The plan of the next step: its gradients and operations, in order."""
        # Options of groups may change between steps, so the plan is looked up each time.
        key = (self.has_radius, self.frozen)
        if key not in self._plans:
            plan = self.method.plan(has_radius=key[0])
            self._plans[key] = plan.frozen() if self.frozen else plan
        return self._plans[key]

    @property
    def has_radius(self) -> bool:
        """Whether the radius of some param group may be non-zero at some step."""
        return any(rules.perturbs for rules in map(self.rules_of, self.groups))

    @property
    def perturbed(self) -> Evaluation | None:
        """The evaluation at a perturbed point in the next step; None if it has none."""
        perturbation, evaluation = self.method.perturbation, self.plan.perturbed
        if perturbation is None or not perturbation.is_due(self.steps):
            return None
        return evaluation

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups, which the base owns."""
        return self.base.param_groups

    def rules_of(self, group: dict[str, Any]) -> GroupRules:
        """Return the radius and penalty of a param group."""
        settings = settings_of(group, self.base)
        return GroupRules.read(settings, self.method) if settings else self._rules

    def signed(self, setting: str, params: Sequence[Tensor]) -> list[Scalar]:
        """Return rho or penalty of each parameter, negative in groups with ``maximize``.

        Such a group steps along its gradient, so ascent and penalty need the opposite sign. While
        a step is recorded, each value is a scalar tensor that parameters of a group share.
        """
        return self._spread(self._now(setting), params)

    def magnitudes(self, setting: str, params: Sequence[Tensor]) -> list[Scalar]:
        """Return rho or penalty of each parameter as `signed` does, but never negative."""
        return self._spread([abs(value) for value in self._now(setting)], params)

    def _now(self, setting: str) -> list[Scalar]:
        if self.scheduled is None:
            return self.values_of_groups(setting, self.steps)
        return self.scheduled.of_groups(setting)

    def values_of_groups(self, setting: str, step: int) -> list[Scalar]:
        """Return rho or penalty of each param group at a step, signed as in `signed`."""
        values = [self.rules_of(group).at(setting, step) for group in self.groups]
        pairs = zip(values, self.groups, strict=True)
        return [-value if group.get("maximize") else value for value, group in pairs]

    def _spread(self, values: list[Scalar], params: Sequence[Tensor]) -> list[Scalar]:
        """Return the value of the param group of each parameter."""
        if len(set(values)) == 1:
            return values[:1] * len(params)
        found: dict[Tensor, Scalar] = {}
        for value, group in zip(values, self.groups, strict=True):
            found.update(dict.fromkeys(group["params"], value))
        return [found[p] for p in params]

    def due(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters whose constraint state the next step updates."""
        constraint = self.method.constraint
        found = {
            p
            for pattern, members in self.parameters.pools(params)
            if constraint.is_due(pattern, self.steps)
            for p in members
        }
        return [p for p in params if p in found]

    # Parameters

    @property
    def parameters(self) -> ParameterState:
        """The state of the sparse parameters."""
        return ParameterState(self.state, self.selected, self.method.constraint.support_dtype)

    def trainable(self) -> list[Tensor]:
        """Return all parameters that require gradients."""
        return [p for group in self.groups for p in group["params"] if p.requires_grad]

    def has_gradient(self) -> bool:
        """Return whether any trainable parameter has a gradient."""
        return any(p.grad is not None for p in self.trainable())

    def idle(self) -> list[str]:
        """Return the names of the sparse parameters that `GradientRecord` finds idle.

        Only those that compete with others for the sparsity are named.
        """
        if self.frozen:
            return []
        found = [self.selected[p] for p in self.gradients.idle(self.active())]
        return [chosen.name for chosen in found if chosen.pattern.joint]

    def halted(self) -> list[str]:
        """Return the names of the sparse parameters that were frozen at the last step."""
        return [self.selected[p].name for p in self.gradients.halted(self.constrained())]

    def active(self) -> list[Tensor]:
        """Return the selected parameters that require gradients, which a step changes."""
        return [p for p in self.selected if p.requires_grad]

    def constrained(self) -> list[Tensor]:
        """Return the parameters that `finalize` projects and `check_sparsity` checks.

        Only a parameter that was frozen from the start is exempt: freezing a model for export
        must not exempt its weights.
        """
        has, trained = self.parameters.has, self.trained
        return [p for p in self.selected if p.requires_grad or p in trained or has(p)]

    def sparse(self) -> list[Tensor]:
        """Return the active parameters, and initialise the state of new ones."""
        self.follow_groups()
        sparse = self.active()
        has = self.parameters.has
        new = [p for p in sparse if not has(p)]
        if new:
            refuse_dense(self.method, self.selected, sparse)
            self._start(new)
        return sparse

    @contextmanager
    def as_started(self) -> Iterator[list[Tensor]]:
        """Yield the constrained parameters with initialised state; drop new state on exit.

        Reading an optimizer must not fix where z and u start, because weights may still be
        loaded into the model before the first step.
        """
        self.follow_groups()
        constrained, has = self.constrained(), self.parameters.has
        new = [p for p in constrained if not has(p)]
        before = {p: dict(self.state[p]) for p in new if p in self.state}
        try:
            if new:
                self._start(new)
            yield constrained
        finally:
            for p in new:
                self.state.pop(p, None)
            self.state.update(before)

    @torch.no_grad()
    def _start(self, params: list[Tensor]) -> None:
        if self.frozen:
            raise ValueError(
                "parameters must not become trainable once the support is frozen, got "
                f"{', '.join(self.selected[p].name for p in params)}"
            )
        parameters = self.parameters
        for pattern, members in parameters.pools(params):
            values = [p.detach() for p in members]
            source = self.source
            held = None if source is None else source.init(members)
            known = None if source is None else source.first_metric(held, joint=pattern.joint)
            info = parameters.info(members)
            split = self.method.constraint.init(values, pattern, info, known)
            if isinstance(pattern, FixedZeros):
                self._keep_whole(members, split.support)
            parameters.store(members, split)
            parameters.store_importance(members, held)
            if self.method.measures_steps:
                parameters.store_motions(members, parameters.motions(members))

    def _keep_whole(self, params: Sequence[Tensor], support: Sequence[Tensor]) -> None:
        """Fill the support of parameters that were not pruned, although they are zero."""
        for p, mask in zip(params, support, strict=True):
            if not p.is_meta and not self.selected[p].known and not is_pruned(p, known=False):
                mask.fill_(True)

    def metric(self, pattern: Any, params: Sequence[Tensor]) -> Any:
        """Return P of parameters that are projected together; None where it is 1."""
        source, held = self.source, self.parameters.importance(params)
        if source is None or held is None:
            return None
        return source.metric(held, joint=pattern.joint)

    def motion(self) -> Tensor | None:
        """Return the state of `safe_core.motion` for all sparse parameters together.

        None if the radius is not in steps.
        """
        if not self.method.measures_steps:
            return None
        active = self.active()
        if not active:  # all sparse parameters are frozen, so no step moves them
            return torch.zeros(3)
        held = self.parameters.motions(active)
        # A parameter that joined late has not shrunk yet; the others hold the same number.
        return torch.cat([held[:, :2].sum(0), held[:, 2:].amax(0)])

    def entries(self) -> dict[Tensor, dict[str, Any]]:
        """Return the state to save, with an entry for every parameter.

        `torch.distributed.checkpoint` requires them, and loads only into what exists already.
        So a state that has not started is filled, and directions are zero.
        """
        with self.as_started():
            own: dict[Tensor, dict[str, Any]] = {p: {} for p in self.trainable()}
            own |= {p: dict(entries) for p, entries in self.state.items()}
        if self.plan.reuses:
            for p in self.trainable():
                wide = wide_dtype(torch, [p])
                empty = torch.zeros_like(p, dtype=wide, requires_grad=False)
                own[p].setdefault("flat_direction", empty)
        return own

    def freeze(self, sparse: Sequence[Tensor], support: Sequence[Tensor]) -> None:
        """Make a support final: keep nothing but the mask and the lengths."""
        measured = sparse if self.method.measures_steps else []
        motions = self.parameters.motions(measured)
        self.state.clear()
        for p, mask in zip(sparse, support, strict=True):
            self.state[p] = {"support": mask}
            # Stale momentum of pruned entries would pull them away from zero, and a base that
            # mixes entries, such as Muon, would spread it to the kept ones.
            mask_states(self.base.state.get(p, {}), mask)
        self.parameters.store_motions(measured, motions)
        self.frozen = True

    # The selection

    def refuse_replaced(self) -> None:
        """Raise if a layer of the model has lost a sparse parameter to another tensor.

        To project the old tensor would leave the model dense.
        """
        if self.model is None:
            return
        self.forget_copies()  # FSDP holds gathered tensors after a forward pass
        lost = set(self.constrained()) & (self.of_model - set(self.model.parameters()))
        if lost:
            names = sorted(self.selected[p].name for p in lost)
            raise ValueError(
                "model must hold the parameters that are sparse, but its layers were replaced or "
                f"reparametrized after this optimizer was made: it lost {', '.join(names)}"
            )

    @property
    def selection(self) -> Selection:
        """The rules of the selection."""
        return Selection(self.base, self.method, self.model, self.where, self.layout)

    def coverage(self) -> Coverage:
        """Return which weights are sparse, by the last selection."""
        return coverage_of(self.selection, self.selected, self.constrained())

    def select(self) -> None:
        """Select the sparse parameters among the current groups."""
        self.selected = self.selection.selected()
        if self.model is not None:
            self.of_model |= set(self.model.parameters())
        self.method.sparsity.check_names([chosen.name for chosen in self.selected.values()])
        self.trained = {p for p in self.selected if p.requires_grad or p in self.trained}
        if not self.constrained():
            names = ", ".join(chosen.name for chosen in self.selected.values())
            raise ValueError(
                f"base must hold a sparse parameter that is trainable, got {names} with "
                "requires_grad=False"
            )
        self._check_fit()
        self._seen = self._groups_now()
        self.sharded = any(is_sharded(p) for group in self.groups for p in group["params"])
        if self.compile and self.sharded:
            raise ValueError("compile must be False for sharded parameters, got True")

    def undo_selection(self, selected: dict[Tensor, Selected]) -> None:
        """Restore an earlier selection after a group was removed again."""
        self.selected, self._seen = selected, self._groups_now()

    def _groups_now(self) -> list[Any]:
        return [
            ([id(p) for p in group["params"]], group.get("sparsity"), group.get("sparsify"))
            for group in self.groups
        ]

    def follow_groups(self) -> None:
        """Select again if options changed or a trainer replaced parameters."""
        if self._seen == self._groups_now():
            return
        here = {p for group in self.groups for p in group["params"]}
        gone = [p for p in self.state if p not in here]
        if any(self.state[p] for p in gone):
            raise ValueError(
                "param_groups must keep the parameters that training began with, got others "
                f"in place of {len(gone)}: create the optimizer after its model is wrapped or "
                "sharded"
            )
        self.moved.release()
        for p in gone:
            del self.state[p]
        self.select()
        for p in [p for p in self.state if p not in self.selected]:
            for key in ("anchor", "support", "scale", "importance"):
                self.state[p].pop(key, None)

    def _check_fit(self) -> None:
        """Raise errors of the first step early, without allocating memory.

        Tensors on the meta device have shapes and dtypes but no data.
        """
        params, parameters = self.constrained(), self.parameters
        if isinstance(self.handed, Mapping):
            known = {chosen.name for chosen in self.selected.values()}
            unknown = sorted(set(self.handed) - known)
            if unknown:
                raise ValueError(
                    f"importance must name sparse parameters, {', '.join(sorted(known))}, got "
                    f"{unknown[0]!r}"
                )
            parameters.placed(self.handed, params)
        for pattern, members in parameters.pools(params):
            shapes = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in members]
            self.method.constraint.init(shapes, pattern, parameters.info(members))

    # Operations that several parts of a step share

    def zero_grad(self) -> None:
        """Clear the gradients; unlike `SparseOptimizer.zero_grad`, keep the phase."""
        Optimizer.zero_grad(self.base)

    def discard_products(self) -> None:
        """Discard the Hessian products of a second-order base."""
        if hasattr(self.base, "discard_products"):
            self.base.discard_products()

    def forget_copies(self) -> None:
        """Drop cached casts and gathered shards, which hold the values of another point."""
        forget_copies(self.model if self.sharded else None)

    def mask(self, tensors: list[Tensor], params: list[Tensor]) -> None:
        """Set tensors to zero outside the support of their parameters."""
        supports = [self.state[p]["support"] for p in params]
        kernels.mask_([t.detach() for t in tensors], supports)

    def mask_gradients(self, sparse: list[Tensor]) -> None:
        """Set gradients to zero outside the support if the plan masks gradients."""
        if self.plan.masks_gradients:
            known = [p for p in sparse if p.grad is not None]
            self.mask([p.grad for p in known if p.grad is not None], known)

    def has_zero_rates(self) -> bool:
        """Return whether every group has a learning rate that is known to be 0.

        One on an accelerator is not known, because the host would wait for it at every step.
        """
        return all(known_rate(group) == 0 for group in self.groups)

    def final_support(self, sparse: list[Tensor], importance: Any) -> list[Tensor]:
        """Return the support of the final projection."""
        if self.frozen:
            return [self.state[p]["support"] for p in sparse]
        found: dict[Tensor, Tensor] = {}
        for pattern, members in self.parameters.pools(sparse):
            if isinstance(pattern, FixedZeros):
                # The support is that of the start: the weights may have lost zeros since.
                found.update((p, self.state[p]["support"]) for p in members)
                continue
            if isinstance(importance, str) and importance == LAST:
                metric = self.metric(pattern, members)
            else:
                metric = None if importance is None else self.parameters.placed(importance, members)
            found.update(zip(members, self.support_at(pattern, members, None, metric), strict=True))
        return [found[p] for p in sparse]

    def support_at(
        self, pattern: Any, members: list[Tensor], step: int | None, metric: Any
    ) -> list[Tensor]:
        """Return the support of ``C(x)`` at a step, for parameters projected together."""
        values = [p.detach() for p in members]
        return select_support(values, pattern, self.parameters.info(members), metric, step=step)


def known_rate(group: Mapping[str, Any]) -> float | None:
    """Return the learning rate of a param group, or None where the host would wait for it."""
    rate = group.get("lr")
    if rate is None or (torch.is_tensor(rate) and not on_host(rate)):
        return None
    return float(rate)


def by_value(values: Iterable[Scalar], items: Iterable[Any]) -> dict[Scalar, list[Any]]:
    """Return lists of the items that have the same value."""
    found: dict[Scalar, list[Any]] = {}
    for value, item in zip(values, items, strict=True):
        found.setdefault(value, []).append(item)
    return found


def fill_gradients(params: Iterable[Tensor]) -> None:
    """Give a zero gradient to each parameter without one."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients, with zeros for parameters that have none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
