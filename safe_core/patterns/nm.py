"""Keep N of every M consecutive inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Literal

from safe_core import _checks
from safe_core.backends import Array
from safe_core.layout import Layout, merge

from .base import Pattern, Units
from .counts import require_roles, too_few, whole_units
from .pools import keep_in_groups, on_whole_units, pad_kept, take

__all__ = ["NM"]


@dataclass(frozen=True)
class NM(Pattern):
    """Pattern that keeps ``n`` of every ``m`` consecutive entries along the input axis.

    Attributes
    ----------
    n, m : int
        Entries kept and entries in a group, ``1 <= n <= m``. NVIDIA's sparse tensor cores run
        2:4. Note that n counts kept entries, not zeros.
    ragged : {"error", "dense"}
        Behaviour if ``m`` does not divide the input axis: raise, or keep the last, shorter
        group dense.

    Raises
    ------
    TypeError, ValueError
        If ``n`` and ``m`` are not integers with ``1 <= n <= m``.

    Examples
    --------
    >>> NM(2, 4)
    NM(n=2, m=4, ragged='error')
    """

    n: int
    m: int
    ragged: Literal["error", "dense"] = "error"

    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.integer("m", self.m, low=1)
        _checks.integer("n", self.n, low=1)
        if self.n > self.m:
            raise ValueError(f"n must be at most m={self.m!r}, got {self.n!r}")
        _checks.choice("ragged", self.ragged, ("error", "dense"))

    @property
    def group(self) -> int:  # type: ignore[override]
        """The number of consecutive inputs decided together, m."""
        return self.m

    def fractions(self) -> tuple[Fraction, ...]:
        """Return the fraction of zeros, ``1 - n/m``, as the only stage."""
        return (1 - Fraction(self.n, self.m),)

    def describe(self) -> str:
        """Return the text ``"n:m"``, for tables."""
        return f"{self.n}:{self.m}"

    def check(self, shape: Sequence[int], layout: Layout | None, name: str) -> None:
        """Raise ValueError if ``m`` does not divide the input axis, or that axis is unknown."""
        layout = require_roles(layout, name, "an N:M pattern", inputs=True, shape=shape)
        merged, axis = merge(tuple(shape), layout.input_axes, name)
        whole_units(merged[axis], self.m, self.ragged, name, "input", replace(self, ragged="dense"))

    def why_whole(self, shape: Sequence[int], layout: Layout | None, name: str) -> str:
        """Return why an array has no whole group, or an empty text."""
        if self.ragged == "error" or layout is None or not layout.input_axes:
            return ""
        merged, axis = merge(tuple(shape), layout.input_axes, name)
        return too_few(merged[axis], self.m, "input")

    def keep(
        self, units: Sequence[Units], names: Sequence[str], stage: int | Array, *, xp: Any
    ) -> list[Array]:
        """Return masks that keep ``n`` of every ``m`` along the input axis."""
        masks = []
        for unit, name in zip(units, names, strict=True):
            self.check(unit.scores.shape, unit.layout, name)
            axes = unit.layout.input_axes  # type: ignore[union-attr]
            within = partial(self._keep_in_groups, axes, name, xp)
            # Shards may cut a single input axis between groups, but not merged axes.
            size = self.m if len(axes) == 1 else 0
            masks.append(on_whole_units(within, unit.scores, dict.fromkeys(axes, size)))
        return masks

    def in_pools(
        self,
        fn: Callable[[Array, tuple[int, ...] | None], Array],
        x: Array,
        layout: Layout | None,
        name: str,
        *,
        xp: Any,
    ) -> Array:
        """Return ``fn(x, axes)`` of the groups; a shorter last group is returned unchanged."""
        self.check(x.shape, layout, name)
        axes = layout.input_axes  # type: ignore[union-attr]

        def grouped(part: Array) -> Array:
            head, full, axis = self._groups(part, axes, name, xp)
            done = xp.reshape(fn(head, (axis + 1,)), self._head(full, axis).shape)
            if done.shape[axis] < full.shape[axis]:
                rest = take(full, axis, full.shape[axis], start=done.shape[axis])
                done = xp.concat([done, xp.astype(rest, done.dtype)], axis=axis)
            return xp.reshape(done, part.shape)

        return on_whole_units(grouped, x, dict.fromkeys(axes, self.m if len(axes) == 1 else 0))

    def _groups(
        self, x: Array, axes: tuple[int, ...], name: str, xp: Any
    ) -> tuple[Array, Array, int]:
        """Return x with groups along an axis of their own, x with merged axes, and that axis."""
        shape, axis = merge(tuple(x.shape), axes, name)
        full = xp.reshape(x, shape)
        head = self._head(full, axis)
        split = (*shape[:axis], head.shape[axis] // self.m, self.m, *shape[axis + 1 :])
        return xp.reshape(head, split), full, axis

    def _head(self, full: Array, axis: int) -> Array:
        """Return the entries in whole groups."""
        return take(full, axis, full.shape[axis] - full.shape[axis] % self.m)

    def _keep_in_groups(self, axes: tuple[int, ...], name: str, xp: Any, scores: Array) -> Array:
        groups, full, axis = self._groups(scores, axes, name, xp)
        mask = keep_in_groups(groups, axis + 1, self.n, xp=xp)
        mask = pad_kept(xp.reshape(mask, self._head(full, axis).shape), axis, full, xp=xp)
        return xp.reshape(mask, scores.shape)
