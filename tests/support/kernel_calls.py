"""Run the code of accelerators on the CPU, and count the kernels that it would start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safe_core.adapters.torch import captured, kernels, run
from safe_core.backends import torch_accelerator

__all__ = ["NO_KERNEL", "KernelCalls", "on_an_accelerator"]

# They only make or describe memory.
NO_KERNEL = ("empty", "detach", "alias", "_unsafe_view", "_reshape_alias", "is_same_size")


@pytest.fixture
def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat tensors in the memory of the host as those of an accelerator."""
    for module in (torch_accelerator, kernels, run, captured):
        monkeypatch.setattr(module, "on_host", lambda x: False)


def _kernels(name: str, args: Any) -> int:
    """Return the number of kernels of an operation."""
    lists = [found for found in args if isinstance(found, list | tuple) and len(found)]
    lists = [found for found in lists if isinstance(found[0], Tensor)]
    dtypes = {x.dtype for found in lists for x in found}
    apart = name.startswith("_foreach") and "copy" not in name and len(dtypes) > 1
    return len(lists[0]) if apart else 1


class KernelCalls(TorchDispatchMode):
    """Count operations that compute, and reads by the host.

    An operation on lists counts once. It counts once for every tensor where the dtypes of the lists
    differ, because CUDA has no foreach kernel for them, except for copying.

    The host reads values by `Tensor.item`, `tolist` or `cpu`, and a number of entries where a mask
    selects them. A tensor of the host itself counts, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads = 0

    @property
    def total(self) -> int:
        """The number of kernels, if every operation is one."""
        return sum(self.counts.values())

    def __enter__(self) -> KernelCalls:
        self._patches = ExitStack()
        for name in ("tolist", "cpu"):
            patch = mock.patch.object(Tensor, name, self._counted(getattr(Tensor, name)))
            self._patches.enter_context(patch)
        return super().__enter__()

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(x: Tensor, *args: Any) -> Any:
            self.reads += 1
            return read(x, *args)

        return counted

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        self.reads += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        if not (func.is_view or name.startswith(NO_KERNEL)):
            self.counts[name] += _kernels(name, args)
        return func(*args, **(kwargs or {}))
