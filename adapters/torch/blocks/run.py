"""The walk over the blocks of a model: dense pass, solver, pruned pass, one block at a time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safe_core._dtypes import wide_dtype
from safe_core.layout import Layout
from safe_core.reconstruction import batches_at_random, batches_in_order
from safe_core.solvers.gram import gram_or_identity

from .activations import Activations, prefetched
from .calls import BlockCalls, record
from .memory import MemoryEstimate, TensorBytes, hollow
from .reconstruction import SafeReconstruction
from .report import BlockReport, Progress, PruningReport, WeightReport
from .resume import WorkFolder, sample_of
from .statistics import InputStatistics, each_slice, inputs_of, one_by_one
from .structure import evaluated, inside
from .task import NO_CAST, Task, own_dtype, trained_by_safe

__all__ = ["Run"]


def _on_device(block: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a block on a device, in its own dtypes or with all floating tensors in one."""
    return hollow(
        block,
        lambda t: t.detach().to(
            device, dtype if dtype is not None and t.is_floating_point() else t.dtype, copy=True
        ),
    )


class Run:
    """One walk over the blocks, made by the plan of `plan_pruning`."""

    def __init__(
        self,
        task: Task,
        predicted: MemoryEstimate,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self.task = task
        self.settings = task.settings
        self.device = task.settings.device
        self.predicted = predicted
        self.progress = progress
        self.unseen: list[str] = []
        self.calls: BlockCalls
        self.inputs: Activations
        self.targets: Activations
        self._folder: WorkFolder | None = None
        self._started = time.monotonic()
        self._resumed = self._finished = 0

    def run(self, *, measure_memory: bool) -> PruningReport:
        """Prune every block, and say what became of it."""
        task, reports = self.task, []
        with ExitStack() as stack:
            stack.enter_context(evaluated(task.model))
            if self.device.type == "cuda":
                torch.cuda.init()  # type: ignore[no-untyped-call]
                stack.enter_context(torch.cuda.device(self.device))
            peak = stack.enter_context(_Peak(self.device, task, measure_memory))
            self._folder = self._open_folder(stack)
            try:
                self._record(stack)
                for i in range(len(task.blocks)):
                    finished = self._folder is not None and i < len(self._folder.finished)
                    reports.append(self._take_up(i) if finished else self._prune(i))
            except BaseException as error:
                error.add_note(self._kept())
                raise
        seconds = time.monotonic() - self._started
        return PruningReport(
            tuple(reports), tuple(self.unseen), self.predicted, peak.bytes, seconds
        )

    def _kept(self) -> str:
        name = self.task.name
        folder = "" if self._folder is None else f", also in {self._folder.path}"
        if not self._finished:
            return f"No block of {name or 'the model'} was pruned"
        last = inside(name, self._finished - 1)
        return f"{inside(name, 0)} to {last} are pruned and stay so{folder}; the rest is dense"

    # Beginning

    def _open_folder(self, stack: ExitStack) -> WorkFolder | None:
        path = self.settings.work_dir
        if path is None:
            return None
        digests = [sample_of(block.parameters()) for block in self.task.blocks]
        folder = WorkFolder(path, self.task.described(), notes=digests)
        stack.callback(folder.close)
        self._resumed = len(folder.finished)
        for i, (now, then) in enumerate(zip(digests, folder.notes, strict=True)):
            pruned = i < self._resumed and now == folder.finished[i]["digest"]
            needed = self.settings.two_streams or self.settings.propagate == "dense"
            if now != then and (not pruned or needed):
                state = "it was, when dense" if pruned else "it was"
                raise ValueError(
                    f"model must be as {state} when the run in {path} was begun, got other weights "
                    f"in {inside(self.task.name, i)}: load the dense model again"
                )
        return folder

    def _record(self, stack: ExitStack) -> None:
        """Run the model around its blocks, and keep what they take."""
        task, s = self.task, self.settings
        alike: dict[Any, list[int]] = {}
        for i, sample in enumerate(task.samples):
            shapes = tuple((k, v.shape) for k, v in sample.items() if torch.is_tensor(v))
            alike.setdefault(shapes, []).append(i)
        first = {members[0]: members for members in alike.values()}
        self.inputs = Activations(self.device, s.offload, s.work_dir, "inputs")
        stack.callback(self.inputs.close)

        def take(i: int, hidden: Tensor) -> None:
            if i in first:
                self.inputs.expect(first[i], hidden)
            self.inputs.put([i], hidden)

        self.calls = record(task.model, task.name, task.blocks, task.samples, task.structure, take)
        self.targets = self.inputs.alike("targets")
        stack.callback(self.targets.close)
        if s.two_streams:
            self.targets.copy_from(self.inputs)

    # One block

    def _prune(self, i: int) -> BlockReport:
        started = time.monotonic()
        block = self.task.blocks[i]
        self.calls.forget_placed()
        statistics, dense = self._dense_pass(i)
        unknown = self.settings.watched == "roles"
        tokens = {
            key: None if unknown else int(found.tokens.min()) for key, found in statistics.items()
        }
        supports: dict[str, Tensor] = {}
        solved: dict[str, Tensor] = {}
        if statistics:
            solved, supports = (
                self._reconstruct(i, statistics)
                if dense is None
                else self._solve_layers(i, statistics, dense)
            )
        del dense, statistics
        before = {key: block.get_parameter(key).detach().to("cpu", copy=True) for key in solved}
        kept = torch.stack([m.sum() for m in supports.values()]).tolist() if supports else []
        weights = {
            key: WeightReport(mask.numel(), count, tokens[key])
            for (key, mask), count in zip(supports.items(), kept, strict=True)
        }
        try:
            _write_back(block, solved)
            solved.clear()
            report = self._finish(i, weights, started)
        except BaseException:
            _write_back(block, before)
            raise
        self._finished = i + 1
        self._tell(i, None, report.loss)
        return report

    def _finish(self, i: int, weights: dict[str, WeightReport], started: float) -> BlockReport:
        """Bring the hidden states behind the pruned block, and keep it in the folder."""
        name, block = inside(self.task.name, i), self.task.blocks[i]
        loss, relative = self._pruned_pass(i)
        report = BlockReport(name, loss, relative, weights, time.monotonic() - started)
        if self._folder is not None:
            digest = sample_of(block.parameters())
            unseen = [key for key in self.unseen if key.startswith(f"{name}.")]
            entry = {**report._asdict(), "digest": digest, "unseen": unseen}
            self._folder.save(dict(block.named_parameters()), entry)
        return report

    def _take_up(self, i: int) -> BlockReport:
        """Load a finished block, and bring the hidden states behind it."""
        assert self._folder is not None  # there are finished blocks
        block, s = self.task.blocks[i], self.settings
        if s.two_streams or s.propagate == "dense":
            self._dense_pass(i)
        loaded = self._folder.load(i)
        with torch.no_grad():
            for key, p in block.named_parameters():
                p.copy_(loaded[key])
        if s.propagate == "pruned":
            self._forward_in_place(i, self._copy(i), self.inputs)
        else:
            self.inputs, self.targets = self.targets, self.inputs
        entry = dict(self._folder.finished[i])
        del entry["digest"]
        self.unseen = sorted({*self.unseen, *entry.pop("unseen")})
        weights = {key: WeightReport(*w) for key, w in entry.pop("weights").items()}
        self._finished = i + 1
        return BlockReport(weights=weights, **entry)

    def _tell(self, i: int, epoch: int | None, loss: float) -> None:
        if self.progress is None:
            return
        solver = self.settings.solver
        epochs = solver.epochs if solver.trains else 0
        at = Progress(i, len(self.task.blocks), epoch, epochs, loss, 0.0)
        rate = (time.monotonic() - self._started) / (at.done - self._resumed)
        self.progress(replace(at, seconds_left=rate * (at.blocks - at.done)))

    # Passes

    def _copy(self, i: int, dtype: torch.dtype | None = None) -> nn.Module:
        return _on_device(self.task.blocks[i], self.device, dtype)

    def _call(self, arguments: tuple[Any, Any], block: nn.Module) -> Tensor:
        args, kwargs = arguments
        return self.task.structure.output(block, block(*args, **kwargs))

    def _forward(
        self, i: int, block: nn.Module, source: Activations, seen: inputs_of | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Run a block on all samples; what it returns, batch by batch, and finite."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        batches = batches_in_order(self.calls.groups, self.settings.batch_size)
        for samples, hidden in prefetched(batches, source.take, self.device):
            arguments = self.calls.arguments(i, samples, hidden, NO_CAST)
            with torch.no_grad(), nullcontext() if seen is None else seen:
                output = self._call(arguments, block)
                finite &= output.isfinite().all()
            yield samples, output
        if not bool(finite):
            raise ValueError(
                "batches must lead to finite activations, got others behind "
                f"{inside(self.task.name, i)}"
            )

    def _forward_in_place(self, i: int, block: nn.Module, stream: Activations) -> None:
        for samples, output in self._forward(i, block, stream):
            stream.put(samples, output)

    def _dense_pass(self, i: int) -> tuple[dict[str, InputStatistics], nn.Module | None]:
        """Compute the targets, and watch the inputs of the weights.

        The dense block comes back where a layer-wise solver goes on with it.
        """
        s, weights = self.settings, self.task.weights[i]
        dense = self._copy(i)
        watches = s.watched != "roles" or None in weights.values()
        if watches:
            one_by_one(dense)
        if s.two_streams:
            self._forward_in_place(i, dense, self.targets)
        seen = inputs_of(dense, weights, s.watched)
        if watches or not s.two_streams:
            watched = self._forward(i, dense, self.inputs, seen if watches else None)
            for samples, output in watched:
                if not s.two_streams:
                    self.targets.put(samples, output)
        statistics = seen.statistics()
        self.unseen += [
            f"{inside(self.task.name, i)}.{key}" for key in weights if key not in statistics
        ]
        return statistics, None if s.solver.trains else dense

    def _pruned_pass(self, i: int) -> tuple[float, float]:
        """Compute the error of the pruned block and, for the next, what it returns."""
        s = self.settings
        error = torch.zeros(2, dtype=torch.float64, device=self.device)
        entries = 0
        for samples, output in self._forward(i, self._copy(i), self.inputs):
            dtype = wide_dtype(torch, [output])
            target = self.targets.take(samples).to(dtype)
            error[0] += (output.to(dtype) - target).square().sum()
            error[1] += target.square().sum()
            entries += target.numel()
            if s.propagate == "pruned":
                self.inputs.put(samples, output)
        if s.propagate == "dense":
            self.inputs, self.targets = self.targets, self.inputs
        wrong, size = error.tolist()
        return wrong / max(1, entries), wrong / size if size else 0.0

    # Solvers

    def _reconstruct(
        self, i: int, statistics: Mapping[str, InputStatistics]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """SAFE on the whole block: its parameters, in float32 or wider, and supports."""
        s, home = self.settings, self.task.blocks[i]
        solver: SafeReconstruction = s.solver
        own, wide = own_dtype(home), wide_dtype(torch, list(home.parameters()))
        cast = own, wide
        block = self._copy(i, wide)
        params = dict(block.named_parameters())
        trained = trained_by_safe(self.task, i, statistics)
        for key, p in params.items():
            p.requires_grad_(key in trained)
        importance = None
        if solver.importance is not None:
            importance = {
                key: found.importance(tuple(params[key].shape)) for key, found in statistics.items()
            }
        groups, size = self.calls.groups, solver.batch_size

        def load(samples: Sequence[int]) -> tuple[Tensor, Tensor]:
            return self.inputs.take(samples), self.targets.take(samples)

        def epoch(k: int) -> Iterator[tuple[Callable[[nn.Module], Tensor], Tensor]]:
            batches = batches_at_random(groups, size, seed=s.seed, block=i, epoch=k)
            for samples, (hidden, target) in prefetched(batches, load, self.device):
                arguments = self.calls.arguments(i, samples, hidden.to(wide), cast)
                yield functools.partial(self._call, arguments), target

        supports = solver.solve(
            block,
            {key: found.layout for key, found in statistics.items()},
            importance,
            s.pattern,
            epoch,
            len(batches_in_order(groups, size)),
            lambda k, loss: self._tell(i, k, loss),
            name=inside(self.task.name, i),
            autocast=solver.autocasts(self.device, own),
        )
        return {key: p.detach() for key, p in params.items() if p.requires_grad}, supports

    def _solve_layers(
        self, i: int, statistics: dict[str, InputStatistics], dense: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A layer-wise solver on each weight, which takes the place of the dense one.

        What is known of a weight's inputs is dropped with it.
        """
        values, supports = {}, {}
        for key in list(statistics):
            found = statistics.pop(key)
            grams = found.squares
            assert grams is not None  # asked for

            def solve(
                weight: Tensor, layout: Layout, expert: int, key: str = key, grams: Tensor = grams
            ) -> tuple[Tensor, Tensor]:
                gram = gram_or_identity(grams[expert])
                result = self.settings.solver(weight, gram, self.settings.pattern, layout=layout)
                _check_result(f"{inside(self.task.name, i)}.{key}", weight, result)
                return result[0], result[1]

            values[key] = dense.get_parameter(key).detach()
            with torch.no_grad():
                wide = wide_dtype(torch, [values[key]])
                solved, supports[key] = each_slice(values[key].to(wide), found.layout, solve)
                values[key].copy_(solved)
        return values, supports


def _write_back(block: nn.Module, solved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, p in block.named_parameters():
            if key in solved:
                p.copy_(solved[key])


def _check_result(name: str, weight: Tensor, result: Any) -> None:
    """Refuse what a layer-wise solver must not return."""
    values, support = result
    if values.shape != weight.shape or support.shape != weight.shape:
        wrong = f"shapes {tuple(values.shape)} and {tuple(support.shape)}"
    elif support.dtype != torch.bool:
        wrong = f"a support of {support.dtype}"
    elif not bool(values.isfinite().all()):
        wrong = "values that are not finite"
    elif bool((values[~support] != 0).any()):
        wrong = "values that are not zero off the support"
    else:
        return
    raise ValueError(
        f"solver must return finite values {tuple(weight.shape)} for {name} that are zero off a "
        f"bool support, got {wrong}"
    )


class _Peak:
    """The peak of memory within, over that at the start."""

    def __init__(self, device: torch.device, task: Task, on_cpu: bool) -> None:
        self.bytes: int | None = None
        self._device = device
        self._counted: TensorBytes | None = None
        if on_cpu and device.type == "cpu":
            inputs = [v for x in task.samples for v in x.values() if torch.is_tensor(v)]
            own = [*task.model.parameters(), *task.model.buffers(), *inputs]
            self._counted = TensorBytes(own)

    def __enter__(self) -> _Peak:
        if self._counted is not None:
            self._counted.__enter__()  # type: ignore[no-untyped-call]
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._counted is not None:
            self._counted.__exit__(*error)  # type: ignore[no-untyped-call]
            self.bytes = self._counted.peak
        elif self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
