"""Statistics of a layer's inputs: the Gram matrix and the squares of each input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of

from .._dtypes import check_real_floating, wide_dtype

__all__ = ["Gram", "gram_or_identity", "positive_squares", "solver_statistics"]

_FLOOR = 1e-8  # times the mean over inputs: the P of an input that is never active


class Gram(NamedTuple):
    """The Gram matrix ``X^T X`` of the inputs of a layer, summed over tokens.

    Start with `of` the first batch and `add` the others. To combine several processes, sum each
    field. The scale does not matter to any solver.

    Attributes
    ----------
    matrix : array
        ``sum_t x_t x_t^T``, shape (features, features), float32 or wider.
    count : int
        Number of tokens.

    Examples
    --------
    >>> import numpy
    >>> gram = Gram.of(numpy.asarray([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.add(numpy.asarray([1.0, 1.0]))
    Gram(matrix=array([[11.,  3.],
           [ 3.,  5.]]), count=3)
    """

    matrix: Array
    count: Any

    @classmethod
    def of(cls, inputs: Array) -> Gram:
        """Return the Gram matrix of a first batch.

        Parameters
        ----------
        inputs : array
            Shape (..., features), real floating.

        Raises
        ------
        TypeError, ValueError
            If ``inputs`` is not a real floating array or has no axes.
        """
        rows = _tokens(inputs)
        return cls(rows.mT @ rows, rows.shape[0])

    def add(self, inputs: Array) -> Gram:
        """Return the sum with the Gram matrix of another batch, shaped as in `of`.

        Raises
        ------
        TypeError, ValueError
            As `of`, or if the number of features differs.
        """
        other = Gram.of(inputs)
        if other.matrix.shape != self.matrix.shape:
            raise ValueError(
                f"inputs must have {self.matrix.shape[0]} features, as before, got shape "
                f"{tuple(inputs.shape)}"
            )
        return Gram(self.matrix + other.matrix, self.count + other.count)

    def mean_squares(self) -> Array:
        """Return the mean square of each input, shape (features,): the P of Wanda and SAFE+.

        Raises
        ------
        ValueError
            If no token was seen.
        """
        if isinstance(self.count, int) and self.count == 0:
            raise ValueError("count must be positive for a mean square, got 0")
        return array_namespace(self.matrix).linalg.diagonal(self.matrix) / self.count


def gram_or_identity(gram: Array) -> Array:
    """Return a Gram matrix, or the identity where no input was ever active.

    Under the identity every solver prunes by magnitude. Single inputs that were never active,
    ``H_jj = 0`` beside others, are left for the solvers to tell.

    Parameters
    ----------
    gram : array
        Shape (inputs, inputs), real floating.

    Examples
    --------
    >>> import numpy
    >>> gram_or_identity(numpy.zeros((2, 2)))
    array([[1., 0.],
           [0., 1.]])
    >>> gram_or_identity(numpy.diag([4.0, 0.0]))
    array([[4., 0.],
           [0., 0.]])
    """
    xp = array_namespace(gram)
    diagonal = xp.linalg.diagonal(gram)
    active = xp.any(diagonal != 0)
    added = xp.where(active, xp.zeros_like(diagonal), xp.ones_like(diagonal))
    return gram + xp.tril(xp.triu(xp.broadcast_to(added, gram.shape)))


def solver_statistics(needs: str, statistics: Array) -> Array | None:
    """Return what a layer-wise solver takes, from a Gram matrix or sums of squares.

    Where no input was ever active, it is that of the identity, see `gram_or_identity`.

    Parameters
    ----------
    needs : {"nothing", "squares", "gram"}
        As of `safe_core.solvers.Solver`.
    statistics : array
        Shape (inputs, inputs), or for "squares" also (inputs,).

    Examples
    --------
    >>> import numpy
    >>> solver_statistics("squares", numpy.zeros(2)), solver_statistics("squares", 4 * numpy.eye(2))
    (array([1., 1.]), array([4., 4.]))
    """
    if needs == "nothing":
        return None
    if needs == "gram":
        return gram_or_identity(statistics)
    xp = array_namespace(statistics)
    squares = xp.linalg.diagonal(statistics) if statistics.ndim == 2 else statistics
    return xp.where(xp.any(squares != 0), squares, xp.ones_like(squares))


def positive_squares(mean_squares: Array) -> Array:
    """Return mean squares of inputs as a positive P: an input that was never active counts little.

    ``P_j = max(s_j, 1e-8 mean(s))``, so that weights of such inputs rank by magnitude among
    each other and below the rest. Where no input was active P is 1.

    Parameters
    ----------
    mean_squares : array
        ``s``, shape (..., inputs), real floating, not negative.

    Examples
    --------
    >>> import numpy
    >>> positive_squares(numpy.asarray([[4.0, 0.0], [0.0, 0.0]]))
    array([[4.e+00, 2.e-08],
           [1.e+00, 1.e+00]])
    """
    xp = array_namespace(mean_squares)
    floor = _FLOOR * xp.mean(mean_squares, axis=-1, keepdims=True)
    filled = xp.where(mean_squares > floor, mean_squares, floor)
    return xp.where(floor > 0, filled, xp.ones_like(filled))


def _tokens(inputs: Array) -> Array:
    """Inputs as a matrix (tokens, features), in the dtype that sums are taken in."""
    if not is_array_api_obj(inputs):
        raise TypeError(f"inputs must be an array, got {type(inputs)!r}")
    xp = array_namespace(inputs)
    check_real_floating(xp, inputs, "inputs")
    if inputs.ndim == 0:
        raise ValueError("inputs must have shape (..., features), got a scalar")
    shape = math.prod(inputs.shape[:-1]), inputs.shape[-1]
    wide = xp.astype(backend_of(inputs).detached(inputs), wide_dtype(xp, [inputs]), copy=False)
    return xp.reshape(wide, shape)
