"""The spectrum of a Hessian from its products with vectors: eigenvalues and trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from safe_core import _checks
from safe_core.backends import Array
from safe_core.perturbations import norm

from .vectors import Coordinates, Operator, check_seed, dot, operator_on, orthogonalised

__all__ = ["Eigenvalues", "Trace", "eigenvalues", "trace"]

_SPANNED = 100  # units of rounding of |H| below which a new direction is none


class Eigenvalues(NamedTuple):
    """What `eigenvalues` found, in the order asked for.

    Attributes
    ----------
    values : list of float
        In the unit of the loss over the unit of the parameters squared.
    errors : list of float
        ``|H y - value * y|_2``: within this distance of each value lies an eigenvalue.
    vectors : list
        For each value a unit eigenvector y, in arrays shaped as the parameters.
    products : int
        Hessian-vector products that were taken.
    """

    values: list[float]
    errors: list[float]
    vectors: list[Any]
    products: int


class Trace(NamedTuple):
    """What `trace` found, in the unit of `Eigenvalues`.

    Attributes
    ----------
    value : float
        The mean of the samples, an unbiased estimate.
    standard_error : float
        Its standard deviation, estimated from the samples.
    samples : list of float
        Estimates from one vector each, what a sketch takes exactly included.
    """

    value: float
    standard_error: float
    samples: list[float]


def eigenvalues(
    product: Operator,
    arrays: Sequence[Array],
    k: int = 1,
    *,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    support: Sequence[Array | None] | None = None,
) -> Eigenvalues:
    """The k largest eigenvalues of a symmetric operator, by block Lanczos iteration.

    From a block of k random vectors, every product with a basis vector extends the basis,
    and the eigenvalues of H on its span, ``Q^T H Q``, approach those of H from within. Every
    product is orthogonalised against the whole basis, twice, so none appears again as a
    ghost. A block of k finds an eigenvalue as often as it occurs, up to k times: the Hessian
    of least squares with several outputs repeats each. For ``k=1`` this is the iteration
    of Lanczos.

    Parameters
    ----------
    product : callable
        ``product(vectors) -> vectors``, lists of arrays shaped as ``arrays``: ``v -> H v`` of
        a symmetric H. It is called with float32, or float64 where an array is.
    arrays : list of arrays
        Real floating; only their shapes, dtypes and places matter.
    k : int
        How many eigenvalues.
    which : {"largest", "smallest", "magnitude"}
        The largest, the smallest or the largest in magnitude first.
    iterations : int
        At least k: at most so many products, and k more for the errors. The basis is kept:
        one vector in a wide dtype for each, of the entries on the support.
    tolerance : float
        Stop as soon as each error is at most this share of the largest magnitude found. Of
        an eigenvalue apart from the others the true error goes with its square.
    seed : int
        Of the random block, in ``[0, 2**32)``: the same numbers in every library.
    support : list of bool arrays or None, optional
        Entries that may vary, None for all of an array: the spectrum of the rows and
        columns of H that belong to them.

    Returns
    -------
    Eigenvalues
        Its errors say how far the iteration came.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind, there are fewer than k entries or a product is not
        finite.

    References
    ----------
    Lanczos 1950; Golub and Underwood 1977, "The block Lanczos method for computing
    eigenvalues"; Parlett 1998, "The Symmetric Eigenvalue Problem", theorem 4.5.1 (errors).

    Examples
    --------
    >>> import numpy
    >>> diagonal = numpy.asarray([3.0, -5.0, 3.0, 1.0])
    >>> found = eigenvalues(lambda v: [diagonal * v[0]], [diagonal], k=2)
    >>> [round(value, 6) for value in found.values]
    [3.0, 3.0]
    """
    _checks.choice("which", which, ("largest", "smallest", "magnitude"))
    _checks.integer("k", k, low=1)
    _checks.integer("iterations", iterations, low=k)
    _checks.real("tolerance", tolerance, low=0.0)
    check_seed(seed)
    coordinates = Coordinates.of(arrays, support)
    if k > coordinates.size:
        raise ValueError(f"k must be at most the number of entries {coordinates.size}, got {k}")
    hessian = operator_on(coordinates, product)
    iterations = min(iterations, coordinates.size)
    rounding = _SPANNED * _spacing(coordinates)
    basis = _random_block(coordinates, k, seed)
    # Row i, column j: q_i . H q_j. Basis vectors have a row before they have a column.
    projected = np.zeros((iterations + k, iterations))
    scale, done, exhausted = 0.0, 0, False
    while done < iterations and not exhausted:
        along, rest, length = orthogonalised(hessian(basis[done]), basis)
        projected[: len(along), done] = along
        scale = max(scale, math.hypot(length, *along))
        if length > rounding * scale and len(basis) < coordinates.size:
            projected[len(basis), done] = length
            basis.append(rest / length)
        done += 1
        exhausted = done == len(basis)
        if exhausted or done % k == 0 or done == iterations:
            values, mixing, errors, peak = _ritz(projected, done, k, which)
            if np.all(errors <= tolerance * peak):
                break
    vectors = [_combined(basis, column) for column in mixing.T]
    pairs = zip(vectors, values.tolist(), strict=True)
    return Eigenvalues(
        values.tolist(),
        [float(norm([hessian(y) - value * y])) for y, value in pairs],
        [coordinates.unpack(y) for y in vectors],
        done + k,
    )


def trace(
    product: Operator,
    arrays: Sequence[Array],
    samples: int = 100,
    *,
    sketch: int = 0,
    seed: int = 0,
    support: Sequence[Array | None] | None = None,
) -> Trace:
    """The trace of a symmetric operator, from random vectors.

    Hutchinson's estimate is the mean of ``v . H v`` over vectors v of independent signs. With
    a ``sketch`` it is Hutch++: with Q an orthonormal basis of the products of H with as many
    random vectors::

        tr(H) = tr(Q^T H Q) + E[w . H w],    w = v - Q Q^T v

    where the first part is exact: worth its products where few eigenvalues stand out.

    Parameters
    ----------
    product, arrays, seed, support
        As for `eigenvalues`.
    samples : int
        At least 2; a product for each.
    sketch : int
        The size of Q; two products for each.

    Returns
    -------
    Trace

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its kind or a product is not finite.

    References
    ----------
    Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines"; Meyer et al. 2021, "Hutch++: Optimal Stochastic Trace Estimation".

    Examples
    --------
    >>> import numpy
    >>> matrix = numpy.asarray([[2.0, 1.0], [1.0, 5.0]])
    >>> found = trace(lambda v: [matrix @ v[0]], [numpy.zeros(2)], samples=400)
    >>> abs(found.value - 7) < 3 * found.standard_error < 0.5
    True
    """
    _checks.integer("samples", samples, low=2)
    _checks.integer("sketch", sketch, low=0)
    check_seed(seed)
    coordinates = Coordinates.of(arrays, support)
    hessian = operator_on(coordinates, product)
    basis: list[Array] = []
    for i in range(sketch):
        image = hessian(coordinates.rademacher(seed, samples + i))
        _, rest, length = orthogonalised(image, basis)
        if length > _SPANNED * _spacing(coordinates) * math.sqrt(float(dot(image, image))):
            basis.append(rest / length)
    exact = sum(float(dot(q, hessian(q))) for q in basis)
    found = []
    for i in range(samples):
        v = orthogonalised(coordinates.rademacher(seed, i), basis)[1]
        found.append(exact + float(dot(v, hessian(v))))
    if not math.isfinite(sum(found)):
        raise ValueError(f"product(arrays) must be finite, got {sum(found)} along a vector")
    return Trace(float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(samples)), found)


def _ritz(projected: Any, done: int, k: int, which: str) -> tuple[Any, Any, Any, float]:
    """Of H on the span: eigenvalues, coefficients of vectors, errors, largest magnitude."""
    square = projected[:done, :done]
    values, mixing = np.linalg.eigh((square + square.T) / 2)
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    chosen = np.argsort(order, kind="stable")[:k]
    mixing = mixing[:, chosen]
    # The errors are what the products hold beyond the span.
    errors = np.linalg.norm(projected[done:, :done] @ mixing, axis=0)
    return values[chosen], mixing, errors, float(np.abs(values).max())


def _random_block(coordinates: Coordinates, k: int, seed: int) -> list[Array]:
    basis: list[Array] = []
    for i in range(k):
        _, rest, length = orthogonalised(coordinates.normal(seed, i), basis)
        basis.append(rest / length)
    return basis


def _combined(basis: Sequence[Array], coefficients: Any) -> Array:
    """The unit vector along ``sum_i coefficients_i q_i``."""
    total = sum(c * q for q, c in zip(basis, coefficients.tolist(), strict=False))
    return total / math.sqrt(float(dot(total, total)))


def _spacing(coordinates: Coordinates) -> float:
    return float(array_namespace(coordinates.counter).finfo(coordinates.dtype).eps)
