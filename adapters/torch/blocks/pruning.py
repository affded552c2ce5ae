"""Prune a trained transformer block by block, with SAFE, SAFE+ or a layer-wise solver.

A model of Hugging Face, or any other with its blocks in a `torch.nn.ModuleList`, is pruned
after training with a small set of inputs: each block is made sparse such that what it returns
stays close to what it returned when dense. One block at a time is on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safe_core import _checks
from safe_core.layout import Layout
from safe_core.reconstruction import block_pattern

from .calibration import calibration_batches, check_tokens, split_samples
from .memory import MemoryEstimate
from .methods import as_solver, default_scope
from .reconstruction import SafeReconstruction
from .report import BlockReport, Progress, PruningReport, WeightReport
from .resume import identity
from .run import Run
from .statistics import block_weights
from .structure import evaluated, find_blocks, inside, learn_structure
from .task import OFFLOADS, Settings, Task, check_patterns, predict_memory

__all__ = [
    "BlockReport",
    "Progress",
    "PruningPlan",
    "PruningReport",
    "SafeReconstruction",
    "WeightReport",
    "calibration_batches",
    "plan_pruning",
    "prune_blocks",
]


def prune_blocks(
    model: nn.Module,
    batches: Any,
    solver: Any,
    sparsity: Any,
    *,
    blocks: str | nn.Module | None = None,
    where: Callable[[str, Tensor], bool] | None = None,
    targets: Literal["pruned", "dense"] = "pruned",
    propagate: Literal["pruned", "dense"] = "pruned",
    batch_size: int = 8,
    device: torch.device | str | None = None,
    offload: Literal["cpu", "disk", "none"] = "cpu",
    work_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
    measure_memory: bool = False,
) -> PruningReport:
    """Prune the weights of a model's blocks in place, block after block.

    Block i with parameters x is made sparse to minimise

        ``|block_x(h) - target|^2``,  ``target = block_dense(h')``,

    over the calibration samples. What lies outside the blocks, embeddings and the head, stays
    dense, and so do weights that are tied to them, biases, norms, convolutions and routers.

    Parameters
    ----------
    model : torch.nn.Module
        Of Hugging Face, or any with its blocks in a `torch.nn.ModuleList` of which each takes
        what the one before returns. Hybrid models and mixtures of experts too.
    batches : tensor, mapping, or iterable of them
        What the model takes: a tensor of samples, such as `calibration_batches` returns, or
        keyword arguments. Padding counts as if it were input: leave it out.
    solver : str, SafeReconstruction or callable
        The name of a method, as on the command line: "safe+", "safe", "alps", "sparsegpt",
        "wanda" or "magnitude". Or the whole block by SAFE or SAFE+ with settings of your own,
        for which `safe_core.reconstruction.Reconstruction` does too, or a layer-wise solver
        ``solver(weight, gram, sparsity, layout=layout) -> (values, support)``, which gets each
        weight in float32 or wider and ``gram = X^T X`` (inputs, inputs) of the inputs that it
        has in the dense block.
    sparsity : float, str or pattern
        As for `safe_core.project`. A number is that of each weight, or for the name "wanda" of
        each output of each weight, as published; a pattern must not compare entries over all
        weights (``scope="global"``).
    blocks : str or torch.nn.Module, optional
        Which `ModuleList`, or `Sequential`, by its name, "" for the model itself; the
        `ModuleList` with the most parameters by default. An encoder and a decoder
        are pruned one after the other, by two calls.
    where : callable, optional
        ``where(name, parameter) -> bool`` leaves weights of the blocks dense.
    targets : {"pruned", "dense"}
        Whether h' is what the pruned blocks before give, ``h' = h``, or what the dense ones
        gave.
    propagate : {"pruned", "dense"}
        Whether h is what the pruned blocks before give. With "dense" every block is pruned as
        if the others were dense, and ``targets`` makes no difference.
    batch_size : int
        Samples in a forward pass; those in a step are the solver's.
    device : torch.device or str, optional
        Where blocks are pruned; that of the model by default.
    offload : {"cpu", "disk", "none"}
        Where activations lie meanwhile: on the CPU, in memory-mapped files under ``work_dir``,
        or on the device.
    work_dir : path, optional
        Finished blocks are kept here. The same call goes on after them, and ends with the same
        bits; a solver of your own must be a function or a dataclass, which can be told from
        another.
    seed : int
        Of the order of samples.
    progress : callable, optional
        Called with a `Progress` after every epoch and every block.
    measure_memory : bool
        Count tensors on the CPU, which is slow; on a GPU they are counted in any case.

    Returns
    -------
    PruningReport

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind, the blocks are not found or not called in a chain,
        groups of N:M do not divide the inputs of a weight, tokens are not of the model's
        vocabulary, or activations are not finite. Blocks that were finished stay pruned; the
        one at work stays dense.
    OSError
        If ``work_dir`` has no room.

    Notes
    -----
    The paper reconstructs blocks one after the other "similarly to other LLM pruning
    techniques" and does not say more: as in those, by default a block sees what the pruned
    ones before it return, and its targets are what it returns for that when dense.

    Parameters are trained in float32 or wider and written back in their own dtype, zeros
    exactly. SAFE trains biases and norms of a block too; those with ``requires_grad=False``
    stay as they are, bit for bit. Weights that are pruned are trained in any case.

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
    >>> solver = SafeReconstruction(importance="wanda", epochs=3, batch_size=2)
    >>> report = prune_blocks(model, torch.randn(8, 8), solver, 0.5)
    >>> report.sparsity, int((model.blocks[0].weight == 0).sum())
    (0.5, 32)
    """
    plan = plan_pruning(
        model,
        batches,
        solver,
        sparsity,
        blocks=blocks,
        where=where,
        targets=targets,
        propagate=propagate,
        batch_size=batch_size,
        device=device,
        offload=offload,
        work_dir=work_dir,
        seed=seed,
    )
    return plan.apply(progress, measure_memory=measure_memory)


def plan_pruning(
    model: nn.Module,
    batches: Any,
    solver: Any,
    sparsity: Any,
    *,
    blocks: str | nn.Module | None = None,
    where: Callable[[str, Tensor], bool] | None = None,
    targets: Literal["pruned", "dense"] = "pruned",
    propagate: Literal["pruned", "dense"] = "pruned",
    batch_size: int = 8,
    device: torch.device | str | None = None,
    offload: Literal["cpu", "disk", "none"] = "cpu",
    work_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Find out what `prune_blocks` would do, and what memory it would take.

    Parameters
    ----------
    model, batches, solver, sparsity, blocks, where, targets, propagate, batch_size, device, \
offload, work_dir, seed
        As for `prune_blocks`.

    Returns
    -------
    PruningPlan
        Nothing is pruned before its `apply`.

    Raises
    ------
    TypeError, ValueError
        As `prune_blocks`, before any block is touched.

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
    device 3.2 KiB, host 0 B, disk 0 B
    """
    pattern = block_pattern(sparsity, default_scope(solver))
    solver = as_solver(solver)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)!r}")
    for name, value in (("targets", targets), ("propagate", propagate)):
        _checks.choice(name, value, ("pruned", "dense"))
    _checks.choice("offload", offload, OFFLOADS)
    if offload == "disk" and work_dir is None:
        raise ValueError('work_dir must name a folder for offload="disk", got None')
    if work_dir is not None:
        identity(solver)  # raises for one that cannot be told from another
    _checks.integer("batch_size", batch_size, low=1)
    _checks.integer("seed", seed, low=0)
    samples = split_samples(batches)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model must be loaded, got parameters on the meta device")
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise ValueError(
            "model must be loaded without device_map, for its blocks are moved to `device` one by "
            "one, got one with hooks that move them"
        )
    check_tokens(model, samples)
    name, modules = find_blocks(model, blocks)
    home = next(model.parameters()).device
    place = home if device is None else torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be there, got {device!r} and no GPU")
    settings = Settings(
        solver,
        pattern,
        targets,
        propagate,
        batch_size,
        place,
        offload,
        None if work_dir is None else Path(work_dir),
        seed,
    )
    outside = _outside(model, name)
    weights = [_chosen(inside(name, i), block, outside, where) for i, block in enumerate(modules)]
    if not any(weights):
        raise ValueError(f"blocks must hold weights to prune, got none in {name or 'the model'}")
    check_patterns(pattern, name, modules, weights)
    placed = [{k: _placed(v, home) for k, v in sample.items()} for sample in samples]
    with evaluated(model):
        structure = learn_structure(model, name, modules, placed[0])
    return PruningPlan(Task(model, placed, settings, name, modules, weights, structure, outside))


class PruningPlan:
    """What `prune_blocks` is about to do; `apply` does it.

    Attributes
    ----------
    name : str
        Of the list of blocks.
    weights : dict of str to Layout or None
        What will be pruned; None where the roles of axes are seen as the block runs.
    memory : MemoryEstimate
        The predicted peak.
    """

    name: str
    weights: dict[str, Layout | None]
    memory: MemoryEstimate

    def __init__(self, task: Task) -> None:
        self._task = task
        self.name = task.name
        self.weights = {
            f"{inside(task.name, i)}.{key}": layout
            for i, weights in enumerate(task.weights)
            for key, layout in weights.items()
        }
        self.memory = predict_memory(task)

    def apply(
        self, progress: Callable[[Progress], object] | None = None, *, measure_memory: bool = False
    ) -> PruningReport:
        """Prune the model, see `prune_blocks`."""
        return Run(self._task, self.memory, progress).run(measure_memory=measure_memory)


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value


def _outside(model: nn.Module, name: str) -> frozenset[int]:
    """Ids of the parameters that are used outside the blocks, which may be tied to some within."""
    named = model.named_parameters(remove_duplicate=False)
    prefix = f"{name}." if name else ""
    return frozenset(id(p) for key, p in named if not key.startswith(prefix))


def _chosen(
    prefix: str,
    block: nn.Module,
    outside: frozenset[int],
    where: Callable[[str, Tensor], bool] | None,
) -> dict[str, Layout | None]:
    params = dict(block.named_parameters())
    return {
        name: layout
        for name, layout in block_weights(block).items()
        if id(params[name]) not in outside
        and (where is None or where(f"{prefix}.{name}", params[name]))
    }
