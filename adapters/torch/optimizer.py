"""Wrap any torch.optim optimizer to train under a sparsity constraint.

`SparseOptimizer` implements the interface of `torch.optim.Optimizer`. The module `run` holds
its data, `phases` moves the parameters to where gradients are taken, and `step` takes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core import Coverage, Layout, Method, SplitState, _checks
from safe_core.arguments import refuse_filled
from safe_core.coverage import listing
from safe_core.finalization import Finalized, warn
from safe_core.report import Report

from . import kernels
from .after_finalize import way_to_sparse
from .arguments import check_arguments
from .checkpoint import pack, unpack
from .coverage import warn_of_chosen_vectors, warn_of_dense
from .evaluation import at_both, is_evaluating, refuse_training_mode, sparse_weights, switch_of
from .modules import RandomState, joined
from .phases import Phase, Phases
from .reporting import describe_final, report
from .run import LAST, Run
from .step import take_step

__all__ = ["SparseOptimizer"]


class SparseOptimizer(Optimizer):
    """Train towards exactly sparse weights with any optimizer of torch.optim.

    It shares the ``param_groups`` of the base, so learning-rate schedulers work on either.
    `safe_core.Method` writes out one step.

    Parameters
    ----------
    base : torch.optim.Optimizer
        An instance that holds the parameters. It keeps its own state. A base that perturbs by
        itself, such as `Sassha`, needs ``rho=0``, because the method perturbs.
    method : Method
        From `safe_core.safe` or another function of `safe_core`. A decoupled penalty
        reads the ``"lr"`` of the groups.
    model : torch.nn.Module, or list or mapping of modules, optional
        Makes the weights of its linear, convolution, attention and recurrent layers sparse,
        not biases, norms and embeddings. It also supplies names and layouts. Of several
        modules, such as both networks of a GAN, those in ``base`` are trained.
    where : callable or list of str, optional
        ``where(name, parameter) -> bool`` chooses the sparse parameters instead, among all of
        ``base``, biases and norms included. Test ``parameter.ndim > 1`` to leave those out. A list
        of names chooses exactly these. Without ``model``, names come from a base made with
        ``named_parameters()``.
    layout : Layout, mapping of name to Layout, or callable, optional
        Axis roles, which override those of ``model``; ``layout(name, parameter)`` may
        return None for unknown.
    importance : mapping of name to tensor, or callable, optional
        P of the sparse parameters: per entry, broadcastable, or per input feature. A
        function ``importance({name: parameter}) -> {name: tensor}`` is called at each dual
        update, after the base step; P is 1 before the first.
    allow_unperturbed : bool
        Let `step` run without the gradients of `perturbed` and `projected`.
    compile : bool
        Compile the perturbation, and the penalty fused with the base step, by
        `torch.compile`. If the learning rate changes, it must be a tensor. The step count
        and the dual update are not compiled.
    replay_rng : bool
        Replay the random numbers of the first closure call in later ones, so that dropout
        draws the same masks. Without a closure, pass `perturbed` a `RandomState`.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, no argument selects sparse parameters, none of them
        is trainable, a pattern does not fit a parameter, or a layer that ``model`` selects
        computes its weight, as under `torch.nn.utils.prune`. The message names it.

    Warns
    -----
    UserWarning
        If a function ``where`` chooses parameters of fewer than two axes beside weights.
    DenseWeightWarning
        If weights of ``model`` with two or more axes stay dense although neither ``where`` nor
        ``"sparsify"`` excludes them: the type of their module is unknown, ``base`` does not hold
        them, or they are frozen. See `coverage`.

    Notes
    -----
    A param group opts out with ``"sparsify": False``. With True, all its parameters of two or
    more axes are sparse, whatever ``model`` and ``where`` say. ``"rho"``, ``"penalty"`` and
    ``"sparsity"`` of a group override the method's. Where the method takes ``steps``, or its
    sparsity rises along a cubic from 0, a number as the sparsity of a group rises over the same
    steps. ``"rho"`` counts steps if the radius of the method is in steps, and ``"penalty"`` of a
    `Pull` is a rate. The perturbation is ``e_i = rho_i g_i / |g|`` with the norm over all groups,
    and groups of equal sparsity are projected together. Parameters that are dense or frozen need
    no state.

    The buffers of ``model``, such as running statistics, are updated once per step, at x.

    `step` adds the penalty to ``.grad`` in place, so clip gradients before it. z and u are
    initialised from the parameters at the first step.

    Examples
    --------
    With a closure, as for torch.optim.LBFGS:

    >>> import safe_core
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(8, 2)
    >>> x, y = torch.randn(16, 8), torch.randn(16, 2)
    >>> method = safe_core.safe(sparsity=0.75, steps=100)
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = SparseOptimizer(base, method, model=model)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(100):
    ...     loss = optimizer.step(closure)

    Or with the two passes written out. Guard the block by ``if optimizer.perturbs:`` if the
    method does not perturb at every step, and add a `projected` block if it `projects`:

    >>> optimizer.zero_grad()
    >>> nn.functional.mse_loss(model(x), y).backward()
    >>> with optimizer.perturbed():
    ...     nn.functional.mse_loss(model(x), y).backward()
    >>> optimizer.step()

    After the last step, make the weights exactly sparse:

    >>> optimizer.finalize()
    >>> int((model.weight == 0).sum())
    12
    """

    def __init__(
        self,
        base: Optimizer,
        method: Method,
        *,
        model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] | None = None,
        where: Callable[[str, Tensor], bool] | Collection[str] | None = None,
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
        if isinstance(base, SparseOptimizer):
            raise TypeError("base must be a plain optimizer, got a SparseOptimizer")
        model = joined(model)
        for name, flag in (
            ("allow_unperturbed", allow_unperturbed),
            ("compile", compile),
            ("replay_rng", replay_rng),
        ):
            _checks.flag(name, flag)
        check_arguments(base, method, model, where, layout, importance, compile)
        super().__init__(base.param_groups, base.defaults)
        # The same list, not a copy: schedulers change it through either optimizer.
        self.param_groups = base.param_groups
        # `self.state`, not `base.state`: optimizers of torch initialise a parameter only if
        # its state is empty, so an entry of ours there would break Adam.
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
        warn_of_dense(self._run.coverage(), where, stacklevel=3)
        warn_of_chosen_vectors(where, self._run.selected)

    # Properties

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
        """Number of base steps taken."""
        return self._run.steps

    @property
    def frozen(self) -> bool:
        """Whether the support is final, see `finalize`."""
        return self._run.frozen

    @property
    def finalized(self) -> Finalized | None:
        """The changes that the last call of `finalize` made; None before it."""
        return self._run.finalized

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` skips a step with overflow by itself, which `GradScaler` asks.

        Only while a `CapturedStep` records it, because the host must not read the overflow then.
        """
        return self._run.scheduled is not None

    @property
    def allow_unperturbed(self) -> bool:
        """Whether `step` may run without the gradients of `perturbed` and `projected`."""
        return self._phases.allow_unperturbed

    @allow_unperturbed.setter
    def allow_unperturbed(self, flag: bool) -> None:
        self._phases.allow_unperturbed = _checks.flag("allow_unperturbed", flag)

    # Evaluation during training

    @contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """Set the parameters to C(x), the result of `finalize`, within the block.

        Evaluate or export the sparse network inside; training continues after it as if the
        block had not been. On exit x is restored bit for bit, also after an error. A tensor
        that outlives the block must be a copy: ``model.state_dict()`` refers to the
        parameters, so clone its entries, or save them to a file inside.

        Only `check_sparsity`, `zero_grad` and `split` may be called inside. `split` returns the
        state of training. Buffers, such as batch statistics, are those of x. With sharded
        parameters, pass ``model`` to the constructor and enter the block in every process.

        Raises
        ------
        ValueError
            If a block is open, a parameter holds NaN or infinity, parameters changed within
            the block, or the base needs `eval` first.

        Examples
        --------
        >>> import safe_core
        >>> model = nn.Linear(8, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = SparseOptimizer(base, safe_core.admm(0.75, steps=100), model=model)
        >>> with optimizer.sparse_weights():
        ...     int((model.weight == 0).sum())
        12
        >>> int((model.weight == 0).sum())
        0
        """
        with sparse_weights(self._run, self._phases):
            yield

    @property
    def train(self) -> Callable[[], None]:
        """Call ``train()`` of the base optimizer; exists only where the base has it.

        A schedule-free optimizer trains other parameters than it evaluates. Call `train` before
        the steps and `eval` before `sparse_weights`, `finalize` and evaluation, on this
        optimizer and not on the base. `train` raises a ValueError for a method that moves the
        parameters by a decoupled penalty or a `Pull`, which the base could not average.
        """
        return switch_of(self._run, self._phases, "train")

    @property
    def eval(self) -> Callable[[], None]:
        """Call ``eval()`` of the base optimizer; exists only where the base has it."""
        return switch_of(self._run, self._phases, "eval")

    @property
    def evaluates(self) -> bool:
        """Whether `eval` was called since the last step."""
        return is_evaluating(self._run)

    # The step

    @property
    def backward(self) -> Callable[..., None]:
        """Compute gradients by ``backward(loss)``; exists only where the base has it.

        A second-order base, such as `Sassha`, needs this instead of ``loss.backward()``. Options
        are those of `Sassha.backward`. Hessian products are computed where the method takes the
        gradient of the step: at x + e, or at several points if it adds their gradients.
        """
        if not hasattr(self.base, "backward"):
            kind = type(self.base).__name__
            raise AttributeError(f"{kind} has no backward(): call loss.backward()")
        return self._phases.backward

    @property
    def perturbs(self) -> bool:
        """Whether the next step needs a second gradient, from within `perturbed`."""
        return self._run.perturbed is not None

    @property
    def projects(self) -> bool:
        """Whether the next step needs a gradient from within `projected`."""
        return self._run.plan.projected is not None

    @contextmanager
    def perturbed(
        self, replay: RandomState | None = None, *, loss_scale: float | Tensor = 1.0
    ) -> Iterator[None]:
        """Move the parameters to ``x + e`` within the block; restore x bit for bit on exit.

        The gradients of the first backward pass give ``e`` and are cleared on entry.
        Compute the loss and call ``backward()`` again inside. x is also restored if the
        block raises. At a step that does not perturb, the parameters stay at x. The first
        gradients may come from a part of the batch, unless the method reuses their direction
        or adds them. Gradients that the method adds are added back on exit.

        Parameters
        ----------
        replay : RandomState, optional
            From `RandomState.record` before the first forward pass. The block then draws
            the same random numbers, such as dropout masks.
        loss_scale : float or scalar tensor
            The factor of loss scaling, such as ``scaler.get_scale()``. It matters only if e
            depends on the gradient's norm, as in `safe_core.cram` but not `safe_core.safe`. A
            tensor is not checked, because the host would wait for it.

        Raises
        ------
        ValueError
            If no parameter has a gradient, a gradient is a sparse tensor, or a block is open. In
            the first steps also if the gradients were added to those of the last step, or a
            second block would discard the gradients of the first.
        """
        phases = self._phases
        phases.check_block("perturbed()", replay)
        if not torch.is_tensor(loss_scale) and not _checks.real("loss_scale", loss_scale) > 0:
            raise ValueError(f"loss_scale must be positive, got {loss_scale!r}")
        phases.refuse_stale_gradients("perturbed()")
        phases.refuse_second_block()
        phases.reset()
        with phases.restoring(), phases.at_perturbed_point(replay, loss_scale):
            yield
        phases.watch_gradients()

    @contextmanager
    def projected(self, replay: RandomState | None = None) -> Iterator[None]:
        """Move the parameters to ``C(x)`` within the block; restore x bit for bit on exit.

        A method that adds a projected gradient needs this block after `perturbed`. Compute
        the loss and call ``backward()`` inside. Existing gradients are saved on entry and
        added back on exit, so that clipping and unscaling act on the sum. ``replay`` is as
        for `perturbed`.

        Raises
        ------
        ValueError
            If the method adds no such gradient, earlier gradients are missing, or a block is
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
        phases.refuse_stale_gradients("projected()")
        phases.refuse_lost_gradients("projected()")
        phases.stop_watching()
        with phases.restoring(), phases.at_projected_point(replay):
            yield
        phases.watch_gradients()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, with a closure or after the `perturbed` and `projected` blocks.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss, calls ``backward()`` and returns
            the loss. It is called at x and, if the step needs those gradients, at x + e
            and at C(x).

        Returns
        -------
        loss
            The closure's result at x; None without a closure.

        Raises
        ------
        ValueError
            If a gradient that the step needs is missing, or a block is open. In the first steps
            also if the gradients were added to those of the last step, or the gradients of a
            block were cleared after it.
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
            if self._run.scheduled is not None and hasattr(self, "found_inf"):  # of a `GradScaler`
                self._run.scheduled.take_overflow(self.found_inf, getattr(self, "grad_scale", None))
            take_step(self._run, *phases.take())
            phases.count_step()
            return None
        phases.stop_watching()
        with phases.restoring():
            loss = phases.call(closure)
            take_step(self._run, *phases.take())
        return loss

    @torch.no_grad()
    def finalize(self, importance: Any = LAST, *, freeze: bool = False) -> None:
        """Project the parameters in place, ``x <- proj(x)``, after the last step.

        Kept entries do not change, bit for bit. The others become +0, exactly as many as
        the method's sparsity requires, also in parameters whose ``requires_grad`` was switched
        off after the optimizer was made. `finalized` then holds what changed.

        Parameters
        ----------
        importance : optional
            The default is the last P of the run. None means P = 1, as in Algorithm 1 of the
            paper. A mapping of name to tensor replaces P.
        freeze : bool
            Keep this support, to fine-tune: every later step masks gradients and parameters,
            and the penalty, the dual variable and reused directions are dropped.

        Raises
        ------
        TypeError, ValueError
            If ``importance`` does not fit the parameters, a parameter holds NaN or infinity, a
            block is open, or the base needs `eval` first.

        Warns
        -----
        safe_core.FinalizeWarning
            If the run was too short for the method to act (no dual update, a schedule that has
            not reached its end), or took over 1.5 times the steps of the method; if the projection
            removes more than a tenth of the norm of the weights; or if a parameter becomes zero as
            a whole, or had no gradient in ten or more steps.
        """
        self._phases.refuse_within_block("finalize()")
        refuse_training_mode(self._run, "finalize()")
        _checks.flag("freeze", freeze)
        run = self._run
        run.refuse_replaced()
        with run.as_started() as sparse:
            support = run.final_support(sparse, importance)
            patterns = list(run.parameters.pools(sparse))
        run.finalized = describe_final(run.parameters, sparse, support, run.steps)
        run.finalized_at = run.steps
        kernels.mask_([p.detach() for p in sparse], support)
        run.forget_copies()
        source = run.source if isinstance(importance, str) else None
        used = [pattern for pattern, _ in patterns]
        warn(
            run.finalized,
            self.method.constraint,
            used,
            source,
            frozen=run.frozen,
            idle=run.idle(),
            halted=run.halted(),
        )
        if freeze and not run.frozen:
            run.freeze(sparse, support)

    @torch.no_grad()
    def check_sparsity(self) -> None:
        """Raise a ValueError unless the parameters have the method's sparsity.

        The error names the parameters with too many non-zeros. A frozen support replaces the
        method's pattern. Call this before saving or serving a model: another optimizer, or
        merging an adapter such as LoRA, makes zeros non-zero without warning.
        """
        run = self._run
        run.refuse_replaced()
        with run.as_started() as sparse:
            support = run.final_support(sparse, None)
        filled = kernels.count_filled(sparse, support)
        names = [run.selected[p].name for p in sparse]
        refuse_filled("parameters", names, filled, way_to_sparse(run))

    @torch.no_grad()
    def report(
        self, evaluate: Callable[[], Any] | None = None, *, steps: int | None = None
    ) -> Report:
        """Return how far the parameters are from the constraint, and what to change.

        This computes a projection and a dual update on copies and changes no state. Nothing is
        measured, and the host does not wait, at steps without a report. `TensorReport` documents
        the figures, and `Report.advice` what they mean.

        Parameters
        ----------
        evaluate : callable, optional
            Function without arguments that returns the loss, the accuracy or another number of
            the model. It is called at x, without gradients, and again within `sparse_weights`,
            so the report shows what the projected network would lose. Put the model into
            evaluation mode before.
        steps : int, optional
            Steps of the whole run, by which the figures are judged. By default they are those
            that the schedule of the penalty was made for.

        Returns
        -------
        safe_core.report.Report

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong type, ``evaluate`` does not return one number, a block
            is open, or the support is frozen; with ``evaluate``, also as `sparse_weights`.

        Examples
        --------
        >>> import safe_core
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(8, 2)
        >>> x, y = torch.randn(16, 8), torch.randn(16, 2)
        >>> method = safe_core.admm(0.75, penalty=1e-3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = SparseOptimizer(base, method, model=model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(640):
        ...     loss = optimizer.step(closure)
        >>> report = optimizer.report(lambda: nn.functional.mse_loss(model(x), y), steps=640)
        >>> [item.cause for item in report.advice]
        ['penalty']
        >>> report.dense_value < report.sparse_value
        True
        """
        self._phases.refuse_within_block("report()")
        found = report(self._run, steps)
        if evaluate is None:
            return found
        # A projection of NaN or infinity would raise, and the report is to say so.
        dense, sparse = at_both(self._run, self._phases, evaluate, projects=found.is_finite)
        return found._replace(dense_value=dense, sparse_value=sparse)

    def coverage(self) -> Coverage:
        """Return which weights are sparse, and why the others stay dense.

        This lists the parameters of ``model`` with two or more axes, or without a model those
        of the base. ``print(optimizer.coverage())`` shows them in one line.
        """
        self._run.follow_groups()
        return self._run.coverage()

    def sparse_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that the method makes sparse, by name."""
        return {self._run.selected[p].name: p for p in self._run.constrained()}

    def split(self) -> SplitState:
        """Return copies of the anchors ``z - u`` and supports, ordered as `sparse_parameters`."""
        if self.frozen:
            raise ValueError("split() must come before the support is frozen, got frozen=True")
        with self._run.as_started() as sparse:
            anchor, support, _ = self._run.parameters.split(sparse)
            return SplitState([a.clone() for a in anchor], [s.clone() for s in support])

    # The optimizer contract

    def __repr__(self) -> str:
        method, coverage = self.method, self._run.coverage()
        perturbation = method.perturbation if self._run.has_radius else None
        parts = (method.constraint, *filter(None, [perturbation]))
        how = " with ".join(type(part).__name__ for part in parts)
        title = f"{type(self).__name__}({type(self.base).__name__}, {how})"
        patterns = {c.name: c.pattern.describe() for c in self._run.selected.values()}
        lines = [f"{title}, steps taken: {self.steps}", *listing(coverage.sparse, patterns)]
        return "\n".join([*lines, str(coverage)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; after a block, also discard the step that it began."""
        super().zero_grad(set_to_none)
        if not self._phases.block:  # a closure clears at every point, but gradients may add up
            self._run.discard_products()
        self._phases.stop_watching()
        if self._phases.phase in (Phase.READY, Phase.COMPLETE):
            self._phases.reset(lost="no block since zero_grad() cleared the gradients of one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer, and select the sparse ones among them."""
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
        new = {p: chosen for p, chosen in run.selected.items() if p not in before}
        warn_of_chosen_vectors(run.where, new)
        rows, names = run.coverage().weights, run.selection.names()
        added = {names[p] for p in self.param_groups[-1]["params"]}
        warn_of_dense(Coverage(tuple(w for w in rows if w.name in added)), run.where, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer and ours, in torch's format.

        Our entries of a parameter are ``safe_anchor``, ``safe_support``, ``safe_importance``;
        ``safe_motion`` if the radius is in steps; and ``safe_flat_direction`` if the method
        reuses a direction. Each group also holds ``safe_steps``, ``safe_finalized_at`` and
        ``safe_method``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._phases.refuse_within_block("state_dict()")
        run = self._run
        started = any("support" in entries for entries in self.state.values())
        merged = pack(
            self.base,
            run.entries(),
            self.method,
            steps=run.steps,
            frozen=run.frozen,
            started=started,
            finalized_at=run.finalized_at,
        )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            merged = post_hook(self, merged) or merged
        return merged

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from `state_dict`, or raise before anything changes.

        A frozen support also masks the parameters. Anchors and supports keep their dtypes;
        `torch.optim.Optimizer.load_state_dict` would cast them to the parameter's.

        Raises
        ------
        ValueError
            If our entries are missing, or belong to other parameters or to an optimizer with
            another importance, method or base.
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
        run.steps, run.frozen, run.finalized = found.steps, found.frozen, None
        run.finalized_at, run.warned_of_zeros = found.finalized_at, False
        run.switched = None  # the state that was loaded may be that of train()
        self._phases.reset()
        if run.frozen:
            sparse = [p for p in run.constrained() if run.parameters.has(p)]
            run.mask(sparse, sparse)
            run.forget_copies()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._phases.refuse_within_block("a copy")
        return {**super().__getstate__(), "_run": self._run, "_phases": self._phases}
