"""Perturbations e, which move x to a nearby point of higher loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from . import _checks
from .direction import Direction, norm
from .layout import Layout
from .schedules import Schedule, as_schedule, is_zero

__all__ = [
    "ASAM",
    "SAM",
    "GradientAscent",
    "Perturbation",
    "adapted",
    "ball",
]


@dataclass(frozen=True)
class Perturbation:
    """Base class of perturbations, which compute e from the gradient at x.

    A subclass overrides `direction`. With an ``interval`` n only the steps ``t`` with
    ``t % n == 0`` perturb and pay for a second gradient. The others use the gradient ``g_0``
    at x or, with ``reuse``, that of LookSAM::

        h = g_s - (g_s . g_0) / |g_0|^2 * g_0    at the last step that perturbed
        g = g_0 + reuse * |g_0| / |h| * h        at the others

    where ``g_s`` is the gradient at x + e.

    Attributes
    ----------
    rho : float or schedule
        Perturbation radius, in the unit of the parameters.
    interval : int
        Steps between two perturbations; keyword-only.
    reuse : float
        Weight of the last flat direction at the steps in between; keyword-only. If positive,
        ``h / |h|`` is kept as state for every trainable parameter, in float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``rho`` is not a non-negative number or a schedule, ``interval`` not a positive
        integer or ``reuse`` negative, or positive where every step perturbs.

    References
    ----------
    Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization"
    (LookSAM), Algorithm 1.
    """

    rho: Schedule | float = 0.1
    interval: int = field(default=1, kw_only=True)
    reuse: float = field(default=0.0, kw_only=True)

    in_steps: ClassVar[bool] = False
    """Whether rho counts steps of the base optimizer, which are measured during training."""

    full_step: ClassVar[float] = 0.0
    """Relative length of a step from which on such a radius is full; see `SAM`."""

    max_growth: ClassVar[float] = 0.0
    """Growth of the gradient's norm at x + e beyond which such a radius shrinks; see `SAM`."""

    is_scale_free: ClassVar[bool] = True
    """Whether e stays the same when the loss is multiplied by a positive number."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", as_schedule("rho", self.rho))
        _checks.integer("interval", self.interval, low=1)
        if _checks.real("reuse", self.reuse, low=0.0) > 0 and self.interval == 1:
            raise ValueError(
                "reuse must be 0 unless perturbations are more than one step apart, got "
                f"{self.reuse!r} and an interval of 1"
            )

    @property
    def is_zero(self) -> bool:
        """Whether the radius is known to be 0 at every step."""
        return is_zero(self.rho)

    def is_due(self, step: int | Array) -> bool | Array:
        """Return whether ``step`` perturbs by its ``interval``."""
        return self.interval == 1 or step % self.interval == 0

    def perturbation(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> list[Array]:
        """Return ``e`` for every parameter, in float32 or wider.

        e is zero if the norm of the gradient is zero or not finite. Only adaptive
        perturbations read ``params`` and ``layouts``.
        """
        return self.direction(params, gradients, rho=rho, layouts=layouts).perturbation()

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return `perturbation` as a factor and vectors, for an adapter that adds in place.

        ``layouts`` holds the axis roles of each parameter, or None where they are unknown.
        """
        raise NotImplementedError

    def direction_at(
        self,
        step: int | Array,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return `direction` at a step; by default only rho depends on the step."""
        return self.direction(params, gradients, rho=rho, layouts=layouts)


@dataclass(frozen=True)
class SAM(Perturbation):
    """Perturbation of fixed norm along the gradient, ``e = rho * g / |g|_2``.

    The norm runs over all trainable parameters together, not over each tensor.

    Attributes
    ----------
    rho : float or schedule
        Perturbation radius, in the unit of the parameters or in steps.
    in_steps : bool
        Whether the radius is ``rho`` times the root mean square length of the steps that the
        base optimizer has taken so far on the sparse parameters; keyword-only. Every eighth
        step is measured, before a penalty of `Pull` or a mask acts. The radius then follows the
        learning rate and the optimizer: where training moves slowly, e is short.
    full_step : float
        With ``in_steps``: the length l of a step relative to that of the sparse parameters,
        ``l / |x|``, from which on the radius is full; keyword-only. Below it the radius is
        multiplied by ``(l / (full_step * |x|))**2``. Both lengths are root mean squares over the
        measured steps. 0, the default, turns this off.
    max_growth : float
        With ``in_steps``: the ratio ``|grad f(x + e)| / |grad f(x)|`` beyond which the radius
        shrinks, because the loss is far from linear within it; keyword-only. After a step with a
        larger ratio the radius is multiplied by ``exp(-1/4)``, down to ``exp(-4)`` of the full
        one, and after others by ``exp(1/50)`` until it is full. The norms run over all trainable
        parameters. Both gradients must be of the same batch, scale and dropout masks, and clipped
        afterwards or not at all: clipping one of them changes the ratio, and clipping both hides
        it. 0, the default, turns this off.
    interval, reuse : int, float
        Perturb at every n-th step only, and reuse part of the perturbed gradient at the
        others, see `Perturbation`; keyword-only.

    Raises
    ------
    TypeError, ValueError
        As `Perturbation`, or if ``full_step`` or ``max_growth`` is negative, not finite, or
        positive without ``in_steps``, or ``max_growth`` lies between 0 and 1.

    References
    ----------
    Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization"; Lee et al. 2025, equation 4.

    Examples
    --------
    >>> import numpy
    >>> SAM(0.1).perturbation([numpy.zeros(2)], [numpy.asarray([3.0, 4.0])], rho=0.1)
    [array([0.06, 0.08])]
    """

    in_steps: bool = field(default=False, kw_only=True)  # type: ignore[misc]
    full_step: float = field(default=0.0, kw_only=True)  # type: ignore[misc]
    max_growth: float = field(default=0.0, kw_only=True)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.flag("in_steps", self.in_steps)
        for name in ("full_step", "max_growth"):
            value = _checks.real(name, getattr(self, name), low=0.0)
            if value > 0 and not self.in_steps:
                raise ValueError(f"{name} must be 0 unless the radius is in steps, got {value!r}")
        if 0 < self.max_growth < 1:
            raise ValueError(f"max_growth must be 0 or at least 1, got {self.max_growth!r}")

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return e as ``rho / |g|`` and the gradients."""
        return Direction(gradients, norm(gradients), rho)


@dataclass(frozen=True)
class ASAM(Perturbation):
    """Adaptive perturbation that scales with each weight, ``e = rho * T^2 g / |T g|_2``.

    ``T = |x| + eta`` for weights (arrays of two or more axes) and 1 for other parameters, so
    that ``|T^-1 e|_2 = rho``.

    Attributes
    ----------
    rho : float or schedule
        Perturbation radius in the norm ``|T^-1 e|_2``. It has no unit for weights.
    eta : float
        Constant that keeps T positive where a weight is zero.
    interval, reuse : int, float
        See `Perturbation`.

    Raises
    ------
    TypeError, ValueError
        As `Perturbation`, or if ``eta`` is negative.

    References
    ----------
    Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks".

    Examples
    --------
    >>> import numpy
    >>> x, g = numpy.asarray([[0.99]]), numpy.asarray([[2.0]])
    >>> ASAM(0.5).perturbation([x], [g], rho=0.5)
    [array([[0.5]])]
    """

    rho: Schedule | float = 0.5
    eta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.real("eta", self.eta, low=0.0)

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return e as a factor and vectors."""
        scaled, twice = adapted(params, gradients, self.eta)
        return Direction(twice, norm(scaled), rho)


def adapted(
    params: Sequence[Array], gradients: Sequence[Array], eta: float
) -> tuple[list[Array], list[Array]]:
    """Return ``T g`` and ``T^2 g`` of `ASAM`, in float32 or wider."""
    if not gradients:
        return [], []
    backend = backend_of(gradients[0])

    def times(g: Array, x: Array) -> Array:
        xp = array_namespace(g)
        return (xp.abs(xp.astype(x, g.dtype, copy=False)) + eta) * g

    # Both products run in float32 or wider: T^2 g of 16 bits would underflow.
    scaled = backend.widened(gradients)
    twice = list(scaled)
    weights = [i for i, x in enumerate(params) if x.ndim >= 2]
    own = [params[i] for i in weights]
    for found in (scaled, twice):
        products = backend.blockwise(times, [scaled[i] for i in weights], own)
        for i, product in zip(weights, products, strict=True):
            found[i] = product
    return scaled, twice


@dataclass(frozen=True)
class GradientAscent(Perturbation):
    """Step along the gradient without normalisation, ``e = rho * g``.

    The norm of e is proportional to that of the gradient. A loss scaler would therefore
    change e, so unscale the gradients before the perturbation.

    Attributes
    ----------
    rho : float or schedule
        Step size, in the unit of a learning rate.
    interval, reuse : int, float
        See `Perturbation`.

    Raises
    ------
    TypeError, ValueError
        As `Perturbation`.

    References
    ----------
    Peste et al. 2023, "CrAM: A Compression-Aware Minimizer", ICLR, equation 4.

    Examples
    --------
    >>> import numpy
    >>> ascent = GradientAscent(0.5)
    >>> ascent.perturbation([numpy.zeros(2)], [numpy.asarray([3.0, 4.0])], rho=0.5)
    [array([1.5, 2. ])]
    """

    is_scale_free: ClassVar[bool] = False

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return e as a factor and vectors."""
        length = norm(gradients)
        xp = array_namespace(length)
        # The length is 1, so that the factor is rho. It is infinite if the norm is not finite,
        # which makes the direction unusable and e zero.
        one = xp.ones_like(length)
        return Direction(gradients, xp.where(xp.isfinite(length), one, math.inf * one), rho)


def ball(rho: Any, adaptive: Any, **options: Any) -> Perturbation:
    """Return `ASAM` if ``adaptive`` is True, else `SAM`."""
    return (ASAM if _checks.flag("adaptive", adaptive) else SAM)(rho, **options)
