"""Prune the blocks of a model in order: dense pass, solver, pruned pass."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_core._dtypes import wide_dtype
from safe_core.reconstruction import batches_at_random, batches_in_order

from ..example_inputs import evaluation_mode
from .activations import Activations, prefetched
from .calls import BlockCalls, record
from .fingerprints import sample_of
from .memory import MemoryEstimate, TensorBytes, block_dtype, copy_with
from .report import BlockReport, Progress, PruningReport, TimeEstimate, WeightReport
from .resuming import block_digests, check_weights
from .solver import Batch, BlockProblem
from .statistics import InputRecorder, one_by_one
from .structure import (
    block_kind,
    block_name,
    check_alike,
    naming_other_blocks,
    ordinary_mode,
)
from .task import NO_CAST, Task, alike_samples, trainable_names
from .work_folder import WorkFolder

__all__ = ["Run"]

_UNUSED = "no matrix product uses it"


def _on_device(block: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a block on a device, with floating tensors in a dtype if one is given."""
    return copy_with(
        block,
        lambda t: t.detach().to(
            device, dtype if dtype is not None and t.is_floating_point() else t.dtype, copy=True
        ),
    )


class Run:
    """One run of pruning, from the plan of `plan_pruning`."""

    def __init__(
        self,
        task: Task,
        predicted: MemoryEstimate,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self.task = task
        self.settings = task.settings
        self.device = task.device
        self.predicted = predicted
        self.processes = task.processes
        self.progress = progress if task.processes.first else None
        self.dense = dict(task.dense)
        self.calls: BlockCalls
        self.inputs: Activations
        self.targets: Activations
        self._folder: WorkFolder | None = None
        self._started = time.monotonic()
        self._resumed = self._finished = 0

    def run(self, *, measure_memory: bool) -> PruningReport:
        """Prune every block, and report the result."""
        task, reports = self.task, []
        with self.processes.together(), ExitStack() as stack:
            self._enter_modes(stack)
            peak = stack.enter_context(_Peak(self.device, task, measure_memory))
            self._folder = self._open_folder(stack)
            (self._resumed, *_) = self.processes.gather(self._resumed)
            # All processes must take part in the first exchange of a device.
            self.processes.sum_([torch.zeros(1, device=self.device)])
            try:
                self._record(stack)
                for i in range(len(task.blocks)):
                    reports.append(self._resume(i) if i < self._resumed else self._prune(i))
            except BaseException as error:
                error.add_note(self._progress_note())
                raise
        if not any(report.weights for report in reports):
            raise ValueError(
                "model must use its weights by matrix products, so that they can be pruned, got "
                f"none that does: all of {', '.join(self.task.patterns)} stay dense"
            )
        seconds = time.monotonic() - self._started
        return PruningReport(tuple(reports), self.dense, self.predicted, peak.bytes, seconds)

    def measure(self) -> TimeEstimate:
        """Prune one block of each kind, restore it, and estimate the time of all blocks.

        Every kind gets inputs of the first blocks, whose values differ from those it would get
        in a run.
        """
        pairs = zip(self.task.blocks, self.task.weights, strict=True)
        kinds = [(block_kind(block), tuple(weights)) for block, weights in pairs]
        reports: dict[Any, BlockReport] = {}
        with self.processes.together(), ExitStack() as stack:
            self._enter_modes(stack)
            self._record(stack)
            recording = time.monotonic() - self._started
            for i, kind in enumerate(kinds):
                if kind not in reports:
                    reports[kind] = self._prune_and_restore(i)
        by_block = tuple(reports[kind].seconds for kind in kinds)
        return TimeEstimate(recording, by_block, tuple(reports.values()))

    def dense_problems(self) -> Iterator[BlockProblem]:
        """Yield every dense block with the statistics of its inputs, and prune none.

        The settings must have ``propagate="dense"``. The solver of the task decides what is
        recorded.
        """
        with self.processes.together(), ExitStack() as stack:
            self._enter_modes(stack)
            self._record(stack)
            for i in range(len(self.task.blocks)):
                self.calls.forget_placed()
                yield self._dense_pass(i)
                self.inputs, self.targets = self.targets, self.inputs

    def _prune_and_restore(self, i: int) -> BlockReport:
        block = self.task.blocks[i]
        dense = {key: p.detach().to("cpu", copy=True) for key, p in block.named_parameters()}
        try:
            return self._prune(i)
        finally:
            _write_back(block, dense)

    def _enter_modes(self, stack: ExitStack) -> None:
        stack.enter_context(ordinary_mode(self.device))
        stack.enter_context(evaluation_mode(self.task.model))
        if self.device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            stack.enter_context(torch.cuda.device(self.device))

    def _progress_note(self) -> str:
        """Say which blocks are pruned, for an error that ends the run."""
        name = self.task.name
        folder = "" if self._folder is None else f", also in {self._folder.path}"
        if not self._finished:
            return f"No block of {name or 'the model'} was pruned"
        last = block_name(name, self._finished - 1)
        return f"{block_name(name, 0)} to {last} are pruned and stay so{folder}; the rest is dense"

    # Beginning

    def _open_folder(self, stack: ExitStack) -> WorkFolder | None:
        if self.settings.work_dir is None or not self.processes.first:
            return None
        path, digests = Path(self.settings.work_dir), block_digests(self.task)
        folder = WorkFolder(path, self.task.described(), notes=digests)
        stack.callback(folder.close)
        self._resumed = len(folder.finished)
        check_weights(self.task, digests, folder.notes, folder.finished)
        return folder

    def _record(self, stack: ExitStack) -> None:
        """Run the model without its blocks, and record their arguments."""
        task, s = self.task, self.settings
        groups = alike_samples(task.samples)
        first = {members[0]: members for members in groups}
        held = {sample for members in task.held(groups) for sample in members}
        folder = None if s.work_dir is None else Path(s.work_dir)
        if folder is not None and s.offload == "disk":
            folder.mkdir(parents=True, exist_ok=True)  # on a machine without the first process
        own = "" if self.processes.first else f"-{self.processes.rank}"
        self.inputs = Activations(self.device, s.offload, folder, f"inputs{own}")
        stack.callback(self.inputs.close)

        def take(i: int, hidden: Tensor) -> None:
            if i in first:
                self.inputs.expect(first[i], hidden, held)
            if i in held:
                self.inputs.put([i], hidden)

        self.calls = record(task.model, task.name, task.blocks, task.samples, task.structure, take)
        self.targets = self.inputs.alike(f"targets{own}")
        stack.callback(self.targets.close)
        if s.two_streams:
            self.targets.copy_from(self.inputs)

    # One block

    def _prune(self, i: int) -> BlockReport:
        started = time.monotonic()
        block = self.task.blocks[i]
        self.calls.forget_placed()
        problem = self._dense_pass(i)
        unknown = self.task.solver.watches == "nothing"
        tokens = {
            key: None if unknown else int(found.tokens.min())
            for key, found in problem.statistics.items()
        }
        supports: dict[str, Tensor] = {}
        solved: dict[str, Tensor] = {}
        if problem.statistics:
            solved, masks = self.task.solver.prune(problem)
            supports = {key: masks[key] for key in tokens if key in masks}
        training_kept = problem.training_kept
        del problem  # with the dense copy
        before = {key: block.get_parameter(key).detach().to("cpu", copy=True) for key in solved}
        kept = torch.stack([m.sum() for m in supports.values()]).tolist() if supports else []
        weights = {
            key: WeightReport(mask.numel(), count, tokens[key])
            for (key, mask), count in zip(supports.items(), kept, strict=True)
        }
        try:
            _write_back(block, solved)
            solved.clear()
            report = self._finish(i, weights, training_kept, started)
        except BaseException:
            _write_back(block, before)
            raise
        self._finished = i + 1
        self._tell(i, None, report.loss, report.loss, report.relative_error, training_kept)
        return report

    def _finish(
        self,
        i: int,
        weights: dict[str, WeightReport],
        training_kept: bool | None,
        started: float,
    ) -> BlockReport:
        """Compute the outputs of the pruned block, and save it in the folder."""
        name, block = block_name(self.task.name, i), self.task.blocks[i]
        loss, relative = self._pruned_pass(i)
        seconds = time.monotonic() - started
        report = BlockReport(name, loss, relative, weights, seconds, training_kept)
        if self._folder is not None:
            digest = sample_of(block.parameters())
            unseen = [key for key in self.dense if key.startswith(f"{name}.")]
            entry = {**report._asdict(), "digest": digest, "unseen": unseen}
            self._folder.save(dict(block.named_parameters()), entry)
        self.processes.meet()  # so that all restore the block if it could not be saved
        return report

    def _resume(self, i: int) -> BlockReport:
        """Load a finished block, and compute its outputs."""
        s = self.settings
        if s.two_streams or s.propagate == "dense":
            self._dense_pass(i)
        entry = self._load(i)
        if s.propagate == "pruned":
            self._forward_in_place(i, self._copy(i), self.inputs)
        else:
            self.inputs, self.targets = self.targets, self.inputs
        del entry["digest"]
        self.dense |= dict.fromkeys(set(entry.pop("unseen")) - set(self.dense), _UNUSED)
        weights = {key: WeightReport(*w) for key, w in entry.pop("weights").items()}
        self._finished = i + 1
        return BlockReport(weights=weights, **entry)

    def _load(self, i: int) -> dict[str, Any]:
        """Load a finished block in all processes, and return its entry in the folder."""
        block, entry = self.task.blocks[i], {}
        if self._folder is not None:
            found, entry = self._folder.load(i), self._folder.finished[i]
        else:
            found = {key: torch.empty_like(p, device="cpu") for key, p in block.named_parameters()}
        self.processes.copy_(found[key] for key, _ in block.named_parameters())
        _write_back(block, found)
        return dict(self.processes.gather(entry)[0])

    def _tell(
        self,
        i: int,
        epoch: int | None,
        loss: float,
        sparse_loss: float | None = None,
        error: float | None = None,
        training_kept: bool | None = None,
    ) -> None:
        if self.progress is None:
            return
        blocks, epochs = len(self.task.blocks), self.task.solver.epochs
        at = Progress(i, blocks, epoch, epochs, loss, 0.0, sparse_loss, error, training_kept)
        rate = (time.monotonic() - self._started) / (at.done - self._resumed)
        self.progress(replace(at, seconds_left=rate * (at.blocks - at.done)))

    # Passes

    def _copy(self, i: int, dtype: torch.dtype | None = None) -> nn.Module:
        return _on_device(self.task.blocks[i], self.device, dtype)

    def _call(self, i: int, arguments: tuple[Any, Any], block: nn.Module) -> Tensor:
        args, kwargs = arguments
        return self.task.structure.output(i, block(*args, **kwargs))

    def _forward(
        self, i: int, block: nn.Module, source: Activations, seen: InputRecorder | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Run a block on all samples and yield its outputs, which must be finite."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        batches = batches_in_order(self.task.held(self.calls.groups), self.settings.batch_size)
        for samples, hidden in prefetched(batches, source.take, self.device):
            arguments = self.calls.arguments(i, samples, hidden, NO_CAST)
            with torch.no_grad(), nullcontext() if seen is None else seen:
                output = self._call(i, arguments, block)
                finite &= output.isfinite().all()
            # Blocks with equal parameters may differ in an attribute, such as a stride, and
            # learn_structure ran only one of them.
            with naming_other_blocks(self.task.model, self.task.name):
                check_alike(block_name(self.task.name, i), hidden, output)
            yield samples, output
        if not bool(finite):
            raise ValueError(
                "batches must lead to finite activations, got others behind "
                f"{block_name(self.task.name, i)}"
            )

    def _forward_in_place(self, i: int, block: nn.Module, stream: Activations) -> None:
        for samples, output in self._forward(i, block, stream):
            stream.put(samples, output)

    def _dense_pass(self, i: int) -> BlockProblem:
        """Compute the targets, and record the inputs of the weights."""
        s, weights, watches = self.settings, self.task.weights[i], self.task.solver.watches
        dense = self._copy(i)
        records = watches != "nothing" or None in weights.values()
        if records:
            one_by_one(dense)
        if s.two_streams:
            self._forward_in_place(i, dense, self.targets)
        seen = InputRecorder(dense, weights, watches)
        if records or not s.two_streams:
            outputs = self._forward(i, dense, self.inputs, seen if records else None)
            for samples, output in outputs:
                if not s.two_streams:
                    self.targets.put(samples, output)
        seen.sum_over(self.processes)
        statistics = seen.statistics()
        prefix = block_name(self.task.name, i)
        self.dense |= {f"{prefix}.{k}": _UNUSED for k in weights if k not in statistics}
        return BlockProblem(
            name=prefix,
            pattern=self.task.pattern_of(i, statistics),
            statistics=statistics,
            trainable=trainable_names(self.task, i, statistics),
            dense=dense,
            dtype=block_dtype(self.task.blocks[i]),
            device=self.device,
            batches=functools.partial(self._batches, i),
            copy=functools.partial(self._copy, i),
            report=functools.partial(self._tell, i),
            processes=self.processes,
            shard=s.shard,
        )

    def _batches(
        self, i: int, size: int, dtype: torch.dtype
    ) -> tuple[Callable[[int], Iterator[Batch]], int]:
        """Return a function of the epoch that yields its batches, and their number."""
        groups, cast = self.calls.groups, (block_dtype(self.task.blocks[i]), dtype)
        shares, rank = self.task.shares, self.processes.rank

        def load(parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
            streams = (self.inputs, self.targets)
            (hidden, sent), (target, more) = (
                stream.take_part(parts, rank, shares.owners) for stream in streams
            )
            self.processes.move([*sent, *more])
            return hidden, target

        def epoch(k: int) -> Iterator[Batch]:
            order = batches_at_random(groups, size, seed=self.settings.seed, block=i, epoch=k)
            parts = map(shares.parts, order)
            for samples, (hidden, target) in prefetched(parts, load, self.device):
                mine = samples[rank]
                arguments: tuple[Any, Any] = (), {}
                if mine:
                    arguments = self.calls.arguments(i, mine, hidden.to(dtype), cast)
                run = functools.partial(self._call, i, arguments)
                yield Batch(run, target, len(mine) / sum(map(len, samples)))

        return epoch, len(batches_in_order(groups, size))

    def _pruned_pass(self, i: int) -> tuple[float, float]:
        """Return the error of the pruned block, and keep its outputs for the next block."""
        s = self.settings
        error = torch.zeros(3, dtype=torch.float64, device=self.device)
        for samples, output in self._forward(i, self._copy(i), self.inputs):
            dtype = wide_dtype(torch, [output])
            target = self.targets.take(samples).to(dtype)
            error[0] += (output.to(dtype) - target).square().sum()
            error[1] += target.square().sum()
            error[2] += target.numel()
            if s.propagate == "pruned":
                self.inputs.put(samples, output)
        if s.propagate == "dense":
            self.inputs, self.targets = self.targets, self.inputs
        self.processes.sum_([error])
        wrong, size, entries = error.tolist()
        return wrong / max(1, entries), wrong / size if size else 0.0


def _write_back(block: nn.Module, solved: Mapping[str, Tensor]) -> None:
    for key, p in block.named_parameters():
        if key in solved:
            # A model made in inference mode can be changed in that mode only.
            with torch.inference_mode(p.is_inference()), torch.no_grad():
                p.copy_(solved[key])


class _Peak:
    """Measure the peak of memory in this context, relative to the start."""

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
