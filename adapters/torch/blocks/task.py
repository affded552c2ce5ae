"""What is to be pruned and how, and what memory that will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from safe_core._dtypes import wide_dtype
from safe_core.layout import Layout, resolve
from safe_core.patterns import Pattern

from .calls import BlockCalls, record
from .memory import BlockSize, MemoryEstimate, forward_backward_bytes
from .reconstruction import wide_mse
from .resume import fingerprint, identity
from .structure import Structure, evaluated, inside

__all__ = [
    "NO_CAST",
    "OFFLOADS",
    "RaggedWeightError",
    "Settings",
    "Task",
    "check_patterns",
    "own_dtype",
    "predict_memory",
    "trained_by_safe",
]

NO_CAST = (torch.float32, torch.float32)
OFFLOADS = ("cpu", "disk", "none")


class Settings(NamedTuple):
    """Checked arguments of `plan_pruning`."""

    solver: Any
    pattern: Pattern
    targets: str
    propagate: str
    batch_size: int
    device: torch.device
    offload: str
    work_dir: Path | None
    seed: int

    @property
    def watched(self) -> Literal["roles", "diagonal", "gram"]:
        """What must be known of the inputs of weights."""
        return self.solver.needs  # type: ignore[no-any-return]

    @property
    def two_streams(self) -> bool:
        """Whether hidden states of dense blocks are kept beside those of pruned ones."""
        return self.targets == "dense" and self.propagate == "pruned"


class Task(NamedTuple):
    """What is to be pruned and how."""

    model: nn.Module
    samples: list[dict[str | None, Any]]
    settings: Settings
    name: str
    blocks: list[nn.Module]
    weights: list[dict[str, Layout | None]]
    structure: Structure
    outside: frozenset[int]  # ids of parameters that are used outside the blocks too

    def described(self) -> dict[str, str]:
        """What must be the same for a run to go on."""
        s = self.settings
        tensors = [v for sample in self.samples for v in sample.values() if torch.is_tensor(v)]
        settled: dict[str, Any] = {}  # by default, so that it is no part of what the solver says
        if s.solver.trains:
            settled = {"method": identity(s.solver.bound(s.pattern)), "warmup": s.solver.warmup}
        return {
            "model": f"{type(self.model).__name__} with {len(self.blocks)} blocks in {self.name}",
            "weights": repr([list(w) for w in self.weights]),
            "solver": identity(s.solver),
            "sparsity": repr(s.pattern),
            "targets": s.targets,
            "propagate": s.propagate,
            "batch_size": str(s.batch_size),
            "seed": str(s.seed),
            "batches": fingerprint(tensors),
            **{key: str(value) for key, value in settled.items()},
        }


class RaggedWeightError(ValueError):
    """The groups of a pattern do not divide the inputs of a weight.

    Attributes
    ----------
    name : str
        The first weight that does not fit.
    inputs : int
        The inputs of that weight.
    common : int
        The greatest common divisor of the inputs of all weights.
    """

    def __init__(self, pattern: Pattern, name: str, inputs: int, common: int) -> None:
        super().__init__(
            f"sparsity must divide the inputs of every weight into groups of {pattern.group}, got "
            f"{inputs} of {name}: {pattern!r} with ragged='dense' leaves the rest of them dense, "
            "and where= the weight"
        )
        self.name, self.inputs, self.common = name, inputs, common


def check_patterns(
    pattern: Pattern,
    name: str,
    blocks: Sequence[nn.Module],
    weights: Sequence[Mapping[str, Layout | None]],
) -> None:
    """Raise where the pattern does not fit a weight, as far as its layout is known."""
    known = {
        f"{inside(name, i)}.{key}": (tuple(block.get_parameter(key).shape), layout)
        for i, (block, chosen) in enumerate(zip(blocks, weights, strict=True))
        for key, layout in chosen.items()
        if layout is not None
    }
    for key, (shape, layout) in known.items():
        try:
            pattern.check(shape, resolve(layout, len(shape), key), key)
        except ValueError:
            inputs = [math.prod(s[axis] for axis in lay.input_axes) for s, lay in known.values()]
            mine = math.prod(shape[axis] for axis in layout.input_axes)
            if pattern.group is None or mine % pattern.group == 0:
                raise
            raise RaggedWeightError(pattern, key, mine, math.gcd(*inputs)) from None


def trained_by_safe(task: Task, i: int, pruned: Collection[str]) -> set[str]:
    """The names of what SAFE trains in block i: what is pruned, and the rest unless frozen."""
    return {
        key
        for key, p in task.blocks[i].named_parameters()
        if key in pruned or (p.requires_grad and id(p) not in task.outside)
    }


def own_dtype(block: nn.Module) -> torch.dtype:
    return next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)


def predict_memory(task: Task) -> MemoryEstimate:
    """Predict the peak of a run, from the arguments of one sample and the largest block."""
    s = task.settings
    hidden: list[Tensor] = []
    with evaluated(task.model):
        calls = record(
            task.model, task.name, task.blocks, task.samples[:1], task.structure,
            lambda _, x: hidden.append(x.to("meta")),
        )  # fmt: skip
    sizes = [
        BlockSize.of(block, weights, trained_by_safe(task, i, weights))
        for i, (block, weights) in enumerate(zip(task.blocks, task.weights, strict=True))
    ]
    largest = max(range(len(sizes)), key=lambda i: sizes[i].entries)
    size = sizes[largest]
    if s.solver.trains:
        work = _work_bytes(task, calls, largest, hidden[0], s.solver.batch_size, backward=True)
        needed = size.reconstruction(work)
    else:
        work = _work_bytes(task, calls, largest, hidden[0], s.batch_size, backward=False)
        needed = size.layerwise(work, s.solver.matrices)
    first = _numbers(task.samples[0])
    stored = 2 * sum(hidden[0].nbytes * _numbers(x) // first for x in task.samples)
    # A pruned block stands beside a copy of the dense one and, for a folder, its file.
    found = {"device": needed, "host": calls.nbytes + 2 * size.stored, "disk": 0}
    places = {"none": "device", "cpu": "host", "disk": "disk"}
    found[places[s.offload]] += stored
    if s.device.type == "cpu":
        beside = found["host"] - 2 * size.stored
        found["device"] = max(found["device"], 3 * size.stored) + beside
        found["host"] = 0
    return MemoryEstimate(**found)


def _numbers(sample: Mapping[Any, Any]) -> int:
    return next(max(1, v.numel()) for v in sample.values() if torch.is_tensor(v) and v.ndim)


def _work_bytes(
    task: Task, calls: BlockCalls, i: int, hidden: Tensor, batch: int, *, backward: bool
) -> int:
    """Bytes of a forward (and backward) pass of a block on a batch, beside its parameters."""
    block, rows = task.blocks[i], min(batch, len(task.samples))
    own, s = own_dtype(block), task.settings
    dtype = wide_dtype(torch, list(block.parameters())) if backward else own
    trained = trained_by_safe(task, i, task.weights[i])
    autocast = backward and s.solver.autocasts(s.device, own)

    def of(rows: int, dtype: torch.dtype, *, fake: bool) -> int:
        shape = (rows * hidden.shape[0], *hidden.shape[1:])
        like = torch.empty(shape, device="meta", dtype=dtype)
        arguments = calls.arguments(i, [0] * rows, like, (own, dtype))
        calls.forget_placed()

        def call(model: nn.Module, make: Callable[[Tensor], Tensor]) -> Tensor:
            args, kwargs = tree_map_only(torch.Tensor, make, arguments)
            with torch.autocast(s.device.type, torch.bfloat16, enabled=autocast and fake):
                output = task.structure.output(model, model(*args, **kwargs))
            if not backward:
                return output
            target = make(torch.empty(output.shape, dtype=hidden.dtype, device="meta"))
            return wide_mse(output, target)

        device = s.device if fake else torch.device("cpu")
        return forward_backward_bytes(
            block, call, device, backward=backward, trained=trained, dtype=dtype, fake=fake
        )

    try:
        if None in task.weights[i].values():
            # Grouped products of experts know their shapes in bfloat16 only.
            return of(rows, torch.bfloat16, fake=True) * dtype.itemsize // 2
        return of(rows, dtype, fake=True)
    except RuntimeError:
        # Shapes within depend on values, or a kernel knows none: one sample for real.
        return of(1, dtype, fake=False) * rows
