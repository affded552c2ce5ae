"""Show which channels `shrink` removed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from safe_core.finalization import listed

__all__ = ["RemovedChannels"]


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

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Return the layers with channels that are zero and stay, by the reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            found.setdefault(reason, []).append(name)
        return found

    def __str__(self) -> str:
        """Return the numbers of parameters and of the channels that were removed."""
        before, after = self.parameters
        lines = [f"{after:,} of {before:,} parameters are left"]
        if self.removed:
            counts = [f"{count} of {name!r}" for name, count in self.removed.items()]
            lines.append(f"removed channels: {listed(counts)}")
        else:
            lines.append("no channel was removed")
        for reason, names in self.reasons.items():
            shown = listed(list(map(repr, names)))
            lines.append(f"kept channels that are zero of {shown}: {reason}")
        return "\n".join(lines)
