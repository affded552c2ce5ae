"""Zero blocks of outputs by inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from safe_core import _checks
from safe_core.backends import Array, backend_of
from safe_core.layout import Layout, merge
from safe_core.sparsity_tables import SparsityTable

from .base import FractionPattern, Units, check_floor, check_fraction
from .counts import require_roles, too_few, whole_units
from .pools import expansion, pad_kept, take

__all__ = ["Block"]


@dataclass(frozen=True, repr=False)
class Block(FractionPattern):
    """Pattern that keeps or zeroes whole blocks of ``shape`` (outputs, inputs).

    Blocks rank by the sum of ``P_ii * v_i**2`` over their entries. That sum is what zeroing
    the block adds to the squared distance.

    Attributes
    ----------
    shape : tuple of two int
        Size of a block along the output and the input axis.
    sparsity : float or sparsity schedule
        Fraction of blocks that are zero, in [0, 1).
    scope : {"tensor", "global"}
        Whether blocks compete within each tensor or across all tensors. Each slice along the
        batch axes of an array is one tensor.
    ragged : {"error", "dense"}
        Behaviour if the block size does not divide an axis: raise, or keep the tail dense
        and count whole blocks only.
    floor : float
        In the scope "global": each tensor keeps at least this part, from 0 to 1, of the fraction
        of blocks that all tensors keep together; see `Unstructured`.

    Raises
    ------
    TypeError, ValueError
        If ``shape`` is not two positive integers, ``sparsity`` is not in [0, 1), or ``floor`` is
        not in [0, 1] or is given in the scope "tensor".

    Examples
    --------
    >>> Block((16, 16), 0.75)
    Block(shape=(16, 16), sparsity=0.75, scope='tensor', ragged='error')
    """

    shape: tuple[int, int]
    sparsity: float | SparsityTable
    scope: Literal["tensor", "global"] = "tensor"
    ragged: Literal["error", "dense"] = "error"
    floor: float = 0.0

    ranks: ClassVar[Literal["entries", "units"]] = "units"
    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.shape, (tuple, list)) or len(self.shape) != 2:
            raise TypeError(f"shape must be two integers (outputs, inputs), got {self.shape!r}")
        for size in self.shape:
            _checks.integer("shape", size, low=1)
        object.__setattr__(self, "shape", tuple(self.shape))
        check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("tensor", "global"))
        _checks.choice("ragged", self.ragged, ("error", "dense"))
        check_floor(self.floor, self.scope)

    def check(self, shape: Sequence[int], layout: Layout | None, name: str) -> None:
        """Raise ValueError if blocks do not divide an axis or the axis roles are unknown."""
        what = "a Block pattern"
        layout = require_roles(layout, name, what, inputs=True, outputs=True, shape=shape)
        advised = replace(self, ragged="dense", sparsity=self.sparsity_of(name))
        for size, unit, role in _BlockPlan.of(shape, self, layout, name).blocks.values():
            whole_units(size, unit, self.ragged, name, role, advised)

    def why_whole(self, shape: Sequence[int], layout: Layout | None, name: str) -> str:
        """Return why an array has no whole block, or an empty text."""
        if self.ragged == "error" or not (layout and layout.input_axes and layout.output_axes):
            return ""
        plan = _BlockPlan.of(shape, self, layout, name)
        found = [too_few(size, unit, role) for size, unit, role in plan.blocks.values()]
        return next(filter(None, found), "")

    def units(self, scores: Array, layout: Layout | None, name: str, *, xp: Any) -> Units:
        """Return the sums of ``P v^2`` over every block, in storage order.

        The storage order makes ties fall the same way as in a flat array.
        """
        self.check(scores.shape, layout, name)
        roles = require_roles(layout, name, "a Block pattern", inputs=True, outputs=True)
        plan = _BlockPlan.of(scores.shape, self, roles, name)
        backend = backend_of(scores)
        whole = backend.regrouped(scores, units=plan.units(scores.ndim))

        def add(part: Array) -> Array:
            own = _BlockPlan.of(part.shape, self, roles, name)
            head = xp.reshape(part, own.merged)
            for axis, size in enumerate(own.wholes):
                head = take(head, axis, size)
            head = xp.reshape(xp.reshape(head, own.halfway), own.split)
            return xp.sum(head, axis=own.inner, keepdims=True)

        def cover(part: Array, mask: Array) -> Array:
            own = _BlockPlan.of(part.shape, self, roles, name)
            mask = xp.reshape(xp.broadcast_to(mask, own.split), own.halfway)
            mask = xp.reshape(mask, own.wholes)
            like = xp.reshape(part, own.merged)
            for axis in range(mask.ndim):
                mask = pad_kept(mask, axis, like, xp=xp)
            return xp.reshape(mask, part.shape)

        sums = backend.shardwise(add, whole, axes=plan.places)
        return Units(sums, Layout(batch_axes=plan.batch), expansion(scores, whole, cover))


class _BlockPlan(NamedTuple):
    """Shapes that cut an array into blocks.

    ``merged`` puts each role on one axis, ``wholes`` drops the ragged tails, and ``split``
    turns each role into the axes (blocks, block size). Only reshapes are needed, so units
    keep the storage order. Each reshape splits one role, because JAX allows no more under
    `jax.vmap` over an explicit mesh axis.
    """

    merged: tuple[int, ...]  # shape with each role merged to one axis
    wholes: tuple[int, ...]  # merged, without the ragged tails
    halfway: tuple[int, ...]  # wholes, with the first role split
    split: tuple[int, ...]  # wholes, with each role split into (blocks, block size)
    inner: tuple[int, ...]  # axes of split that run within a block
    batch: tuple[int, ...]  # axes of split along which tensors are stacked
    places: dict[int, int]  # axes that shards may cut, and their axes of split
    blocks: dict[int, tuple[int, int, str]]  # first axis of a role: (size, block size, role)

    @classmethod
    def of(cls, shape: Sequence[int], pattern: Block, layout: Layout, name: str) -> _BlockPlan:
        shape = tuple(shape)
        units = dict(zip(("output", "input"), pattern.shape, strict=True))
        axes_of = {"output": layout.output_axes, "input": layout.input_axes}
        roles = {axes[0]: role for role, axes in axes_of.items()}
        merged: list[int] = []
        wholes: list[int] = []
        split: list[int] = []
        inner: list[int] = []
        batch: list[int] = []
        places, blocks = {}, {}
        for axis, size in enumerate(shape):
            if axis in roles:
                role = roles[axis]
                unit = units[role]
                size = merge(shape, axes_of[role], name)[0][axis]
                blocks[axis] = (size, unit, role)
                # A merged axis mixes several storage axes, so shards must not cut those.
                if len(axes_of[role]) == 1:
                    places[axis] = len(split)
                merged.append(size)
                wholes.append(size - size % unit)
                inner.append(len(split) + 1)
                split += [size // unit, unit]
            elif axis not in layout.output_axes + layout.input_axes:
                if axis in layout.batch_axes:
                    batch.append(len(split))
                places[axis] = len(split)
                merged.append(size)
                wholes.append(size)
                split.append(size)
        return cls(
            merged=tuple(merged),
            wholes=tuple(wholes),
            halfway=(*split[: inner[0] + 1], *wholes[inner[0] :]),
            split=tuple(split),
            inner=tuple(inner),
            batch=tuple(batch),
            places=places,
            blocks=blocks,
        )

    def units(self, ndim: int) -> dict[int, int]:
        """Return the length along each axis that a shard must not cut, 0 for the whole axis."""
        alone = {axis: self.blocks[axis][1] if axis in self.blocks else 1 for axis in self.places}
        return {axis: alone.get(axis, 0) for axis in range(ndim)}
