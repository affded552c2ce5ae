"""Prune trained transformers block by block.

The same names as `safe_core.adapters.torch.blocks`, which prunes any PyTorch model of
repeated blocks.
"""

from .torch.blocks import (
    BlockReport,
    BlockSparsity,
    MemoryEstimate,
    OutlierSparsities,
    Progress,
    PruningPlan,
    PruningReport,
    PruningSettings,
    SafeReconstruction,
    TimeEstimate,
    WeightReport,
    calibration_batches,
    outlier_sparsities,
    plan_pruning,
    prune_blocks,
)

__all__ = [
    "BlockReport",
    "BlockSparsity",
    "MemoryEstimate",
    "OutlierSparsities",
    "Progress",
    "PruningPlan",
    "PruningReport",
    "PruningSettings",
    "SafeReconstruction",
    "TimeEstimate",
    "WeightReport",
    "calibration_batches",
    "outlier_sparsities",
    "plan_pruning",
    "prune_blocks",
]
