"""Constraints: how training brings the weights x to the set C of allowed supports.

A constraint carries its own state, says when it is due and what it then does to x, and
which operations it adds to a step (see `safe_core.step`). To add one, derive from
`Constraint` and export it here.
"""

from .admm import ADMM
from .at_end import AtEnd
from .base import ArrayInfo, Constraint, SplitState
from .hard import HardThreshold
from .mask import Mask

__all__ = ["ADMM", "ArrayInfo", "AtEnd", "Constraint", "HardThreshold", "Mask", "SplitState"]
