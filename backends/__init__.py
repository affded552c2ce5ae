"""Backends: what the array API standard lacks, in one module per library.

A backend knows arrays and nothing of the method. It selects the largest entries
exactly, views floats as integers and branches on traced predicates. `backend_of` finds
the backend of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from array_api_compat import is_jax_array, is_numpy_array, is_torch_array

__all__ = ["Array", "Backend", "backend_of", "selecting_on_host", "selects_on_host"]

Array = Any
"""An array of any library that follows the array API standard."""


class Backend(Protocol):
    """The functions that the backend of every library provides.

    Arrays are passed by position and options by keyword.
    """

    __name__: str

    # What is known of values

    def unreadable(self, x: Array) -> str:
        """Return what ``x`` must be instead, or "" if the other functions can read it.

        Some kinds of arrays hold more than their values say, or store them in another way:
        masked, sparse, nested and quantized arrays, or random keys. The text ends with what
        was given.
        """

    def is_concrete(self, x: Array) -> bool:
        """Return whether the values of ``x`` can be read now: it is not traced and not meta."""

    def detached(self, x: Array) -> Array:
        """Return ``x`` without its graph of derivatives."""

    def has_nan(self, arrays: Sequence[Array]) -> bool:
        """Return whether an entry of concrete arrays is NaN."""

    def known_finite(self, arrays: Sequence[Array]) -> bool:
        """Return True only if all entries are finite and seeing so needs no wait for a device."""

    # Numbers

    def ordering_key(self, x: Array) -> Array:
        """Return keys that order as ``|x|`` does, subnormal numbers included.

        A traced program cannot refuse NaN. There it orders above infinity.
        """

    def exponents(self, arrays: Sequence[Array]) -> Array:
        """Return the least integer k with ``|x| < 2**k`` for all finite entries of each array.

        It is exact for subnormal numbers too. Where all entries are zero or infinite, k is at
        most that of the smallest number. Arrays are float32 or float64.
        """

    def exponents_along(self, x: Array, *, axes: tuple[int, ...]) -> Array:
        """Return `exponents` of the entries along ``axes``, which stay with length 1."""

    def scaled(self, x: Array, exponents: Array, *, dtype: Any) -> Array:
        """Return ``|x| * 2**-exponents`` in float32 or float64, zero where it would be subnormal.

        Nothing else is rounded, and subnormal x count. ``exponents`` broadcast to x, which is
        float32 or float64 and no wider than ``dtype``.
        """

    def norms(self, arrays: Sequence[Array], *, dtype: Any) -> Array:
        """Return the Euclidean norm of each array, summed in ``dtype``, as one array."""

    def peaks(self, arrays: Sequence[Array]) -> Array:
        """Return the largest magnitude of each array as one array, 0 where there are no entries."""

    def where_kept(self, arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
        """Return each array where its mask is true, bit for bit, and +0 elsewhere.

        The results can share one allocation.
        """

    def blockwise(
        self,
        fn: Callable[..., Array],
        *lists: Sequence[Array],
        static: tuple[Any, ...] | None = None,
        out: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Return ``[fn(*arrays) for arrays in zip(*lists)]`` for an elementwise ``fn``.

        With ``static``, a hashable tuple, the results are ``fn(*static, *arrays)``. Pass it, if
        only ``()``, where ``fn`` is a function of a module, so that the backend can compile it.
        Leave it out for a closure, which is new at each call and would be compiled each time.

        Arrays at the same position of the lists have the same shape. The backend can call
        ``fn`` with flat pieces of them that fit in the cache. Each result has the dtype of the
        first array, and the results can share one allocation.

        Where arrays can be written to, results are written to ``out`` if it is given. It may
        be one of the lists.
        """

    def widened(self, arrays: Sequence[Array]) -> list[Array]:
        """Return arrays of less than 32 bits in float32, detached, and others as they are.

        The byte order of a result is that of the machine.
        """

    def has_bfloat16(self) -> bool:
        """Return whether the library has bfloat16, which `stochastic_bfloat16` needs."""

    def stochastic_bfloat16(
        self, arrays: Sequence[Array], *, step: int | Array, out: Sequence[Array] | None = None
    ) -> list[Array]:
        """Round float32 stochastically to one of the two nearest bfloat16.

        The magnitude rounds up with the probability that makes the mean exact. Its bits
        become ``(bits(|x|) + dither) >> 16``, and the sign stays. The dither is the upper
        half of ``mix(bits(|x|) ^ mix(step))`` with `hashing.mix`: it depends on x and step
        alone and is the same in every library. Values that bfloat16 can hold are unchanged,
        ``-x`` rounds to the negative of x, and no finite x rounds to infinity.

        x must not be NaN, and step must be in ``[0, 2**31)``. Where arrays can be written
        to, results are written to ``out`` if it is given. Raises TypeError where the library
        has no bfloat16.
        """

    def positions(self, x: Array) -> Array:
        """Return the row-major positions of the entries, a vector of int32 where ``x`` is."""

    # Selection

    def keep_largest(
        self, scores: Sequence[Array], *, counts: tuple[int, ...], stage: int | Array
    ) -> list[Array]:
        """Return masks of the ``counts[stage]`` scores of largest magnitude over all arrays.

        Ties go to the first array and within it to the lowest row-major index. Scores share
        one real floating dtype. See `selecting_on_host` for where the selection runs.
        """

    def keep_largest_per_row(
        self, scores: Array, *, counts: tuple[int, ...], stage: int | Array
    ) -> Array:
        """Return the mask of the ``counts[stage]`` largest magnitudes of each row of a matrix.

        Ties go to the lowest index.
        """

    # Sharded arrays

    def on_several_devices(self, x: Array) -> bool:
        """Return whether ``x`` lies on several devices, so that the host cannot select from it."""

    def regrouped(self, x: Array, *, units: Mapping[int, int]) -> Array:
        """Return ``x``, resharded if necessary so that no shard begins within a unit.

        ``units`` maps an axis to the length of a unit along it, or to 0 if the whole axis is
        a unit. Other axes may be cut anywhere.
        """

    def resharded_as(self, x: Array, result: Array) -> Array:
        """Return ``result``, which has the shape of ``x``, sharded as ``x``."""

    def shardwise(
        self, fn: Callable[..., Array], *arrays: Array, axes: Mapping[int, int] | None = None
    ) -> Array:
        """Return ``fn(*arrays)``, computed for each shard alone.

        The result is sharded as the first array. ``axes`` maps its axes to those of the result.
        """

    # Control

    def joins(self, arrays: Sequence[Array]) -> bool:
        """Return whether small arrays are to be joined.

        That is so on an accelerator, where starting a kernel costs more than reading a small
        array. Sharded arrays stay apart, because joining would move their shards.
        """

    def as_program(self, fn: Callable[..., Any], static: tuple[Any, ...], *operands: Any) -> Any:
        """Return ``fn(*static, *operands)``, compiled as one program where that is faster.

        ``static`` is hashable, and names all that the program depends on besides operands, which
        are arrays, numbers, None, or lists of them. An integer becomes an int32 in a program.
        """

    def linalg_errors(self) -> tuple[type[Exception], ...]:
        """Return the errors that a factorisation of a singular matrix raises."""

    def cond(
        self,
        predicate: bool | Array,
        true_fun: Callable[..., Any],
        false_fun: Callable[..., Any],
        *operands: Any,
    ) -> Any:
        """Return ``true_fun(*operands)`` if ``predicate`` else ``false_fun(*operands)``."""


_ON_HOST = ContextVar("safe_core_selecting_on_host", default=False)


@contextmanager
def selecting_on_host(flag: bool) -> Iterator[None]:
    """Choose whether backends copy scores to the host and select there.

    In JAX on the CPU a host callback is faster than counting in the compiled program. On
    an accelerator it costs one transfer. NumPy and other libraries on the host ignore it.

    The flag is read when `Backend.keep_largest` is called, which under ``jax.jit`` is
    when the function is traced. A program that is already compiled keeps the choice it
    was traced with, so enter the context inside the traced function, not around it.

    Parameters
    ----------
    flag : bool
        True to select on the host, False to select where the scores are. The innermost
        context decides; without one it is False.

    Examples
    --------
    >>> with selecting_on_host(True):
    ...     selects_on_host()
    True
    >>> selects_on_host()
    False
    """
    token = _ON_HOST.set(flag)
    try:
        yield
    finally:
        _ON_HOST.reset(token)


def selects_on_host() -> bool:
    """Return the flag of the innermost `selecting_on_host`, False outside of one.

    Examples
    --------
    >>> selects_on_host()
    False
    """
    return _ON_HOST.get()


def backend_of(x: Array) -> Backend:
    """Return the backend of an array.

    Importing this package imports no framework. A backend is imported when the first
    array of its library arrives, which means that the caller has imported the library.

    Parameters
    ----------
    x : array
        An array of any library that follows the array API standard.

    Returns
    -------
    Backend
        The module that implements the protocol for the library of ``x``.

    Examples
    --------
    >>> import numpy
    >>> backend_of(numpy.ones(3)).__name__
    'safe_core.backends.numpy'
    """
    if is_numpy_array(x):
        return _numpy()
    if is_torch_array(x):
        return _torch()
    if is_jax_array(x):
        return _jax()
    return _standard()


# Each function imports one backend, and only when it is called. The declared result makes
# a type checker compare every function of the module with the protocol.


def _numpy() -> Backend:
    from . import numpy as found

    return found


def _torch() -> Backend:
    from . import torch as found

    return found


def _jax() -> Backend:
    from . import jax as found

    return found


def _standard() -> Backend:
    from . import standard as found

    return found
