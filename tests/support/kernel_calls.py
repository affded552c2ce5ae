"""Run the code of accelerators on the CPU, and count the kernels that it would start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safe_core.adapters.torch import captured, kernels, run
from safe_core.backends import torch_accelerator

__all__ = ["NO_KERNEL", "KernelCalls", "on_an_accelerator"]

# They only make or describe memory.
NO_KERNEL = ("empty", "detach", "alias", "_unsafe_view", "_reshape_alias", "is_same_size")
NO_KERNEL += ("_record_function",)  # only marks a range for profilers


@pytest.fixture
def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat tensors in the memory of the host as those of an accelerator."""
    for module in (torch_accelerator, kernels, run, captured):
        monkeypatch.setattr(module, "on_host", lambda x: False)


# A foreach kernel of CUDA takes this many tensors at most, by the number of lists. Their addresses
# must fit into its arguments. A concatenation takes up to 128.
_FOREACH_LIMITS = (110, 64, 48, 36)
_JOINED_LIMIT = 128


def _launches(name: str, args: Any, result: Any) -> int:
    """Return how often CUDA starts a kernel for an operation, split by its limits."""
    lists = [found for found in (*args, result) if _is_list_of_tensors(found)]
    if name == "cat":
        return math.ceil(len(lists[0]) / _JOINED_LIMIT)
    if not (name.startswith("_foreach") and lists):
        return _kernels(name, args)
    limit = _FOREACH_LIMITS[min(len(lists), len(_FOREACH_LIMITS)) - 1]
    return max(_kernels(name, args), math.ceil(len(lists[0]) / limit))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _read_and_written(func: Any, args: Any) -> list[Tensor]:
    """Return the tensors that an operation changes in place, unless it only writes them."""
    if "copy" in func.overloadpacket.__name__ or "fill" in func.overloadpacket.__name__:
        return []
    pairs = zip(args, func._schema.arguments, strict=False)
    changed = [arg for arg, spec in pairs if spec.alias_info and spec.alias_info.is_write]
    return _tensors(changed)


def _is_list_of_tensors(found: Any) -> bool:
    return isinstance(found, list | tuple) and len(found) > 0 and isinstance(found[0], Tensor)


def _kernels(name: str, args: Any) -> int:
    """Return the number of kernels of an operation."""
    lists = [found for found in args if _is_list_of_tensors(found)]
    dtypes = {x.dtype for found in lists for x in found}
    apart = name.startswith("_foreach") and "copy" not in name and len(dtypes) > 1
    return len(lists[0]) if apart else 1


class KernelCalls(TorchDispatchMode):
    """Count operations that compute, launches of kernels, and reads by the host.

    An operation on lists counts once. It counts once for every tensor where the dtypes of the lists
    differ, because CUDA has no foreach kernel for them, except for copying.

    The host reads values by `Tensor.item`, `tolist` or `cpu`, and a number of entries where a mask
    selects them. A tensor of the host itself counts, too.

    `launches` counts an operation on lists as often as CUDA splits it. `bytes` adds up the sizes of
    all tensors that an operation reads and writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.launches = 0
        self.bytes = 0
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
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or name.startswith(NO_KERNEL)):
            self.counts[name] += _kernels(name, args)
            self.launches += _launches(name, args, result)
            touched = {id(x): x for x in _tensors((args, kwargs, result))}
            self.bytes += sum(x.nbytes for x in touched.values())
            self.bytes += sum(x.nbytes for x in _read_and_written(func, args))
        return result
