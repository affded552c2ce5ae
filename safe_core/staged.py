"""Change the perturbation at a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import wide_dtype
from .direction import Direction
from .layout import Layout
from .perturbations import Perturbation
from .schedules import Schedule

__all__ = ["Staged"]


@dataclass(frozen=True)
class Staged(Perturbation):
    """Perturbation that is ``first`` before step ``start``, and ``second`` from it on.

    Both can be any perturbations whose radius has the unit of the parameters, such as `SAM`,
    `ASAM`, `ChannelSAM` or another `Staged`. A radius that is given to the adapter replaces that
    of both. A compiled program runs one of them only.

    Attributes
    ----------
    first, second : Perturbation
        Perturbations of the two stages, with the same ``interval`` and ``reuse``.
    start : int
        Step at which the second stage starts.

    Raises
    ------
    TypeError, ValueError
        If a part is not a perturbation, has a radius in steps or is not normalised, if the two
        differ in ``interval`` or ``reuse``, or if ``start`` is negative.

    Examples
    --------
    >>> from safe_core import ASAM, SAM
    >>> perturbation = Staged(SAM(0.1), ASAM(2.0), start=100)
    >>> perturbation.rho(99), perturbation.rho(100)
    (0.1, 2.0)
    """

    rho: Schedule = field(init=False, repr=False)
    first: Perturbation
    second: Perturbation
    start: int
    interval: int = field(init=False, repr=False)
    reuse: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _checks.integer("start", self.start, low=0)
        for name, part in (("first", self.first), ("second", self.second)):
            if not isinstance(part, Perturbation):
                raise TypeError(f"{name} must be a perturbation, got {_checks.shown(part)}")
            if part.in_steps or not part.is_scale_free:
                raise ValueError(
                    f"{name} must be normalised, with a radius in the unit of the parameters, such "
                    f"as SAM(0.1), got {part!r}"
                )
        for name in ("interval", "reuse"):
            values = getattr(self.first, name), getattr(self.second, name)
            if values[0] != values[1]:
                raise ValueError(
                    f"{name} must be the same in both stages, got {values[0]!r} and {values[1]!r}"
                )
            object.__setattr__(self, name, values[0])
        radius: Any = self.first.rho
        if self.second.rho != radius:
            radius = _StagedRadius(radius, self.second.rho, self.start)  # type: ignore[arg-type]
        object.__setattr__(self, "rho", radius)
        super().__post_init__()

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Raise an error, because the stage depends on the step: use `direction_at`."""
        raise ValueError(f"step must be given to `direction_at` of a staged perturbation {self!r}")

    def direction_at(
        self,
        step: int | Array,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return the direction of the stage that ``step`` belongs to."""

        def of(part: Perturbation) -> Any:
            def directed(params: Sequence[Array], gradients: Sequence[Array]) -> Any:
                return part.direction_at(step, params, gradients, rho=rho, layouts=layouts)

            return directed

        if isinstance(step, int):
            return of(self.first if step < self.start else self.second)(params, gradients)

        def traced(part: Perturbation) -> Any:
            # Both branches must return the same types, and rho is the same in both.
            def directed(params: Sequence[Array], gradients: Sequence[Array]) -> Any:
                found = of(part)(params, gradients)
                return [_wide(vector) for vector in found.vectors], found.length

            return directed

        cond = backend_of(step).cond
        branches = traced(self.first), traced(self.second)
        vectors, length = cond(step < self.start, *branches, list(params), list(gradients))
        return Direction(vectors, length, rho)


@dataclass(frozen=True)
class _StagedRadius:
    """The schedule ``first`` before step ``start``, and ``second`` from it on."""

    first: Schedule
    second: Schedule
    start: int

    def __call__(self, step: int | Array) -> float | Array:
        if isinstance(step, int):
            return (self.first if step < self.start else self.second)(step)
        xp = array_namespace(step)
        floating = xp.__array_namespace_info__().default_dtypes()["real floating"]
        values = [xp.asarray(part(step), dtype=floating) for part in (self.first, self.second)]
        return xp.where(step < self.start, *values)


def _wide(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.astype(x, wide_dtype(xp, [x]), copy=False)
