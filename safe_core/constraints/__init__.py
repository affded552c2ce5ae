"""Constraints bring the weights x to the set C of sparse points during training.

A constraint defines its state, the steps after which the state is updated, and the operations
that it adds to a step (see `safe_core.step`). To add one, derive from `Constraint` and export
it here.
"""

from .admm import ADMM
from .at_end import AtEnd
from .base import ArrayInfo, Constraint, SplitState
from .hard import HardThreshold
from .mask import Mask
from .pull import Pull

__all__ = [
    "ADMM",
    "ArrayInfo",
    "AtEnd",
    "Constraint",
    "HardThreshold",
    "Mask",
    "Pull",
    "SplitState",
]
