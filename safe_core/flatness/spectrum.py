"""Estimate eigenvalues and the trace of a Hessian from Hessian-vector products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from safe_core import _checks
from safe_core.backends import Array
from safe_core.direction import norm
from safe_core.random_numbers import check_seed

from .vectors import Coordinates, Operator, dot, operator_on, orthogonalised

__all__ = ["Eigenvalues", "Trace", "eigenvalues", "trace"]

# A new basis vector shorter than this many roundings of |H| is noise: the span is complete.
_SPANNED = 100


class Eigenvalues(NamedTuple):
    """Result of `eigenvalues`, in the order of its argument ``which``.

    Attributes
    ----------
    values : list of float
        Eigenvalues, in the unit of the loss divided by that of the parameters squared.
    errors : list of float
        Residuals ``|H y - value * y|_2``. An eigenvalue of H lies within this distance of
        each value.
    vectors : list
        Unit eigenvector y of each value, as arrays shaped as the parameters.
    products : int
        Number of Hessian-vector products computed.
    """

    values: list[float]
    errors: list[float]
    vectors: list[Any]
    products: int


class Trace(NamedTuple):
    """Result of `trace`, in the unit of `Eigenvalues`.

    Attributes
    ----------
    value : float
        Mean of the samples, an unbiased estimate of the trace.
    standard_error : float
        Standard deviation of the mean, estimated from the samples.
    samples : list of float
        Estimates from one random vector each. Each includes the exact part of a sketch.
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
    """Return k extreme eigenvalues of a symmetric operator, by block Lanczos iteration.

    The iteration starts from a block of k random vectors. Every product with a basis vector
    extends the basis, and the eigenvalues of ``Q^T H Q``, H on the span, approach those of H
    from within. A block of k finds an eigenvalue of multiplicity up to k, which single-vector
    Lanczos cannot: the Hessian of least squares with several outputs repeats each one. For
    ``k=1`` this is Lanczos iteration with full reorthogonalisation.

    Parameters
    ----------
    product : callable
        ``product(vectors) -> vectors``, the map ``v -> H v`` of a symmetric H on lists of
        arrays shaped as ``arrays``. The vectors are float64 if any array is, else float32.
    arrays : list of arrays
        Real floating arrays. Only their shapes, dtypes and devices are used.
    k : int
        Number of eigenvalues.
    which : {"largest", "smallest", "magnitude"}
        Order of the eigenvalues: the largest, the smallest or the largest magnitude first.
    iterations : int
        Maximum number of products, at least k. The errors take k more. Memory grows with it:
        each iteration keeps one vector in float32 or wider.
    tolerance : float
        Stop once every error is at most ``tolerance`` times the largest magnitude found. For a
        well separated eigenvalue the true error is far smaller: it goes with the square.
    seed : int
        Seed of the random block, in ``[0, 2**32)``. All libraries draw the same numbers.
    support : list of bool arrays or None, optional
        Entries that may vary. None for an array lets all its entries vary. The spectrum is
        that of the submatrix of H on the support.

    Returns
    -------
    Eigenvalues
        Check its errors: the iteration also stops, without an error, after ``iterations``.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, ``arrays`` have fewer than k
        entries, or a product is not finite.

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
    # Entry (i, j) is q_i . H q_j. A vector enters the basis, and gets a row, before its product
    # is taken, which fills its column.
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
        # Test convergence once per block: each test solves an eigenproblem of size `done`.
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
    """Estimate the trace of a symmetric operator from random vectors.

    Hutchinson's estimate is the mean of ``v . H v`` over vectors v of random signs. With a
    ``sketch`` it is Hutch++, where Q is an orthonormal basis of the products of H with
    ``sketch`` random vectors::

        tr(H) = tr(Q^T H Q) + E[w . H w],    w = v - Q Q^T v

    The first part is computed exactly. That lowers the variance if a few eigenvalues are much
    larger than the others.

    Parameters
    ----------
    product, arrays, seed, support
        See `eigenvalues`.
    samples : int
        Number of random vectors, at least 2. Each takes one product.
    sketch : int
        Number of vectors in the sketch. Each takes two products.

    Returns
    -------
    Trace

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, or a product is not finite.

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
    """Return k Ritz values, their vectors' coefficients, their errors, and the largest magnitude.

    The values are eigenvalues of H on the span of the first ``done`` basis vectors.
    """
    square = projected[:done, :done]
    values, mixing = np.linalg.eigh((square + square.T) / 2)
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    chosen = np.argsort(order, kind="stable")[:k]
    mixing = mixing[:, chosen]
    # The error of a Ritz vector is the part of its product outside the span.
    errors = np.linalg.norm(projected[done:, :done] @ mixing, axis=0)
    return values[chosen], mixing, errors, float(np.abs(values).max())


def _random_block(coordinates: Coordinates, k: int, seed: int) -> list[Array]:
    basis: list[Array] = []
    for i in range(k):
        _, rest, length = orthogonalised(coordinates.normal(seed, i), basis)
        basis.append(rest / length)
    return basis


def _combined(basis: Sequence[Array], coefficients: Any) -> Array:
    """Return the unit vector along ``sum_i coefficients_i q_i``."""
    total = sum(c * q for q, c in zip(basis, coefficients.tolist(), strict=False))
    return total / math.sqrt(float(dot(total, total)))


def _spacing(coordinates: Coordinates) -> float:
    return float(array_namespace(coordinates.counter).finfo(coordinates.dtype).eps)
