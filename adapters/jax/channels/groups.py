"""Find the channels of a traced network that are zero, and all that goes with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..traced_program import Program
from .rules import Axis, follow
from .sets import ChannelSets, Labels

__all__ = ["ChannelGroups", "ZeroChannels"]

_COUPLED = "they go together with channels that are not zero"
_CONSTANT = "an activation or another operation makes them constant instead of zero"
_LAST = "each layer keeps at least one channel"


class ZeroChannels(NamedTuple):
    """The channels whose kernels are zero, as numbers of channels.

    Attributes
    ----------
    gone : array of bool
        Channels that can go, by their number.
    constant : array of bool
        Channels that can go as soon as biases, scales and shifts are zero, too.
    shifted : array of bool
        Those of them for which running statistics must be zero as well, as in a batch norm
        without a scale.
    kept : dict of int to str
        Output channels of kernels that are zero and stay, and why.
    """

    gone: Labels
    constant: Labels
    shifted: Labels
    kept: dict[int, str]


class ChannelGroups:
    """The channels of a network, in sets that can only be removed together.

    A set goes if three things hold: no reason keeps it; the output channels of kernels in it are
    all zero; and at each product that sums over it one operand is zero. The values of the second
    operand are constants then, so they can be read off one call: the kernels are zero, and `follow`
    keeps channels to which a value of the inputs is added.

    Parameters
    ----------
    program : Program
        The network. Its first inputs are the leaves, and the others are the inputs.
    trainable : list of bool
        Whether each leaf is a parameter.
    fixed : dict of int to str
        Leaves that must keep their shapes, and why.
    """

    def __init__(
        self, program: Program, trainable: Sequence[bool], fixed: Mapping[int, str]
    ) -> None:
        self.program, self.trainable = program, trainable
        sets = ChannelSets()
        numbers = program.inputs[: len(trainable)]
        self.labels = [[sets.new(size) for size in program.shapes[n]] for n in numbers]
        found = follow(program, sets, dict(zip(numbers, self.labels, strict=True)))
        for leaf, reason in fixed.items():
            for labels in self.labels[leaf]:
                sets.keep(labels, reason)
        self.roots, self.reasons = sets.roots(), sets.reasons()
        self._found = found
        self.written = self._marked(found.labels[axis.value][axis.axis] for axis in found.writes)
        self._reads = [pair for pair in found.reads if self._can_go(pair)]
        self._axes = list(
            dict.fromkeys([*found.writes, *(a for pair in self._reads for a in pair)])
        )
        kernels = self.written | self._marked(
            found.labels[a.value][a.axis]
            for pair in found.reads
            for a in pair
            if a.value in found.parametric
        )
        self.kernels = {
            leaf
            for leaf, labels in enumerate(self.labels)
            if any(kernels[own].any() for own in labels)
        }
        self._run = jax.jit(self._measured)

    def zero(self, leaves: Sequence[Any], inputs: Sequence[Any]) -> ZeroChannels:
        """Return the channels whose kernels are zero."""
        nonzero = self._nonzero(leaves, inputs)
        dead = self._dead(nonzero)
        reasons = np.isin(self.roots, list(self.reasons))
        silent = ~self._in_sets(self.written & ~dead) & self._in_sets(self.written) & ~reasons
        blocked = silent & self._read(nonzero)
        gone = silent & ~blocked
        constant, shifted = self._constant(leaves, inputs, blocked)
        last = self._last(gone | constant)
        kept = {}
        for channel in np.flatnonzero(dead & ~(gone | constant) | dead & last).tolist():
            own = self.reasons.get(int(self.roots[channel]))
            kept[channel] = own or (
                _LAST if last[channel] else _CONSTANT if blocked[channel] else _COUPLED
            )
        return ZeroChannels(gone & ~last, constant & ~last, shifted & ~last, kept)

    def silenced(self, leaves: Sequence[Any], zero: ZeroChannels) -> list[Any]:
        """Return leaves in which biases, scales and shifts of channels without weights are zero."""
        changed = self._zeroed(leaves, zero.gone | zero.constant, statistics=False)
        return self._zeroed(changed, zero.shifted, statistics=True)

    def cut(self, leaf: int, value: Any, gone: Labels) -> Any:
        """Return an array of the shape of a leaf without some channels."""
        for axis, own in enumerate(self.labels[leaf]):
            if gone[own].any():
                value = value.take(np.flatnonzero(~gone[own]), axis=axis)
        return value

    def channels(self, leaf: int) -> Labels:
        """Return the numbers of all channels along the axes of a leaf."""
        return np.concatenate([np.zeros(0, int), *self.labels[leaf]])

    def _constant(
        self, leaves: Sequence[Any], inputs: Sequence[Any], blocked: Labels
    ) -> tuple[Labels, Labels]:
        """Return which channels biases alone keep from being zero, and running statistics."""
        found = []
        for statistics in (False, True):
            left = blocked
            if blocked.any():
                changed = self._zeroed(leaves, blocked, statistics=statistics)
                left = blocked & self._read(self._nonzero(changed, inputs))
            found.append(left)
        return blocked & ~found[1], found[0] & ~found[1]

    def _zeroed(self, leaves: Sequence[Any], channels: Labels, *, statistics: bool) -> list[Any]:
        """Return leaves in which all but the kernels is zero for some channels.

        ``statistics`` tells whether this holds for leaves that are no parameters, too.
        """
        changed = list(leaves)
        for leaf, labels in enumerate(self.labels):
            if leaf in self.kernels or not (statistics or self.trainable[leaf]):
                continue
            for axis, own in enumerate(labels):
                if channels[own].any():
                    shape = [-1 if i == axis else 1 for i in range(len(labels))]
                    mask = channels[own].reshape(shape)
                    changed[leaf] = jnp.where(mask, jnp.zeros_like(changed[leaf]), changed[leaf])
        return changed

    def _marked(self, labels: Iterable[Labels]) -> Labels:
        marked = np.zeros(len(self.roots), bool)
        for own in labels:
            marked[own[own >= 0]] = True
        return marked

    def _in_sets(self, channels: Labels) -> Labels:
        """Return which channels are in one set with any of some channels."""
        sets = np.zeros(len(self.roots), bool)
        sets[self.roots[channels]] = True
        return sets[self.roots]

    def _can_go(self, pair: tuple[Axis, Axis]) -> bool:
        """Return whether a product sums over sets that no reason keeps."""
        return any(
            int(root) not in self.reasons for each in pair for root in self._roots_along(each)
        )

    def _roots_along(self, axis: Axis) -> Labels:
        labels = self._found.labels[axis.value][axis.axis]
        return np.unique(self.roots[labels[labels >= 0]])

    def _measured(self, leaves: list[Any], inputs: list[Any]) -> list[Any]:
        """Return where each axis has entries that are not zero."""
        values = self.program.run([*leaves, *inputs])
        return [
            jnp.any(values[n] != 0, axis=[i for i in range(values[n].ndim) if i != axis])
            for n, axis in self._axes
        ]

    def _nonzero(self, leaves: Sequence[Any], inputs: Sequence[Any]) -> dict[Axis, Labels]:
        found = self._run(list(leaves), list(inputs))
        return dict(zip(self._axes, map(np.asarray, found), strict=True))

    def _dead(self, nonzero: Mapping[Axis, Labels]) -> Labels:
        """Return the output channels of kernels that are zero."""
        alive = self._marked(
            np.where(nonzero[axis], self._found.labels[axis.value][axis.axis], -1)
            for axis in self._found.writes
        )
        return self.written & ~alive

    def _read(self, nonzero: Mapping[Axis, Labels]) -> Labels:
        """Return the channels of sets over which a product sums more than zeros."""
        read = np.zeros(len(self.roots), bool)
        for pair in self._reads:
            used = nonzero[pair[0]] & nonzero[pair[1]]
            for n, axis in pair:
                labels = self._found.labels[n][axis][used]
                read[labels[labels >= 0]] = True
        return self._in_sets(read)

    def _last(self, gone: Labels) -> Labels:
        """Return the channels of sets that must stay so that each axis keeps a channel."""
        last = np.zeros_like(gone)
        for labels in self.labels:
            for own in labels:
                if len(own) and (gone[own] & ~last[own]).all():
                    last |= self.roots == self.roots[own[0]]
        return last
