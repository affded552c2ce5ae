"""Sparse and flat neural networks: SAFE and SAFE+ for JAX and PyTorch.

The method is written once against the array API. `safe_core.adapters.torch` binds it to
torch.optim, `safe_core.adapters.optax` to optax; importing `safe_core` imports neither.
"""

from . import importance, schedules
from .certificate import stationarity_gap
from .importance import SquaredGradient
from .layout import Layout
from .method import Method, admm, cram, gmp, iht, imp_sam, magnitude, safe
from .projection import Projection, project
from .sharpness import ASAM, SAM, GradientAscent
from .sparsity import NM, Block, Channel, Unstructured
from .splitting import SplitState, Targets

__all__ = [
    "ASAM",
    "NM",
    "SAM",
    "Block",
    "Channel",
    "GradientAscent",
    "Layout",
    "Method",
    "Projection",
    "SplitState",
    "SquaredGradient",
    "Targets",
    "Unstructured",
    "admm",
    "cram",
    "gmp",
    "iht",
    "imp_sam",
    "importance",
    "magnitude",
    "project",
    "safe",
    "schedules",
    "stationarity_gap",
]

__version__ = "0.1.0"
