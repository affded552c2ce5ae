"""Several arrays, or the entries of them that are kept, as one vector; and random vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from safe_core import _checks
from safe_core._dtypes import check_real_floating, wide_dtype
from safe_core.backends import Array, backend_of, hashing

__all__ = ["Coordinates", "Operator", "dot", "operator_on", "orthogonalised"]

Operator = Callable[[Sequence[Array]], Sequence[Array]]
"""A linear map from arrays to arrays of the same shapes, such as ``v -> H v``."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The entries of several arrays in a row, array by array, as a vector in a wide dtype.

    With a support only the entries on it are coordinates: `pack` leaves the others out, and
    `unpack` puts zeros there. So what is computed with vectors is computed on the support,
    in memory for it alone.

    Attributes
    ----------
    shapes : tuple of tuple of int
    dtype : dtype
        float64 if an array is, else float32.
    counter : int32 array, (size,)
        0, 1, 2, ...
    kept : integer array, (size,), or None
        The place of each coordinate among all entries; None where all are coordinates.
    place : int32 array, (entries,), or None
        The coordinate of each entry, and -1 where it is none.

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
        """Take note of the shapes of ``arrays`` and of the entries that are kept."""
        if not isinstance(arrays, (list, tuple)) or not arrays:
            raise ValueError(f"arrays must be a list of at least one array, got {arrays!r}")
        xp = array_namespace(*arrays)
        for i, x in enumerate(arrays):
            check_real_floating(xp, x, f"arrays[{i}]")
        dtype = wide_dtype(xp, arrays)
        shapes = tuple(tuple(x.shape) for x in arrays)
        kept = place = None
        if support is None:
            # Of ones, and not `arange`, so as to be where the arrays are.
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
        """Return the vector of the coordinates of ``arrays``."""
        shapes = tuple(tuple(x.shape) for x in arrays)
        if shapes != self.shapes:
            raise ValueError(f"{name} must have the shapes {self.shapes}, got {shapes}")
        arrays = [backend_of(x).detached(x) for x in arrays]
        values = _flat(array_namespace(*arrays), arrays, self.dtype)
        return values if self.kept is None else array_namespace(values).take(values, self.kept)

    def unpack(self, vector: Array) -> list[Array]:
        """Return the arrays of the coordinates in ``vector``, zero elsewhere."""
        xp = array_namespace(vector)
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
        """Return a vector of standard normal numbers, by the method of Box and Muller."""
        xp = array_namespace(self.counter)
        first, second = (self._uniform(seed, 3 * index + i) for i in (1, 2))
        return xp.sqrt(-2 * xp.log(first)) * xp.cos(2 * math.pi * second)

    def _uniform(self, seed: int, stream: int) -> Array:
        """Numbers in (0, 1): odd multiples of ``2**-24``."""
        xp = array_namespace(self.counter)
        bits = (self._bits(seed, stream) >> 9) & 0x7FFFFF
        return (xp.astype(bits, self.dtype) + 0.5) * 2.0**-23

    def _bits(self, seed: int, stream: int) -> Array:
        """32 random bits for every coordinate: a hash of seed, stream and position.

        By integer arithmetic on the device of the arrays: the same in every library, and
        nothing is sent there.
        """
        salt = _mixed_int(_mixed_int(seed) ^ stream)
        return hashing.mix(hashing.mix(self.counter) ^ (salt - 2**32 if salt >= 2**31 else salt))


def operator_on(coordinates: Coordinates, product: Operator) -> Callable[[Array], Array]:
    """``product`` as a map of vectors.

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
    """``a . b``, by no matrix unit, which might round the factors.

    Examples
    --------
    >>> import numpy
    >>> float(dot(numpy.asarray([1.0, 2.0]), numpy.asarray([3.0, 4.0])))
    11.0
    """
    return array_namespace(a, b).sum(a * b)


def orthogonalised(vector: Array, basis: Sequence[Array]) -> tuple[list[float], Array, float]:
    """Split ``vector`` into its parts along an orthonormal basis and the rest.

    ``vector = sum_i c_i q_i + rest``, by two passes of modified Gram-Schmidt, after which the
    rest is orthogonal to rounding (Giraud et al. 2005, "twice is enough").

    Parameters
    ----------
    vector : array, (n,)
    basis : sequence of arrays, (n,)
        Orthonormal.

    Returns
    -------
    list of float
        The coefficients c.
    array
        The rest.
    float
        Its norm.

    Raises
    ------
    ValueError
        If that is not finite.

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


def check_seed(seed: int) -> None:
    """Refuse what the hash does not take as it is."""
    if _checks.integer("seed", seed, low=0) >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed!r}")


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
    """How many flags of 0 or 1 precede each."""
    return xp.cumulative_sum(flags, dtype=xp.int32) - 1


def _mixed_int(h: int) -> int:
    """Return the hash of ``h`` moved by a constant, for the hash of zero is zero."""
    return hashing.mix_int((h + 0x9E3779B9) & 0xFFFFFFFF)
