"""View several arrays, or their kept entries, as one vector; draw random vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from safe_core._dtypes import check_real_floating, wide_dtype
from safe_core.backends import Array, backend_of, hashing
from safe_core.random_numbers import fractions, mixed, signed

__all__ = ["Coordinates", "Operator", "dot", "operator_on", "orthogonalised"]

Operator = Callable[[Sequence[Array]], Sequence[Array]]
"""A linear map from arrays to arrays of the same shapes, such as ``v -> H v``."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Map between several arrays and one vector of all their entries, in array order.

    With a support, only entries on it are coordinates: `pack` leaves the others out and
    `unpack` fills them with zeros. Vectors then need memory for the support only.

    Attributes
    ----------
    shapes : tuple of tuple of int
        Shapes of the arrays.
    dtype : dtype
        Dtype of vectors: float64 if any array is float64, else float32.
    counter : int32 array, (size,)
        Positions 0, 1, 2, ..., on the device of the arrays.
    kept : integer array, (size,), or None
        Index of each coordinate among all entries. None if all entries are coordinates.
    place : int32 array, (entries,), or None
        Coordinate of each entry, or -1 for an entry off the support.

    Examples
    --------
    >>> import numpy
    >>> arrays = [numpy.asarray([1.0, 2.0]), numpy.asarray([[3.0]])]
    >>> kept = [numpy.asarray([False, True]), None]
    >>> coordinates = Coordinates.of(arrays, kept)
    >>> coordinates.pack(arrays)
    array([2., 3.])
    >>> coordinates.unpack(10 * coordinates.pack(arrays))
    [array([ 0., 20.]), array([[30.]])]
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: Any
    counter: Array
    kept: Array | None
    place: Array | None

    @classmethod
    def of(
        cls, arrays: Sequence[Array], support: Sequence[Array | None] | None = None
    ) -> Coordinates:
        """Return the coordinates for ``arrays`` and the entries that ``support`` keeps."""
        if not isinstance(arrays, (list, tuple)) or not arrays:
            raise ValueError(f"arrays must be a list of at least one array, got {arrays!r}")
        xp = array_namespace(*arrays)
        for i, x in enumerate(arrays):
            check_real_floating(xp, x, f"arrays[{i}]")
        dtype = wide_dtype(xp, arrays)
        shapes = tuple(tuple(x.shape) for x in arrays)
        kept = place = None
        if support is None:
            # Counting ones puts the result on the device of the arrays; arange would not.
            counter = _counted(xp, xp.ones_like(_flat(xp, arrays, dtype), dtype=xp.int32))
        else:
            mask = _mask(xp, arrays, support)
            (kept,) = xp.nonzero(mask)
            counter = _counted(xp, xp.ones_like(kept, dtype=xp.int32))
            count = _counted(xp, xp.astype(mask, xp.int32))
            place = xp.where(mask, count, xp.full_like(count, -1))
        if not math.prod(counter.shape):
            raise ValueError("arrays must hold at least one entry that is kept, got none")
        return cls(shapes, dtype, counter, kept, place)

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return math.prod(self.counter.shape)

    def pack(self, arrays: Sequence[Array], name: str = "arrays") -> Array:
        """Return the entries of ``arrays`` as a vector, without those off the support."""
        shapes = tuple(tuple(x.shape) for x in arrays)
        if shapes != self.shapes:
            raise ValueError(f"{name} must have the shapes {self.shapes}, got {shapes}")
        arrays = [backend_of(x).detached(x) for x in arrays]
        values = _flat(array_namespace(*arrays), arrays, self.dtype)
        return values if self.kept is None else array_namespace(values).take(values, self.kept)

    def unpack(self, vector: Array) -> list[Array]:
        """Return the entries of ``vector`` as arrays, with zeros off the support."""
        xp = array_namespace(vector)
        # Gather and mask, because the array API has no scatter.
        if self.place is not None:
            values = xp.take(vector, xp.maximum(self.place, xp.zeros_like(self.place)))
            vector = xp.where(self.place >= 0, values, xp.zeros_like(values))
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        starts = [0, *ends[:-1]]
        return [
            xp.reshape(vector[start:end], shape)
            for start, end, shape in zip(starts, ends, self.shapes, strict=True)
        ]

    def rademacher(self, seed: int, index: int) -> Array:
        """Return a vector of -1 and +1, each with probability 1/2."""
        xp = array_namespace(self.counter)
        ones = xp.ones_like(self.counter, dtype=self.dtype)
        return xp.where(self._bits(seed, 3 * index) < 0, -ones, ones)

    def normal(self, seed: int, index: int) -> Array:
        """Return a vector of standard normal numbers, by the Box-Muller transform."""
        xp = array_namespace(self.counter)
        first, second = (self._uniform(seed, 3 * index + i) for i in (1, 2))
        return xp.sqrt(-2 * xp.log(first)) * xp.cos(2 * math.pi * second)

    def _uniform(self, seed: int, stream: int) -> Array:
        """Return numbers in (0, 1), odd multiples of ``2**-24``."""
        xp = array_namespace(self.counter)
        return fractions(self._bits(seed, stream), self.dtype, xp=xp)

    def _bits(self, seed: int, stream: int) -> Array:
        """Return 32 random bits for every coordinate, a hash of seed, stream and position.

        Integer arithmetic gives the same bits in every library, and runs on the device of the
        arrays. A generator of each library would give other numbers in each.
        """
        salt = signed(mixed(mixed(seed) ^ stream))
        return hashing.mix(hashing.mix(self.counter) ^ salt)


def operator_on(coordinates: Coordinates, product: Operator) -> Callable[[Array], Array]:
    """Return ``product`` as a function from vector to vector.

    Examples
    --------
    >>> import numpy
    >>> coordinates = Coordinates.of([numpy.zeros(2)])
    >>> operator_on(coordinates, lambda v: [3 * v[0]])(numpy.ones(2))
    array([3., 3.])
    """

    def apply(vector: Array) -> Array:
        return coordinates.pack(product(coordinates.unpack(vector)), "product(arrays)")

    return apply


def dot(a: Array, b: Array) -> Array:
    """Return ``a . b`` as a sum of products.

    A matrix product might run on tensor cores, which round the factors to TF32.

    Examples
    --------
    >>> import numpy
    >>> float(dot(numpy.asarray([1.0, 2.0]), numpy.asarray([3.0, 4.0])))
    11.0
    """
    return array_namespace(a, b).sum(a * b)


def orthogonalised(vector: Array, basis: Sequence[Array]) -> tuple[list[float], Array, float]:
    """Split ``vector`` into components along an orthonormal basis and a remainder.

    ``vector = sum_i c_i q_i + rest``, by two passes of modified Gram-Schmidt. After one pass
    rounding can leave the remainder far from orthogonal; after two it is orthogonal up to
    rounding (Giraud et al. 2005, "twice is enough").

    Parameters
    ----------
    vector : array, (n,)
    basis : sequence of arrays, (n,)
        Orthonormal vectors.

    Returns
    -------
    list of float
        Coefficients c.
    array
        Remainder, orthogonal to the basis.
    float
        Norm of the remainder.

    Raises
    ------
    ValueError
        If the norm is not finite.

    Examples
    --------
    >>> import numpy
    >>> orthogonalised(numpy.asarray([3.0, 4.0]), [numpy.asarray([1.0, 0.0])])
    ([3.0], array([0., 4.]), 4.0)
    """
    passes = []
    for _ in range(2):
        found = []
        for q in basis:
            found.append(dot(q, vector))
            vector = vector - found[-1] * q
        passes.append(found)
    length = float(array_namespace(vector).linalg.vector_norm(vector))
    if not math.isfinite(length):
        raise ValueError(f"product(arrays) must be finite, got a vector of norm {length}")
    return [float(a + b) for a, b in zip(*passes, strict=True)], vector, length


def _flat(xp: Any, arrays: Sequence[Array], dtype: Any) -> Array:
    return xp.concat([xp.reshape(xp.astype(x, dtype, copy=False), (-1,)) for x in arrays])


def _mask(xp: Any, arrays: Sequence[Array], support: Sequence[Array | None]) -> Array:
    if len(support) != len(arrays):
        raise ValueError(
            f"support must have one entry per array ({len(arrays)}), got {len(support)}"
        )
    masks = []
    for i, (x, kept) in enumerate(zip(arrays, support, strict=True)):
        mask = xp.ones_like(x, dtype=xp.bool) if kept is None else kept
        if mask.dtype != xp.bool or tuple(mask.shape) != tuple(x.shape):
            raise ValueError(
                f"support[{i}] must be a bool array of shape {tuple(x.shape)} or None, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}"
            )
        masks.append(xp.reshape(mask, (-1,)))
    return xp.concat(masks)


def _counted(xp: Any, flags: Array) -> Array:
    """Return the running count of flags of 0 or 1, less one: positions among those that are 1."""
    return xp.cumulative_sum(flags, dtype=xp.int32) - 1
