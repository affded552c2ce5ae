"""Show which channels `shrink` removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

__all__ = ["RemovedChannels"]

_SHOWN = 8  # layers in a text


class RemovedChannels(NamedTuple):
    """Hold the result of `shrink`. Printed, it is a short text.

    Attributes
    ----------
    model : torch.nn.Module
        The smaller network.
    removed : dict of str to int
        Number of output channels that were removed, by the name of the layer.
    kept : dict of str to str
        Layers with channels that are zero and stay, and why.
    parameters : tuple of int
        Number of parameters before and after.
    """

    model: nn.Module
    removed: dict[str, int]
    kept: dict[str, str]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        """Return the numbers of parameters and of the channels that were removed."""
        before, after = self.parameters
        lines = [f"{after:,} of {before:,} parameters are left"]
        if self.removed:
            counts = [f"{count} of {name!r}" for name, count in self.removed.items()]
            lines.append(f"removed channels: {_listed(counts)}")
        else:
            lines.append("no channel was removed")
        for reason in dict.fromkeys(self.kept.values()):
            names = [repr(name) for name, why in self.kept.items() if why == reason]
            lines.append(f"kept channels that are zero of {_listed(names)}: {reason}")
        return "\n".join(lines)


def _listed(texts: Sequence[str]) -> str:
    """Return the first texts, and how many layers there are more."""
    more = f" and {len(texts) - _SHOWN} more layers" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
