"""optax: the same names as `safe_core.adapters.jax`."""

from .jax import (
    FixedSupportState,
    SasshaState,
    SparseOptimizerState,
    check_sparsity,
    coverage,
    finalize,
    find_state,
    fixed_support,
    hessian_diagonal,
    report,
    sassha,
    sparse_optimizer,
    sparse_weights,
    value_and_gradients,
)

__all__ = [
    "FixedSupportState",
    "SasshaState",
    "SparseOptimizerState",
    "check_sparsity",
    "coverage",
    "finalize",
    "find_state",
    "fixed_support",
    "hessian_diagonal",
    "report",
    "sassha",
    "sparse_optimizer",
    "sparse_weights",
    "value_and_gradients",
]
