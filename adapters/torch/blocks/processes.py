"""Processes that prune one model together: sums, copies, and errors that end all of them.

`Processes` is one process, which has nothing to exchange. If `torch.distributed` is initialised,
its subclass meets the other processes before each exchange. There a process learns whether
another has failed, so that none waits for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...memory_errors import lacks_memory

__all__ = ["Move", "OtherProcessError", "Processes", "processes_of"]

# The others wait while one process solves its layers or saves the model. A process that ends
# closes its connections, which ends the wait at once.
_PATIENCE = timedelta(hours=12)
_FAREWELL = timedelta(seconds=10)  # a process that fails waits so long for the others to hear it
_MESSAGE = 2048  # bytes of an error's message

# States in which processes meet; of several, the largest counts.
_READY, _INCOMPLETE, _FAILED = 0, 1, 2


class OtherProcessError(RuntimeError):
    """Another process of the run has failed or ended.

    Attributes
    ----------
    explained : bool
        Whether the message holds that of the other process.
    """

    def __init__(self, message: str, *, explained: bool) -> None:
        super().__init__(message)
        self.explained = explained


class Move(NamedTuple):
    """A tensor that one process sends to another; None in all other processes."""

    source: int
    target: int
    tensor: Tensor | None


class Processes:
    """The processes of a run: one, in which every exchange is done already.

    Attributes
    ----------
    rank, size : int
    reports : bool
        Whether this process is the one to show an error that ends the run.

    Examples
    --------
    >>> one, total = Processes(), torch.ones(2)
    >>> one.sum_([total])
    >>> one.gather("a"), total.tolist()
    (['a'], [1.0, 1.0])
    """

    rank: int = 0
    size: int = 1
    reports: bool = True

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all processes if one raises an error in this context."""
        yield

    def meet(self) -> None:
        """Wait for all processes.

        Raises
        ------
        OtherProcessError
            If one of them has failed. All methods that exchange something raise it.
        """

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all processes pass, in their order. They are pickled."""
        return [value]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Check that all processes pass the same values.

        Raises
        ------
        ValueError
            If not. Every process raises it.
        """
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, 1):
            for key in first:
                if other[key] != first[key]:
                    raise ValueError(
                        f"{key} must be the same in all processes, got another in process {rank} "
                        "than in process 0; distributed=False prunes in each process alone"
                    )

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place."""

    def complete_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Fill in a gradient of zeros where only other processes have one."""

    def sum_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of parameters over all processes.

        A parameter stays without a gradient if it has none in any process.
        """

    def copy_(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Overwrite tensors by those of one process."""

    def move(self, moves: Sequence[Move]) -> None:
        """Send and receive tensors. Every process passes all moves, in one order."""


class _Group(Processes):
    """All processes of `torch.distributed`."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # An error may come between meeting and an exchange, so they must not share a group.
        self._control = dist.new_group(timeout=_PATIENCE, backend="gloo")
        self._data = dist.new_group(backend="gloo")
        self._depth, self._ended = 0, False

    def _of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """Return the group for a tensor: the default one for those of GPUs."""
        return self._data if tensor.device.type == "cpu" else None

    # Errors

    @contextmanager
    def together(self) -> Iterator[None]:
        self._ended, self.reports = self._ended and self._depth > 0, True
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if isinstance(error, OtherProcessError) and not error.explained:
                self.reports = self.first
            elif not self._ended:
                self._announce(error)
            raise
        finally:
            self._depth -= 1

    def _announce(self, error: BaseException) -> None:
        """Tell the others that this process has failed, when they next meet."""
        self._ended = True
        failed = self._signal(_FAILED)
        kind, said = type(error).__name__, str(error)
        text = said if isinstance(error, ValueError) else f"{kind}: {said}" if said else kind
        try:
            # The processes that fail and those that do not take part in the same two exchanges,
            # which go on in the background after this process has stopped to wait.
            meeting = dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._control, async_op=True)
            saying = dist.all_gather(
                self._letters(), _letter(text), group=self._control, async_op=True
            )
            meeting.wait(_FAREWELL)
            saying.wait(_FAREWELL)
        except RuntimeError:  # the others have ended, or are at work for long
            return
        self.reports = int(failed[1]) == self.size - self.rank

    def _signal(self, state: int) -> Tensor:
        """Return a state and, if this process has failed, a number that is largest for rank 0."""
        failed = self.size - self.rank if state == _FAILED else 0
        return torch.tensor([state, failed], device="cpu")

    def _letters(self) -> list[Tensor]:
        return [_letter("") for _ in range(self.size)]

    def _meet(self, state: int = _READY) -> int:
        """Wait for all processes, and return the largest state; raise if one has failed."""
        found, letters = self._signal(state), self._letters()
        try:
            with _reaching():
                dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        finally:  # an interrupt waits for the exchange, too
            failed = int(found[0]) == _FAILED
            if failed:
                self._ended, self.reports = True, False
                with _reaching():
                    dist.all_gather(letters, _letter(""), group=self._control)
        if failed:
            rank = self.size - int(found[1])
            raise OtherProcessError(
                f"process {rank} of {self.size} failed: {_text(letters[rank])}", explained=True
            )
        return int(found[0])

    # Exchanges

    def meet(self) -> None:
        self._meet()

    def gather(self, value: Any) -> list[Any]:
        self._meet()
        found: list[Any] = [None] * self.size
        with _reaching():
            dist.all_gather_object(found, value, group=self._data)
        return found

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        self._meet()
        self._sum(tensors)

    def _sum(self, tensors: Iterable[Tensor]) -> None:
        self._each(lambda x, group: dist.all_reduce(x, group=group, async_op=True), tensors)

    def _each(self, exchange: Callable[[Tensor, Any], Any], tensors: Iterable[Tensor]) -> None:
        """Exchange tensors in place; they may be strided."""
        pairs = [(tensor.detach(), tensor.detach().contiguous()) for tensor in tensors]
        with _reaching():
            for work in [exchange(whole, self._of(whole)) for _, whole in pairs]:
                work.wait()
        for tensor, whole in pairs:
            if not tensor.is_contiguous():
                tensor.copy_(whole)

    def complete_gradients(self, params: Iterable[nn.Parameter]) -> None:
        trained = list(params)
        complete = all(p.grad is not None for p in trained)
        if self._meet(_READY if complete else _INCOMPLETE):
            held = [int(p.grad is not None) for p in trained]
            counts = torch.tensor(held, device="cpu")
            self._sum([counts])
            for p, holders in zip(trained, counts.tolist(), strict=True):
                if holders and p.grad is None:
                    p.grad = torch.zeros_like(p)

    def sum_gradients(self, params: Iterable[nn.Parameter]) -> None:
        trained = list(params)
        self.complete_gradients(trained)
        self._sum([p.grad for p in trained if p.grad is not None])

    def copy_(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        self._meet()
        self._each(
            lambda x, group: dist.broadcast(x, source, group=group, async_op=True),
            tensors,
        )

    def move(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        self._meet()
        operations = []
        for source, target, tensor in moves:
            if tensor is not None and self.rank in (source, target):
                call, other = (dist.isend, target) if source == self.rank else (dist.irecv, source)
                operations.append(dist.P2POp(call, tensor, other, self._of(tensor)))
        if operations:
            with _reaching():
                for work in dist.batch_isend_irecv(operations):
                    work.wait()


_KNOWN: weakref.WeakKeyDictionary[dist.ProcessGroup, Processes] = weakref.WeakKeyDictionary()


def processes_of(*, distributed: bool = True) -> Processes:
    """Return all processes of `torch.distributed` or, if it is not initialised, this one.

    If ``distributed`` is False, it is this one too. Otherwise all processes must call this
    function.

    Examples
    --------
    >>> processes_of().size
    1
    """
    if not (distributed and dist.is_available() and dist.is_initialized()):
        return Processes()
    if dist.get_world_size() == 1:
        return Processes()
    world = dist.group.WORLD
    assert world is not None  # it is initialised
    if world not in _KNOWN:
        _KNOWN[world] = _Group()
    return _KNOWN[world]


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn errors of an exchange into an `OtherProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        raise OtherProcessError(
            "another process has ended or cannot be reached; its own output may say why",
            explained=False,
        ) from error


def _letter(text: str) -> Tensor:
    """Return a text of bounded length as bytes."""
    data = text.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _text(letter: Tensor) -> str:
    return bytes(letter.tolist()).rstrip(b"\0").decode(errors="ignore")
