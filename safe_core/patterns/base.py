"""Base classes of sparsity patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

from safe_core import _checks
from safe_core.backends import Array, backend_of
from safe_core.layout import Layout
from safe_core.sparsity_tables import SparsityTable, cubic

from .counts import kept_counts
from .pools import in_pools, keep_within

__all__ = ["FractionPattern", "Pattern", "Units", "check_floor", "check_fraction"]


class Units(NamedTuple):
    """Units of one array and their scores.

    Attributes
    ----------
    scores : array
        One score per unit. Units with the largest ``|score|`` are kept.
    layout : Layout or None
        Axis roles of ``scores``, with non-negative axes.
    expand : callable
        Function from a mask of units to a mask of entries.
    """

    scores: Array
    layout: Layout | None
    expand: Callable[[Array], Array]


@dataclass(frozen=True)
class Pattern:
    """Base class of sparsity patterns, which define the allowed supports.

    Projecting onto a pattern takes four steps: score the entries, combine the scores of each
    unit (`units`), keep the best units of each pool (`keep`), and expand the mask of units to
    entries. Before `keep`, `with_floor` can raise the scores of units that must stay. A subclass
    defines `units` and `keep`. Both adapters, block-wise pruning, recipes and reports then work
    with it.
    """

    ranks: ClassVar[Literal["entries", "units"]] = "entries"
    """The scores that `units` gets: ``sqrt(P) |v|`` to rank entries, or ``P v^2`` to sum up."""

    only_masks: ClassVar[bool] = False
    """Whether zeros must be kept from the start, because the pattern does not ask for them."""

    stacks: ClassVar[bool] = False
    """Whether arrays may be stacked to be scored together, which saves kernels on an accelerator.

    Then `units` and `with_floor` can get a stack along a batch axis, axis 0 of the layout, with the
    name of its first array. The scores must keep that axis in its place.
    """

    group: ClassVar[int | None] = None
    """The number of consecutive inputs decided together, such as m of N:M, or None."""

    @property
    def joint(self) -> bool:
        """Whether the units of all arrays compete in one pool."""
        return False

    @property
    def by_output(self) -> bool:
        """Whether the units of each output form a pool of their own."""
        return False

    @property
    def counts_in_tensors(self) -> bool:
        """Whether it matters which axes of an array stack several tensors."""
        return not self.joint

    @property
    def couples_arrays(self) -> bool:
        """Whether the mask of one array depends on the other arrays."""
        return self.joint

    @property
    def schedule(self) -> SparsityTable | None:
        """The sparsity schedule, or None if the sparsity is constant."""
        return None

    def fractions(self) -> tuple[Fraction, ...]:
        """Return the fraction of zeros at every stage of the schedule, exactly."""
        raise NotImplementedError

    @property
    def changes(self) -> bool:
        """Whether the sparsity of some array changes from step to step."""
        return self.schedule is not None

    def rising(self, steps: int, every: int) -> Pattern:
        """Return the pattern with a sparsity that rises along a cubic to its final value.

        ``steps`` is the length of the rise and ``every`` the steps between two changes. A
        pattern without a sparsity in between, such as N:M, and one whose sparsity changes
        already are returned as they are.
        """
        return self

    def stage(self, step: int | Array | None) -> int | Array:
        """Return the index into `fractions` at ``step``, or the last index if None."""
        if self.schedule is None:
            return 0
        return len(self.schedule.table) - 1 if step is None else self.schedule.stage(step)

    def sparsity_of(self, name: str) -> float:
        """Return the final fraction of zeros required of the array ``name``."""
        return float(self.fractions()[-1])

    def describe(self) -> str:
        """Return a short text for tables, such as ``"2:4"``."""
        return repr(self)

    def renamed(self, rename: Callable[[str], str]) -> Pattern:
        """Return the pattern with ``rename`` applied to the array names that it holds."""
        return self

    def of(self, name: str) -> Pattern:
        """Return the pattern of the array ``name``.

        Arrays with equal patterns are projected together.
        """
        return self

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The patterns that `of` can return, each once."""
        return (self,)

    @property
    def named_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that have a sparsity of their own."""
        return ()

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError if the pattern names an array that is not among ``names``."""

    def check(self, shape: Sequence[int], layout: Layout | None, name: str) -> None:
        """Raise ValueError if the pattern does not fit an array of this shape and layout.

        ``layout`` has non-negative axes. A check needs no values, so it can run when the
        optimizer is constructed, before any training.
        """

    def why_whole(self, shape: Sequence[int], layout: Layout | None, name: str) -> str:
        """Return why an array stays dense as a whole, as the end of "because ...", or "".

        A pattern that leaves ragged tails dense overrides it, for arrays that are nothing but tail.
        """
        return ""

    def units(self, scores: Array, layout: Layout | None, name: str, *, xp: Any) -> Units:
        """Return the units of one array from the scores of its entries."""
        return Units(scores, layout, lambda mask: mask)

    def with_floor(
        self, units: Sequence[Units], names: Sequence[str], stage: int | Array, *, xp: Any
    ) -> list[Units]:
        """Return the units of all arrays, with infinite scores for those that must stay.

        An array can be a stack of tensors along the batch axes of its units.
        """
        return list(units)

    def keep(
        self, units: Sequence[Units], names: Sequence[str], stage: int | Array, *, xp: Any
    ) -> list[Array]:
        """Return masks of the units to keep, one per array."""
        raise NotImplementedError

    def in_pools(
        self,
        fn: Callable[[Array, tuple[int, ...] | None], Array],
        x: Array,
        layout: Layout | None,
        name: str,
        *,
        xp: Any,
    ) -> Array:
        """Return ``fn(x, axes)``, where the entries of x along ``axes`` form one pool.

        Scores are scaled in each pool. A pattern overrides this if its pools are smaller than
        an array and than the rows of `by_output`. ``axes`` is None if x is one pool.
        """
        return in_pools(fn, x, layout, by_output=self.by_output)


@dataclass(frozen=True, repr=False)
class FractionPattern(Pattern):
    """Base class of patterns that zero a fraction of the units in each pool.

    A subclass has two fields. ``sparsity`` is a fraction of zeros or a sparsity schedule.
    ``scope`` is "global" (all arrays form one pool), "tensor", or, for patterns of single
    entries, "row". It may have a third, ``floor``, for the scope "global", see `Unstructured`.
    """

    def __repr__(self) -> str:
        shown = [f.name for f in fields(self) if f.name != "floor" or self._floor]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in shown)})"

    @property
    def joint(self) -> bool:
        """Whether the units of all arrays compete in one pool."""
        return bool(self._scope == "global")

    @property
    def by_output(self) -> bool:
        """Whether the units of each output form a pool of their own."""
        return bool(self._scope == "row")

    @property
    def _scope(self) -> str:
        return str(getattr(self, "scope", "tensor"))

    @property
    def counts_in_tensors(self) -> bool:
        """Whether it matters which axes of an array stack several tensors."""
        return not self.joint or self._floor > 0

    @property
    def _floor(self) -> float:
        return float(getattr(self, "floor", 0.0))

    @property
    def _sparsity(self) -> Any:
        return self.sparsity  # type: ignore[attr-defined]

    @property
    def schedule(self) -> SparsityTable | None:
        """The sparsity schedule, or None if the sparsity is constant."""
        return self._sparsity if isinstance(self._sparsity, SparsityTable) else None

    def fractions(self) -> tuple[Fraction, ...]:
        """Return the fraction of zeros at every stage of the schedule, exactly."""
        if self.schedule is not None:
            return tuple(self.schedule.table)
        return (_checks.decimal_fraction(self._sparsity),)

    def rising(self, steps: int, every: int) -> Pattern:
        """Return the pattern with a sparsity that rises along a cubic to its final value."""
        if self.schedule is not None or not self._sparsity:
            return self
        schedule = cubic(self._sparsity, steps=steps, every=every)
        return replace(self, sparsity=schedule)  # type: ignore[call-arg]

    def describe(self) -> str:
        """Return a short text for tables, such as ``"0.9 of Channel, scope tensor"``."""
        return f"{float(self.fractions()[-1]):g} of {type(self).__name__}, {self._described}"

    @property
    def _described(self) -> str:
        return f"scope {self._scope}" + (f", floor {self._floor:g}" if self._floor else "")

    def distributed(
        self,
        shapes: Sequence[tuple[int, ...]],
        layouts: Sequence[Layout | None],
        names: Sequence[str],
    ) -> Sequence[tuple[Fraction, ...]]:
        """Return the fraction of zeros of every array at every stage.

        By default all arrays get the same. Override it to distribute sparsity over arrays.
        """
        return [self.fractions()] * len(names)

    def keep(
        self, units: Sequence[Units], names: Sequence[str], stage: int | Array, *, xp: Any
    ) -> list[Array]:
        """Return masks of the units to keep, one per array.

        Units that ``floor`` keeps must have infinite scores, see `with_floor`.
        """
        scores = [unit.scores for unit in units]
        if self.joint:
            counts = kept_counts(self.fractions(), sum(math.prod(s.shape) for s in scores))
            # The stage may be traced, so counts of all stages go along and are looked up.
            return backend_of(scores[0]).keep_largest(scores, counts=counts, stage=stage)
        layouts = [unit.layout for unit in units]
        shapes = [tuple(s.shape) for s in scores]
        spread = self.distributed(shapes, layouts, names)
        return [
            keep_within(score, stages, stage, layout, name, by_output=self.by_output, xp=xp)
            for score, stages, layout, name in zip(scores, spread, layouts, names, strict=True)
        ]

    def with_floor(
        self, units: Sequence[Units], names: Sequence[str], stage: int | Array, *, xp: Any
    ) -> list[Units]:
        """Return the units, with infinite scores for those that ``floor`` keeps in each tensor.

        Keeping the largest of each tensor, and then the largest of all others, minimises the
        distance.
        """
        if not self._floor:
            return list(units)
        shapes = [tuple(unit.scores.shape) for unit in units]
        slices = [
            math.prod(shape[axis] for axis in (unit.layout.batch_axes if unit.layout else ()))
            for shape, unit in zip(shapes, units, strict=True)
        ]
        sizes = [math.prod(s) // max(n, 1) for s, n in zip(shapes, slices, strict=True)]
        counts = kept_counts(self.fractions(), sum(map(math.prod, shapes)))
        floors = self._least(sizes, slices, counts)
        found = []
        for i, (unit, name) in enumerate(zip(units, names, strict=True)):
            scores = unit.scores
            stages = [1 - Fraction(of[i], max(sizes[i], 1)) for of in floors]
            chosen = keep_within(scores, stages, stage, unit.layout, name, by_output=False, xp=xp)
            largest = xp.full_like(scores, float(xp.finfo(scores.dtype).max))
            # Infinite scores of other units must not tie with these.
            bounded = xp.where(xp.isinf(scores), largest, scores)
            raised = xp.where(chosen, xp.full_like(scores, math.inf), bounded)
            found.append(unit._replace(scores=raised))
        return found

    def _least(
        self, sizes: Sequence[int], slices: Sequence[int], counts: Sequence[int]
    ) -> list[list[int]]:
        """Return for every stage the units that each tensor keeps at least.

        ``sizes`` are the units of a tensor, ``slices`` the tensors in each stack, and ``counts``
        the units that all tensors keep together at every stage.
        """
        share = _checks.decimal_fraction(self._floor)
        floors = []
        for zeros, count in zip(self.fractions(), counts, strict=True):
            # Rounded down, so that all floors together are at most what all tensors keep.
            least = [int(share * (1 - zeros) * n) for n in sizes]
            raised = [max(k, min(n, 1)) for k, n in zip(least, sizes, strict=True)]
            fits = sum(k * n for k, n in zip(raised, slices, strict=True)) <= count
            floors.append(raised if fits else least)
        return floors


def check_floor(floor: Any, scope: str) -> None:
    """Raise unless ``floor`` is in [0, 1], and 0 where tensors do not compete."""
    value = _checks.real("floor", floor, low=0.0)
    if value > 1:
        raise ValueError(f"floor must be in [0, 1], got {floor!r}")
    if value and scope != "global":
        raise ValueError(
            f"floor must be 0 unless scope is 'global', where tensors compete, got {floor!r}"
        )


def check_fraction(name: str, value: Any) -> None:
    """Raise unless ``value`` is a fraction of zeros or a sparsity schedule."""
    if not isinstance(value, SparsityTable):
        _checks.sparsity(name, value)
