"""Recognise out-of-memory errors."""

from __future__ import annotations

__all__ = ["lacks_memory"]

# PyTorch on a CPU, and JAX, raise a RuntimeError that only its text tells apart. The third text is
# that of PyTorch on Windows.
_SAID = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "RESOURCE_EXHAUSTED",
)


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy, PyTorch or JAX says that memory is full.

    Examples
    --------
    >>> lacks_memory(MemoryError()), lacks_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    (True, True)
    >>> lacks_memory(RuntimeError("shapes differ"))
    False
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(x in str(error) for x in _SAID)
