"""Measure how far the Hessians of batches spread around their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from safe_core import _checks
from safe_core.backends import Array

from .spectrum import eigenvalues
from .vectors import Operator

__all__ = ["Moment", "hessian_moment"]


class Moment(NamedTuple):
    """Result of `hessian_moment`, in the unit of `Eigenvalues`.

    Attributes
    ----------
    value : float
        ``s_k``, which is 0 if all Hessians are equal.
    error : float
        An eigenvalue of the matrix lies within this distance of ``s_k^k``.
    """

    value: float
    error: float


def hessian_moment(
    products: Sequence[Callable[[], Operator]],
    arrays: Sequence[Array],
    order: int = 2,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    support: Sequence[Array | None] | None = None,
) -> Moment:
    """Return how much the Hessians of n batches differ, by their k-th moment.

    With the Hessians ``H_i`` of the batches and their mean H::

        s_k = r(lambda_max(1/n sum_i H_i^k - H^k)),    r(a) = sign(a) |a|^(1/k)

    For k = 2 this is the non-uniformity of Wu et al. The linear stability of SGD at a minimum
    bounds it by the learning rate, and that of SAM bounds ``s_2``, ``s_3`` and ``s_4``, so SAM can
    settle only at minima at which the batches agree in their curvature.

    Parameters
    ----------
    products : sequence of callables
        ``products[i]()`` returns the map ``v -> H_i v``. It is called once for every vector, and
        may hold memory until the next one.
    arrays : list of arrays
        As for `eigenvalues`.
    order : int
        k, at least 2.
    iterations, tolerance, seed, support
        As for `eigenvalues`. An iteration takes 2 k n products.

    Returns
    -------
    Moment

    Raises
    ------
    TypeError, ValueError
        As `eigenvalues`, or if ``products`` is empty.

    References
    ----------
    Wu, Ma and E 2018, "How SGD Selects the Global Minima in Over-parameterized Learning"; Shin
    et al. 2023, "Critical Influence of Overparameterization on Sharpness-aware Minimization".

    Examples
    --------
    >>> import numpy
    >>> first, second = numpy.asarray([4.0, 1.0]), numpy.asarray([2.0, 1.0])
    >>> products = [lambda d=d: lambda v: [d * v[0]] for d in (first, second)]
    >>> round(hessian_moment(products, [first]).value, 4)  # (16 + 4) / 2 - 3^2 = 1
    1.0
    """
    _checks.integer("order", order, low=2)
    if not products:
        raise ValueError("products must hold one for each batch, got none")

    def total(terms: Sequence[Sequence[Array]]) -> list[Array]:
        return [sum(parts[1:], start=parts[0]) for parts in zip(*terms, strict=True)]

    def mean(vectors: Sequence[Array]) -> list[Array]:
        return [x / len(products) for x in total([make()(vectors) for make in products])]

    def power(product: Operator, vectors: Sequence[Array]) -> Sequence[Array]:
        for _ in range(order):
            vectors = product(vectors)
        return vectors

    def spread(vectors: Sequence[Array]) -> list[Array]:
        each = total([power(make(), vectors) for make in products])
        return [a / len(products) - b for a, b in zip(each, power(mean, vectors), strict=True)]

    found = eigenvalues(
        spread, arrays, iterations=iterations, tolerance=tolerance, seed=seed, support=support
    )
    (value,), (error,) = found.values, found.errors
    return Moment(math.copysign(abs(value) ** (1 / order), value), error)
