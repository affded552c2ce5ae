"""Numbers and tables as people read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal

__all__ = [
    "aligned",
    "excerpt",
    "readable_bytes",
    "readable_ms",
    "readable_number",
    "readable_seconds",
]

_LONG = 120  # characters of a text that is shown whole


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table, whose columns are two spaces apart.

    Parameters
    ----------
    rows : sequence of sequences of str
        The cells, the same number in each row.
    right : sequence of int
        The columns that end at the same place, such as numbers; the others begin there.

    Examples
    --------
    >>> aligned([("layer", "size"), ("a", "12")], right=[1])
    ['layer  size', 'a        12']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def excerpt(text: str, other: str) -> str:
    """Return a text or, if it is long, the part around its first difference from another.

    Examples
    --------
    >>> excerpt("a" * 200 + "b", "a" * 200 + "c")
    '...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaab'
    """
    if len(text) <= _LONG:
        return text
    pairs = enumerate(itertools.zip_longest(text, other))
    same = next((i for i, (a, b) in pairs if a != b), 0)
    start = max(0, same - _LONG // 4)
    more = "..." if start + _LONG < len(text) else ""
    return f"{'...' if start else ''}{text[start : start + _LONG]}{more}"


def readable_bytes(n: int) -> str:
    """Return a number of bytes as people read it.

    Examples
    --------
    >>> readable_bytes(3 * 2**29), readable_bytes(12)
    ('1.5 GiB', '12 B')
    >>> readable_bytes(2**20 - 1)
    '1.0 MiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        # The next smaller unit would print 1024.0 for a number just below this one.
        if round(1024 * n / size, 1) >= 1024:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def readable_ms(seconds: float) -> str:
    """Return a short time in milliseconds.

    Examples
    --------
    >>> readable_ms(0.00123456), readable_ms(1.5)
    ('1.23 ms', '1500 ms')
    """
    return f"{readable_number(1e3 * seconds, 3)} ms"


def readable_number(x: float, digits: int) -> str:
    """Return a number with some significant digits, and without an exponent.

    Examples
    --------
    >>> readable_number(123.4, 2), readable_number(0.01234, 2)
    ('120', '0.012')
    """
    return f"{Decimal(f'{x:.{digits}g}'):f}"


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
