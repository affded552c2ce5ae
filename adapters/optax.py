"""optax: the same names as `safe_core.adapters.jax`."""

from .jax import (
    FixedSupportState,
    SparseOptimizerState,
    check_sparsity,
    coverage,
    finalize,
    find_state,
    fixed_support,
    hessian_diagonal,
    report,
    sparse_optimizer,
    sparse_weights,
    value_and_gradients,
)

__all__ = [
    "FixedSupportState",
    "SparseOptimizerState",
    "check_sparsity",
    "coverage",
    "finalize",
    "find_state",
    "fixed_support",
    "hessian_diagonal",
    "report",
    "sparse_optimizer",
    "sparse_weights",
    "value_and_gradients",
]
