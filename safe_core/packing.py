"""Store a mask with one bit for each entry."""

from __future__ import annotations

from collections.abc import Sequence

from array_api_compat import array_namespace

from safe_core.backends import Array

__all__ = ["packed", "packed_shape", "unpacked"]


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a packed mask, with ``ceil(n / 8)`` in place of n along the last axis.

    Examples
    --------
    >>> packed_shape((3, 9))
    (3, 2)
    """
    if not shape:
        return ()
    *lead, n = shape
    return (*lead, -(-n // 8))


def packed(mask: Array) -> Array:
    """Return a mask as bytes that hold eight entries of the last axis each, the first lowest.

    Parameters
    ----------
    mask : bool array
        A mask without axes takes a byte.

    Returns
    -------
    uint8 array
        Of shape ``packed_shape(mask.shape)``.

    Examples
    --------
    >>> import numpy
    >>> packed(numpy.asarray([True, False, True, False, False, False, False, False, True]))
    array([5, 1], dtype=uint8)
    """
    xp = array_namespace(mask)
    bits = xp.astype(mask, xp.uint8)
    if not bits.ndim:
        return bits
    *lead, n = bits.shape
    if n % 8:
        zero = xp.zeros_like(bits[..., :1])
        bits = xp.concat([bits, xp.broadcast_to(zero, (*lead, -n % 8))], axis=-1)
    eights = xp.reshape(bits, (*packed_shape(mask.shape), 8))
    found = eights[..., 0]
    for i in range(1, 8):
        found = found + eights[..., i] * (1 << i)
    return found


def unpacked(found: Array, like: Array) -> Array:
    """Return the mask that `packed` stored, in the shape of ``like``; a bool mask as it is.

    Examples
    --------
    >>> import numpy
    >>> unpacked(numpy.asarray([5, 1], dtype=numpy.uint8), numpy.zeros(9)).nonzero()[0].tolist()
    [0, 2, 8]
    """
    xp = array_namespace(found)
    if found.dtype == xp.bool:
        return found
    if not found.ndim:
        return found != 0
    bits = xp.stack([(found & (1 << i)) != 0 for i in range(8)], axis=-1)
    whole = xp.reshape(bits, (*found.shape[:-1], 8 * found.shape[-1]))
    return whole[..., : like.shape[-1]]
