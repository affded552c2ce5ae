"""Stand in for CUDA graphs on the CPU: record operations, and run them again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_calls import NO_KERNEL, KernelCalls
from torch import Tensor
from torch.utils._pytree import tree_leaves

from safe_core.adapters.torch import captured, lost_steps, watching

__all__ = ["RecordedGraphs", "recorded_graphs"]


class _Recorder(KernelCalls):
    """Record operations without lasting effect, and refuse reads by the host.

    A CUDA graph does not run what it records. These operations run, because the code needs tensors,
    so the memory that they change is restored on exit, and their results become NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in _tensors((args, kwargs)):  # batch norm writes to arguments against its schema
            self._save(x)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.reads:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if not (func.is_view or func._schema.is_mutable):
            self._own |= {x.untyped_storage().data_ptr() for x in _tensors(result)}
        self._operations.append((func, args, kwargs, result))
        return result

    def _save(self, x: Tensor) -> None:
        place = x.untyped_storage().data_ptr()
        if place not in self._own and place not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self._before[place] = whole, whole.clone()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for *_, result in self._operations:
                for x in _tensors(result):
                    if x.is_floating_point() and x.untyped_storage().data_ptr() in self._own:
                        x.detach().fill_(math.nan)
        for whole, values in self._before.values():
            whole.copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again, with the same memory for their results."""
        for func, args, kwargs, result in self._operations:
            if func.is_view or func.overloadpacket.__name__.startswith(NO_KERNEL):
                continue
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(_tensors(result), _tensors(found), strict=True):
                    old.detach().copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class RecordedGraphs:
    """Replace `captured.Graphs`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def beside(self) -> Any:
        return nullcontext()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with _capturing(), _Recorder() as recorder:
            result = function()
        return recorder.replay, result


@contextmanager
def _capturing() -> Iterator[None]:
    with (
        mock.patch.object(watching, "is_capturing", return_value=True),
        mock.patch.object(lost_steps, "is_capturing", return_value=True),
    ):
        yield


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch, on_an_accelerator: None) -> None:
    """Run `CapturedStep` on the CPU."""
    monkeypatch.setattr(captured, "Graphs", RecordedGraphs)
