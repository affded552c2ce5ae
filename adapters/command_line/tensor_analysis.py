"""What the zeros of one array look like, found from its bits in NumPy.

The magnitude of a floating number orders as its bits without the sign, so that arrays of
any floating type, bfloat16 and 8 bits too, are analysed as unsigned integers of their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["GroupPattern", "GroupSearch", "TensorAnalysis", "analyse", "magnitude_bits"]

_SIZES = (2, 4, 8, 16, 32)
_SLAB = 2**20  # entries
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
        Along which the groups of N:M run, where that is the pattern.
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


class GroupSearch:
    """Find the N:M pattern that an array follows, slab by slab along its first axis.

    For M = 2, 4, ..., 32 that divides an axis, N is the most that a group holds. It is no
    pattern if N = M, or if fewer than nine tenths of the groups hold N, rows of zeros aside: in
    an array with 99% random zeros no group of 4 is full either. Of the patterns that hold,
    the one with the smallest N / M is taken, and of these the smallest M.

    Parameters
    ----------
    shape : tuple of int
        Of the whole array.

    Examples
    --------
    >>> search = GroupSearch((2, 8))
    >>> search.add(np.asarray([[1, 1, 0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 1, 0, 1, 0]], bool))
    >>> search.found()
    GroupPattern(n=2, m=4, axis=1)
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        # The last axis, the input axis of a torch weight, goes first.
        self._axes = list(reversed(range(len(shape)))) if len(shape) > 1 else []
        self._most = {
            (axis, m): _Extreme(max) for axis in self._axes for m in _SIZES if shape[axis] % m == 0
        }
        self._rows = dict.fromkeys(self._axes, 0)  # lines along an axis that are not zero
        self._columns = np.zeros(shape[1:], bool)

    def add(self, nonzero: NDArray[np.bool_]) -> None:
        """Take in the next slab; all but the last have a multiple of 32 rows."""
        for axis in self._axes:
            if not any((axis, m) in self._most for m in _SIZES):
                continue
            if axis:
                self._rows[axis] += int(np.count_nonzero(nonzero.any(axis=axis)))
            else:
                self._columns |= nonzero.any(axis=0)
            counts = np.moveaxis(nonzero, axis, -1).view(np.uint8)
            for m in _SIZES:
                if counts.shape[-1] % 2:
                    break
                counts = counts[..., 0::2] + counts[..., 1::2]
                self._count(axis, m, counts)

    def _count(self, axis: int, m: int, counts: NDArray[Any]) -> None:
        most = self._most.get((axis, m))
        if most is not None:
            most.add(counts)
            if most.value == m:
                del self._most[axis, m]

    def found(self) -> GroupPattern | None:
        """Return the pattern of all slabs, or None."""
        for axis in self._axes:
            rows = self._rows[axis] if axis else int(np.count_nonzero(self._columns))
            patterns = [
                (most.value / m, GroupPattern(most.value, m, axis))
                for (a, m), most in self._most.items()
                if a == axis
                and most.value
                and most.times >= _FULL * rows * (self._shape[axis] // m)
            ]
            if patterns:
                return min(patterns)[1]
        return None


class _Extreme:
    """The smallest or largest of many numbers, and how many times it occurs."""

    def __init__(self, choose: Callable[[int, int], int]) -> None:
        self._choose = choose
        self.value: int | None = None
        self.times = 0

    def add(self, numbers: NDArray[Any]) -> None:
        if not numbers.size:
            return
        value = int(numbers.max() if self._choose is max else numbers.min())
        if self.value is None or self._choose(value, self.value) != self.value:
            self.value, self.times = value, 0
        if value == self.value:
            self.times += int(np.count_nonzero(numbers == value))


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
    Goes through the array once, in slabs of rows of about a million entries.

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
    shape = array.shape
    groups, ties = GroupSearch(shape), _Extreme(min)
    kept, rows, columns = 0, 0, np.zeros(shape[1:2], bool)
    for slab in _slabs(array.reshape(1) if array.ndim == 0 else array):
        numbers = magnitude_bits(slab) if floating else slab
        nonzero = numbers != 0
        if floating:
            numbers -= np.asarray(1, numbers.dtype)  # 0 becomes the largest
            ties.add(numbers)
        kept += int(np.count_nonzero(nonzero))
        groups.add(nonzero)
        if array.ndim > 1:
            rows += int(np.count_nonzero(nonzero.any(axis=tuple(range(1, array.ndim)))))
            columns |= nonzero.any(axis=(0, *range(2, array.ndim)))
    empty = (0, 0)
    if array.ndim > 1 and array.size:
        empty = shape[0] - rows, len(columns) - int(np.count_nonzero(columns))
    return _described(array, kept, empty, groups.found(), ties.times if floating and kept else 0)


def _slabs(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    per_row = max(1, math.prod(array.shape[1:]))
    rows = max(1, _SLAB // per_row // _SIZES[-1]) * _SIZES[-1]
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _described(
    array: NDArray[Any],
    kept: int,
    empty: tuple[int, int],
    groups: GroupPattern | None,
    ties: int,
) -> TensorAnalysis:
    shape, entries = array.shape, array.size
    if kept == entries:
        pattern = "dense"
    elif not kept:
        pattern = "all zero"
    elif array.ndim > 1 and kept == math.prod(
        [shape[0] - empty[0], shape[1] - empty[1], *shape[2:]]
    ):
        pattern = "channels"
    else:
        pattern = str(groups) if groups else "unstructured"
    size = array.dtype.itemsize
    if groups is not None and pattern == str(groups):
        places = entries // groups.m * groups.n
        axis, bits = groups.axis, places * (groups.m - 1).bit_length()
    else:
        places, axis, bits = kept, None, entries
    stored = places * size + math.ceil(bits / 8)
    return TensorAnalysis(
        entries,
        entries - kept,
        pattern,
        axis,
        *empty,
        ties,
        array.nbytes,
        min(array.nbytes, stored),
    )
