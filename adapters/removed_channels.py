"""Describe which channels were removed from a network."""

from __future__ import annotations

from collections.abc import Mapping

from safe_core.finalization import listed

__all__ = ["by_reason", "counted", "removed_text"]


def by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the layers with channels that are zero and stay, by the reason."""
    found: dict[str, list[str]] = {}
    for name, reason in kept.items():
        found.setdefault(reason, []).append(name)
    return found


def counted(channels: Mapping[str, int]) -> str:
    """Return the numbers of channels of layers as a list.

    Examples
    --------
    >>> counted({"layers/0": 1, "norm": 2})
    "1 of 'layers/0', 2 of 'norm'"
    """
    return listed([f"{count} of {name!r}" for name, count in channels.items()])


def removed_text(
    parameters: tuple[int, int], removed: Mapping[str, int], kept: Mapping[str, str]
) -> str:
    """Return a text with the numbers of parameters and of removed channels.

    Parameters
    ----------
    parameters : tuple of int
        Number of parameters before and after.
    removed : dict of str to int
        Number of channels that were removed, by layer.
    kept : dict of str to str
        Layers with channels that are zero and stay, and why.

    Examples
    --------
    >>> print(removed_text((26, 20), {"layers/0": 1}, {"layers/2": "they are outputs"}))
    20 of 26 parameters are left
    removed channels: 1 of 'layers/0'
    kept channels that are zero of 'layers/2': they are outputs
    """
    before, after = parameters
    lines = [f"{after:,} of {before:,} parameters are left"]
    lines.append(f"removed channels: {counted(removed)}" if removed else "no channel was removed")
    for reason, names in by_reason(kept).items():
        shown = listed(list(map(repr, names)))
        lines.append(f"kept channels that are zero of {shown}: {reason}")
    return "\n".join(lines)
