"""PyTorch: any torch.optim optimizer, under a sparsity constraint.

`SparseOptimizer` holds no mathematics: it moves tensors between the parameters, the
base optimizer and `safe_core.Method`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core import Method, SplitState, _checks
from safe_core._dtypes import wide_dtype
from safe_core.arguments import refuse_filled
from safe_core.backends import backend_of
from safe_core.backends.torch_shards import is_sharded
from safe_core.layout import Layout
from safe_core.report import Report, TensorReport
from safe_core.sharpness import norm

from . import kernels
from .checkpoint import pack, unpack
from .closures import GradientWatch
from .compiled import CompiledStep
from .groups import (
    GroupRules,
    Target,
    refuse_flat_parameters,
    select_parameters,
    settings_of,
)
from .modules import RandomState, forget_copies, statistics_kept
from .reporting import tensor_reports
from .state import HeldSplit

__all__ = ["SparseOptimizer"]

_LAST = "last"


class SparseOptimizer(Optimizer):
    """Train with a base optimizer towards weights that are exactly sparse.

    Wraps an optimizer of torch.optim and shares its ``param_groups``, so learning-rate
    schedulers work on either. Written out, one step is that of `safe_core.Method`.

    Parameters
    ----------
    base : torch.optim.Optimizer
        An instance that holds the parameters. Its own state stays apart from ours.
    method : Method
        From `safe_core.safe` or another function of `safe_core`. One with a decoupled penalty
        reads the ``"lr"`` of the groups.
    model : torch.nn.Module, optional
        Makes the weights of its linear, convolution and attention layers sparse, not
        biases, norms and embeddings, and supplies their names and layouts.
    where : callable, optional
        ``where(name, parameter) -> bool`` chooses the sparse parameters instead.
        Without ``model``, names come from a base made with ``named_parameters()``.
    layout : Layout, mapping of name to Layout, or callable, optional
        Roles of the axes, over what ``model`` says; ``layout(name, parameter)`` may
        return None for unknown.
    importance : mapping of name to tensor, or callable, optional
        P of the sparse parameters: per entry, broadcastable, or per input feature. A
        function ``importance({name: parameter}) -> {name: tensor}`` is called at dual
        updates, after the base optimizer's step, and P is 1 before the first.
    allow_unperturbed : bool
        Let `step` run without a perturbed gradient, or one at the projected parameters.
    compile : bool
        Run the perturbation, and the penalty together with the base optimizer's step, as
        two programs of `torch.compile`. Needs a base that compiles, with a learning rate
        in a tensor if it changes. The step count and the dual update stay outside.
    replay_rng : bool
        Give the second call of a closure the random numbers of the first, so that dropout
        draws the same masks. Phase by phase, hand `perturbed` a `RandomState`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind, nothing says which parameters are sparse, or
        a pattern does not fit a parameter. The message names it.

    Notes
    -----
    A param group may opt out with ``"sparsify": False``; without ``model`` and
    ``where``, groups with ``"sparsify": True`` are taken whole. Its ``"rho"``, ``"penalty"``
    and ``"sparsity"`` stand for those of the method: ``e_i = rho_i g_i / |g|`` with the norm
    over all parameters, and groups of one sparsity are projected together. A parameter
    that is not sparse costs no state, one that is frozen is left alone.

    With ``model``, normalisation layers keep their running statistics in the second pass:
    they are updated once a step, at x.

    `step` adds the penalty to ``.grad`` in place. Clip gradients before it. z and u start
    from the parameters that the first step finds.

    Examples
    --------
    With a closure, as torch.optim.LBFGS wants it:

    >>> import safe_core
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(8, 2)
    >>> x, y = torch.randn(16, 8), torch.randn(16, 2)
    >>> method = safe_core.safe(sparsity=0.75, rho=0.05, penalty=0.1, dual_update_interval=2)
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = SparseOptimizer(base, method, model=model)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(10):
    ...     loss = optimizer.step(closure)

    Or phase by phase:

    >>> optimizer.zero_grad()
    >>> nn.functional.mse_loss(model(x), y).backward()
    >>> with optimizer.perturbed():
    ...     nn.functional.mse_loss(model(x), y).backward()
    >>> optimizer.step()

    (within ``if optimizer.perturbs:`` where the method does not perturb at every step, and
    with `projected` for a method that `projects`). In the end the weights are made sparse:

    >>> optimizer.finalize()
    >>> int((model.weight == 0).sum())
    12
    """

    def __init__(
        self,
        base: Optimizer,
        method: Method,
        *,
        model: nn.Module | None = None,
        where: Callable[[str, Tensor], bool] | None = None,
        layout: Layout
        | Mapping[str, Layout | None]
        | Callable[[str, Tensor], Layout | None]
        | None = None,
        importance: Mapping[str, Tensor]
        | Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
        | None = None,
        allow_unperturbed: bool = False,
        compile: bool = False,
        replay_rng: bool = False,
    ) -> None:
        _check_arguments(base, method, model, where, layout, importance)
        _check_flags(allow_unperturbed=allow_unperturbed, compile=compile, replay_rng=replay_rng)
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups = base.param_groups
        self.method = method
        self.steps = 0
        self.allow_unperturbed = allow_unperturbed
        self.compile = compile
        self.replay_rng = replay_rng
        self.frozen = False
        self._rules = (model, where, layout)
        self._importance = importance
        self._targets: dict[Tensor, Target]
        self._select()
        self._make_kernels()
        # "", "perturbed" within the block, "ready" after it, "projected" within that one,
        # "complete" after it
        self._phase = ""
        self._first: dict[Tensor, Tensor] = {}  # gradients at x, where they are reused
        self._checked_rounding = False

    # The step

    @property
    def perturbs(self) -> bool:
        """Whether the step to come takes a second gradient, within `perturbed`."""
        perturbation = self.method.perturbation
        return (
            perturbation is not None and bool(perturbation.is_due(self.steps)) and self._has_radius
        )

    @property
    def projects(self) -> bool:
        """Whether the step to come takes a gradient within `projected`."""
        return self.method.adds_projected and not self.frozen

    @contextmanager
    def perturbed(
        self, replay: RandomState | None = None, *, loss_scale: float = 1.0
    ) -> Iterator[None]:
        """Hold the parameters at ``x + e``; restore x bit for bit on the way out.

        ``e`` follows from the gradients of the first backward pass, which are cleared
        on entry: compute the loss and call ``backward()`` again inside. Restores too
        when the block raises. At a step that does not perturb, the parameters stay at x. The
        first gradients serve the ascent alone, and may be of a part of the batch, unless the
        method reuses a direction or adds them: then they are added as the block ends.

        Parameters
        ----------
        replay : RandomState, optional
            From `RandomState.record` before the first forward pass: the block draws the
            same random numbers, such as dropout masks.
        loss_scale : float
            What the loss was multiplied by, as ``scaler.get_scale()``. Read where e depends
            on it, as of `safe_core.cram`; e of `safe_core.safe` does not.

        Raises
        ------
        ValueError
            If no parameter has a gradient, one is sparse, or a block is open.
        """
        self._check_block("perturbed()", replay)
        if not _checks.real("loss_scale", loss_scale) > 0:
            raise ValueError(f"loss_scale must be positive, got {loss_scale!r}")
        self._phase, self._first = "", {}
        try:
            with self._at_perturbed_point(replay, loss_scale):
                yield
        finally:
            with torch.no_grad():
                self._moved.restore()
            self._forget_copies()

    @contextmanager
    def projected(self, replay: RandomState | None = None) -> Iterator[None]:
        """Hold the parameters at ``C(x)``; restore x bit for bit on the way out.

        The third phase of a method that adds a projected gradient, after `perturbed`: compute
        the loss and call ``backward()`` inside. The gradients from before are set aside on
        entry and added as the block ends, so that what clips or unscales sees the sum.

        Parameters
        ----------
        replay : RandomState, optional
            As for `perturbed`.

        Raises
        ------
        ValueError
            If the method adds no such gradient, those before it are missing, or a block is
            open.
        """
        self._check_block("projected()", replay)
        if not self.projects:
            raise ValueError(
                "projected() must be for a method that adds the gradient there, see `projects`, "
                f"got {self.method!r}"
            )
        if self._phase != "ready":
            self._check_perturbed("projected()")
        if not self._has_gradient():
            raise ValueError(
                "projected() needs the gradients of a backward pass before it, to which it adds "
                "its own, got None for every parameter"
            )
        try:
            with self._at_projected_point(replay):
                yield
        finally:
            with torch.no_grad():
                self._moved.restore()
            self._forget_copies()

    @contextmanager
    def _at_projected_point(self, replay: RandomState | None) -> Iterator[None]:
        """`projected` without the way back."""
        before = self._phase
        try:
            held = self._set_aside()
            with torch.no_grad():
                sparse = self._sparse_parameters()
                self._moved.hold(sparse)
                self._compress(sparse)
            self._phase = "projected"
            self._forget_copies()
            with statistics_kept(self._rules[0]), RandomState.replayed(replay):
                yield
        except BaseException:
            self._phase = ""
            raise
        else:
            self._phase = "complete" if self._has_gradient() else before
            self._add_back(held)

    def _set_aside(self) -> dict[Tensor, Tensor]:
        """Clear the gradients, and return copies.

        Copies, for a reducer may write the next gradients to the same memory.
        """
        held = {p: p.grad.clone() for p in self._trainable() if p.grad is not None}
        super().zero_grad()
        return held

    @torch.no_grad()
    def _add_back(self, held: dict[Tensor, Tensor]) -> None:
        """Add gradients that were set aside to those that are there."""
        met = {p: g for p, g in held.items() if p.grad is not None}
        kernels.add_(_gradients(met), list(met.values()))
        for p in held.keys() - met.keys():
            p.grad = held[p]

    def _compress(self, sparse: list[Tensor]) -> None:
        """Set parameters to ``C(x)``."""
        for method, members in self._held.by_pattern(self.method, sparse):
            values = [p.detach() for p in members]
            metric = method.metric(self._held.importance(members))
            kept = method.compression(values, self._held.targets(members), self.steps, metric)
            kernels.mask_(values, kept)

    @contextmanager
    def _at_perturbed_point(
        self, replay: RandomState | None, loss_scale: float = 1.0
    ) -> Iterator[None]:
        """`perturbed` without the way back."""
        params = [p for p in self._trainable() if p.grad is not None]
        if not params:
            raise ValueError(
                "perturbed() needs the gradients of a first loss.backward(), got None for "
                "every parameter; an optimizer must be made after its model is wrapped or sharded"
            )
        sparse = self._sparse_parameters()  # z and u start from x, not from x + e
        added: dict[Tensor, Tensor] = {}
        try:
            if self.perturbs:
                compresses = self.method.compressed and not self.frozen
                with torch.no_grad():
                    if compresses:  # which moves parameters without a gradient too
                        _fill_gradients(sparse)
                        params = [p for p in self._trainable() if p.grad is not None]
                    self._mask_gradients(sparse)
                    self._ascend(params, loss_scale)
                    if compresses:
                        self._compress(sparse)
                if self._reuses:
                    held = self._set_aside()
                    self._first = {
                        p: held[p] if p in held else torch.zeros_like(p) for p in self._trainable()
                    }
                elif self.method.adds_unperturbed:
                    added = self._set_aside()
            self.zero_grad()
            self._phase = "perturbed"
            self._forget_copies()
            with statistics_kept(self._rules[0]), RandomState.replayed(replay):
                yield
        except BaseException:
            self._phase, self._first = "", {}
            raise
        else:
            # A block that only looked leaves the step without its gradient.
            looked = all(p.grad is None for p in params)
            self._phase = "" if looked else "ready"
            self._first = {} if looked else self._first
            if not looked:
                self._add_back(added)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the method, with a closure or after the phases.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss, calls ``backward()`` and returns
            the loss. It is called at x and, where the step takes gradients there, at x + e
            and at C(x).

        Returns
        -------
        loss
            What the closure returned at x; None without one.

        Raises
        ------
        ValueError
            If there is neither a closure nor the phases that the step needs before it, or if
            it is called within one.
        """
        self._refuse_within_block("step()")
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function or None, got {type(closure)!r}")
        if closure is None and not self._phase and self._only_initialises():
            self.base.step()
            self.state.update({p: {} for p in self._trainable() if p not in self.state})
            return None
        if closure is None:
            self._check_phases()
            self._take_step()
            return None
        try:
            loss = self._call(closure)
            self._take_step()
        finally:
            self._moved.restore()
            self._forget_copies()
        return loss

    def _call(self, closure: Callable[[], Any]) -> Any:
        """Call a closure at x and at the other points of the step; it stays at the last."""
        if not self.perturbs and not self.projects:
            with torch.enable_grad():
                return closure()
        replay = RandomState.record() if self.replay_rng else None
        watch = GradientWatch(self._trainable())
        try:
            with torch.enable_grad():
                loss = closure()
            ignored, added = watch.ignored, watch.added
        finally:
            watch.put_back()
        if ignored:  # as by that of a trainer that has called backward() by itself
            self._check_phases()
            return loss
        if added:
            raise ValueError(
                "closure must clear the gradients before backward(), got one that adds to "
                "those before it. The second gradient of an accumulated batch needs all its "
                "parts again: take the phases, with `with optimizer.perturbed():`, which in "
                "Lightning means manual optimization"
            )
        if self.perturbs and self._has_gradient():
            with torch.enable_grad(), self._at_perturbed_point(replay):
                closure()
        if self.projects and self._has_gradient():
            self._moved.restore()
            with torch.enable_grad(), self._at_projected_point(replay):
                closure()
        return loss

    def _forget_copies(self) -> None:
        forget_copies(self._rules[0] if self._sharded else None)

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for p in self._trainable())

    def _check_phases(self) -> None:
        """Refuse a step without its closure and phases."""
        if self._phase == "complete" or self._may_go_unperturbed():
            return
        if self._phase != "ready":
            self._check_perturbed("step()")
        if self.projects:
            raise ValueError(
                "step() needs a gradient at the projected point, for the method adds it: pass "
                "step(closure=...), or call loss.backward() within `with optimizer.projected():` "
                "last; allow_unperturbed=True lifts this. Got closure=None"
            )

    def _check_perturbed(self, call: str) -> None:
        if self.perturbs and not self._may_go_unperturbed():
            raise ValueError(
                f"{call} needs a gradient at the perturbed point, for the method has rho > 0: "
                "pass step(closure=...), or call loss.backward() within "
                "`with optimizer.perturbed():` first, of an optimizer that a trainer has wrapped "
                "`with perturbed(optimizer):` from safe_core.adapters.torch.trainers, with Hugging "
                "Face its SparseTrainerMixin; allow_unperturbed=True lifts this. Got closure=None"
            )

    def _take_step(self) -> None:
        """Everything after the gradients; brings x back if that is still to do."""
        self._phase = ""
        if not self._has_gradient():
            return  # as optimizers of torch do
        sparse = self._sparse_parameters()
        self._mask_gradients(sparse)
        if self._reuses:
            self._reuse_direction()
        due = self._due(sparse)
        if due:
            self._take_in_gradients(due)
        if self.method.splits and not self.frozen:
            self._held.store(sparse, self.method.rescale(self._held.split(sparse), self.steps))
            self._descend(sparse)
        else:
            self._moved.restore()
            self._base_step()
        if self._masks:
            self._mask(sparse, sparse)
        if due:
            self._update_support(due)
        self.steps += 1

    def _due(self, sparse: list[Tensor]) -> list[Tensor]:
        """The parameters whose support is updated after this step."""
        if self.frozen:
            return []
        if not self.method.masks:
            return sparse if self.method.is_dual_update(self.steps) else []
        pools = self._held.by_pattern(self.method, sparse)  # each with stages of its own
        return [p for own, members in pools if own.is_dual_update(self.steps) for p in members]

    def _update_support(self, params: list[Tensor]) -> None:
        """Project what is due: z and u, or x itself."""
        self._call_importance(params)
        for method, members in self._held.by_pattern(self.method, params):
            split = method.dual_update(
                [p.detach() for p in members],
                self._held.split(members),
                self.steps,
                self._held.targets(members),
                method.metric(self._held.importance(members)),
                workspace=self._moved.workspace(members) if method.splits else None,
            )
            self._held.store(members, split)
            if method.prunes:
                self._mask(members, members)

    @torch.no_grad()
    def finalize(self, importance: Any = _LAST, *, freeze: bool = False) -> None:
        """Project the parameters, ``x <- proj(x)``, after the last step.

        Kept entries are unchanged, bit for bit; the others become +0, exactly as many
        as the method asks.

        Parameters
        ----------
        freeze : bool
            Keep this support from now on, to fine-tune further: gradients and parameters
            are masked at every step; the penalty, the dual variable and a direction to
            reuse are dropped.
        importance : optional
            By default the P last in use. None is P = 1, as Algorithm 1 of the paper
            prints it. A mapping of name to tensor is used as it is.

        Raises
        ------
        TypeError, ValueError
            If ``importance`` does not fit the parameters, or within a perturbed block.
        """
        self._refuse_within_block("finalize()")
        _check_flags(freeze=freeze)
        with self._as_started() as sparse:
            values = [p.detach() for p in sparse]
            if values and backend_of(values[0]).has_nan(values):
                bad = [self._targets[p].name for p in sparse if bool(p.isnan().any())]
                raise ValueError(f"parameters must not be NaN, got NaN in {', '.join(bad)}")
            support = self._final_support(sparse, importance)
        kernels.mask_(values, support)
        if freeze and not self.frozen:
            self.state.clear()
            for p, mask in zip(sparse, support, strict=True):
                self.state[p] = {"support": mask}
                # Momentum of a base that sums it otherwise than per entry would fill zeros.
                held = self.base.state.get(p, {}).values()
                likes = [t for t in held if torch.is_tensor(t) and t.shape == p.shape]
                kernels.mask_(likes, [mask] * len(likes))
            self.frozen = True

    def _final_support(self, sparse: list[Tensor], importance: Any) -> list[Tensor]:
        if self.frozen:
            return [self.state[p]["support"] for p in sparse]
        found: dict[Tensor, Tensor] = {}
        for method, members in self._held.by_pattern(self.method, sparse):
            if isinstance(importance, str) and importance == _LAST:
                metric: Any = method.metric(self._held.importance(members))
            else:
                metric = None if importance is None else self._held.placed(importance, members)
            values = [p.detach() for p in members]
            support = method.final_support(values, self._held.targets(members), metric)
            found.update(zip(members, support, strict=True))
        return [found[p] for p in sparse]

    @torch.no_grad()
    def check_sparsity(self) -> None:
        """Raise unless the parameters are as sparse as the method asks.

        What sparse means is the method's pattern or, once the support is frozen, that
        support. Call it before a model is saved or served: merging an adapter such as
        LoRA, or an optimizer of another kind, fills zeros silently.

        Raises
        ------
        ValueError
            If an entry that must be zero is not. The message names the parameters.
        """
        with self._as_started() as sparse:
            support = self._final_support(sparse, None)
        filled = kernels.count_filled(sparse, support)
        refuse_filled("parameters", [self._targets[p].name for p in sparse], filled)

    @torch.no_grad()
    def report(self) -> Report:
        """Return what the constraint looks like from here, tensor by tensor.

        Computes a projection and a dual update on copies, and changes nothing. See
        `TensorReport` for the figures.
        """
        self._refuse_within_block("report()")
        if self.frozen:
            raise ValueError("report() must come before the support is frozen, got frozen=True")
        found: dict[Tensor, TensorReport] = {}
        with self._as_started() as sparse:
            penalties = self._signed("penalty")
            for method, members in self._held.by_pattern(self.method, sparse):
                weights = [abs(penalties[p]) for p in members]
                rows = tensor_reports(self._held, method, members, self.steps, weights)
                found.update(zip(members, rows, strict=True))
        return Report(self.steps, [found[p] for p in sparse])

    def sparse_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that the method makes sparse, by name."""
        return {self._targets[p].name: p for p in self._active()}

    def split(self) -> SplitState:
        """Return copies of anchors and supports, in the order of `sparse_parameters`."""
        if self.frozen:
            raise ValueError("split() must come before the support is frozen, got frozen=True")
        with self._as_started() as sparse:
            anchor, support = self._held.split(sparse)
            return SplitState([a.clone() for a in anchor], [s.clone() for s in support])

    # The optimizer contract

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r}, steps={self.steps})\n{self.base!r}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad` does.

        After a phase that gives up the step it was for.
        """
        super().zero_grad(set_to_none)
        if self._phase in ("ready", "complete"):
            self._phase, self._first = "", {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer, and select among them as at the start."""
        if "base" not in self.__dict__:  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        before = self._targets
        self.base.add_param_group(param_group)
        try:
            self._select()
            if self.frozen and len(self._targets) > len(before):
                raise ValueError(
                    "param_group must not be sparse once the support is frozen: give it "
                    '"sparsify": False'
                )
        except BaseException:
            self.param_groups.pop()
            self._targets, self._seen = before, self._groups_now()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer and ours, in torch's format.

        Our tensors stand beside the base's as ``safe_anchor``, ``safe_support`` and
        ``safe_importance``, where the method reuses a direction ``safe_flat_direction``,
        and the step count and the method in each group as ``safe_steps`` and
        ``safe_method``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._refuse_within_block("state_dict()")
        started = any("support" in entries for entries in self.state.values())
        with self._as_started():
            # Every parameter has an entry, for torch.distributed.checkpoint wants one.
            own: dict[Tensor, dict[str, Any]] = {p: {} for p in self._trainable()}
            own |= {p: dict(entries) for p, entries in self.state.items()}
        if self._reuses:
            for p in self._trainable():
                # Zero until it is known, so that a checkpoint has a place for it.
                wide = wide_dtype(torch, [p])
                empty = torch.zeros_like(p, dtype=wide, requires_grad=False)
                own[p].setdefault("flat_direction", empty)
        merged = pack(
            self.base,
            own,
            self.method,
            steps=self.steps,
            frozen=self.frozen,
            started=started,
        )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            merged = post_hook(self, merged) or merged
        return merged

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; nothing changes if it does not fit.

        Where the support is frozen, parameters are masked by it.

        Anchors and supports keep dtypes of their own, which the loading of a plain
        optimizer would cast to the parameter's.

        Raises
        ------
        ValueError
            If the state lacks our entries, or they are those of other parameters or of an
            optimizer with another importance, method or base.
        """
        self._refuse_within_block("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict)!r}")
        loaded = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = hook(self, loaded) or loaded
        self._follow_groups()
        found = unpack(loaded, self.base, self._targets, self.method, self._importance)
        self.base.load_state_dict(found.base)
        self.param_groups = self.base.param_groups
        self.state.clear()
        self.state.update(found.own)
        self.steps, self.frozen = found.steps, found.frozen
        self._phase, self._first = "", {}
        if self.frozen:
            self._mask(self._active(), self._active())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_within_block("a copy")
        own = (
            "base",
            "method",
            "steps",
            "allow_unperturbed",
            "compile",
            "replay_rng",
            "frozen",
            "_targets",
            "_rules",
            "_importance",
            "_checked_rounding",
            "_sharded",
        )
        kept = {name: self.__dict__[name] for name in own}
        return {**super().__getstate__(), **kept, "_phase": "", "_first": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = self._groups_now()
        self._make_kernels()

    # Parts of the step

    def _make_kernels(self) -> None:
        """Make what holds no state of the training and cannot be pickled."""
        self._moved = kernels.Perturbed()
        self._compiled = CompiledStep(self.base) if self.compile else None

    @property
    def _has_radius(self) -> bool:
        return self.method.compressed or any(
            self._rules_of(group).perturbs for group in self.param_groups
        )

    def _rules_of(self, group: dict[str, Any]) -> GroupRules:
        return GroupRules.read(settings_of(group, self.base), self.method)

    @property
    def _reuses(self) -> bool:
        """Whether a direction of the perturbed gradient is kept for other steps."""
        return self.method.reuses and not self.frozen and self._has_radius

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _signed(self, setting: str) -> dict[Tensor, float]:
        """rho or penalty of every parameter, negative where the loss is maximised."""
        found: dict[Tensor, float] = {}
        for group in self.param_groups:
            value = self._rules_of(group).at(setting, self.steps)
            signed = -value if group.get("maximize") else value
            found.update(dict.fromkeys(group["params"], signed))
        return found

    @property
    def _held(self) -> HeldSplit:
        return HeldSplit(self.state, self._targets)

    def _mask(self, tensors: list[Tensor], params: list[Tensor]) -> None:
        """Set tensors to zero off the support of their parameters."""
        kernels.mask_([t.detach() for t in tensors], [self.state[p]["support"] for p in params])

    @property
    def _masks(self) -> bool:
        """Whether parameters and gradients are held to the support at every step."""
        return self.frozen or self.method.masks

    def _mask_gradients(self, sparse: list[Tensor]) -> None:
        if self._masks:
            known = [p for p in sparse if p.grad is not None]
            self._mask([p.grad for p in known if p.grad is not None], known)

    def _active(self) -> list[Tensor]:
        """Selected parameters that are not frozen."""
        return [p for p in self._targets if p.requires_grad]

    def _sparse_parameters(self) -> list[Tensor]:
        """The active parameters; starts the split of new ones."""
        self._follow_groups()
        sparse = self._active()
        new = [p for p in sparse if not self._held.has(p)]
        if new:
            self._start(new)
        return sparse

    @contextmanager
    def _as_started(self) -> Iterator[list[Tensor]]:
        """The active parameters with a split, which is dropped again where it is new.

        To look at an optimizer must not fix where z and u start: weights may still be
        loaded into the model.
        """
        self._follow_groups()
        new = [p for p in self._active() if not self._held.has(p)]
        before = {p: dict(self.state[p]) for p in new if p in self.state}
        try:
            yield self._sparse_parameters()
        finally:
            for p in new:
                self.state.pop(p, None)
            self.state.update(before)

    @torch.no_grad()
    def _start(self, params: list[Tensor]) -> None:
        if self.frozen:
            raise ValueError(
                "parameters must not become trainable once the support is frozen, got "
                f"{', '.join(self._targets[p].name for p in params)}"
            )
        for method, members in self._held.by_pattern(self.method, params):
            values = [p.detach() for p in members]
            placed = None
            if isinstance(self._importance, Mapping):
                placed = self._held.placed(self._importance, members)
            split = method.init(values, self._held.targets(members), placed)
            source = method.init_importance(values)
            self._held.store(members, split)
            self._held.store_importance(members, source if placed is None else placed)

    def _select(self) -> None:
        """Choose the sparse parameters among the groups as they are."""
        self._targets = select_parameters(self.base, self.method, *self._rules)
        self._check_fit()
        self._seen = self._groups_now()
        self._sharded = any(is_sharded(p) for group in self.param_groups for p in group["params"])
        if self.compile and self._sharded:
            raise ValueError("compile must be False for sharded parameters, got True")

    def _groups_now(self) -> list[Any]:
        return [
            ([id(p) for p in group["params"]], group.get("sparsity"), group.get("sparsify"))
            for group in self.param_groups
        ]

    def _follow_groups(self) -> None:
        """Select anew where settings were changed, or a trainer has exchanged parameters."""
        if self._seen == self._groups_now():
            return
        here = {p for group in self.param_groups for p in group["params"]}
        gone = [p for p in self.state if p not in here]
        if any(self.state[p] for p in gone):
            raise ValueError(
                "param_groups must keep the parameters that training has begun with, got others "
                f"in the place of {len(gone)}: make the optimizer after its model is wrapped or "
                "sharded"
            )
        self._moved.release()
        for p in gone:
            del self.state[p]
        self._select()
        for p in [p for p in self.state if p not in self._targets]:
            for key in ("anchor", "support", "importance"):
                self.state[p].pop(key, None)

    def _check_fit(self) -> None:
        """Raise now what would be raised at the first step, at no cost in memory."""
        params = self._active()
        if isinstance(self._importance, Mapping):
            known = {target.name for target in self._targets.values()}
            unknown = sorted(set(self._importance) - known)
            if unknown:
                raise ValueError(
                    f"importance names {unknown[0]!r}, which is no sparse parameter; they are "
                    f"{', '.join(sorted(known))}"
                )
            self._held.placed(self._importance, params)
        for method, members in self._held.by_pattern(self.method, params):
            shapes = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in members]
            method.init(shapes, self._held.targets(members))

    @property
    def _block(self) -> str:
        """The block that is open, if any."""
        return self._phase if self._phase in ("perturbed", "projected") else ""

    def _refuse_within_block(self, call: str) -> None:
        if self._block:
            raise ValueError(f"{call} must come after the {self._block}() block, not within it")

    def _check_block(self, call: str, replay: Any) -> None:
        """Refuse to open a block within another, or to replay what is no state."""
        if self._block:
            raise ValueError(f"{call} must not be entered within {self._block}()")
        if replay is not None and not isinstance(replay, RandomState):
            raise TypeError(f"replay must be a RandomState or None, got {replay!r}")

    def _ascend(self, params: list[Tensor], loss_scale: float) -> None:
        """Move the parameters to x + e, uphill in the loss."""
        radii = self._radii(loss_scale)
        gradients = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in gradients):
            raise ValueError("gradients must be dense to be perturbed along, got a sparse one")
        self._warn_of_rounding(params, gradients, radii)
        direction = self.method.direction(params, gradients, self.steps)
        by_radius = {rho: direction._replace(rho=rho) for rho in {radii[p] for p in params}}
        copies = self._moved.prepare(params)
        if self._compiled is not None:
            by_factor = {rho: found.factor for rho, found in by_radius.items()}
            factors = [by_factor[radii[p]] for p in params]
            self._compiled.ascend(params, copies, direction.vectors, factors, direction.usable)
            self._moved.saved(params, copies)
            return
        for rho, found in by_radius.items():
            mine = [i for i, p in enumerate(params) if radii[p] == rho]
            self._moved.move(
                [params[i] for i in mine],
                [copies[i] for i in mine],
                found._replace(vectors=[direction.vectors[i] for i in mine]),
            )

    def _radii(self, loss_scale: float) -> dict[Tensor, float]:
        """What e is a multiple of, for gradients of a scaled loss."""
        radii = self._signed("rho")
        if self.method.perturbation is None or self.method.perturbation.is_scale_free:
            return radii
        return {p: rho / loss_scale for p, rho in radii.items()}

    def _only_initialises(self) -> bool:
        """Whether a step would only make the base optimizer create its state.

        torch.distributed.checkpoint takes one with zero learning rates and gradients
        before it saves or loads, unless `state` holds something. It is no step of the
        method.
        """
        return (
            self.steps == 0
            and self._has_zero_rates()
            and not any(bool(p.grad.any()) for p in self._trainable() if p.grad is not None)
        )

    def _may_go_unperturbed(self) -> bool:
        return self.allow_unperturbed or self._has_zero_rates()

    def _has_zero_rates(self) -> bool:
        return all("lr" in group and float(group["lr"]) == 0 for group in self.param_groups)

    def _descend(self, sparse: list[Tensor]) -> None:
        """Add the gradient of the penalty and take a step of the base optimizer."""
        penalties = self._signed("penalty")
        _fill_gradients(sparse)  # the penalty still acts there, else u would wind up
        if self.method.decoupled:
            self._descend_beside(sparse, penalties)
            return
        if self._compiled is not None:
            anchors, copies = self._held.split(sparse).anchor, self._moved.copies(sparse)
            self._moved.restore(but=sparse)
            self._compiled.descend(_gradients(sparse), sparse, anchors, penalties, copies)
            self._moved.forget(sparse)
            return
        for penalty in {penalties[p] for p in sparse}:
            mine = [p for p in sparse if penalties[p] == penalty]
            gradients, anchors = _gradients(mine), self._held.split(mine).anchor
            copies = self._moved.copies(mine)
            kernels.add_penalty_(gradients, mine, anchors, penalty, copies)
            self._moved.forget(mine)
        self._moved.restore()
        self.base.step()

    def _descend_beside(self, sparse: list[Tensor], penalties: dict[Tensor, float]) -> None:
        """Take a step of the base optimizer, and the pull of the penalty beside it."""
        self._moved.restore()
        pulled: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            mine = [p for p in group["params"] if p in self._targets and p.requires_grad]
            if mine:
                rate = group["lr"]  # torch takes a tensor of one entry, of any number of axes
                rate = rate.reshape(()) if torch.is_tensor(rate) else rate
                factor = rate * abs(penalties[mine[0]])
                found = kernels.pulls(mine, self._held.split(mine).anchor, factor)
                pulled.update(zip(mine, found, strict=True))
        self._base_step()
        kernels.subtract_(sparse, [pulled[p] for p in sparse])

    def _base_step(self) -> None:
        """A step of the base optimizer alone."""
        if self._compiled is None or self.frozen:
            self.base.step()
        else:
            self._compiled.descend([], [], [], {}, None)

    def _reuse_direction(self) -> None:
        """Keep the direction of a perturbed gradient, or add it to a plain one."""
        first, self._first = self._first, {}
        if first:
            flat = self.method.flat_direction(list(first.values()), _gradients(first))
            for p, direction in zip(first, flat, strict=True):
                self.state[p]["flat_direction"] = direction
            return
        held = {p: self.state.get(p, {}).get("flat_direction") for p in self._trainable()}
        for p, flat in held.items():
            if p.grad is None and flat is not None:
                p.grad = torch.zeros_like(p)
        known = [(p.grad, flat) for p, flat in held.items() if p.grad is not None]
        gradients = [gradient for gradient, _ in known]
        directions = [torch.zeros_like(g) if flat is None else flat for g, flat in known]
        if gradients:
            kernels.copy_(gradients, self.method.reuse(gradients, directions))

    def _take_in_gradients(self, sparse: list[Tensor]) -> None:
        """Refresh the method's own importance from the loss gradient, before the penalty."""
        if self.method.importance is not None:
            found = self._held.importance(sparse)
            state = self.method.refresh_importance(found, _gradients(sparse))
            self._held.store_importance(sparse, state)

    def _call_importance(self, sparse: list[Tensor]) -> None:
        """Ask the user's function for P at the parameters that are to be projected."""
        if callable(self._importance):
            named = {self._targets[p].name: p for p in sparse}
            placed = self._held.placed(self._importance(named), sparse)
            self._held.store_importance(sparse, placed)

    def _warn_of_rounding(
        self, params: list[Tensor], gradients: list[Tensor], radii: dict[Tensor, float]
    ) -> None:
        """Say once, at the first perturbation, that 16-bit parameters swallow it."""
        if self._checked_rounding or all(p.element_size() > 2 for p in params):
            return
        widest = max(abs(radii[p]) for p in params)
        if widest == 0:
            return
        steps = self.method.perturb(params, gradients, self.steps, rho=widest)
        length = float(norm(steps))
        if length == 0:  # as of a gradient that is zero or not finite
            return
        self._checked_rounding = True
        moves = [(p + e).to(p.dtype).float() - p for p, e in zip(params, steps, strict=True)]
        moved = float(norm(moves))
        if moved < length / 2:
            warnings.warn(
                f"16-bit parameters round the perturbation away: |(x + e) - x| = {moved:.3g} for "
                f"|e| = {length:.3g}; keep the parameters in float32 and use autocast",
                stacklevel=7,
            )


def _check_arguments(
    base: Any,
    method: Any,
    model: Any,
    where: Any,
    layout: Any,
    importance: Any,
) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be an optimizer of torch.optim, got {base!r}")
    if isinstance(base, SparseOptimizer):
        raise TypeError("base must be a plain optimizer, got a SparseOptimizer")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("base must not need a closure of its own, got LBFGS")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a safe_core.Method, got {method!r}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    refuse_flat_parameters(model)
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of name and parameter, got {where!r}")
    if layout is not None and not (isinstance(layout, (Layout, Mapping)) or callable(layout)):
        raise TypeError(f"layout must be a Layout, a mapping or a function, got {layout!r}")
    if importance is not None and method.importance is not None:
        raise ValueError(
            f"importance must be given once: the method has {method.importance!r} already"
        )
    if importance is not None and not (isinstance(importance, Mapping) or callable(importance)):
        raise TypeError(f"importance must be a mapping or a function, got {type(importance)!r}")


def _check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def _fill_gradients(params: Iterable[Tensor]) -> None:
    """Give a zero gradient where there is none."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Gradients, zero where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
