"""Show which channels `shrink` removed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from safe_core.adapters.removed_channels import by_reason, removed_text

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

    Examples
    --------
    >>> print(RemovedChannels(nn.Linear(4, 2), {"0": 1}, {}, (23, 16)))
    16 of 23 parameters are left
    removed channels: 1 of '0'
    """

    model: nn.Module
    removed: dict[str, int]
    kept: dict[str, str]
    parameters: tuple[int, int]

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Return the layers with channels that are zero and stay, by the reason."""
        return by_reason(self.kept)

    def __str__(self) -> str:
        """Return the numbers of parameters and of the channels that were removed."""
        return removed_text(self.parameters, self.removed, self.kept)
