"""Say what happened to the zeros of a network after `finalize`."""

from __future__ import annotations

import warnings

from safe_core import Operation
from safe_core._calls import level_of_caller
from safe_core.finalization import FinalizeWarning

from .run import Run

__all__ = ["warn_of_moved_zeros", "way_to_sparse"]

# A mask keeps the zeros, and a method that projects x itself sets them again.
_KEEPING = {Operation.MASK_PARAMETERS, Operation.PROJECT_PARAMETERS}


def warn_of_moved_zeros(run: Run) -> None:
    """Warn once, before the first step after `finalize` that makes zeros non-zero."""
    if run.finalized_at is None or run.warned_of_zeros:
        return
    if not _KEEPING.isdisjoint(run.plan.operations) or run.has_zero_rates():
        return
    run.warned_of_zeros = True
    warnings.warn(
        "step() after finalize() moves the zeros; call finalize(freeze=True), or train with "
        "keep_zeros()",
        FinalizeWarning,
        stacklevel=level_of_caller(),
    )


def way_to_sparse(run: Run) -> str:
    """Return why the parameters may not be sparse, for an error."""
    if run.finalized_at is None and not run.frozen:
        return "call finalize() first"
    if run.finalized_at is not None and run.steps > run.finalized_at and not run.frozen:
        return "steps were taken after finalize(), so call it again"
    return "the weights were changed after finalize(), by something other than this optimizer"
