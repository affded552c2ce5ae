"""Validate arguments of the public entry points.

Every message names the argument, the rule that it breaks and the value that was given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

# A mapping of all layers of a large model would fill the terminal; 300 characters show its kind.
_LONGEST = 300


def shown(value: Any) -> str:
    """Return the text that stands for ``value`` in a message.

    That is its repr, except that an array is shown by type and shape: the repr of an array on
    a GPU copies it to the host, and that of a traced one is unreadable.
    """
    shape = getattr(value, "shape", ())
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__module__}.{type(value).__name__} of shape {tuple(shape)}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = [f"{key}={shown(x)}" for key, x in zip(value._fields, value, strict=True)]
        return f"{type(value).__name__}({', '.join(parts)})"
    if type(value) in (list, tuple):
        parts = [shown(x) for x in value[:4]] + ["..."] * (len(value) > 4)
        return ("[{}]" if type(value) is list else "({})").format(", ".join(parts))
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def real(name: str, value: Any, *, low: float = -math.inf) -> float:
    """Return ``value`` as a finite float of at least ``low``, or raise."""
    # True is an int in Python; here it is more likely a misplaced flag than the number 1.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python number, got {shown(value)}")
    number = float(value)
    if not math.isfinite(number) or number < low:
        bound = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def integer(name: str, value: Any, *, low: int) -> int:
    """Return ``value`` as an int of at least ``low``, or raise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Return ``value``, which must be True or False, or raise.

    Other truthy values are refused, because ``adaptive="no"`` would mean True.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def choice(name: str, value: Any, options: tuple[str | None, ...]) -> None:
    """Raise unless ``value`` is one of ``options``."""
    if not (value is None or isinstance(value, str)) or value not in options:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, options))}, got {shown(value)}"
        )


def decimal_fraction(value: Any) -> Fraction:
    """Return the exact fraction that ``value`` prints as: 29/100 for 0.29.

    The float 0.29 lies slightly below 29/100, so ``floor(0.29 * 100)`` is 28. A user who
    writes 0.29 means 29 of 100, and the printed decimal is what the user wrote.
    """
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    return Fraction(Decimal(str(value)))


def sparsity(name: str, value: Any) -> Any:
    """Return ``value``, a fraction of zeros in ``[0, 1)``, or raise.

    A Decimal is returned as a Fraction, because Decimal is not a `numbers.Real`.
    """
    if isinstance(value, Decimal):
        value = Fraction(value)
    if isinstance(value, str):
        raise TypeError(
            f"{name} must be a Python number in [0, 1), got {value!r}{sparsity_meant(value)}"
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a Python number in [0, 1), got {shown(value)}{why_no_array(value)}"
        )
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(
            f"{name} must be a fraction in [0, 1), such as 0.95, got {value!r}"
            f"{percent_meant(str(value))}"
        )
    return value


def why_no_array(value: Any) -> str:
    """Return why an array is refused as a sparsity, or an empty text for another value.

    Examples
    --------
    >>> why_no_array([0.9])
    ''
    """
    if not hasattr(value, "dtype"):
        return ""
    return (
        "; an array or a traced value is refused because float32 arithmetic gets the number of "
        "zeros wrong"
    )


def percent_meant(text: str) -> str:
    """Return a hint for a text that gives a sparsity in percent, or an empty text.

    Examples
    --------
    >>> percent_meant("90%"), percent_meant("2.5"), percent_meant("0.9")
    (': write 0.9 for 90 percent', ': write 0.025 for 2.5 percent', '')
    """
    percent = re.fullmatch(r"(\d+(?:\.\d+)?) ?%?", text)
    if percent is None or not 1 < float(percent[1]) < 100:
        return ""
    number = Decimal(percent[1])
    return f": write {(number / 100).normalize():f} for {number.normalize():f} percent"


def sparsity_meant(text: str) -> str:
    """Return a hint for a text that is no sparsity, but shows which was meant.

    Examples
    --------
    >>> sparsity_meant("0.9"), sparsity_meant("2-4"), sparsity_meant("half")
    (': pass the number 0.9', ': use NM(2, 4)', '')
    """
    text = text.strip()
    if re.fullmatch(r"0?\.\d+", text):
        return f": pass the number {text}"
    if groups := re.fullmatch(r"(\d+) ?[-:/] ?(\d+)", text):
        n, m = int(groups[1]), int(groups[2])
        return f": use NM({n}, {m})" if 1 <= n <= m else ""
    if block := re.fullmatch(r"(\d+) ?[xX] ?(\d+)", text):
        return f": for blocks pass safe_core.Block(({block[1]}, {block[2]}), 0.9)"
    named = {
        "unstructured": "for single entries pass a number such as 0.9",
        "channel": "for channels pass safe_core.Channel(0.5)",
    }
    found = named.get(text.lower().removesuffix("s"))
    return f": {found}" if found else percent_meant(text)


def weight_meant(name: str, names: Iterable[str]) -> str:
    """Return a hint for the name of a module that stands for its weight, or an empty text.

    Examples
    --------
    >>> weight_meant("layers.0.up", ["layers.0.up.weight"])
    ': it is a module; name its weight, layers.0.up.weight'
    """
    within = [known for known in names if known.startswith(f"{name}.")]
    if not within:
        return ""
    weights = "weights, such as" if len(within) > 1 else "weight,"
    return f": it is a module; name its {weights} {within[0]}"


def printable(text: str) -> str:
    """Return a text with control characters escaped: names in files could command a terminal.

    Examples
    --------
    >>> printable("a\\x1b[2Jb"), printable("naïve")
    ('a\\\\x1b[2Jb', 'naïve')
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
