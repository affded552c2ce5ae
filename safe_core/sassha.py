"""Sassha, a second-order optimizer that seeks flat minima, on lists of arrays.

The adapters compute gradients and Hessian products, hold the state and count. Everything else
of a step is here: where the gradient is taken, the averages, and the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import scalar_like, wide_dtype
from .direction import Direction, norm

__all__ = ["ASCENTS", "BIAS_CORRECTIONS", "SasshaRule", "check_number", "estimates"]

ASCENTS = ("gradient", "momentum")
BIAS_CORRECTIONS = ("corrected", "published", "none")

Number = float | Array


@dataclass(frozen=True)
class SasshaRule:
    """Settings and formulas of Sassha. Numbers may be scalar arrays, also traced ones.

    A step ``t = 1, 2, ...`` is::

        e  = rho * grad f(x) / |grad f(x)|                 M-Sassha: -rho * m / |m|
        g  = grad f(x + e)
        if (t - 1) % hessian_interval == 0:                c counts these steps
            h = z * (H z)                                  H at x + e, entries of z are -1 or +1
            D = beta_2 * D + (1 - beta_2) * |h|
        m  = beta_1 * m + (1 - beta_1) * g
        d  = (D / (1 - beta_2**c))**power + eps
        x  = (1 - lr * weight_decay) * x - lr * m / (1 - beta_1**t) / d

    The norms are over all parameters.

    Attributes
    ----------
    betas : (float, float)
        Weights of the previous averages, of the gradient and of the Hessian diagonal.
    rho : float
        Perturbation radius. If it is 0, the gradient is that at x.
    weight_decay : float
        Decoupled weight decay, multiplied by the learning rate as in AdamW.
    hessian_interval : int
        Steps between two Hessian products.
    eps : float
        Added to the denominator.
    power : float
        Exponent of the averaged Hessian diagonal.
    bias_correction : {"corrected", "published", "none"}
        Whether D is corrected by c, its number of updates, or by t, as in the published code. With
        "none", neither average is corrected.
    ascent : {"gradient", "momentum"}
        Direction of e. With "momentum", which is M-Sassha, a step needs one gradient only.

    Raises
    ------
    TypeError, ValueError
        If a setting is not a number in its range, or not one of its choices.

    References
    ----------
    Shin et al. 2025, "Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable
    Hessian Approximation", arXiv 2502.18153.

    Examples
    --------
    >>> import numpy
    >>> rule = SasshaRule(betas=(0.9, 0.99), eps=0.0)
    >>> x, hessian = [numpy.asarray([2.0, 2.0])], numpy.asarray([4.0, -16.0])
    >>> z, zero = numpy.asarray([1.0, -1.0]), [numpy.zeros(2)]
    >>> m = rule.average_gradients(zero, [hessian * x[0]])
    >>> d = rule.average_curvatures(zero, estimates([z], [hessian * z]))
    >>> rule.moved(x, m, d, learning_rate=0.1, step=1, hessian_count=1)[0].round(6)
    array([1.6, 2.8])
    """

    betas: tuple[Number, Number] = (0.9, 0.999)
    rho: Number = 0.2
    weight_decay: Number = 0.0
    hessian_interval: int | Array = 10
    eps: Number = 1e-4
    power: Number = 0.5
    bias_correction: str = "corrected"
    ascent: str = "gradient"

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, got {_checks.shown(self.betas)}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for i, beta in enumerate(self.betas):
            check_number(f"betas[{i}]", beta, below=1.0)
        for name in ("rho", "weight_decay", "eps", "power"):
            check_number(name, getattr(self, name))
        if not is_array_api_obj(self.hessian_interval):
            _checks.integer("hessian_interval", self.hessian_interval, low=1)
        _checks.choice("bias_correction", self.bias_correction, BIAS_CORRECTIONS)
        _checks.choice("ascent", self.ascent, ASCENTS)

    @property
    def perturbs(self) -> bool:
        """Whether the radius can differ from 0. Only the number 0 is known to be 0."""
        return is_array_api_obj(self.rho) or self.rho != 0

    @property
    def follows_momentum(self) -> bool:
        """Whether e follows the averaged gradient, so that a step needs one gradient only."""
        return self.perturbs and self.ascent == "momentum"

    def needs_product(self, step: int | Array) -> bool | Array:
        """Return whether a step, counted from 0, needs a Hessian product."""
        every_step = not is_array_api_obj(self.hessian_interval) and self.hessian_interval == 1
        return every_step or step % self.hessian_interval == 0

    @property
    def signed_rho(self) -> Number:
        """The radius along the vectors that `direction` takes."""
        # Momentum overshoots a valley, so its direction of descent ends where the loss rises.
        return -self.rho if self.ascent == "momentum" else self.rho

    def direction(self, vectors: Sequence[Array]) -> Direction:
        """Return e from the gradients at x, or for M-Sassha from the averages ``m``.

        The averages are zero before the first step, and e is, too.
        """
        return Direction(vectors, norm(vectors), self.signed_rho)

    def average_gradients(
        self,
        means: Sequence[Array],
        gradients: Sequence[Array],
        *,
        out: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Return ``m``, in the dtypes of ``means``; write it to ``out`` where that can be."""

        def average(m: Array, g: Array) -> Array:
            return _averaged(m, array_namespace(m).astype(g, m.dtype, copy=False), self.betas[0])

        return _blockwise(average, means, gradients, out=out)

    def average_curvatures(
        self,
        diagonals: Sequence[Array],
        estimates: Sequence[Array],
        *,
        out: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Return D, which holds the averages of ``|h|``.

        The estimates h are averaged over the batch and all processes. An entry that would not be
        finite keeps its old value: a loss scaler overflows now and then.
        """

        def average(d: Array, h: Array) -> Array:
            xp = array_namespace(d)
            new = _averaged(d, xp.abs(xp.astype(h, d.dtype, copy=False)), self.betas[1])
            return xp.where(xp.isfinite(new), new, d)

        return _blockwise(average, diagonals, estimates, out=out)

    def moved(
        self,
        params: Sequence[Array],
        means: Sequence[Array],
        diagonals: Sequence[Array],
        *,
        learning_rate: Number,
        step: int | Array,
        hessian_count: int | Array,
        out: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Return the parameters after a step.

        ``step`` counts the steps and ``hessian_count`` the updates of D, with those of this step.
        """
        change = self._change(learning_rate, step, hessian_count)

        def move(x: Array, m: Array, d: Array) -> Array:
            xp, found = array_namespace(x), change(x, m, d)
            return xp.astype(xp.astype(x, found.dtype, copy=False) + found, x.dtype, copy=False)

        return _blockwise(move, params, means, diagonals, out=out)

    def updates(
        self,
        params: Sequence[Array],
        means: Sequence[Array],
        diagonals: Sequence[Array],
        *,
        learning_rate: Number,
        step: int | Array,
        hessian_count: int | Array,
    ) -> list[Array]:
        """Return what `moved` adds to the parameters, as optax does."""
        change = self._change(learning_rate, step, hessian_count)

        def update(x: Array, m: Array, d: Array) -> Array:
            return array_namespace(x).astype(change(x, m, d), x.dtype, copy=False)

        return _blockwise(update, params, means, diagonals)

    def _change(self, learning_rate: Number, step: int | Array, hessian_count: int | Array) -> Any:
        """Return the function of x, m and D that computes the change of x in a wide dtype."""
        of_m: Number = 1.0
        of_d: Number = 1.0
        if self.bias_correction != "none":
            published = self.bias_correction == "published"
            of_m = _correction(self.betas[0], step)
            of_d = _correction(self.betas[1], step if published else hessian_count)
        numbers = (learning_rate, self.weight_decay, self.eps, self.power, of_m, of_d)

        def change(x: Array, m: Array, d: Array) -> Array:
            xp = array_namespace(x)
            wide = wide_dtype(xp, [x])
            x, m, d = (xp.astype(a, wide, copy=False) for a in (x, m, d))
            rate, decay, eps, power, first, second = (scalar_like(n, x) for n in numbers)
            curvature = d / second
            # The square root is exact, which a power need not be.
            root = xp.sqrt(curvature) if _is_half(power) else curvature**power
            return -rate * (decay * x + m / first / (root + eps))

        return change


def estimates(probes: Sequence[Array], products: Sequence[Array]) -> list[Array]:
    """Return ``h = z * (H z)`` from the probes z and the Hessian products, in their dtypes.

    It estimates the diagonal of H without bias, because ``E[z_i z_j]`` is 0 unless ``i = j``.

    Examples
    --------
    >>> import numpy
    >>> z = numpy.asarray([1.0, -1.0])
    >>> estimates([z], [numpy.asarray([[3.0, 1.0], [1.0, 2.0]]) @ z])
    [array([2., 1.])]
    """
    return _blockwise(lambda product, z: product * z, products, probes)


def check_number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise unless ``value`` is a scalar array, or a number of at least 0 and below a bound."""
    if is_array_api_obj(value):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}")
    elif _checks.real(name, value, low=0.0) >= below:
        raise ValueError(f"{name} must be in [0, {below:g}), got {value!r}")


def _averaged(old: Array, new: Array, beta: Number) -> Array:
    beta = scalar_like(beta, old)
    return beta * old + (1 - beta) * new


def _correction(beta: Number, count: int | Array) -> Number:
    """Return ``1 - beta**count``, without the cancellation of that difference in float32."""
    log: Number
    if is_array_api_obj(beta):
        log = array_namespace(beta).log(beta)
    else:
        log = math.log(beta) if beta else -math.inf
    if not is_array_api_obj(count):
        exponent = count * log
    elif backend_of(count).is_concrete(count):
        exponent = int(count) * log  # type: ignore[arg-type]
    else:  # in the default dtype, which is float32 in JAX unless x64 is enabled
        xp = array_namespace(count)
        floating = xp.__array_namespace_info__().default_dtypes()["real floating"]
        exponent = xp.astype(count, floating)
        exponent = exponent * scalar_like(log, exponent)
    if is_array_api_obj(exponent):
        return -array_namespace(exponent).expm1(exponent)
    return -math.expm1(exponent)


def _is_half(power: Number) -> bool:
    return not is_array_api_obj(power) and power == 0.5


def _blockwise(fn: Any, *lists: Sequence[Array], out: Sequence[Array] | None = None) -> list[Array]:
    return backend_of(lists[0][0]).blockwise(fn, *lists, out=out) if lists[0] else []
