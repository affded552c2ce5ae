"""Prune a trained model block by block, with SAFE, SAFE+ or a layer-wise solver.

A Hugging Face model, or any model with its blocks in a `torch.nn.ModuleList`, is pruned after
training with a small set of inputs: each block becomes sparse while its outputs stay close to
those of the dense block. Only one block at a time is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from safe_core.layout import Layout
from safe_core.patterns import Pattern
from safe_core.reconstruction import block_patterns, changed
from safe_core.solvers import named_solver

from ..example_inputs import evaluation_mode
from .calibration import calibration_batches, check_token_axes, check_tokens, split_samples
from .fingerprints import sample_of
from .memory import MemoryEstimate
from .processes import Processes, processes_of
from .reconstruction import SafeReconstruction
from .report import BlockReport, Progress, PruningReport, TimeEstimate, WeightReport
from .resuming import finished_blocks
from .run import Run
from .selection import refuse_quantised, select_weights
from .settings import PruningSettings, writing_nothing
from .shares import SampleShares
from .solver import as_block_solver
from .structure import (
    block_name,
    find_blocks,
    learn_structure,
    ordinary_mode,
)
from .task import Task, alike_samples, check_pattern, predict_memory
from .work_folder import check_work_folder

__all__ = [
    "BlockReport",
    "Progress",
    "PruningPlan",
    "PruningReport",
    "PruningSettings",
    "SafeReconstruction",
    "TimeEstimate",
    "WeightReport",
    "calibration_batches",
    "plan_pruning",
    "prune_blocks",
]

_DEFAULTS = PruningSettings()


def prune_blocks(
    model: nn.Module,
    batches: Any,
    solver: Any,
    sparsity: Any,
    *,
    settings: PruningSettings = _DEFAULTS,
    progress: Callable[[Progress], object] | None = None,
    measure_memory: bool = False,
    **changes: Any,
) -> PruningReport:
    """Prune the weights of a model's blocks in place, block after block.

    Block i with parameters x becomes sparse while minimising

        ``|block_x(h) - target|^2``,  ``target = block_dense(h')``,

    over the calibration samples. Everything outside the blocks stays dense, such as embeddings
    and the head. So do weights that are tied to them, biases, norms, convolutions, and routers,
    whose outputs choose experts or weigh them. The report lists the dense matrices of the blocks.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face model, or any model with its blocks in a `torch.nn.ModuleList`, each of
        which takes the output of the one before. Hybrid models and mixtures of experts work too.
    batches : tensor, mapping, or iterable of them
        Inputs of the model: a tensor of samples, such as `calibration_batches` returns, or
        keyword arguments. Leave padding out, since it counts as input.
    solver : str, solver, class or callable
        The name of a solver, see `safe_core.solvers.named_solvers`; or `SafeReconstruction`,
        which `safe_core.reconstruction.Reconstruction` can replace, to set its parameters; or a
        layer-wise solver, an instance or a class, such as those of `safe_core.solvers`; or a
        function ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``, which
        gets each weight in float32 or wider and ``gram = X^T X`` (inputs, inputs) of its inputs
        in the dense block.
    sparsity : float, str, pattern, mapping or callable
        As for `safe_core.project`. A number is the sparsity of each weight, or of each output of
        each weight for the name "wanda", as published. A pattern must not compare entries of
        different weights (``scope="global"``). A mapping of full names to sparsities, or a
        function ``sparsity(name, parameter)`` that returns a sparsity or None, gives weights
        their own; the others stay dense.
    settings : PruningSettings, optional
        All other settings.
    progress : callable, optional
        Called with a `Progress` after every epoch and every block.
    measure_memory : bool
        Whether to count tensors on the CPU too, which is slow; on a GPU they are always counted.
    **changes
        Fields of `PruningSettings`, which replace those of ``settings``: ``propagate``,
        ``target_inputs``, ``batch_size``, ``seed``, ``blocks``, ``where``, ``device``,
        ``offload``, ``work_dir``, ``distributed`` and ``shard``.

    Returns
    -------
    PruningReport

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind, blocks are not found or not called in a chain, the
        pattern does not fit a weight, tokens are not in the model's vocabulary, or activations
        are not finite. Finished blocks stay pruned; the current one stays dense.
    OSError
        If ``work_dir`` has too little room.
    OtherProcessError
        If another of several processes fails.

    Notes
    -----
    The paper reconstructs blocks one after the other "similarly to other LLM pruning
    techniques". As in those, by default the inputs of a block are the outputs of the pruned
    blocks before it, and its targets are its own dense outputs for them.

    Parameters are trained in float32 or wider and written back in their own dtype, zeros
    exactly. SAFE trains biases, norms and dense weights of a block too; matrices keep the zeros
    that they have. Parameters with ``requires_grad=False`` keep their bits, unless they are
    pruned. Autocast and inference mode around the call are switched off within it.

    If `torch.distributed` is initialised, every process calls this function with the same model
    and the same batches. Each holds the activations of its share of the samples, solves its
    share of the layers, and trains on its part of every batch. Sums over the processes make the
    result that of one process, up to rounding. All return the same report and have the pruned
    model. Only the first writes to ``work_dir`` and calls ``progress``.

    References
    ----------
    Lee et al. 2025, "SAFE: Finding Sparse and Flat Minima to Improve Pruning", sections 3.4 and
    4.3, appendix B.4; Shin et al. 2024, "Rethinking Pruning Large Language Models: Benefits and
    Pitfalls of Reconstruction Error Minimization".

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> class Tiny(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    ...     def forward(self, x):
    ...         for block in self.blocks:
    ...             x = block(x)
    ...         return x
    >>> model = Tiny()
    >>> solver = SafeReconstruction(
    ...     importance="wanda", epochs=3, batch_size=2, dual_update_interval=4
    ... )
    >>> report = prune_blocks(model, torch.randn(8, 8), solver, 0.5)
    >>> report.sparsity, int((model.blocks[0].weight == 0).sum())
    (0.5, 32)
    """
    plan = plan_pruning(model, batches, solver, sparsity, settings=settings, **changes)
    return plan.apply(progress, measure_memory=measure_memory)


def plan_pruning(
    model: nn.Module,
    batches: Any,
    solver: Any,
    sparsity: Any,
    *,
    settings: PruningSettings = _DEFAULTS,
    **changes: Any,
) -> PruningPlan:
    """Check the arguments of `prune_blocks`, and predict its memory, without pruning.

    Parameters
    ----------
    model, batches, solver, sparsity, settings, **changes
        As for `prune_blocks`.

    Returns
    -------
    PruningPlan
        Its `apply` prunes.

    Raises
    ------
    TypeError, ValueError
        As `prune_blocks`, before any block is changed.

    Examples
    --------
    >>> class Tiny(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    ...     def forward(self, x):
    ...         return self.blocks[1](self.blocks[0](x))
    >>> plan = plan_pruning(Tiny(), torch.randn(8, 8), "safe", "2:4")
    >>> plan.name, list(plan.weights)
    ('blocks', ['blocks.0.weight', 'blocks.1.weight'])
    >>> print(plan.memory)
    device 4.7 KiB, host 0 B, disk 0 B
    """
    settings = changed(settings, changes)
    processes = processes_of(distributed=settings.distributed)
    with processes.together():
        return _planned(model, batches, solver, sparsity, settings, processes)


def _planned(
    model: nn.Module,
    batches: Any,
    solver: Any,
    sparsity: Any,
    settings: PruningSettings,
    processes: Processes,
) -> PruningPlan:
    scope = named_solver(solver).default_scope if isinstance(solver, str) else "tensor"
    solver = as_block_solver(solver)
    if not isinstance(sparsity, Mapping) and not callable(sparsity):
        block_patterns(sparsity, {}, scope)  # raises before the model runs if it is invalid
    if isinstance(model, nn.Module):
        check_token_axes(model, batches)
    samples = split_samples(batches)
    if settings.work_dir is not None and processes.first:
        check_work_folder(settings.work_dir)
    if processes.size > 1 and not solver.distributed:
        raise ValueError(
            "solver must be one that sums over processes, which BlockSolver.distributed says, got "
            f"{solver!r} in {processes.size} processes"
        )
    _check_model(model)
    check_tokens(model, samples)
    name, modules = find_blocks(model, settings.blocks)
    home = next(model.parameters()).device
    device = home if settings.device is None else torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be available, got {settings.device!r} and no GPU")
    refuse_quantised(name, modules)
    outside = _outside(model, name)
    placed = [{k: _placed(v, home) for k, v in sample.items()} for sample in samples]
    with ordinary_mode(device), evaluation_mode(model):
        structure, calls = learn_structure(model, name, modules, placed[0])
        weights, patterns, dense = select_weights(
            name, modules, calls, sparsity, scope, settings.where, outside
        )
    if not patterns:
        raise ValueError(
            f"blocks must hold weights to prune, got none in {name or 'the model'}{_shown(dense)}"
        )
    check_pattern(patterns, name, modules, weights)
    task = Task(
        model=model,
        samples=placed,
        solver=solver,
        patterns=patterns,
        settings=settings,
        device=device,
        name=name,
        blocks=modules,
        weights=weights,
        structure=structure,
        outside=outside,
        dense=dense,
        processes=processes,
        shares=SampleShares.dealt(alike_samples(placed), processes.size),
    )
    if settings.work_dir is not None:
        task.described()  # raises for a solver that cannot be compared with another
    if processes.size > 1:
        processes.check_same(task.given() | {"model": sample_of(model.parameters())})
    return PruningPlan(task)


def _shown(dense: dict[str, str]) -> str:
    """Return why the first matrices stay dense, for a message."""
    found = [f"{name}, because {reason}" for name, reason in list(dense.items())[:3]]
    return f": {'; '.join(found)}" if found else ""


class PruningPlan:
    """A checked call of `prune_blocks`; `apply` runs it.

    Attributes
    ----------
    name : str
        The name of the list of blocks.
    weights : dict of str to Layout or None
        The weights to prune; the layout is None if it is known only once the block runs.
    patterns : dict of str to Pattern
        The pattern of each weight to prune.
    dense : dict of str to str
        The matrices of the blocks that stay dense, with the reason.
    blocks : int
        The number of blocks.
    steps : int
        Training steps in each block, 0 for a solver that does not train.
    memory : MemoryEstimate
        The predicted peak.
    """

    name: str
    weights: dict[str, Layout | None]
    patterns: dict[str, Pattern]
    dense: dict[str, str]
    blocks: int
    steps: int
    memory: MemoryEstimate

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name = task.name
        self.weights = {
            f"{block_name(task.name, i)}.{key}": layout
            for i, weights in enumerate(task.weights)
            for key, layout in weights.items()
        }
        self.patterns, self.dense = dict(task.patterns), dict(task.dense)
        self.blocks = len(task.blocks)
        self.steps = task.solver.steps([len(group) for group in alike_samples(task.samples)])
        with ordinary_mode(task.device):
            self.memory = predict_memory(task)

    def measure_time(self) -> TimeEstimate:
        """Prune one block of each kind, restore it, and estimate the time of `apply`.

        The model keeps its bits, and no file stays. With ``offload="disk"`` activations are kept
        in a temporary folder beside ``work_dir`` meanwhile.

        Returns
        -------
        TimeEstimate
        """
        with writing_nothing(self.task.settings) as settings:
            return Run(self.task._replace(settings=settings), self.memory, None).measure()

    def finished_blocks(self) -> int:
        """Return the number of blocks in ``work_dir`` after which `apply` resumes.

        Only the first of several processes reads the folder; the others return 0.

        Raises
        ------
        ValueError
            If ``work_dir`` is of a run with other settings, or of another model.
        """
        with self.task.processes.together():
            return finished_blocks(self.task)

    def apply(
        self, progress: Callable[[Progress], object] | None = None, *, measure_memory: bool = False
    ) -> PruningReport:
        """Prune the model, see `prune_blocks`."""
        return Run(self.task, self.memory, progress).run(measure_memory=measure_memory)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model must be loaded, got parameters on the meta device")
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise ValueError(
            "model must be loaded without device_map, because its blocks are moved to `device` one "
            "by one, got hooks that move them"
        )


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value


def _outside(model: nn.Module, name: str) -> frozenset[int]:
    """Return the ids of parameters used outside the blocks, which blocks may share."""
    named = model.named_parameters(remove_duplicate=False)
    prefix = f"{name}." if name else ""
    return frozenset(id(p) for key, p in named if not key.startswith(prefix))
