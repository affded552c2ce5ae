"""Prune a trained PyTorch model block by block, from calibration inputs."""

from .calibration import calibration_batches
from .memory import MemoryEstimate
from .outliers import BlockSparsity, OutlierSparsities, outlier_sparsities
from .processes import OtherProcessError, Processes
from .pruning import PruningPlan, plan_pruning, prune_blocks
from .reconstruction import SafeReconstruction
from .report import BlockReport, Progress, PruningReport, TimeEstimate, WeightReport
from .settings import PruningSettings
from .solver import BlockProblem, BlockSolver

__all__ = [
    "BlockProblem",
    "BlockReport",
    "BlockSolver",
    "BlockSparsity",
    "MemoryEstimate",
    "OtherProcessError",
    "OutlierSparsities",
    "Processes",
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
