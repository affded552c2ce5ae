"""Pickles read without running what they may hold."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_pickle"]


def read_pickle(path: str | Path) -> Any:
    """Return what a pickle holds: arrays, dictionaries, lists, bytes, strings and integers.

    Strings of Python 2 are read as bytes.

    Raises
    ------
    ValueError
        If it holds anything else, which is not loaded, or is no pickle.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "batch"
    >>> _ = path.write_bytes(pickle.dumps({b"labels": [6, 9]}, protocol=2))
    >>> read_pickle(path)
    {b'labels': [6, 9]}
    >>> _ = path.write_bytes(pickle.dumps(print))
    >>> read_pickle(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: ... must hold arrays, ... strings and integers alone, got builtins.print
    """
    try:
        return _Reader(io.BytesIO(Path(path).read_bytes()), encoding="bytes").load()
    except _RefusedError as error:
        raise ValueError(
            f"{path} must hold arrays, dictionaries, lists, bytes, strings and integers alone, "
            f"got {error}"
        ) from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{path} must be a pickle, got {type(error).__name__}: {error}") from None


class _RefusedError(Exception):
    pass


_NDARRAY = object()  # what is named but never called


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into pickles that Python 2 can read."""
    if encoding not in ("latin1", b"latin1"):
        raise _RefusedError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _array(kind: Any, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """An empty array, which the pickle then fills."""
    if kind is not _NDARRAY or shape != (0,):
        raise _RefusedError(f"an array of {kind!r} and shape {shape!r}")
    return np.ndarray((0,), np.int8)


def _dtype(name: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """A type of numbers; older pickles have integers for the flags."""
    dtype = np.dtype(name.decode("latin1") if isinstance(name, bytes) else name)
    if dtype.kind not in "biuf":
        raise _RefusedError(f"an array of {dtype}")
    return dtype


_KNOWN = {
    **{
        (module, name): found
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name, found in (("ndarray", _NDARRAY), ("dtype", _dtype), ("_reconstruct", _array))
    },
    ("_codecs", "encode"): _latin1,
}


class _Reader(pickle.Unpickler):
    """Finds what arrays are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"{module}.{name}")
        return _KNOWN[module, name]
