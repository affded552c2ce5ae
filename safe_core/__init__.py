"""Sparse and flat neural networks: SAFE and SAFE+ for JAX and PyTorch.

The method is written once against the array API. `safe_core.adapters.torch` binds it to
torch.optim, `safe_core.adapters.optax` to optax; importing `safe_core` imports neither.
"""

from typing import TYPE_CHECKING, NoReturn

from . import _installed, importance, schedules  # noqa: F401 - a check comes first
from .baselines import adasap, cram, gmp, iht, imp_sam, magnitude
from .certificate import stationarity_gap
from .channel_sam import ChannelSAM
from .constraints import (
    ADMM,
    ArrayInfo,
    AtEnd,
    Constraint,
    HardThreshold,
    Mask,
    Pull,
    SplitState,
)
from .coverage import Coverage, DenseWeightWarning, WeightCoverage
from .direction import Direction
from .finalization import FinalizeWarning
from .importance import Importance, RandomOrder, SecondMoment, SquaredGradient
from .layout import Layout
from .method import Method
from .methods import admm, elsa, keep_zeros, safe
from .patterns import (
    NM,
    Block,
    ByName,
    Channel,
    FixedZeros,
    FractionPattern,
    Pattern,
    Units,
    Unstructured,
)
from .perturbations import ASAM, SAM, GradientAscent, Perturbation
from .projection import Projection, project
from .staged import Staged
from .step import Evaluation, Operation, Point, StepPlan

__all__ = [
    "ADMM",
    "ASAM",
    "NM",
    "SAM",
    "ArrayInfo",
    "AtEnd",
    "Block",
    "ByName",
    "Channel",
    "ChannelSAM",
    "Constraint",
    "Coverage",
    "DenseWeightWarning",
    "Direction",
    "Evaluation",
    "FinalizeWarning",
    "FixedZeros",
    "FractionPattern",
    "GradientAscent",
    "HardThreshold",
    "Importance",
    "Layout",
    "Mask",
    "Method",
    "Operation",
    "Pattern",
    "Perturbation",
    "Point",
    "Projection",
    "Pull",
    "RandomOrder",
    "SecondMoment",
    "SplitState",
    "SquaredGradient",
    "Staged",
    "StepPlan",
    "Units",
    "Unstructured",
    "WeightCoverage",
    "adasap",
    "admm",
    "cram",
    "elsa",
    "gmp",
    "iht",
    "imp_sam",
    "importance",
    "keep_zeros",
    "magnitude",
    "project",
    "safe",
    "schedules",
    "stationarity_gap",
]

__version__ = "0.2.0"


# A type checker would take every name for known if it saw this function.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> NoReturn:
        from ._adapter_names import missing_name

        raise AttributeError(missing_name(name), name=name, obj=__import__(__name__))
