"""A model, its blocks and what to do with them; checks, and the prediction of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from safe_core._dtypes import wide_dtype
from safe_core.layout import Layout, resolve
from safe_core.patterns import ByName, Pattern

from ..example_inputs import evaluation_mode
from .calls import BlockCalls, record
from .fingerprints import Description, fingerprint, identity
from .memory import BlockSize, MemoryEstimate, block_dtype, forward_backward_bytes
from .processes import Processes
from .reconstruction import wide_mse
from .settings import PruningSettings
from .shares import SampleShares
from .solver import BlockSolver
from .statistics import InputRecorder
from .structure import Structure, block_name

__all__ = [
    "NO_CAST",
    "PatternError",
    "Task",
    "alike_samples",
    "check_pattern",
    "predict_memory",
    "trainable_names",
]

NO_CAST = (torch.float32, torch.float32)


class Task(NamedTuple):
    """Hold the blocks to prune, the samples and the settings.

    Attributes
    ----------
    patterns : dict of str to Pattern
        The pattern of each weight to prune, by full name.
    weights : list of dict of str to Layout or None
        For each block, the weights to prune by their names in it, with their layouts.
    outside : frozenset of int
        Ids of the parameters that are used outside the blocks too.
    dense : dict of str to str
        The matrices of the blocks that stay dense, by full name, with the reason.
    processes : Processes
        Those that prune the model together.
    shares : SampleShares
        Which of them holds which sample.
    """

    model: nn.Module
    samples: list[dict[str | None, Any]]
    solver: BlockSolver
    patterns: dict[str, Pattern]
    settings: PruningSettings
    device: torch.device
    name: str
    blocks: list[nn.Module]
    weights: list[dict[str, Layout | None]]
    structure: Structure
    outside: frozenset[int]
    dense: dict[str, str]
    processes: Processes
    shares: SampleShares

    def held(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the samples of each group that this process holds."""
        return self.shares.held(self.processes.rank, groups)

    def pattern_of(self, i: int, names: Collection[str]) -> Pattern:
        """Return one pattern for weights of block i, by name where their patterns differ."""
        prefix = block_name(self.name, i)
        found = {name: self.patterns[f"{prefix}.{name}"] for name in names}
        return _joined(found or self.patterns)  # a block may have no weight to prune

    def described(self) -> dict[str, Any]:
        """Return what must be the same for a run to be resumed."""
        return {**self.given(), **self.solver.described(_joined(self.patterns))}

    def given(self) -> dict[str, Any]:
        """Return what must be the same for a run to be resumed, except for the solver."""
        s = self.settings
        tensors = [v for sample in self.samples for v in sample.values() if torch.is_tensor(v)]
        return {
            "model": f"{type(self.model).__name__} with {len(self.blocks)} blocks in {self.name}",
            "weights": [list(w) for w in self.weights],
            "sparsity": _description(_joined(self.patterns)),
            "target_inputs": s.target_inputs,
            "propagate": s.propagate,
            "batch_size": str(s.batch_size),
            "seed": str(s.seed),
            "batches": fingerprint(tensors),
        }


def alike_samples(samples: Iterable[Mapping[str | None, Any]]) -> list[list[int]]:
    """Return groups of samples whose tensors have the same shapes.

    Examples
    --------
    >>> alike_samples([{None: torch.ones(1, length)} for length in (2, 3, 2)])
    [[0, 2], [1]]
    """
    alike: dict[Any, list[int]] = {}
    for i, sample in enumerate(samples):
        shapes = tuple((k, v.shape) for k, v in sample.items() if torch.is_tensor(v))
        alike.setdefault(shapes, []).append(i)
    return list(alike.values())


def _description(pattern: Pattern) -> Description:
    """Return the description of a pattern, or its repr if it holds what has no description."""
    try:
        return identity(pattern)
    except ValueError:
        return repr(pattern)


def _joined(patterns: Mapping[str, Pattern]) -> Pattern:
    """Return one pattern for all the arrays, by name where their patterns differ."""
    found = list(dict.fromkeys(patterns.values()))
    return found[0] if len(found) == 1 else ByName(patterns)


class PatternError(ValueError):
    """The groups of a pattern do not divide the inputs of a weight.

    Attributes
    ----------
    name : str
        The first weight that does not fit.
    inputs : int
        The number of inputs of that weight.
    pattern : Pattern
        The pattern of that weight.
    common : int
        The greatest common divisor of the numbers of inputs of all weights.
    misfits : tuple of str
        All weights with this pattern that it does not fit.
    others : bool
        Whether this pattern fits other weights.
    """

    def __init__(
        self,
        pattern: Pattern,
        name: str,
        inputs: int,
        common: int,
        misfits: Sequence[str] = (),
        *,
        others: bool = False,
    ) -> None:
        super().__init__(
            f"sparsity must divide the inputs of every weight into groups of {pattern.group}, got "
            f"{inputs} of {name}: {pattern!r} with ragged='dense' leaves the last group dense, and "
            "where= leaves out the weight"
        )
        self.name, self.inputs, self.pattern, self.common = name, inputs, pattern, common
        self.misfits, self.others = tuple(misfits), others


def check_pattern(
    patterns: Mapping[str, Pattern],
    name: str,
    blocks: Sequence[nn.Module],
    weights: Sequence[Mapping[str, Layout | None]],
) -> None:
    """Raise where the pattern of a weight does not fit it, if the roles of its axes are known."""
    known = {
        f"{block_name(name, i)}.{key}": (tuple(block.get_parameter(key).shape), layout)
        for i, (block, chosen) in enumerate(zip(blocks, weights, strict=True))
        for key, layout in chosen.items()
        if layout is not None
    }
    inputs = {
        key: math.prod(shape[axis] for axis in layout.input_axes)
        for key, (shape, layout) in known.items()
    }
    for key, (shape, layout) in known.items():
        pattern = patterns[key]
        try:
            pattern.check(shape, resolve(layout, len(shape), key), key)
        except ValueError:
            if pattern.group is None or inputs[key] % pattern.group == 0:
                raise
            alike = [name for name in known if patterns[name] == pattern]
            misfits = [name for name in alike if inputs[name] % pattern.group]
            raise PatternError(
                pattern, key, inputs[key], math.gcd(*inputs.values()), misfits,
                others=len(misfits) < len(alike),
            ) from None  # fmt: skip


def trainable_names(task: Task, i: int, pruned: Collection[str]) -> set[str]:
    """Return the parameters of block i that may be trained: pruned weights, and those not frozen.

    Parameters that are used outside the blocks too are excluded unless they are pruned.
    """
    return {
        key
        for key, p in task.blocks[i].named_parameters()
        if key in pruned or (p.requires_grad and id(p) not in task.outside)
    }


def predict_memory(task: Task) -> MemoryEstimate:
    """Predict the peak of a run, from the arguments of one sample and the largest block."""
    s = task.settings
    hidden: list[Tensor] = []
    with evaluation_mode(task.model):
        calls = record(
            task.model, task.name, task.blocks, task.samples[:1], task.structure,
            lambda _, x: hidden.append(x.to("meta")),
        )  # fmt: skip
    sizes = [
        BlockSize.of(
            block, weights, trainable_names(task, i, weights), task.device,
            task.processes.size, shard=s.shard,
        )
        for i, (block, weights) in enumerate(zip(task.blocks, task.weights, strict=True))
    ]  # fmt: skip
    largest = max(range(len(sizes)), key=lambda i: sizes[i].entries)
    size, held = sizes[largest], task.held([range(len(task.samples))])[0]

    def work(
        batch_size: int | None = None,
        *,
        backward: bool = False,
        autocast: bool = False,
        records: bool = True,
    ) -> int:
        whole = min(s.batch_size if batch_size is None else batch_size, len(task.samples))
        # A forward pass runs the samples of this process, and a step its part of the batch.
        rows = task.shares.largest_part(whole) if backward else max(1, min(whole, len(held)))
        sent = 2 * (whole - rows) * hidden[0].nbytes if backward else 0  # inputs and targets
        return sent + _work_bytes(
            task, calls, largest, hidden[0], rows,
            backward=backward, autocast=autocast, records=records and not backward,
        )  # fmt: skip

    first = _numbers(task.samples[0])
    stored = 2 * sum(hidden[0].nbytes * _numbers(task.samples[k]) // first for k in held)
    # The pass of the pruned block holds a copy of it, and the supports.
    after = size.stored + size.sparse + work(records=False)
    # The host holds a copy of the dense block, to undo a failed write, and the file's contents.
    found = {
        "device": max(task.solver.memory(size, work), after),
        "host": calls.nbytes + 2 * size.stored,
        "disk": 0,
    }
    places = {"none": "device", "cpu": "host", "disk": "disk"}
    found[places[s.offload]] += stored
    if task.device.type == "cpu":
        beside = found["host"] - 2 * size.stored
        found["device"] = max(found["device"], 3 * size.stored, after + size.stored) + beside
        found["host"] = 0
    return MemoryEstimate(**found)


def _numbers(sample: Mapping[Any, Any]) -> int:
    return next(max(1, v.numel()) for v in sample.values() if torch.is_tensor(v) and v.ndim)


def _work_bytes(
    task: Task,
    calls: BlockCalls,
    i: int,
    hidden: Tensor,
    rows: int,
    *,
    backward: bool,
    autocast: bool,
    records: bool,
) -> int:
    """Return the bytes of a forward (and backward) pass of a block, beside its parameters."""
    block = task.blocks[i]
    own = block_dtype(block)
    dtype = wide_dtype(torch, list(block.parameters())) if backward else own
    trained = trainable_names(task, i, task.weights[i])

    experts = None in task.weights[i].values()  # whose products depend on values

    def needed(rows: int, dtype: torch.dtype, *, fake: bool) -> int:
        shape = (rows * hidden.shape[0], *hidden.shape[1:])
        like = torch.empty(shape, device="meta", dtype=dtype)
        arguments = calls.arguments(i, [0] * rows, like, (own, dtype))
        calls.forget_placed()

        def call(model: nn.Module, make: Callable[[Tensor], Tensor]) -> Tensor:
            args, kwargs = tree_map_only(torch.Tensor, make, arguments)
            with torch.autocast(task.device.type, torch.bfloat16, enabled=autocast and fake):
                output = task.structure.output(i, model(*args, **kwargs))
            if not backward:
                return output
            target = make(torch.empty(output.shape, dtype=hidden.dtype, device="meta"))
            return wide_mse(output, target)

        def recorder(model: nn.Module) -> InputRecorder:
            return InputRecorder(model, task.weights[i], task.solver.watches)

        device = task.device if fake else torch.device("cpu")
        return forward_backward_bytes(
            block, call, device, backward=backward, trained=trained, dtype=dtype, fake=fake,
            recorder=recorder if records and not experts else None,
        )  # fmt: skip

    try:
        if experts:
            # The shapes of grouped products of experts are known in bfloat16 only.
            return needed(rows, torch.bfloat16, fake=True) * dtype.itemsize // 2
        return needed(rows, dtype, fake=True)
    except Exception:  # of any kind, because shape functions are third-party code
        # Shapes depend on values, or a kernel has no shape function: run one sample for real.
        return needed(1, dtype, fake=False) * rows
