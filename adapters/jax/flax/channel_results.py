"""Show which channels `shrink` and `silence_channels` found."""

from __future__ import annotations

from typing import Any, NamedTuple

from safe_core.adapters.removed_channels import by_reason, counted, removed_text

__all__ = ["RemovedChannels", "SilentChannels"]

PyTree = Any


class RemovedChannels(NamedTuple):
    """Hold the result of `shrink`. Printed, it is a short text.

    Attributes
    ----------
    model : flax.nnx.Module or ShrunkLinen
        The smaller network.
    variables : pytree or None
        Those of the smaller network, for Linen.
    state : pytree or None
        The optimizer state of the smaller network.
    features : dict of str to int
        Number of features that are left, by the path of each layer that has lost some. To make
        the network anew, declare it with these.
    removed : dict of str to int
        Number of output channels that were removed, by the path of the layer.
    kept : dict of str to str
        Layers with channels that are zero and stay, and why.
    parameters : tuple of int
        Number of parameters before and after.

    Examples
    --------
    >>> found = RemovedChannels(None, {}, None, {"layers_0": 2}, {"layers_0": 1}, {}, (23, 16))
    >>> print(found)
    16 of 23 parameters are left
    removed channels: 1 of 'layers_0'
    """

    model: Any
    variables: PyTree
    state: PyTree
    features: dict[str, int]
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


class SilentChannels(NamedTuple):
    """Hold the result of `silence_channels`. Printed, it is a short text.

    Attributes
    ----------
    model : flax.nnx.Module, flax.linen.Module or ShrunkLinen
        A copy of an NNX module, or the Linen module that was given.
    variables : pytree or None
        Those of a Linen module.
    silent : dict of str to int
        Number of channels that are silent now, by the path of the layer or the norm.

    Examples
    --------
    >>> print(SilentChannels(None, {"params": {}}, {"layers_0": 1, "norm": 2}))
    silenced channels: 1 of 'layers_0', 2 of 'norm'
    """

    model: Any
    variables: PyTree
    silent: dict[str, int]

    def __str__(self) -> str:
        """Return the numbers of channels that are silent now."""
        return f"silenced channels: {counted(self.silent)}" if self.silent else "no channel changed"
