"""Zero whole output channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from safe_core import _checks
from safe_core.backends import Array, backend_of
from safe_core.layout import Layout
from safe_core.sparsity_tables import SparsityTable

from .base import FractionPattern, Units, check_floor, check_fraction
from .counts import require_roles
from .pools import expansion

__all__ = ["Channel"]


@dataclass(frozen=True, repr=False)
class Channel(FractionPattern):
    """Pattern that keeps or zeroes whole output channels.

    Channels rank by the sum of ``P_ii * v_i**2`` over their entries. In the scope "global"
    channels of large layers therefore tend to win over those of small layers. The outputs of
    a classifier are channels too, so leave the last layer out, or classes are pruned. If it is the
    layer ``"4"`` of a model in PyTorch, pass
    ``where=lambda name, p: p.ndim > 1 and not name.startswith("4.")``. In JAX, if its path holds
    ``"Dense_2"``, pass ``where=lambda path, leaf: leaf.ndim > 1 and "Dense_2" not in path``.

    A bias, or the shift of a batch norm, stays: it makes a removed channel constant. In PyTorch,
    ``silence_channels`` sets it to zero, and ``shrink`` takes the channel out of the network.

    Attributes
    ----------
    sparsity : float or sparsity schedule
        Fraction of output channels that are zero, in [0, 1).
    scope : {"tensor", "global"}
        Whether channels compete within each tensor or across all tensors. Each slice along the
        batch axes of an array is one tensor.
    floor : float
        In the scope "global": each tensor keeps at least this part, from 0 to 1, of the fraction
        of channels that all tensors keep together; see `Unstructured`.

    Raises
    ------
    TypeError, ValueError
        If ``sparsity`` is not in [0, 1), ``scope`` is unknown, or ``floor`` is not in [0, 1] or is
        given in the scope "tensor".

    Examples
    --------
    >>> Channel(0.5)
    Channel(sparsity=0.5, scope='tensor')
    """

    sparsity: float | SparsityTable
    scope: Literal["tensor", "global"] = "tensor"
    floor: float = 0.0

    ranks: ClassVar[Literal["entries", "units"]] = "units"
    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("tensor", "global"))
        check_floor(self.floor, self.scope)

    def check(self, shape: Sequence[int], layout: Layout | None, name: str) -> None:
        """Raise ValueError if the output axes are unknown."""
        require_roles(layout, name, "a Channel pattern", outputs=True, shape=shape)

    def units(self, scores: Array, layout: Layout | None, name: str, *, xp: Any) -> Units:
        """Return the sums of ``P v^2`` over every output channel."""
        what = "a Channel pattern"
        layout = require_roles(layout, name, what, outputs=True, shape=scores.shape)
        kept = layout.output_axes + layout.batch_axes
        axes = tuple(axis for axis in range(scores.ndim) if axis not in kept)
        backend = backend_of(scores)
        whole = backend.regrouped(scores, units=dict.fromkeys(axes, 0))
        sums = whole
        if axes:
            sums = backend.shardwise(lambda part: xp.sum(part, axis=axes, keepdims=True), whole)

        def cover(part: Array, mask: Array) -> Array:
            return mask & xp.ones_like(part, dtype=xp.bool)

        return Units(sums, layout, expansion(scores, whole, cover))
