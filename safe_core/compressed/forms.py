"""Store a tensor without its zeros, bit for bit.

A tensor is kept as it is (``"dense"``), as its non-zero entries and a bit for every entry
(``"bitmask"``), or as two entries of every four and the places of these (``"2:4"``), whichever is
smallest. An entry counts as zero only if all its bits are zero: -0 and every NaN are kept.

The six ways to keep two of four need log2(6) bits, so that a byte holds those of three groups.
Two indices of 2 bits each, as GPUs store them, would take as much as the bits of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_core.packing import packed

__all__ = [
    "PLACES",
    "WIDTHS",
    "Form",
    "RawTensor",
    "chosen_form",
    "decode",
    "places",
    "places_size",
    "values",
]

Bytes = NDArray[np.uint8]

WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an entry, by the names of dtypes in safetensors files."""

PLACES = {"bitmask": "bitmask", "2:4": "groups"}
"""Names of the tensors that tell the places of entries, by form."""

# Chunks of entries stay in the cache: a multiple of the 8 entries of a byte of a mask, and of the
# 12 of a byte of groups.
_CHUNK = 12 * 2**13
_PAIRS = list(combinations(range(4), 2))  # the places that are kept, in the order of their codes
_BITS_OF_PAIRS = np.asarray([[i in pair for i in range(4)] for pair in _PAIRS])
# The mask of twelve entries for a byte of groups, whose first group counts least.
_GROUPS = np.asarray(
    [
        np.concatenate([_BITS_OF_PAIRS[code] for code in reversed(codes)])
        for codes in product(range(6), repeat=3)
    ]
    + [np.zeros(12, bool)] * 40  # bytes that no group has
)
_CODES = np.zeros(16, np.uint8)  # of a group, by the bits of the entries that are kept
for _code, _pair in enumerate(_PAIRS):
    _CODES[sum(1 << i for i in _pair)] = _code


class RawTensor(NamedTuple):
    """A tensor as bytes.

    Attributes
    ----------
    dtype : str
        Its name in safetensors files, such as ``"BF16"``.
    shape : tuple of int
    data : uint8 array
        One axis; the entries in row-major order, in little-endian byte order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


class Form(NamedTuple):
    """Describe how a tensor is stored.

    Attributes
    ----------
    name : {"dense", "bitmask", "2:4"}
    kept : int
        Number of entries that are stored.
    places : int
        Bytes of the mask or of the groups.
    nbytes : int
        All bytes.
    """

    name: str
    kept: int
    places: int
    nbytes: int


def places_size(name: str, entries: int) -> int:
    """Return the number of bytes that tell the places of the entries that are kept.

    Examples
    --------
    >>> places_size("bitmask", 24), places_size("2:4", 24)
    (3, 2)
    """
    return -(-entries // (12 if name == "2:4" else 8))


def chosen_form(tensor: RawTensor) -> Form:
    """Return the smallest form of a tensor. Dtypes of unknown width stay dense.

    Examples
    --------
    >>> x = np.asarray([[0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0]], "f4")
    >>> chosen_form(RawTensor("F32", x.shape, x.view("u1").ravel()))
    Form(name='bitmask', kept=2, places=2, nbytes=10)
    """
    nbytes = tensor.data.size
    dense = Form("dense", math.prod(tensor.shape), 0, nbytes)
    width = WIDTHS.get(tensor.dtype)
    if width is None or not nbytes:
        return dense
    bits = _bits(tensor)
    kept, forms = int(np.count_nonzero(bits)), [dense]
    size = places_size("bitmask", bits.size)
    forms.append(Form("bitmask", kept, size, size + kept * width))
    half, size = bits.size // 2, places_size("2:4", bits.size)
    groups = Form("2:4", half, size, size + half * width)
    if groups.nbytes < forms[1].nbytes and _is_2_of_4(tensor.shape, bits):
        forms.append(groups)
    return min(forms, key=lambda form: form.nbytes)


def _is_2_of_4(shape: tuple[int, ...], bits: NDArray[Any]) -> bool:
    """Return whether at most two of any four entries along the last axis are non-zero."""
    return (
        bool(shape)
        and shape[-1] % 4 == 0
        and all(((part.reshape(-1, 4) != 0).sum(axis=1) <= 2).all() for part in _chunks(bits))
    )


def _chunks(entries: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, entries.size, _CHUNK):
        yield entries[start : start + _CHUNK]


def values(tensor: RawTensor, form: Form) -> Iterator[Bytes]:
    """Yield the bytes of the entries that are stored, in pieces.

    Examples
    --------
    >>> x = np.asarray([0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0], "i1")
    >>> tensor = RawTensor("I8", x.shape, x.view("u1"))
    >>> form = chosen_form(tensor)
    >>> [[piece.tolist() for piece in part(tensor, form)] for part in (values, places)]
    [[[2, 1]], [[8, 2]]]
    """
    if form.name == "dense":
        yield tensor.data
        return
    for part in _chunks(_bits(tensor)):
        yield part[_kept(form.name, part)].view(np.uint8)


def places(tensor: RawTensor, form: Form) -> Iterator[Bytes]:
    """Yield the bytes that tell the places of the entries, in pieces."""
    for part in _chunks(_bits(tensor)):
        mask = _kept(form.name, part)
        yield _codes_of(mask) if form.name == "2:4" else packed(mask)


def _bits(tensor: RawTensor) -> NDArray[Any]:
    return tensor.data.view(f"u{WIDTHS[tensor.dtype]}")


def _kept(name: str, part: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the entries that are stored: of 2:4 also zeros, up to two of each group."""
    nonzero = part != 0
    if name == "bitmask":
        return nonzero
    groups = nonzero.reshape(-1, 4)
    mask = np.zeros_like(groups)
    first_two = np.argsort(~groups, axis=1, kind="stable")[:, :2]
    np.put_along_axis(mask, first_two, True, axis=1)
    return mask.reshape(-1)


def _codes_of(mask: NDArray[np.bool_]) -> Bytes:
    """Return a byte for three groups each; missing groups of the last byte count as 0."""
    codes = _CODES[mask.reshape(-1, 4) @ np.asarray([1, 2, 4, 8], np.uint8)]
    whole = np.zeros(-(-codes.size // 3) * 3, np.uint8)
    whole[: codes.size] = codes
    found: Bytes = whole.reshape(-1, 3) @ np.asarray([1, 6, 36], np.uint8)
    return found


def decode(name: str, width: int, stored: Bytes, where: Bytes, out: Bytes) -> bool:
    """Write a tensor of stored values and places, and return whether these fit together.

    Parameters
    ----------
    name : {"bitmask", "2:4"}
    width : int
        Bytes of an entry.
    stored, where : uint8 array
        What `values` and `places` yield.
    out : uint8 array
        The bytes of the tensor, all zero before.

    Examples
    --------
    >>> out = np.zeros(12, "u1")
    >>> decode("bitmask", 1, np.asarray([2, 1], "u1"), np.asarray([8, 2], "u1"), out)
    True
    >>> out.tolist()
    [0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0]
    """
    given, found = stored.view(f"u{width}"), out.view(f"u{width}")
    if where.size != places_size(name, found.size):
        return False
    step = _CHUNK // (12 if name == "2:4" else 8)
    used = 0
    for part, start in zip(_chunks(found), range(0, where.size, step), strict=True):
        mask = _mask(name, where[start : start + step])
        # Indices are found faster than entries are assigned by a mask.
        indices = np.flatnonzero(mask[: part.size])
        here = given[used : used + indices.size]
        if here.size != indices.size or (name == "bitmask" and mask[part.size :].any()):
            return False
        part[indices] = here
        used += here.size
    return used == given.size


def _mask(name: str, where: Bytes) -> NDArray[np.bool_]:
    if name == "bitmask":  # the order of the bits is that of `packed`
        return np.unpackbits(where, bitorder="little").view(np.bool_)
    return _GROUPS[where].reshape(-1)
