"""Take the steps between dual updates by replaying a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_core.backends.torch_accelerator import on_host
from safe_core.motion import is_measured

from .after_finalize import warn_of_moved_zeros
from .optimizer import SparseOptimizer
from .run import Run
from .scheduled import Scheduled
from .step import warn_of_long_run

__all__ = ["CapturedStep"]

# Steps of a kind that run as usual before one is recorded. They create the state of the base
# optimizer, and let libraries choose their kernels.
_WARM_UP = 3
# Options that no kernel of a recorded step reads. A new sparsity acts at the next dual update.
_NOT_IN_A_GRAPH = ("params", "name", "sparsity", "sparsify")


class CapturedStep:
    """A training step that is replayed as a CUDA graph wherever its work is the same.

    A graph holds the forward and backward passes, the perturbation, the base step and the pull. It
    starts hundreds of kernels at once, which pays where they are short. Call the object once in
    each step, with new data in the same tensors::

        def step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            with optimizer.perturbed():
                loss = loss_fn(model(x), y)
                loss.backward()
            optimizer.step()
            return loss

        captured = CapturedStep(optimizer, step)
        for inputs, targets in batches:
            x.copy_(inputs)
            y.copy_(targets)
            loss = captured()

    ``step`` is called as it is for the first three steps, for those with a dual update, and for
    those that measure the length of a step. Otherwise it is called once to record a graph, and then
    the graph is replayed. Steps that perturb and steps that do not have graphs of their own, and
    new ones are recorded after three more steps where parameters are frozen, moved or replaced. The
    results are those of calling ``step`` itself, also in turns with it.

    The radius and the penalty follow their schedules. Everything else in the graph is what it was
    when it was recorded: Python code does not run again, and a number of Python does not change. A
    tensor that takes the place of ``x`` is never read. So hold a learning rate that changes in a
    tensor of the device, call its scheduler outside of ``step``, and clear the gradients within it.
    A base that has the option needs ``capturable=True``. ``step`` must read no value on the host.

    With fp16, ``step`` may call ``scaler.step(optimizer)`` and ``scaler.update()`` of a
    `torch.amp.GradScaler`. The base must skip the steps with overflow by itself, as
    ``Adam(fused=True, capturable=True)`` does. Before the next step the host then reads whether
    the step was skipped, as the scaler does without a graph. Otherwise it waits for nothing.

    Parameters
    ----------
    optimizer : SparseOptimizer
        Its parameters must lie on one CUDA device and must not be sharded.
    step : callable
        Takes one whole step of ``optimizer``, without arguments. What it returns is memory of the
        graph, which the next replay overwrites: clone tensors to keep them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit. Calling the object raises a ValueError if ``step`` did not take
        one step, if an option of a param group that is a number has changed since the recording,
        or if the base cannot skip steps with overflow.
    """

    def __init__(self, optimizer: SparseOptimizer, step: Callable[[], Any]) -> None:
        if not isinstance(optimizer, SparseOptimizer):
            raise TypeError(f"optimizer must be a SparseOptimizer, got {type(optimizer)!r}")
        if not callable(step):
            raise TypeError(f"step must be a function without arguments, got {type(step)!r}")
        self._optimizer = optimizer
        self._run: Run = optimizer._run
        self._function = step
        _refuse_unfit(self._run, optimizer)
        self._device = self._run.trainable()[0].device
        self._graphs = Graphs(self._device)
        self._scheduled = Scheduled(self._run, self._device)
        self._state = _StateInPlace(self._run)
        self._recorded: dict[Hashable, _Recording] = {}
        self._seen: Counter[Hashable] = Counter()

    def __call__(self) -> Any:
        """Take one step, and return what ``step`` returns."""
        run = self._run
        self._optimizer._phases.refuse_within_block("a captured step")
        kind = self._kind()
        if self._state.has_lost() or self._has_other_constants(kind):
            # What the graphs read is gone, as after loading a state from before the first step.
            self._forget()
        if kind is None or self._seen[kind] < _WARM_UP:
            before = run.steps
            result = self._take_as_usual()
            self._seen[kind] += run.steps - before  # a step that was skipped creates no state
            return result
        if kind in self._recorded:
            self._refuse_other_options(self._recorded[kind])
        self._state.put_back()
        self._scheduled.prepare()
        if kind in self._recorded:
            run.steps += 1
        else:  # recording counts its step
            self._recorded[kind] = self._record()
        recording = self._recorded[kind]
        warn_of_moved_zeros(run)
        recording.replay()
        if recording.can_skip:
            run.count_later(self._scheduled.read_steps)
        for p, gradient in recording.gradients:
            p.grad = gradient
        run.gradients.note(run.active())
        warn_of_long_run(run)
        return recording.result

    def _kind(self) -> Hashable:
        """Return what steps with the same graph share; None for a step that runs as usual."""
        run = self._run
        sparse = run.sparse()
        updates = not run.frozen and run.due(sparse)
        if updates or (run.method.measures_steps and is_measured(run.steps)):
            return None
        params = run.trainable()
        buffers = [] if run.model is None else list(run.model.buffers())
        # A graph reads and writes addresses, which change where a model moves to other memory.
        places = tuple((id(x), x.data_ptr()) for x in (*params, *buffers))
        return run.plan, run.perturbed is not None, places

    def _forget(self) -> None:
        """Drop all graphs, so that steps run as usual before others are recorded."""
        self._recorded.clear()
        self._seen.clear()
        self._state = _StateInPlace(self._run)
        self._scheduled = Scheduled(self._run, self._device)

    def _take_as_usual(self) -> Any:
        before = self._run.steps
        with self._graphs.beside():
            result = self._function()
        self._check_count(before, least=0)  # a gradient scaler may skip the step
        return result

    def _record(self) -> _Recording:
        run, before = self._run, self._run.steps
        versions = _versions(run)
        for p in run.trainable():
            p.grad = None  # the graph allocates its own
        run.scheduled = self._scheduled

        def whole() -> Any:
            self._scheduled.look_up()
            result = self._function()
            self._state.put_back()
            self._scheduled.count()
            return result

        try:
            replay, result = self._graphs.record(whole)
            self._check_count(before, least=1)
            _refuse_changed(versions, _versions(run))
        except BaseException as error:
            error.add_note(
                "This happened while CapturedStep recorded the step as a CUDA graph, where neither "
                "the step nor the base may read a value on the host."
            )
            # Nothing of the step has run: its new tensors hold no values.
            self._state.put_back(discard=True)
            run.steps = before
            raise
        finally:
            run.scheduled = None
            can_skip = self._scheduled.end()
        gradients = [(p, p.grad) for p in run.trainable()]
        return _Recording(replay, result, gradients, _constants(run), can_skip)

    def _check_count(self, before: int, least: int) -> None:
        taken = self._run.steps - before
        if not least <= taken <= 1:
            raise ValueError(
                f"step must take one step of the optimizer in each call, got {taken} steps; a "
                "closure goes into it, as lambda: optimizer.step(closure)"
            )

    def _has_other_constants(self, kind: Hashable) -> bool:
        """Return whether a group has gained or lost a constant, such as a tensor for a number."""
        known = self._recorded.get(kind)
        return known is not None and known.constants.keys() != _constants(self._run).keys()

    def _refuse_other_options(self, recording: _Recording) -> None:
        now = _constants(self._run)
        for (group, name), old in recording.constants.items():
            if now[group, name] != old:
                raise ValueError(
                    f"{name} of a param group must stay {old!r}, which the CUDA graph holds, got "
                    f"{now[group, name]!r}: hold an option of the base that changes in a tensor of "
                    "the device, make rho or penalty a schedule, or make a new CapturedStep"
                )


class _Recording(NamedTuple):
    """A graph, and what `CapturedStep` needs to replay it.

    Attributes
    ----------
    replay : callable
    result : object
        What the recorded step returned.
    gradients : list of (parameter, tensor or None)
        The gradients that a replay leaves, so that a user can read them.
    constants : dict of (int, str) to object
        The options of the param groups that are constants of the graph.
    can_skip : bool
        Whether a gradient scaler skips the step where there is overflow.
    """

    replay: Callable[[], None]
    result: Any
    gradients: list[tuple[Tensor, Tensor | None]]
    constants: dict[tuple[int, str], Any]
    can_skip: bool


class Graphs:
    """Record and replay CUDA graphs on a stream of their own, with one pool of memory.

    The graphs share the pool, because no two of them run at once and none reads what another left
    in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run on the stream that records, so that what is created there belongs to it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record the kernels of a function, which do not run; return a replay and its result."""
        graph = torch.cuda.CUDAGraph()
        # Threads of the user, such as those that pin memory of batches, may go on meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = function()
        return graph.replay, result


class _StateInPlace:
    """Keep the tensors of the state at the addresses that the graphs know.

    A step may put a new tensor in the place of another, and loading a state does so for all of
    them and for the options of the param groups. The values are copied to the old tensor.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._held: dict[tuple[bool, Any, str], Tensor] = {}

    def has_lost(self) -> bool:
        """Whether an entry is gone that was there before."""
        run = self._run
        states = {True: run.state, False: run.base.state}
        groups = dict(enumerate(run.groups))
        for is_ours, owner, key in self._held:
            part = groups if isinstance(owner, int) else states[is_ours]
            if not torch.is_tensor(part.get(owner, {}).get(key)):
                return True
        return False

    @torch.no_grad()
    def put_back(self, *, discard: bool = False) -> None:
        """Copy new tensors to the places of those that were first seen, or discard them."""
        run = self._run
        for part in (run.state, run.base.state, dict(enumerate(run.groups))):
            for owner, entries in part.items():
                for key, value in entries.items():
                    if torch.is_tensor(value):
                        held = self._held.setdefault((part is run.state, owner, key), value)
                        if held is not value and not discard:
                            held.copy_(value)
                        entries[key] = held


def _refuse_unfit(run: Run, optimizer: SparseOptimizer) -> None:
    """Raise unless the parameters can be those of a graph."""
    params = run.trainable()
    if not params:
        raise ValueError("optimizer must hold a parameter that requires gradients, got none")
    devices = sorted({str(p.device) for p in params})
    elsewhere = any(on_host(p) or p.is_meta for p in params)
    if run.sharded or len(devices) > 1 or elsewhere:
        kind = "sharded parameters" if run.sharded else f"parameters on {', '.join(devices)}"
        raise ValueError(f"optimizer must hold plain parameters on one CUDA device, got {kind}")
    if any(evaluation.point.is_projected for evaluation in run.plan.evaluations):
        raise ValueError(
            "method must not take gradients at a projected point, because the host waits for each "
            f"projection, got {run.method!r}"
        )
    if not all(group.get("capturable", True) for group in run.groups):
        raise ValueError(
            f"base must be made with capturable=True, which {type(run.base).__name__} needs in a "
            "CUDA graph, got False"
        )
    if optimizer._phases.replay_rng:
        raise ValueError(
            "replay_rng of the optimizer must be False, because a CUDA graph cannot set the "
            "states of random number generators, got True"
        )


def _constants(run: Run) -> dict[tuple[int, str], Any]:
    """Return the options of the param groups that a graph holds as constants."""
    found = {
        (i, name): _plain(value)
        for i, group in enumerate(run.groups)
        for name, value in group.items()
        if name not in _NOT_IN_A_GRAPH
    }
    return {key: value for key, value in found.items() if value is not None}


def _versions(run: Run) -> dict[tuple[int, str], int]:
    """Return how often each tensor of the param groups was changed."""
    groups = enumerate(run.groups)
    options = [((i, name), value) for i, group in groups for name, value in group.items()]
    return {key: value._version for key, value in options if torch.is_tensor(value)}


def _refuse_changed(before: dict[tuple[int, str], int], after: dict[tuple[int, str], int]) -> None:
    """Raise if recording a step changed an option, which a replay could not do in Python."""
    for (group, name), version in before.items():
        if after.get((group, name)) != version:
            raise ValueError(
                f"step must not change {name} of a param group, got another value after it: call "
                "the scheduler after the captured step, not within it"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_plain, value))
    if torch.is_tensor(value):  # a graph reads its memory only if it lies on the device
        return value.tolist() if on_host(value) else None
    is_constant = isinstance(value, bool | int | float | str) or callable(value)  # a schedule
    return value if is_constant else None
