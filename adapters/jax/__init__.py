"""Train sparse networks in JAX with any optax transformation.

`sparse_optimizer` wraps the transformation of a training loop, and `finalize` makes the
parameters exactly sparse at the end. `save_litert` saves a model as a LiteRT file.
`safe_core.adapters.jax.flax` supports Flax, and `safe_core.adapters.jax.blocks` prunes a trained
model block by block.
"""

from safe_core._installed import require

require(__name__, "jax", "optax", extra="jax")

from .compressed import load_compressed, save_compressed
from .coverage import coverage
from .evaluation import sparse_weights
from .flatness import loss_surface
from .gradients import value_and_gradients
from .importance import hessian_diagonal
from .litert import save_litert
from .reporting import report
from .sassha import SasshaState, sassha
from .state import SparseOptimizerState, find_state
from .support import FixedSupportState, check_sparsity, fixed_support
from .transform import finalize, sparse_optimizer
from .weights import is_prunable, layout_of

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
    "is_prunable",
    "layout_of",
    "load_compressed",
    "loss_surface",
    "report",
    "sassha",
    "save_compressed",
    "save_litert",
    "sparse_optimizer",
    "sparse_weights",
    "value_and_gradients",
]
