"""Count the zeros of an array and name the pattern that they form.

The module reads the bits of the numbers, in NumPy. Without their sign bit, floating-point
numbers are ordered as unsigned integers. So every floating-point type can be analysed,
bfloat16 and the 8-bit types included, although NumPy has no arithmetic for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["TensorAnalysis", "analyse", "magnitude_bits", "magnitude_table"]

_GROUP_SIZES = (2, 4, 8, 16, 32)
# Entries read at once. Small slabs keep a large memory-mapped array out of memory.
_SLAB = 2**20
# Random zeros also keep every group at or below some N. N:M is only reported where this
# share of the groups holds exactly N.
_MIN_FULL_GROUPS = 0.9


class _GroupPattern(NamedTuple):
    """At most ``n`` of every ``m`` consecutive entries along ``axis`` are non-zero.

    Examples
    --------
    >>> str(_GroupPattern(2, 4, axis=1))
    '2:4'
    """

    n: int
    m: int
    axis: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class TensorAnalysis(NamedTuple):
    """The zeros of one array, as `analyse` returns them.

    Attributes
    ----------
    entries, zeros : int
        Numbers of entries. Zeros include -0.
    pattern : str
        The most specific pattern that holds exactly: ``"dense"``, ``"all zero"``,
        ``"channels"``, an N:M pattern such as ``"2:4"``, or ``"unstructured"``. "channels"
        means that every zero lies in a zero row or column.
    axis : int or None
        The axis along which the groups of N:M run; None for other patterns.
    zero_rows, zero_columns : int
        Numbers of slices along axis 0 and axis 1 that hold zeros only; 0 for vectors.
    ties : int
        Number of entries with the smallest non-zero magnitude. If it is larger than one, no
        threshold can separate these entries.
    dense_bytes : int
        Size of the array as it is stored.
    compressed_bytes : int
        Size of the non-zero values and their positions, or ``dense_bytes`` if that is
        smaller. Positions take one bit per entry, or ``ceil(log2(M))`` bits for each of the
        N values of an N:M group.

    Examples
    --------
    >>> found = analyse(np.asarray([[0.0, 1.0], [0.0, 2.0]]))
    >>> found.pattern, found.zero_columns, found.sparsity
    ('channels', 1, 0.5)
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
        """Fraction of entries that are zero; 0 for an empty array."""
        return self.zeros / max(self.entries, 1)


@lru_cache
def magnitude_table(format: str) -> NDArray[np.uint16] | None:
    """Return the magnitudes of all bytes in a floating-point format of at most 8 bits.

    Most formats have a sign bit, and two zeros. Some have no -0 (its bits are NaN), some have no
    sign bit and no zero, and some have fewer bits than the byte that holds them.

    Parameters
    ----------
    format : str
        The name of the format in ml_dtypes or torch.

    Returns
    -------
    array of uint16, shape (256,), or None
        Integers in the order of the magnitudes, 0 for zero. None for formats with a sign bit at
        the top and two zeros, for which `magnitude_bits` needs no table.

    Examples
    --------
    >>> magnitude_table("float8_e4m3fnuz")[[0, 0x80, 0x81]].tolist()
    [0, 255, 1]
    >>> magnitude_table("float8_e8m0fnu").min()
    np.uint16(1)
    """
    bits = np.arange(256, dtype=np.uint16)
    if format.endswith("fnu"):
        return bits + np.uint16(1)
    if format.endswith("fnuz"):
        return np.where(bits == 0x80, np.uint16(0xFF), bits & np.uint16(0x7F))
    for start, mask in (("float6_", 0x1F), ("float4_", 0x07)):
        if format.startswith(start):
            return bits & np.uint16(mask)
    return None


def magnitude_bits(bits: NDArray[Any], table: NDArray[np.uint16] | None = None) -> NDArray[Any]:
    """Return the bits of floating-point numbers without their sign bits.

    The results are ordered as the magnitudes ``|x|`` are.

    Parameters
    ----------
    bits : unsigned integer array
        A view of floating-point numbers, such as ``x.view("u4")`` of float32.
    table : array, optional
        From `magnitude_table`, for formats of 8 bits and fewer.

    Raises
    ------
    TypeError
        If ``bits`` has another dtype.

    Examples
    --------
    >>> magnitude_bits(np.asarray([-2.0, 1.0, -0.0], "f4").view("u4")).argsort().tolist()
    [2, 1, 0]
    """
    if bits.dtype.kind != "u":
        raise TypeError(f"bits must be unsigned integers, got {bits.dtype}")
    if table is not None:
        return table[bits]
    return np.bitwise_and(bits, np.asarray(2 ** (8 * bits.dtype.itemsize - 1) - 1, bits.dtype))


class _GroupSearch:
    """Find the N:M pattern of an array that is read slab by slab along its first axis.

    For every M of 2, 4, ..., 32 that divides an axis, N is the largest number of non-zeros in
    a group. N:M counts as a pattern if N < M and at least nine tenths of the groups outside
    zero rows hold N non-zeros; in an array with 99% random zeros, no group of 4 is full
    either. Among several patterns, take the one with the smallest N / M, then the smallest M.

    Parameters
    ----------
    shape : tuple of int
        Shape of the whole array.

    Examples
    --------
    >>> search = _GroupSearch((2, 8))
    >>> search.add(np.asarray([[1, 1, 0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 1, 0, 1, 0]], bool))
    >>> search.found()
    _GroupPattern(n=2, m=4, axis=1)
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        # The last axis is the input axis of a torch weight, so patterns along it win.
        self._axes = list(reversed(range(len(shape)))) if len(shape) > 1 else []
        self._most = {
            (axis, m): _Extreme(max)
            for axis in self._axes
            for m in _GROUP_SIZES
            if shape[axis] % m == 0
        }
        self._rows = dict.fromkeys(self._axes, 0)  # lines along an axis with a non-zero
        self._columns = np.zeros(shape[1:], bool)

    def add(self, nonzero: NDArray[np.bool_]) -> None:
        """Count the groups of the next slab. Every slab but the last has a multiple of 32 rows."""
        if self._most and nonzero.all():
            self._most.clear()  # every group is full, so N = M for every M
        for axis in self._axes:
            if not any((axis, m) in self._most for m in _GROUP_SIZES):
                continue
            if axis:
                self._rows[axis] += int(np.count_nonzero(nonzero.any(axis=axis)))
            else:
                self._columns |= nonzero.any(axis=0)
            counts = nonzero.swapaxes(axis, -1).view(np.uint8)
            for m in _GROUP_SIZES:
                if counts.shape[-1] % 2:
                    break
                counts = counts[..., 0::2] + counts[..., 1::2]
                self._count(axis, m, counts)

    def _count(self, axis: int, m: int, counts: NDArray[Any]) -> None:
        most = self._most.get((axis, m))
        if most is None or not counts.size:
            return
        value = int(counts.max())
        if value == m:
            del self._most[axis, m]
        else:
            most.add(counts, value)

    def found(self) -> _GroupPattern | None:
        """Return the pattern that holds in all slabs, or None."""
        for axis in self._axes:
            rows = self._rows[axis] if axis else int(np.count_nonzero(self._columns))
            patterns = [
                (most.value / m, _GroupPattern(most.value, m, axis))
                for (a, m), most in self._most.items()
                if a == axis
                and most.value
                and most.times >= _MIN_FULL_GROUPS * rows * (self._shape[axis] // m)
            ]
            if patterns:
                return min(patterns)[1]
        return None


class _Extreme:
    """A running minimum or maximum, and how often it occurs."""

    def __init__(self, choose: Callable[[int, int], int]) -> None:
        self._choose = choose
        self.value: int | None = None
        self.times = 0

    def add(self, numbers: NDArray[Any], value: int) -> None:
        """Add numbers, given their minimum or maximum."""
        if self.value is None or self._choose(value, self.value) != self.value:
            self.value, self.times = value, 0
        if value == self.value:
            self.times += int(np.count_nonzero(numbers == value))


def analyse(
    array: NDArray[Any], *, floating: bool | None = None, format: str | None = None
) -> TensorAnalysis:
    """Analyse the zeros of an array.

    Parameters
    ----------
    array : array
        Any shape; a real or boolean dtype, those of ml_dtypes included.
    floating : bool, optional
        Whether an array of unsigned integers holds the bits of floating-point numbers. By
        default the dtype decides.
    format : str, optional
        The name of the format of these numbers, see `magnitude_table`. By default the dtype
        decides.

    Returns
    -------
    TensorAnalysis

    Raises
    ------
    TypeError
        If ``array`` is not a NumPy array, has a mask, or has a dtype without real numbers.

    Notes
    -----
    Reads the array once, in slabs of about a million entries.

    Examples
    --------
    >>> found = analyse(np.asarray([[0, 3, -1, 0], [1, 0, 0, 2]], "f4"))
    >>> found.pattern, found.sparsity, found.ties
    ('1:2', 0.5, 2)
    >>> found.dense_bytes, found.compressed_bytes  # 4 values and 4 positions of 1 bit
    (32, 17)
    """
    array = _checked(array)
    if floating is None:
        floating = array.dtype.kind not in "biu"
        if floating:
            format = array.dtype.name
            # The bytes of numbers from some files are in the other order than the machine's.
            native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            array = native.view(f"u{array.dtype.itemsize}")
    table = magnitude_table(format) if floating and format is not None else None
    shape = array.shape
    if not array.size:  # its other axes may be too long for the arrays below
        return _described(array, 0, (0, 0), None, 0)
    groups, ties = _GroupSearch(shape), _Extreme(min)
    kept, rows, columns = 0, 0, np.zeros(shape[1:2], bool)
    for slab in _slabs(array.reshape(1) if array.ndim == 0 else array):
        numbers = magnitude_bits(slab, table) if floating else slab
        nonzero = numbers != 0
        if floating:
            numbers -= np.asarray(1, numbers.dtype)  # 0 wraps around to the largest number
            ties.add(numbers, int(numbers.min()))
        kept += int(np.count_nonzero(nonzero))
        groups.add(nonzero)
        if array.ndim > 1:
            rows += int(np.count_nonzero(nonzero.any(axis=tuple(range(1, array.ndim)))))
            columns |= nonzero.any(axis=(0, *range(2, array.ndim)))
    empty = (0, 0)
    if array.ndim > 1:
        empty = shape[0] - rows, len(columns) - int(np.count_nonzero(columns))
    return _described(array, kept, empty, groups.found(), ties.times if floating and kept else 0)


def _checked(array: Any) -> NDArray[Any]:
    """Return a plain NumPy array of real numbers, or raise TypeError."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"array must be a NumPy array without a mask, got {type(array)!r}")
    # The 8-bit types of ml_dtypes are of kind V, as structured types are, which have names.
    real = array.dtype.kind in "biufV" and not array.dtype.names
    if not real or array.dtype.itemsize not in (1, 2, 4, 8):
        raise TypeError(f"array must be real with at most 64 bits, got dtype {array.dtype}")
    return np.asarray(array)  # drop subclasses, such as numpy.matrix


def _slabs(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    per_row = max(1, math.prod(array.shape[1:]))
    rows = max(1, _SLAB // per_row // _GROUP_SIZES[-1]) * _GROUP_SIZES[-1]
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _described(
    array: NDArray[Any],
    kept: int,
    empty: tuple[int, int],
    groups: _GroupPattern | None,
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
