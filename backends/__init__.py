"""What the array API standard lacks, one small file per library.

A backend knows arrays and nothing of the method: it selects the largest entries
exactly, views floats as integers, branches on a traced predicate. `backend_of`
finds the backend of an array without importing any framework that the caller has
not imported already.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast

from array_api_compat import is_jax_array, is_numpy_array, is_torch_array

__all__ = ["Array", "Backend", "backend_of", "selecting_on_host", "selects_on_host"]

Array = Any
"""An array of any library that follows the array API standard."""


class Backend(Protocol):
    """The functions that every file in this folder provides."""

    def is_concrete(self, x: Array) -> bool:
        """Whether the values of ``x`` can be read now (not traced, not meta)."""

    def detached(self, x: Array) -> Array:
        """``x``, outside any graph of derivatives that work on it would add to."""

    def ordering_key(self, x: Array) -> Array:
        """Keys that order as ``|x|`` does, subnormal numbers included.

        NaN, where a traced program cannot refuse it, orders above infinity.
        """

    def has_nan(self, arrays: Sequence[Array]) -> bool:
        """Whether an entry is NaN; for concrete arrays, with one read of a value from a device."""

    def where_kept(self, arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
        """Each array where its mask is true, bit for bit, and +0 elsewhere.

        What is returned may share one allocation.
        """

    def norms(self, arrays: Sequence[Array], dtype: Any) -> Array:
        """The Euclidean norm of each array, summed in ``dtype``, as one array."""

    def peaks(self, arrays: Sequence[Array]) -> Array:
        """The largest magnitude of each array, 0 where it has no entries, as one array."""

    def known_finite(self, arrays: Sequence[Array]) -> bool:
        """Whether all entries are seen to be finite, where one may look without waiting."""

    def blockwise(
        self,
        fn: Callable[..., Array],
        *lists: Sequence[Array],
        out: Sequence[Array] | None = None,
    ) -> list[Array]:
        """``[fn(*arrays) for arrays in zip(*lists)]`` for an elementwise ``fn``.

        Arrays that match are of one shape. Where that is faster ``fn`` is handed flat
        pieces of them. The result has the dtype of the first of them and may share one
        allocation. It is written to ``out``, where given and arrays can be written to;
        what is read may be written over.
        """

    def frexp(self, x: Array) -> tuple[Array, Array]:
        """``m`` and the integer ``k`` of ``x = m * 2**k`` with ``1/2 <= m < 1``, for a scalar."""

    def keep_largest(
        self,
        scores: Sequence[Array],
        counts: tuple[int, ...],
        stage: int | Array,
    ) -> list[Array]:
        """Masks of the ``counts[stage]`` scores of largest magnitude, of all arrays together.

        Of equal magnitudes the lowest (position of the array, row-major index) is kept.
        Scores share one real floating dtype. See `selecting_on_host` for where it happens.
        """

    def keep_largest_per_row(
        self, scores: Array, counts: tuple[int, ...], stage: int | Array
    ) -> Array:
        """Mask of the ``counts[stage]`` largest magnitudes of each row of ``scores`` (rows, n).

        Of equal magnitudes the lowest index is kept.
        """

    def regrouped(self, x: Array, units: Mapping[int, int]) -> Array:
        """``x``, where it is sharded moved such that no shard begins within a unit.

        ``units`` maps an axis to the length of a unit along it, 0 for all of it; other axes
        may be cut anywhere.
        """

    def resharded_as(self, x: Array, result: Array) -> Array:
        """``result``, of the shape of ``x``, sharded as ``x``."""

    def shardwise(
        self, fn: Callable[..., Array], *arrays: Array, axes: Mapping[int, int] | None = None
    ) -> Array:
        """``fn(*arrays)``, of each shard alone.

        The result is sharded as the first array, whose axes ``axes`` maps to its own.
        """

    def stochastic_bfloat16(
        self, arrays: Sequence[Array], step: int | Array, out: Sequence[Array] | None = None
    ) -> list[Array]:
        """Round float32 to one of the two nearest bfloat16, up with the probability of the rest.

        ``(bits(|x|) + dither) >> 16`` with the sign of x, where the dither is the upper half
        of ``mix(bits(|x|) ^ mix(step))`` and mix is the finalizer of MurmurHash3: a function
        of x and step alone, the same in every library. What bfloat16 holds is unchanged,
        ``-x`` rounds to the negative, and no finite x to infinity. x must not be NaN; step
        is in ``[0, 2**31)``. Written to ``out``, where given and arrays can be written to.
        TypeError where the library has no bfloat16.
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
        """``true_fun(*operands)`` if ``predicate`` else ``false_fun(*operands)``."""


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

    Examples
    --------
    >>> import numpy
    >>> backend_of(numpy.ones(3)).__name__
    'safe_core.backends.numpy'
    """
    if is_numpy_array(x):
        name = "numpy"
    elif is_torch_array(x):
        name = "torch"
    elif is_jax_array(x):
        name = "jax"
    else:
        name = "standard"
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
