"""Train sparse networks in PyTorch with any optimizer of torch.optim.

`SparseOptimizer` wraps the optimizer of a training loop. The other names help the loop around
it: they support trainers, replay steps as CUDA graphs, recalibrate batch normalisation, replay
random numbers, compute importances, change sparse models by low-rank matrices, remove channels,
save LiteRT files, and measure flatness.
`safe_core.adapters.torch.blocks` prunes a trained model block by block.
"""

from safe_core._installed import require

require(__name__, "torch", extra="torch")

from .captured import CapturedStep
from .channels import shrink, silence_channels
from .compressed import load_compressed, save_compressed
from .export_advice import advise
from .flatness import loss_surface
from .importance import hessian_diagonal
from .lightning_callback import SparseCallbackMixin
from .litert import save_litert
from .low_rank import add_low_rank, merge_low_rank
from .modules import RandomState, recalibrate
from .optimizer import SparseOptimizer
from .removed_channels import RemovedChannels
from .sassha import Sassha
from .sparse_model import sparse_modules
from .trainers import SparseTrainerMixin, perturbed, unwrap
from .weights import prunable_weights

__all__ = [
    "CapturedStep",
    "RandomState",
    "RemovedChannels",
    "Sassha",
    "SparseCallbackMixin",
    "SparseOptimizer",
    "SparseTrainerMixin",
    "add_low_rank",
    "advise",
    "hessian_diagonal",
    "load_compressed",
    "loss_surface",
    "merge_low_rank",
    "perturbed",
    "prunable_weights",
    "recalibrate",
    "save_compressed",
    "save_litert",
    "shrink",
    "silence_channels",
    "sparse_modules",
    "unwrap",
]
