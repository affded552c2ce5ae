"""What the zeros of one array look like, found from its bits in NumPy.

The magnitude of a floating number orders as its bits without the sign, so that arrays of
any floating type, bfloat16 and 8 bits too, are analysed as unsigned integers of their width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["GroupPattern", "TensorAnalysis", "analyse", "find_groups", "magnitude_bits"]

_GROUP_SIZES = (2, 4, 8, 16, 32)
_FULL = 0.9  # the share of groups that hold N, for a pattern to be more than chance


class GroupPattern(NamedTuple):
    """At most ``n`` of every ``m`` consecutive entries along ``axis`` are not zero.

    Examples
    --------
    >>> str(GroupPattern(2, 4, axis=1))
    '2:4'
    """

    n: int
    m: int
    axis: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class TensorAnalysis(NamedTuple):
    """The zeros of one array.

    Attributes
    ----------
    entries, zeros : int
        Of both signs.
    pattern : {"dense", "all zero", "N:M", "channels", "unstructured"}
        The narrowest that holds exactly; with its numbers for ``"N:M"``, such as ``"2:4"``.
        "channels" means that every zero is in a zero row or column.
    axis : int or None
        Along which groups of N:M run.
    zero_rows, zero_columns : int
        Slices along axis 0 and along axis 1 that are zero throughout; 0 for vectors.
    ties : int
        Entries of the smallest magnitude that is not zero. Where there is more than one, a
        threshold cannot tell them apart.
    dense_bytes, compressed_bytes : int
        As stored, and by the smaller of that and the values that are not zero with their
        places: a bit for each entry or, for N:M, ``ceil(log2(M))`` bits for each of the N.
    """

    entries: int
    zeros: int
    pattern: str
    axis: int | None
    zero_rows: int
    zero_columns: int
    ties: int
    dense_bytes: int
    compressed_bytes: int

    @property
    def sparsity(self) -> float:
        """The share of zeros; 0 for an empty array."""
        return self.zeros / max(self.entries, 1)


def magnitude_bits(bits: NDArray[Any]) -> NDArray[Any]:
    """Return the bits of floating numbers without their signs: ``|a| < |b|`` orders as they do.

    Parameters
    ----------
    bits : unsigned integer array
        A view of floating numbers, such as ``x.view("u4")`` of float32.

    Raises
    ------
    TypeError
        If ``bits`` is of another kind.

    Examples
    --------
    >>> magnitude_bits(np.asarray([-2.0, 1.0, -0.0], "f4").view("u4")).argsort().tolist()
    [2, 1, 0]
    """
    if bits.dtype.kind != "u":
        raise TypeError(f"bits must be unsigned integers, got {bits.dtype}")
    return np.bitwise_and(bits, np.asarray(2 ** (8 * bits.dtype.itemsize - 1) - 1, bits.dtype))


def find_groups(nonzero: NDArray[np.bool_]) -> GroupPattern | None:
    """Find the N:M pattern that an array follows, or None.

    For M = 2, 4, ..., 32 that divides an axis, N is the most that a group holds. It is no
    pattern if N = M, or if fewer than nine tenths of the groups hold N, rows of zeros aside: in
    an array with 99% random zeros no group of 4 is full either. Of the patterns that hold,
    the one with the smallest N / M is taken, and of these the smallest M.

    Parameters
    ----------
    nonzero : bool array
        Of two or more axes; the last axis, which is the input axis of a torch weight, is
        tried first, then the others from the second last to the first.

    Examples
    --------
    >>> find_groups(np.asarray([[1, 1, 0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 1, 0, 1, 0]], bool))
    GroupPattern(n=2, m=4, axis=1)
    >>> find_groups(np.ones((4, 4), bool)) is None
    True
    """
    if nonzero.ndim < 2 or not nonzero.any():
        return None
    for axis in reversed(range(nonzero.ndim)):
        found = []
        for m in _GROUP_SIZES:
            n = _most_in_group(np.moveaxis(nonzero, axis, -1), m)
            if n is not None:
                found.append((n / m, GroupPattern(n, m, axis)))
        if found:
            return min(found)[1]
    return None


def _most_in_group(nonzero: NDArray[np.bool_], m: int) -> int | None:
    """N of N:M along the last axis, None where that is no pattern."""
    size = nonzero.shape[-1]
    if size % m:
        return None
    counts = np.zeros((*nonzero.shape[:-1], size // m), np.uint8)
    for j in range(m):
        counts += nonzero[..., j::m]
    n = int(counts.max())
    groups = size // m * int(np.count_nonzero(counts.any(axis=-1)))
    return n if n < m and np.count_nonzero(counts == n) >= _FULL * groups else None


def analyse(array: NDArray[Any], *, floating: bool | None = None) -> TensorAnalysis:
    """Describe the zeros of an array.

    Parameters
    ----------
    array : array
        Of any shape and of a real or boolean dtype, those of ml_dtypes too.
    floating : bool, optional
        Whether ``array``, of unsigned integers, holds the bits of floating numbers.

    Returns
    -------
    TensorAnalysis

    Notes
    -----
    Takes the memory of one copy of the array and two bytes for each entry.

    Examples
    --------
    >>> found = analyse(np.asarray([[0, 3, -1, 0], [1, 0, 0, 2]], "f4"))
    >>> found.pattern, found.sparsity, found.ties
    ('1:2', 0.5, 2)
    >>> found.dense_bytes, found.compressed_bytes  # 4 values and 4 places of 1 bit
    (32, 17)
    """
    if floating is None:
        floating = array.dtype.kind not in "biu"
        if floating:
            array = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    nonzero = magnitude_bits(array) if floating else array
    nonzero, ties = nonzero != 0, _ties(nonzero) if floating else 0
    entries, kept = nonzero.size, int(np.count_nonzero(nonzero))
    rows, columns = (_empty_slices(nonzero, axis) for axis in (0, 1))
    groups = find_groups(nonzero) if 0 < kept < entries else None
    return TensorAnalysis(
        entries,
        entries - kept,
        _pattern(nonzero.shape, kept, rows, columns, groups),
        groups.axis if groups else None,
        rows,
        columns,
        ties,
        array.nbytes,
        min(array.nbytes, _compressed(entries, kept, array.dtype.itemsize, groups)),
    )


def _ties(magnitudes: NDArray[Any]) -> int:
    """How many entries have the smallest magnitude that is not zero."""
    below = magnitudes - np.asarray(1, magnitudes.dtype)  # 0 becomes the largest
    smallest = below.min() if below.size else None
    none = smallest is None or smallest == np.iinfo(below.dtype).max
    return 0 if none else int(np.count_nonzero(below == smallest))


def _empty_slices(nonzero: NDArray[np.bool_], axis: int) -> int:
    if nonzero.ndim < 2 or not nonzero.size:
        return 0
    others = tuple(a for a in range(nonzero.ndim) if a != axis)
    return int(np.count_nonzero(~nonzero.any(axis=others)))


def _pattern(
    shape: tuple[int, ...], kept: int, rows: int, columns: int, groups: GroupPattern | None
) -> str:
    entries = math.prod(shape)
    if kept == entries:
        return "dense"
    if not kept:
        return "all zero"
    if len(shape) > 1 and kept == (shape[0] - rows) * (shape[1] - columns) * math.prod(shape[2:]):
        return "channels"
    return str(groups) if groups else "unstructured"


def _compressed(entries: int, kept: int, itemsize: int, groups: GroupPattern | None) -> int:
    if groups is None:
        return kept * itemsize + math.ceil(entries / 8)
    places = entries // groups.m * groups.n
    bits = places * (groups.m - 1).bit_length()
    return places * itemsize + math.ceil(bits / 8)
