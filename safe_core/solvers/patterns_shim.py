"""What the solvers ask of a pattern, until patterns have these methods themselves."""

from __future__ import annotations

from typing import Any

from ..layout import Layout, default_layout, merge, resolve
from ..projection import whole_units
from ..sparsity import NM, Block, Channel, Pattern

__all__ = ["check_shape", "described", "group", "units"]


def group(pattern: Pattern) -> int | None:
    """Return how many consecutive inputs are decided together; None if one by one."""
    return pattern.m if isinstance(pattern, NM) else None


def units(pattern: Pattern) -> str:
    """Return what is kept or zeroed whole: "entries", "blocks" or "channels"."""
    return {Block: "blocks", Channel: "channels"}.get(type(pattern), "entries")


def described(pattern: Pattern) -> str:
    """Return a pattern as people write it.

    Examples
    --------
    >>> described(NM(2, 4)), described(Channel(0.5))
    ('2:4', '0.5')
    """
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else f"{pattern.sparsity}"


def check_shape(pattern: Pattern, shape: tuple[int, ...], layout: Layout | None, name: str) -> None:
    """Raise ValueError where groups or blocks do not divide the axes of an array."""
    sizes: Any = {NM: ("input",), Block: ("output", "input")}.get(type(pattern), ())
    roles = resolve(layout or default_layout(len(shape)) or Layout(), len(shape), name)
    whole = (pattern.m,) if isinstance(pattern, NM) else getattr(pattern, "shape", ())
    for role, unit in zip(sizes, whole, strict=False):
        axes = getattr(roles, f"{role}_axes")
        if axes:
            merged, place = merge(shape, axes, name)
            whole_units(merged[place], unit, pattern.ragged, name, role)  # type: ignore[union-attr]
