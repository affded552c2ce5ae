"""Solvers: they prune one linear layer at a time from its inputs, or a block by training.

Given a layer with weights ``W`` (outputs, inputs) and the Gram matrix ``H = X^T X`` of the
inputs ``X`` (tokens, inputs) that it sees, a solver finds sparse weights ``V`` that keep its
outputs: ``min_V |X W^T - X V^T|_F^2 = tr((W - V) H (W - V)^T)``, without any training.
Every layer-wise solver is a frozen dataclass, a `LayerSolver`, that is called as
``solver(weight, gram, sparsity, *, layout=None)`` and returns a `safe_core.Projection`:
``values`` in the dtype of the weights, and a boolean ``support`` with the pattern's exact
counts. `safe_core.reconstruction.Reconstruction` is SAFE and SAFE+ as a solver of whole blocks.

`Magnitude` costs one selection; `Wanda` the same with the norms of the inputs; `SparseGPT` one
factorisation and one sweep over the columns; `ALPS` one eigendecomposition and a few dozen
selections. Each usually leaves a smaller error than the one before. They run on the device of
the weights, in float32 or wider. In JAX on an accelerator, ask for products in full precision:
``jax.default_matmul_precision("highest")``.

A new solver is one file with a subclass of `LayerSolver` and one line that exports it here;
then its name works in `prune_blocks` and on the command line.

Examples
--------
>>> import numpy
>>> rng = numpy.random.default_rng(0)
>>> weight, mixing = rng.normal(size=(32, 64)), rng.normal(size=(64, 64))
>>> gram = Gram.of(rng.normal(size=(300, 64)) @ mixing)
>>> gram = gram.add(rng.normal(size=(200, 64)) @ mixing)
>>> dense = float(reconstruction_error(weight, 0 * weight, gram))
>>> for solver in (Magnitude(), Wanda(), SparseGPT(), ALPS()):
...     error = reconstruction_error(weight, solver(weight, gram, "2:4").values, gram)
...     print(f"{type(solver).__name__:9} loses {float(error) / dense:.0%}")
Magnitude loses 13%
Wanda     loses 12%
SparseGPT loses 7%
ALPS      loses 2%
"""

from .alps import ALPS
from .base import FunctionSolver, LayerSolver, Solver
from .error import reconstruction_error
from .gram import Gram
from .reconstruction import Reconstruction
from .registry import as_solver, named_solver, named_solvers
from .scores import Magnitude, Wanda
from .sparsegpt import SparseGPT

__all__ = [
    "ALPS",
    "FunctionSolver",
    "Gram",
    "LayerSolver",
    "Magnitude",
    "Reconstruction",
    "Solver",
    "SparseGPT",
    "Wanda",
    "as_solver",
    "named_solver",
    "named_solvers",
    "reconstruction_error",
]
