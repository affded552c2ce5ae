"""Prune a trained PyTorch model block by block, from calibration inputs."""

from .calibration import calibration_batches
from .memory import MemoryEstimate
from .processes import OtherProcessError, Processes
from .pruning import PruningPlan, plan_pruning, prune_blocks
from .reconstruction import SafeReconstruction
from .report import BlockReport, Progress, PruningReport, WeightReport
from .settings import PruningSettings
from .solver import BlockProblem, BlockSolver

__all__ = [
    "BlockProblem",
    "BlockReport",
    "BlockSolver",
    "MemoryEstimate",
    "OtherProcessError",
    "Processes",
    "Progress",
    "PruningPlan",
    "PruningReport",
    "PruningSettings",
    "SafeReconstruction",
    "WeightReport",
    "calibration_batches",
    "plan_pruning",
    "prune_blocks",
]
