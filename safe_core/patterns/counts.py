"""Count the units to keep, in exact arithmetic, and check that units fit an array."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from safe_core.layout import Layout

__all__ = ["kept_counts", "require_roles", "too_few", "whole_units"]


def kept_counts(stages: Sequence[Fraction], units: int) -> tuple[int, ...]:
    """Return how many of ``units`` are kept at every stage: ``units - floor(fraction * units)``.

    The number of zeros is rounded down, so the sparsity never exceeds the one asked for.
    """
    # Fractions, because float products may fall just below an integer that they should hit.
    return tuple(units - int(Fraction(units) * fraction) for fraction in stages)


def whole_units(
    size: int, unit: int, ragged: str, name: str, role: str, advised: Any = None
) -> int:
    """Return the length that whole units cover along an axis, or raise for a ragged tail.

    ``advised`` is the pattern that would leave the tail dense, for the message.
    """
    if size % unit and ragged == "error":
        left = "its tail" if size > unit else "it"
        way = "" if advised is None else f"pass sparsity={advised!r} to leave {left} dense, or "
        raise ValueError(
            f"the {role} axis of {name} has {size} entr{'y' if size == 1 else 'ies'}, which {unit} "
            f"does not divide; {way}leave the array out, with where= in an optimizer"
        )
    return size - size % unit


def too_few(size: int, unit: int, role: str) -> str:
    """Return why an axis that is shorter than one unit leaves an array dense, or "".

    Examples
    --------
    >>> too_few(1, 4, "input"), too_few(3, 4, "input"), too_few(5, 4, "input")
    ('its 1 input is fewer than 4', 'its 3 inputs are fewer than 4', '')
    """
    if size >= unit:
        return ""
    return f"its {size} {role}{' is' if size == 1 else 's are'} fewer than {unit}"


def require_roles(
    layout: Layout | None,
    name: str,
    what: str,
    *,
    inputs: bool = False,
    outputs: bool = False,
    shape: Sequence[int] | None = None,
) -> Layout:
    """Return the layout, or raise ValueError if it lacks a role that the pattern needs."""
    if layout is None and shape is not None and len(shape) == 1:
        raise ValueError(
            f"{name} has one axis, and {what} needs the roles of two; leave it out with where="
        )
    if layout is None:
        of_shape = "" if shape is None else f", whose lengths are {tuple(shape)}"
        raise ValueError(
            f"layout of {name} is unknown, and {what} needs the roles of its axes{of_shape}; pass "
            f"layout={{{name!r}: Layout(input_axes=..., output_axes=..., batch_axes=...)}}"
        )
    if (inputs and not layout.input_axes) or (outputs and not layout.output_axes):
        role = "input_axes" if inputs and not layout.input_axes else "output_axes"
        raise ValueError(f"layout of {name} must name {role} for {what}, got {layout!r}")
    return layout
