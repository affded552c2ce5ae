"""SAFE and SAFE+ on the reconstruction error of one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core._dtypes import wide_dtype
from safe_core.backends.torch_sharding import whole
from safe_core.finalization import pruning_a_block
from safe_core.layout import Layout
from safe_core.patterns import Pattern, Unstructured
from safe_core.reconstruction import Reconstruction
from safe_core.solvers.reconstruction import SOME_STEPS

from ..optimizer import SparseOptimizer
from .fingerprints import Description, identity
from .memory import BlockSize
from .solver import Batch, BlockProblem, BlockSolver, LayerByLayer, WorkBytes
from .trained import Trained, trained_parameters

__all__ = ["SafeReconstruction", "wide_mse"]

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class SafeReconstruction(Reconstruction, BlockSolver):
    """SAFE and SAFE+ as a solver of `prune_blocks`: the recipe and its training loop.

    Attributes
    ----------
    method, learning_rate, betas, epochs, warmup_epochs, batch_size, importance, rho, penalty, \
dual_update_interval, start, published
        As in `safe_core.reconstruction.Reconstruction`.
    autocast : bool, optional
        Whether to compute in bfloat16, with parameters in float32. The default is True on a GPU
        for models in 16 bits.
    compile : bool or str
        Whether to compile the forward pass by `torch.compile`, once for all equal blocks. A
        string is its ``mode``; "reduce-overhead" replays CUDA graphs.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Examples
    --------
    >>> SafeReconstruction(importance="wanda").share(0, 16)
    0.03125
    """

    autocast: bool | None = None
    compile: bool | str = False

    distributed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.compile, bool):
            _checks.choice("compile", self.compile, _MODES)

    def autocasts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether a model in ``dtype`` is computed in bfloat16 on a device."""
        if self.autocast is not None:
            return self.autocast
        return device.type == "cuda" and dtype.itemsize == 2

    @property
    def watches(self) -> Literal["nothing", "tokens", "squares", "gram"]:  # type: ignore[override]
        """The statistics of inputs to record: those that are needed."""
        return self.needs

    def steps(self, groups: Sequence[int]) -> int:
        """Return the number of training steps in each block."""
        return self.epochs * sum(-(-samples // self.batch_size) for samples in groups)

    def described(self, pattern: Pattern) -> dict[str, Description]:
        """Return what must be the same for a run to be resumed, resolved defaults included."""
        return {
            "solver": identity(self),
            "method": identity(self.bound(pattern, SOME_STEPS)),
            "start": identity(self.initial),
            "peak": repr(self.peak(1.0)),
            "warmup": str(self.warmup),
        }

    def memory(self, size: BlockSize, work: WorkBytes) -> int:
        """Return the bytes for the start, or for the optimizer's state and a pass."""
        autocast = self.autocasts(size.device, size.dtype)
        perturbs = self.bound(Unstructured(0.5), SOME_STEPS).plan().perturbs
        training = size.reconstruction(
            work(self.batch_size, backward=True, autocast=autocast), perturbs=perturbs
        )
        first = self.initial
        if first is None:
            return training
        # All solutions and supports are held at once, and a copy of the start during training.
        solving = LayerByLayer(first).solving(size, work, size.solutions)
        copy = size.number * size.trained // size.shards
        return max(training + copy + size.sparse, solving)

    def prune(self, problem: BlockProblem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Train the block in float32 or wider, and return its parameters and the supports."""
        dense = problem.dense
        assert dense is not None  # no solver has run before
        wide = wide_dtype(torch, list(dense.parameters()))
        layouts = {key: found.layout for key, found in problem.statistics.items()}
        importance = None
        if self.importance is not None:
            importance = {
                key: found.importance(tuple(dense.get_parameter(key).shape))
                for key, found in problem.statistics.items()
            }
        start = self._start(problem)
        del dense
        block = problem.in_dtype(wide)
        if self.compile:
            block.compile(mode=self.compile if isinstance(self.compile, str) else None)
        params = dict(block.named_parameters())
        for key, p in params.items():
            p.requires_grad_(key in problem.trainable)
        supports = None if start is None else _put(params, start)
        del start  # and with it the solutions
        _keep_zeros(p for key, p in params.items() if key not in layouts)
        epoch, steps = problem.batches(self.batch_size, wide)
        found, problem.training_kept = self.solve(
            block,
            layouts,
            importance,
            problem.pattern,
            epoch,
            steps,
            problem.report,
            name=problem.name,
            autocast=self.autocasts(problem.device, problem.dtype),
            supports=supports,
            trained=trained_parameters(block, problem.processes, shard=problem.shard),
        )
        values = {key: p.detach() for key, p in params.items() if p.requires_grad}
        # Equal steps give equal weights, unless kernels of different machines round otherwise.
        problem.processes.copy_([*values.values(), *found.values()])
        return values, found

    def _start(self, problem: BlockProblem) -> list[tuple[str, Tensor, Tensor]] | None:
        """Return the name, the values and the support of each weight as training starts."""
        first = self.initial
        return None if first is None else list(LayerByLayer(first).solutions(problem))

    def solve(
        self,
        block: nn.Module,
        weights: Mapping[str, Layout],
        importance: Mapping[str, Tensor] | None,
        sparsity: Pattern,
        epoch: Callable[[int], Iterable[Batch]],
        steps_per_epoch: int,
        report: Callable[[int, float, float], None],
        *,
        name: str = "block",
        autocast: bool = False,
        supports: Mapping[str, Tensor] | None = None,
        trained: Trained | None = None,
    ) -> tuple[dict[str, Tensor], bool | None]:
        """Train a block in place and project it.

        Return the supports by name, and whether the training was kept; None without a start.

        Parameters
        ----------
        block : torch.nn.Module
            In float32 or wider, on its device.
        weights : mapping of name to Layout
        importance : mapping of name to tensor, optional
        sparsity : pattern
        epoch : callable
            ``epoch(k)`` yields the `Batch` of each step.
        steps_per_epoch : int
        report : callable
            ``report(epoch, loss, sparse_loss)`` after each epoch, with the mean loss at x, and
            the loss of the last batch with the weights projected.
        name : str
            The name of the block, for messages.
        autocast : bool
        supports : mapping of name to tensor, optional
            Supports of the weights of a block that is sparse already. If training increases the
            loss, the block is restored and these are returned.
        trained : Trained, optional
            The parameters of the block to train, by the processes that train it together. By
            default those that require gradients, in this process.

        Raises
        ------
        ValueError
            If the loss is not finite after an epoch.
        """
        trained = Trained(block) if trained is None else trained
        steps = self.epochs * steps_per_epoch
        optimizer = self._optimizer(trained, weights, importance, sparsity, steps)

        def loss() -> float:
            return self._mean_loss(block, epoch(0), trained, autocast=autocast)

        # A start is a solution already, which training must not make worse.
        kept = None if supports is None else _Solution.of(trained, supports, loss())
        self.train(
            optimizer, block, epoch, steps_per_epoch, report,
            name=name, autocast=autocast, trained=trained,
        )  # fmt: skip
        method = optimizer.method
        with pruning_a_block(method.constraint, method.sparsity, optimizer.steps):
            optimizer.finalize(freeze=True)
        trained.gather()
        if kept is not None and not loss() <= kept.loss:  # not `>`: a loss may be NaN
            kept.restore(trained)
            return dict(kept.supports), False
        named = optimizer.sparse_parameters()
        found = {name: whole(optimizer.state[p]["support"]) for name, p in named.items()}
        return found, None if kept is None else True

    def train(
        self,
        optimizer: SparseOptimizer,
        block: nn.Module,
        epoch: Callable[[int], Iterable[Batch]],
        steps_per_epoch: int,
        report: Callable[[int, float, float], None],
        *,
        name: str = "block",
        autocast: bool = False,
        trained: Trained | None = None,
    ) -> None:
        """Train a block for all epochs with an optimizer, as `solve` does.

        The other arguments and errors are those of `solve`. ``epoch(k)`` is asked for the next
        batch only after the step on the one before.
        """
        trained = Trained(block) if trained is None else trained
        device = next(block.parameters()).device
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        step = 0
        for k in range(self.epochs):
            total, count = torch.zeros((), device=device, dtype=torch.float64), 0
            for batch in epoch(k):
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * self.share(step, steps_per_epoch)

                def backward(batch: Batch = batch) -> Tensor:
                    return _backward(block, batch, trained, autocast=autocast)

                total, count = total + _step(optimizer, backward), count + 1
                step += 1
            trained.processes.sum_([total])
            mean = float(total) / count  # with the loss below, all that is read from the device
            if not math.isfinite(mean):
                rate = optimizer.param_groups[0]["initial_lr"]
                raise ValueError(
                    f"learning_rate must be low enough for a finite loss, got {rate:g} and a loss "
                    f"of {mean} in epoch {k} of {name}"
                )
            optimizer.zero_grad()  # the gradients' memory is that of the projected weights
            with optimizer.sparse_weights():
                trained.gather()
                sparse_loss = self._mean_loss(block, [batch], trained, autocast=autocast)
            report(k, mean, sparse_loss)

    def _mean_loss(
        self, block: nn.Module, batches: Iterable[Batch], trained: Trained, *, autocast: bool
    ) -> float:
        """Return the mean of the losses of the batches, by one read from the device."""
        # A compiled block would be compiled again without gradients.
        with torch.set_grad_enabled(bool(self.compile)):
            losses = [_loss(block, batch, autocast=autocast).detach() for batch in batches]
        mean = torch.stack(losses).double().mean()
        trained.processes.sum_([mean])
        return float(mean)

    def _optimizer(
        self,
        trained: Trained,
        weights: Mapping[str, Layout],
        importance: Mapping[str, Tensor] | None,
        sparsity: Pattern,
        steps: int,
    ) -> SparseOptimizer:
        named = list(trained.named.items())
        fused = named[0][1].device.type == "cuda"
        peak = float(self.peak(_root_mean_square([p for name, p in named if name in weights])))
        base = torch.optim.Adam(named, lr=peak, betas=self.betas, fused=fused or None)
        return SparseOptimizer(
            base,
            self.bound(sparsity, steps),
            model=trained.model,
            where=lambda name, p: name in weights,
            layout=dict(weights),
            importance=importance,
        )


@torch.no_grad()
def _put(
    params: Mapping[str, Tensor], start: Iterable[tuple[str, Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Copy solutions into the parameters, and return their supports."""
    supports = {}
    for key, solved, support in start:
        params[key].copy_(solved)
        supports[key] = support
    return supports


class _Solution(NamedTuple):
    """A copy of the trained parameters of a block, the supports of its weights, and its loss."""

    values: dict[str, Tensor]
    supports: Mapping[str, Tensor]
    loss: float

    @classmethod
    def of(cls, trained: Trained, supports: Mapping[str, Tensor], loss: float) -> _Solution:
        values = {name: p.detach().clone() for name, p in trained.named.items()}
        return cls(values, supports, loss)

    @torch.no_grad()
    def restore(self, trained: Trained) -> None:
        for name, value in self.values.items():
            trained.named[name].copy_(value)
        trained.gather()


def _root_mean_square(weights: Sequence[Tensor]) -> float:
    """Return the root mean square of all entries of the weights, by one read from the device."""
    squares = torch.stack([whole(w.detach().square().sum(dtype=torch.float64)) for w in weights])
    return math.sqrt(float(squares.sum()) / max(sum(w.numel() for w in weights), 1))


@torch.no_grad()
def _keep_zeros(params: Iterable[Tensor]) -> None:
    """Keep the zeros of matrices, by setting the gradients to zero there.

    The zeros were put there on purpose, such as by an earlier call. Adam does not move an
    entry whose gradients are all zero, nor does the perturbation.
    """
    for p in params:
        if p.ndim >= 2 and p.requires_grad and bool((p == 0).any()):
            kept = p != 0
            p.register_hook(  # type: ignore[no-untyped-call]
                lambda g, kept=kept: torch.where(kept, g, torch.zeros_like(g))
            )


def wide_mse(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error, in float32 or wider."""
    dtype = wide_dtype(torch, [output, target])
    return nn.functional.mse_loss(output.to(dtype), target.to(dtype))


def _loss(block: nn.Module, batch: Batch, *, autocast: bool) -> Tensor:
    """Return what the part of a batch adds to its mean loss."""
    if not batch.share:
        return torch.zeros((), device=batch.target.device)
    with torch.autocast(batch.target.device.type, torch.bfloat16, enabled=autocast):
        output = batch.run(block)
    return wide_mse(output, batch.target) * batch.share


def _backward(block: nn.Module, batch: Batch, trained: Trained, *, autocast: bool) -> Tensor:
    """Compute the gradients of the loss of a batch, and return what its part adds to the loss."""
    trained.gather()
    loss = _loss(block, batch, autocast=autocast)
    if batch.share:
        loss.backward()  # type: ignore[no-untyped-call]
    trained.reduce()
    return loss.detach()


def _step(optimizer: SparseOptimizer, backward: Callable[[], Tensor]) -> Tensor:
    """Take one step of the method and return the loss at x, without reading it."""
    optimizer.zero_grad()
    loss = backward()
    if optimizer.perturbs:
        with optimizer.perturbed():
            backward()
    if optimizer.projects:
        with optimizer.projected():
            backward()
    optimizer.step()
    return loss
