"""Prune a trained PyTorch model block by block, from calibration inputs."""

from .calibration import calibration_batches
from .memory import MemoryEstimate
from .pruning import PruningPlan, plan_pruning, prune_blocks
from .reconstruction import SafeReconstruction
from .report import BlockReport, Progress, PruningReport, WeightReport

__all__ = [
    "BlockReport",
    "MemoryEstimate",
    "Progress",
    "PruningPlan",
    "PruningReport",
    "SafeReconstruction",
    "WeightReport",
    "calibration_batches",
    "plan_pruning",
    "prune_blocks",
]
