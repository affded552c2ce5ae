"""Sassha, a second-order optimizer that seeks flat minima, as an optimizer of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_core import _checks
from safe_core.random_numbers import check_seed
from safe_core.sassha import ASCENTS, SasshaRule, check_number

from . import kernels
from .modules import RandomState, forget_copies, joined, statistics_kept
from .products import HessianEstimates, check_differentiable
from .sassha_state import advance, probes, rate_of, started

__all__ = ["Sassha"]


class Sassha(Optimizer):
    """Sassha: scale the step by the curvature at a perturbed point, to reach flat minima.

    `safe_core.sassha.SasshaRule` writes out one step. Compute gradients by ``backward(loss)`` of
    this optimizer instead of ``loss.backward()``: every ``hessian_interval`` steps it also
    computes a Hessian product.

    Parameters
    ----------
    params : iterable
        Parameters or param groups, as for all optimizers of torch. They are real floating tensors
        on one device each.
    lr : float or tensor
        Learning rate. It multiplies the weight decay, too.
    betas : (float, float)
        Weights of the previous averages, of the gradient and of the Hessian diagonal.
    rho : float
        Perturbation radius. The norm of the gradient is over all groups. With 0 in all groups,
        the gradient is taken at x.
    weight_decay : float
        Decoupled weight decay. The published scripts divide that of a recipe by the initial
        learning rate.
    hessian_interval : int
        Steps between two Hessian products.
    eps : float
        Added to the denominator.
    power : float
        Exponent of the averaged Hessian diagonal. To change it during training, set
        ``group["power"]``, as a scheduler sets ``"lr"``.
    bias_correction : {"corrected", "published", "none"}
        Whether the average of the Hessian diagonal is corrected by the number of its updates, or
        by the number of steps, as in the published code. With "none", neither average is.
    ascent : {"gradient", "momentum"}
        With "momentum", perturb against the averaged gradient (M-Sassha). A step then needs one
        gradient, and the loss is that at the perturbed point. It is the same in all groups.
    seed : int
        Seed of the random signs. Equal seeds draw the same in every process, and in JAX.
    model : torch.nn.Module, or list or mapping of modules, optional
        Its buffers, such as running statistics, are then updated at x only.
    process_group : torch.distributed.ProcessGroup, optional
        Average Hessian products over these processes. The default is all of them if
        torch.distributed is initialised, as for `torch.nn.parallel.DistributedDataParallel`.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of its range.

    Notes
    -----
    All settings but ``ascent``, ``model`` and ``process_group`` are options of param groups.
    Operations of the model must be twice differentiable. Fused attention is not: run the forward
    passes under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` while `needs_product`.

    As the base of `SparseOptimizer` it needs ``rho=0``. The method then decides where the
    gradient and the product are taken, and ``backward`` of the `SparseOptimizer` is called.

    References
    ----------
    Shin et al. 2025, "Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable
    Hessian Approximation", arXiv 2502.18153.

    Examples
    --------
    With a closure:

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(8, 2)
    >>> x, y = torch.randn(16, 8), torch.randn(16, 2)
    >>> optimizer = Sassha(model.parameters(), lr=0.15, rho=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     optimizer.backward(loss)
    ...     return loss
    >>> losses = [optimizer.step(closure).item() for _ in range(50)]
    >>> losses[-1] < losses[0] / 2
    True

    Or with the two passes written out:

    >>> optimizer.zero_grad()
    >>> optimizer.backward(nn.functional.mse_loss(model(x), y))
    >>> with optimizer.perturbed():
    ...     optimizer.backward(nn.functional.mse_loss(model(x), y))
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.2,
        weight_decay: float = 0.0,
        *,
        hessian_interval: int = 10,
        eps: float = 1e-4,
        power: float = 0.5,
        bias_correction: str = "corrected",
        ascent: str = "gradient",
        seed: int = 0,
        model: nn.Module | list[nn.Module] | Mapping[str, nn.Module] | None = None,
        process_group: Any = None,
    ) -> None:
        _checks.choice("ascent", ascent, ASCENTS)
        self._ascent, self._model = ascent, joined(model)
        self._estimates = HessianEstimates(process_group)
        self._prepare()
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "hessian_interval": hessian_interval,
            "eps": eps,
            "power": power,
            "bias_correction": bias_correction,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _prepare(self) -> None:
        """Set what belongs to a step that has begun, and is not copied."""
        self._moved = kernels.MovedParameters()
        self._within_block = self._is_perturbed = False

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("_ascent", "_model", "_estimates")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, checked as by the constructor."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("lr", rate_of(group))
        check_seed(group["seed"])
        self._rule(group)
        for p in group["params"]:
            check_differentiable(p)

    # Properties

    @property
    def perturbs(self) -> bool:
        """Whether a step needs a gradient from within `perturbed`: rho of a group is not 0."""
        return any(self._rule(group).perturbs for group in self.param_groups)

    @property
    def needs_product(self) -> bool:
        """Whether the next step needs a Hessian product, which `backward` computes."""
        return bool(self._due())

    # The gradient and the Hessian product

    def backward(self, loss: Tensor, *, loss_scale: float = 1.0) -> None:
        """Compute gradients by ``loss.backward()``, and where due a Hessian product before it.

        Products of several losses add up as their gradients do, and with them are cleared by
        `zero_grad`. No product is computed for a first gradient, which only gives the
        perturbation.

        Parameters
        ----------
        loss : tensor
            A scalar, such as the mean over a batch.
        loss_scale : float
            The factor that ``loss`` is scaled by, such as ``scaler.get_scale()``. The gradients
            stay scaled, and the products do not.

        Raises
        ------
        TypeError, ValueError
            If ``loss`` is not a tensor or ``loss_scale`` is not positive.
        RuntimeError
            By torch, if an operation is not twice differentiable.
        """
        if not torch.is_tensor(loss):
            raise TypeError(f"loss must be a tensor, got {_checks.shown(loss)}")
        if not _checks.real("loss_scale", loss_scale) > 0:
            raise ValueError(f"loss_scale must be positive, got {loss_scale!r}")
        due = self._due() if self._within_block or not self.perturbs else []
        if due:
            self._estimates.add(loss, due, probes(self.param_groups, self.state, due), loss_scale)
        loss.backward()  # type: ignore[no-untyped-call]

    def discard_products(self) -> None:
        """Discard the Hessian products of the step, as `zero_grad` does."""
        self._estimates.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and the Hessian products."""
        super().zero_grad(set_to_none)
        self.discard_products()
        self._is_perturbed = False

    @contextmanager
    def perturbed(self, replay: RandomState | None = None) -> Iterator[None]:
        """Move the parameters to ``x + e`` within the block; restore x bit for bit on exit.

        The gradients of a first pass give e and are cleared on entry; M-Sassha needs none.
        Compute the loss inside, and call `backward` of this optimizer.

        Parameters
        ----------
        replay : RandomState, optional
            From `RandomState.record` before the first forward pass. The block then draws the
            same random numbers, such as dropout masks.

        Raises
        ------
        ValueError
            If the block is open already, or no parameter has a gradient to perturb along.
        """
        self._refuse_within_block("perturbed()")
        if replay is not None and not isinstance(replay, RandomState):
            raise TypeError(f"replay must be a RandomState or None, got {replay!r}")
        follows_momentum = self._follows_momentum
        try:
            self._leave_x()
            self.zero_grad()
            self._within_block = True
            forget_copies(None)
            # With one pass only, that pass has to update the buffers.
            kept = nullcontext() if follows_momentum else statistics_kept(self._model)
            with kept, RandomState.replayed(replay):
                yield
        finally:
            self._within_block = False
            with torch.no_grad():
                self._moved.restore()
            forget_copies(None)
        self._is_perturbed = self._has_gradient()

    @property
    def _follows_momentum(self) -> bool:
        return self.perturbs and self._ascent == "momentum"

    @torch.no_grad()
    def _leave_x(self) -> None:
        """Move the parameters to x + e."""
        if self._follows_momentum:
            held = {p: self.state.get(p, {}).get("exp_avg") for p in self._trainable()}
        else:
            held = {p: p.grad for p in self._trainable()}
            if not self._has_gradient():
                raise ValueError(
                    "perturbed() needs the gradients of a first backward(), got None for every "
                    "parameter"
                )
        vectors = {p: v for p, v in held.items() if v is not None}
        if not vectors:  # M-Sassha before its first step
            return
        _refuse_sparse(vectors)
        direction = self._rule(self.param_groups[0]).direction(list(vectors.values()))
        for group in self.param_groups:
            mine = [p for p in group["params"] if p in vectors]
            rule = self._rule(group)
            if mine and rule.perturbs:
                e = direction._replace(vectors=[vectors[p] for p in mine], rho=rule.signed_rho)
                self._moved.move(mine, self._moved.prepare(mine), e)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, with a closure or after the gradients of a `perturbed` block.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss, calls `backward` of this optimizer and
            returns the loss. It is called at x and at x + e. If rho is 0, it is called at x only,
            and with M-Sassha at x + e only.

        Returns
        -------
        loss
            The result of the first call; None without a closure.

        Raises
        ------
        ValueError
            If a gradient or a Hessian product that the step needs is missing, or the block is
            open.
        """
        self._refuse_within_block("step()")
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function or None, got {type(closure)!r}")
        if closure is None and self._only_initialises():
            for p in self._trainable():
                started(self.state[p], p)
            return None
        loss = None if closure is None else self._call(closure)
        if self._has_gradient():  # optimizers of torch do nothing without gradients, too
            self._check_complete()
            self._update()
        self.discard_products()
        self._is_perturbed = False
        return loss

    def _call(self, closure: Callable[[], Any]) -> Any:
        """Call a closure at every point of a step; return the first loss."""
        with torch.enable_grad():
            if self._follows_momentum:
                with self.perturbed():
                    return closure()
            loss = closure()
            if self.perturbs and self._has_gradient():
                with self.perturbed():
                    closure()
            return loss

    def _update(self) -> None:
        self._estimates.average()
        for group in self.param_groups:
            rule = self._rule(group)
            # Parameters of one group share their counts unless some joined late.
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.requires_grad and p.grad is not None:
                    state = started(self.state[p], p)
                    alike.setdefault((state["step"], state["hessian_count"]), []).append(p)
            for members in alike.values():
                advance(self.state, members, rule, rate_of(group), self._estimates)

    # Helpers

    def _rule(self, group: dict[str, Any]) -> SasshaRule:
        """Return the settings of a group, checked; they may change between steps."""
        settings = {f.name: group[f.name] for f in fields(SasshaRule) if f.name in group}
        return SasshaRule(**settings, ascent=self._ascent)

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for p in self._trainable())

    def _due(self) -> list[Tensor]:
        """Return the parameters whose next step needs a Hessian product."""
        found = []
        for group in self.param_groups:
            rule = self._rule(group)
            for p in group["params"]:
                if p.requires_grad and rule.needs_product(self.state.get(p, {}).get("step", 0)):
                    found.append(p)
        return found

    # Checks

    def _only_initialises(self) -> bool:
        """Return whether a step would only initialise the state, which must not count as one.

        torch.distributed.checkpoint takes a step with zero learning rates and gradients before
        it saves or loads.
        """
        return (
            not self.state
            and all(float(group["lr"]) == 0 for group in self.param_groups)
            and not any(bool(p.grad.any()) for p in self._trainable() if p.grad is not None)
        )

    def _refuse_within_block(self, call: str) -> None:
        if self._within_block:
            raise ValueError(f"{call} must come after the perturbed() block, not within it")

    def _check_complete(self) -> None:
        """Raise unless the gradients and products of the step are there, before any change."""
        if self.perturbs and not self._is_perturbed:
            raise ValueError(
                "step() needs a gradient at the perturbed point, because rho is not 0: pass "
                "step(closure=...), or call optimizer.backward(loss) within `with "
                "optimizer.perturbed():` first. Under a SparseOptimizer, set rho=0, because its "
                "method perturbs. Got gradients at x"
            )
        with_gradient = [p for p in self._due() if p.grad is not None]
        missing = self._estimates.missing(with_gradient)
        if missing:
            raise ValueError(
                "step() needs a Hessian product at this step: call optimizer.backward(loss) "
                "instead of loss.backward(), which leaves no graph to differentiate again; got "
                f"none for {len(missing)} of {len(with_gradient)} parameters"
            )
        _refuse_sparse({p: p.grad for p in self._trainable() if p.grad is not None})


def _refuse_sparse(gradients: Mapping[Tensor, Tensor]) -> None:
    if any(g.is_sparse for g in gradients.values()):
        raise ValueError("gradients must be dense, got a sparse one")
