"""Any torch.optim optimizer, under a sparsity constraint.

`SparseOptimizer` honours the contract of torch.optim. What it holds is in `run`, the points
at which gradients are taken are in `phases`, and the operations of a step in `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core import Layout, Method, SplitState, _checks
from safe_core._dtypes import wide_dtype
from safe_core.arguments import refuse_filled
from safe_core.backends import backend_of
from safe_core.report import Report, TensorReport

from . import kernels
from .checkpoint import pack, unpack
from .modules import RandomState
from .phases import Phase, Phases
from .reporting import tensor_reports
from .run import LAST, Run
from .selection import refuse_flat_parameters
from .step import take_step

__all__ = ["SparseOptimizer"]


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
        for name, flag in (
            ("allow_unperturbed", allow_unperturbed),
            ("compile", compile),
            ("replay_rng", replay_rng),
        ):
            _checks.flag(name, flag)
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups
        self._run = Run(
            base,
            method,
            self.state,
            model=model,
            where=where,
            layout=layout,
            importance=importance,
            compile=compile,
        )
        self._phases = Phases(self._run, allow_unperturbed=allow_unperturbed, replay_rng=replay_rng)

    # What the run holds

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._run.base

    @property
    def method(self) -> Method:
        """The method of the run."""
        return self._run.method

    @property
    def steps(self) -> int:
        """Base steps taken."""
        return self._run.steps

    @property
    def frozen(self) -> bool:
        """Whether the support is final, see `finalize`."""
        return self._run.frozen

    @property
    def allow_unperturbed(self) -> bool:
        """Whether `step` may run without the gradients of its phases."""
        return self._phases.allow_unperturbed

    @allow_unperturbed.setter
    def allow_unperturbed(self, flag: bool) -> None:
        self._phases.allow_unperturbed = _checks.flag("allow_unperturbed", flag)

    # The step

    @property
    def perturbs(self) -> bool:
        """Whether the step to come takes a second gradient, within `perturbed`."""
        return self._run.perturbed is not None

    @property
    def projects(self) -> bool:
        """Whether the step to come takes a gradient within `projected`."""
        return self._run.plan.projected is not None

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
        phases = self._phases
        phases.check_block("perturbed()", replay)
        if not _checks.real("loss_scale", loss_scale) > 0:
            raise ValueError(f"loss_scale must be positive, got {loss_scale!r}")
        phases.reset()
        with phases.restoring(), phases.at_perturbed_point(replay, loss_scale):
            yield

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
        phases = self._phases
        phases.check_block("projected()", replay)
        if not self.projects:
            raise ValueError(
                "projected() must be for a method that adds the gradient there, see `projects`, "
                f"got {self.method!r}"
            )
        if phases.phase is not Phase.READY:
            phases.check_perturbed("projected()")
        if not self._run.has_gradient():
            raise ValueError(
                "projected() needs the gradients of a backward pass before it, to which it adds "
                "its own, got None for every parameter"
            )
        with phases.restoring(), phases.at_projected_point(replay):
            yield

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
        phases = self._phases
        phases.refuse_within_block("step()")
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function or None, got {type(closure)!r}")
        if closure is None:
            if phases.only_initialises():
                self.base.step()
                self.state.update({p: {} for p in self._run.trainable() if p not in self.state})
                return None
            phases.check_step()
            take_step(self._run, phases.take_first())
            return None
        with phases.restoring():
            loss = phases.call(closure)
            take_step(self._run, phases.take_first())
        return loss

    @torch.no_grad()
    def finalize(self, importance: Any = LAST, *, freeze: bool = False) -> None:
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
        self._phases.refuse_within_block("finalize()")
        _checks.flag("freeze", freeze)
        run = self._run
        with run.as_started() as sparse:
            values = [p.detach() for p in sparse]
            if values and backend_of(values[0]).has_nan(values):
                bad = [run.selected[p].name for p in sparse if bool(p.isnan().any())]
                raise ValueError(f"parameters must not be NaN, got NaN in {', '.join(bad)}")
            support = run.final_support(sparse, importance)
        kernels.mask_(values, support)
        if freeze and not run.frozen:
            self.state.clear()
            for p, mask in zip(sparse, support, strict=True):
                self.state[p] = {"support": mask}
                # Momentum of a base that sums it otherwise than per entry would fill zeros.
                held = self.base.state.get(p, {}).values()
                likes = [t for t in held if torch.is_tensor(t) and t.shape == p.shape]
                kernels.mask_(likes, [mask] * len(likes))
            run.frozen = True

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
        run = self._run
        with run.as_started() as sparse:
            support = run.final_support(sparse, None)
        filled = kernels.count_filled(sparse, support)
        refuse_filled("parameters", [run.selected[p].name for p in sparse], filled)

    @torch.no_grad()
    def report(self) -> Report:
        """Return what the constraint looks like from here, tensor by tensor.

        Computes a projection and a dual update on copies, and changes nothing. See
        `TensorReport` for the figures.
        """
        self._phases.refuse_within_block("report()")
        run = self._run
        if run.frozen:
            raise ValueError("report() must come before the support is frozen, got frozen=True")
        found: dict[Tensor, TensorReport] = {}
        with run.as_started() as sparse:
            penalties, state = run.signed("penalty"), run.parameters
            for pattern, members in state.pools(sparse):
                weights = [abs(penalties[p]) for p in members]
                rows = tensor_reports(
                    state, run.method, run.source, pattern, members, run.steps, weights
                )
                found.update(zip(members, rows, strict=True))
        return Report(run.steps, [found[p] for p in sparse])

    def sparse_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that the method makes sparse, by name."""
        return {self._run.selected[p].name: p for p in self._run.active()}

    def split(self) -> SplitState:
        """Return copies of anchors and supports, in the order of `sparse_parameters`."""
        if self.frozen:
            raise ValueError("split() must come before the support is frozen, got frozen=True")
        with self._run.as_started() as sparse:
            anchor, support = self._run.parameters.split(sparse)
            return SplitState([a.clone() for a in anchor], [s.clone() for s in support])

    # The optimizer contract

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r}, steps={self.steps})\n{self.base!r}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad` does.

        After a phase this gives up the step that the phase was for.
        """
        super().zero_grad(set_to_none)
        if self._phases.phase in (Phase.READY, Phase.COMPLETE):
            self._phases.reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer, and select among them as at the start."""
        if "_run" not in self.__dict__:  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        run, before = self._run, self._run.selected
        self.base.add_param_group(param_group)
        try:
            run.select()
            if run.frozen and len(run.selected) > len(before):
                raise ValueError(
                    "param_group must not be sparse once the support is frozen: give it "
                    '"sparsify": False'
                )
        except BaseException:
            self.param_groups.pop()
            run.undo_selection(before)
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
        self._phases.refuse_within_block("state_dict()")
        run = self._run
        started = any("support" in entries for entries in self.state.values())
        with run.as_started():
            # Every parameter has an entry, for torch.distributed.checkpoint wants one.
            own: dict[Tensor, dict[str, Any]] = {p: {} for p in run.trainable()}
            own |= {p: dict(entries) for p, entries in self.state.items()}
        if run.plan.reuses:
            for p in run.trainable():
                # Zero until it is known, so that a checkpoint has a place for it.
                wide = wide_dtype(torch, [p])
                empty = torch.zeros_like(p, dtype=wide, requires_grad=False)
                own[p].setdefault("flat_direction", empty)
        merged = pack(
            self.base,
            own,
            self.method,
            steps=run.steps,
            frozen=run.frozen,
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
        self._phases.refuse_within_block("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict)!r}")
        loaded = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = hook(self, loaded) or loaded
        run = self._run
        run.follow_groups()
        found = unpack(loaded, self.base, run.selected, self.method, run.source)
        self.base.load_state_dict(found.base)
        self.param_groups = self.base.param_groups
        self.state.clear()
        self.state.update(found.own)
        run.steps, run.frozen = found.steps, found.frozen
        self._phases.reset()
        if run.frozen:
            run.mask(run.active(), run.active())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._phases.refuse_within_block("a copy")
        return {**super().__getstate__(), "_run": self._run, "_phases": self._phases}


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
