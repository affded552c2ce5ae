"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["readable_bytes", "readable_seconds"]


def readable_bytes(n: int) -> str:
    """Return a number of bytes as people read it.

    Examples
    --------
    >>> readable_bytes(3 * 2**29), readable_bytes(12)
    ('1.5 GiB', '12 B')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def readable_seconds(seconds: float) -> str:
    """Return a time as hours, minutes and seconds.

    Examples
    --------
    >>> readable_seconds(3725), readable_seconds(59.6)
    ('1:02:05', '1:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
