"""Read pickles without running code in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_pickle"]


def read_pickle(path: str | Path) -> Any:
    """Read a pickle of arrays, dictionaries, lists, bytes, strings and integers.

    Strings from Python 2 become bytes.

    Raises
    ------
    ValueError
        If the file holds other objects, which are not loaded, or is not a pickle.

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


_NDARRAY = object()  # named in pickles, but never called


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes that Python 3 wrote into a pickle for Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise _RefusedError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _array(kind: Any, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """Return an empty array, which the pickle then fills."""
    if kind is not _NDARRAY or shape != (0,):
        raise _RefusedError(f"an array of {kind!r} and shape {shape!r}")
    return np.ndarray((0,), np.int8)


def _dtype(name: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """Return a numeric dtype. Older pickles use integers for the flags."""
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
    """An unpickler that only finds the parts of arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"{module}.{name}")
        return _KNOWN[module, name]
