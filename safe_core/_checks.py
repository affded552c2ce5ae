"""Validation shared by the public entry points: name the argument, the rule, the value."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

_LONGEST = 300  # characters of a value in a message


def shown(value: Any) -> str:
    """What a message says of a value: its repr, but of an array its type and shape only."""
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
    """Return ``value``, True or False, or raise."""
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
    """The exact fraction that ``value`` prints as: 0.29 is 29/100.

    In binary 0.29 * 100 is below 29, so counts taken from the float would be short.
    """
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    return Fraction(Decimal(str(value)))


def sparsity(name: str, value: Any) -> Any:
    """Return ``value``, a fraction of zeros in ``[0, 1)``, or raise."""
    if isinstance(value, Decimal):
        value = Fraction(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a Python number in [0, 1), got {shown(value)}; an array or a traced "
            "value is refused because float32 arithmetic gets the number of zeros wrong"
        )
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be a fraction in [0, 1), such as 0.95, got {value!r}")
    return value
