"""Importances: where the diagonal P of the generalised projection comes from.

An importance is a frozen dataclass with three functions of lists of arrays: `init` makes
its state, `refresh` updates the state at dual updates, and `metric` turns it into P. It
declares what `refresh` reads. To add one, derive from `Importance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import check_real_floating, wide_dtype

__all__ = [
    "Computed",
    "Given",
    "Importance",
    "SecondMoment",
    "SquaredGradient",
    "hutchinson",
    "wanda",
]


Reads = Literal["gradients", "params", "model", "second_moments"] | None


class Importance:
    """Base class of importances, with the defaults of one that never changes.

    Arrays of one call belong to the sparse parameters, in their order.
    """

    reads: ClassVar[Reads] = None
    """What `refresh` is given at a dual update.

    "gradients": the loss gradients of the step, before the penalty. "params": the
    sparse parameters after the step of the base optimizer. "model": all trainable
    parameters after it. "second_moments": the base
    optimizer's running averages of squared gradients after its step, such as Adam's. None:
    nothing, and the state stays as it is.
    """

    has_state_from_start: ClassVar[bool] = True
    """Whether `init` returns a state; without one P is 1 until the first `refresh`."""

    def init(self, params: Sequence[Array]) -> list[Array] | None:
        """Return the state before step 0, if any."""
        raise NotImplementedError

    def refresh(self, state: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        """Return the state after a dual update; ``values`` are what the class `reads`."""
        return list(state)

    def metric(self, state: Sequence[Array], *, joint: bool) -> list[Array]:
        """Return P. ``joint`` says that all arrays compete in one pool."""
        return list(state)


@dataclass(frozen=True)
class Given(Importance):
    """P as arrays that a caller hands to an adapter; it stays as it is.

    Attributes
    ----------
    place : callable
        Returns the arrays for given parameters, checked and with their axes.

    Examples
    --------
    >>> import numpy
    >>> Given(lambda params: [numpy.asarray([4.0, 1.0])]).init([numpy.ones(2)])
    [array([4., 1.])]
    """

    place: Callable[[Sequence[Array]], list[Array]]

    def init(self, params: Sequence[Array]) -> list[Array]:
        """Return the arrays."""
        return self.place(params)


@dataclass(frozen=True)
class Computed(Importance):
    """P by a caller's function of the parameters, called at dual updates; 1 before the first.

    Attributes
    ----------
    compute : callable
        Returns P of the sparse parameters for given parameters.
    reads : {"params", "model"}
        Whether the function is given the sparse parameters or all of them.

    Examples
    --------
    >>> import numpy
    >>> Computed(lambda params: [x * x for x in params]).refresh([], [numpy.asarray([3.0])])
    [array([9.])]
    """

    compute: Callable[[Sequence[Array]], list[Array]]
    reads: Reads = "params"  # type: ignore[misc]

    has_state_from_start: ClassVar[bool] = False

    def init(self, params: Sequence[Array]) -> list[Array] | None:
        """Return None: the function is not called before the first dual update."""
        return None

    def refresh(self, state: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        """Return what the function gives."""
        return self.compute(values)


@dataclass(frozen=True)
class SquaredGradient(Importance):
    """The squared loss gradient, averaged over dual updates.

    ``m <- decay * m + (1 - decay) * g^2`` and ``P = m``: the diagonal of the empirical
    Fisher information, and SNIP's saliency squared for ``decay=0``. The gradient is the
    one at the perturbed point, unscaled and before the penalty. The average starts at
    zero; its common factor changes no projection, so none is corrected. P is 1 until a
    gradient has been seen, for an all-zero P would keep entries 0, 1, 2, ...

    Attributes
    ----------
    decay : float
        Weight of the past, in [0, 1).

    Raises
    ------
    TypeError, ValueError
        If ``decay`` is not a number in [0, 1).

    References
    ----------
    Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection
    Sensitivity"; Lee et al. 2025, section 3.4.

    Examples
    --------
    >>> import numpy
    >>> source = SquaredGradient(decay=0.5)
    >>> state = source.refresh(source.init([numpy.ones(2)]), [numpy.asarray([2.0, 0.0])])
    >>> source.metric(state, joint=True)
    [array([2., 0.])]
    """

    decay: float = 0.99

    reads: ClassVar[Reads] = "gradients"

    def __post_init__(self) -> None:
        if _checks.real("decay", self.decay, low=0.0) >= 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def init(self, params: Sequence[Array]) -> list[Array]:
        """Zeros of the shapes of ``params``, in float32 or wider."""
        return _zeros(params)

    def refresh(self, state: Sequence[Array], gradients: Sequence[Array]) -> list[Array]:
        """Average in the squares of ``gradients``; a non-finite entry changes nothing."""
        refreshed = []
        for m, g in zip(state, gradients, strict=True):
            xp = array_namespace(m)
            wide = xp.astype(g, m.dtype)
            new = self.decay * m + (1 - self.decay) * (wide * wide)
            refreshed.append(xp.where(xp.isfinite(new), new, m))
        return refreshed

    def metric(self, state: Sequence[Array], *, joint: bool) -> list[Array]:
        """Return ``m``, or 1 where every ``m`` of a pool is still zero."""
        return _one_until_seen(state, joint=joint)


@dataclass(frozen=True)
class SecondMoment(Importance):
    """The base optimizer's running average of squared gradients: ``P = v``.

    The entries then rank by ``sqrt(v) |x + u|``, the objective-aware score of ELSA. The base
    must keep second moments, as Adam and its relatives do. A factor per tensor, such as
    Adam's bias correction, changes no order within it.

    References
    ----------
    ELSA, arXiv 2510.01650.

    Examples
    --------
    >>> import numpy
    >>> source = SecondMoment()
    >>> source.refresh(source.init([numpy.ones(2)]), [numpy.asarray([4.0, 0.0])])
    [array([4., 0.])]
    """

    reads: ClassVar[Reads] = "second_moments"

    def init(self, params: Sequence[Array]) -> list[Array]:
        """Zeros of the shapes of ``params``, in float32 or wider."""
        return _zeros(params)

    def refresh(self, state: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        """Copy the second moments; a non-finite entry keeps its old value."""
        refreshed = []
        for old, new in zip(state, values, strict=True):
            xp = array_namespace(old)
            wide = xp.astype(new, old.dtype)
            refreshed.append(xp.where(xp.isfinite(wide), wide, old))
        return refreshed

    def metric(self, state: Sequence[Array], *, joint: bool) -> list[Array]:
        """Return ``v``, or 1 where every ``v`` of a pool is still zero."""
        return _one_until_seen(state, joint=joint)


def _zeros(params: Sequence[Array]) -> list[Array]:
    return [
        array_namespace(x).zeros_like(x, dtype=wide_dtype(array_namespace(x), [x])) for x in params
    ]


def _one_until_seen(state: Sequence[Array], *, joint: bool) -> list[Array]:
    """Return the arrays, or 1 where a whole pool is zero: P = 0 would keep entries 0, 1, 2."""
    if not state:
        return []
    xp = array_namespace(*state)
    seen = backend_of(state[0]).peaks(state) > 0
    return [
        xp.where(xp.any(seen) if joint else seen[i], m, xp.ones_like(m))
        for i, m in enumerate(state)
    ]


def wanda(activations: Any) -> Any:
    """The diagonal of ``A^T A``: Wanda's importance of each input feature.

    ``P_j = sum_n A_nj^2``. With it the score ``sqrt(P_j) |w_ij|`` of an entry is
    Wanda's ``|w_ij| * |A_j|_2``.

    Parameters
    ----------
    activations : array
        Inputs of a layer, shape (..., features), real floating. Sums of several calls
        add up to that of all samples.

    Returns
    -------
    array
        Shape (features,), float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``activations`` is not real floating or has no axes.

    References
    ----------
    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language
    Models"; Lee et al. 2025, section 3.4.

    Examples
    --------
    >>> import numpy
    >>> wanda(numpy.asarray([[1.0, 2.0], [3.0, 0.0]]))
    array([10.,  4.])
    """
    if not is_array_api_obj(activations):
        raise TypeError(f"activations must be an array, got {type(activations)!r}")
    xp = array_namespace(activations)
    check_real_floating(xp, activations, "activations")
    if activations.ndim == 0:
        raise ValueError("activations must have shape (..., features), got a scalar")
    wide = xp.astype(activations, wide_dtype(xp, [activations]))
    return xp.sum(wide * wide, axis=tuple(range(activations.ndim - 1)))


def hutchinson(probes: Sequence[Any], products: Sequence[Any]) -> Any:
    """The diagonal of a Hessian, estimated from products with it, negative entries as 0.

    ``P = max(0, mean_s r_s * (H r_s))`` over samples s, with entries of r drawn from -1 and
    1: the mean of every ``r_i H_ij r_j`` is zero but for ``i = j``. With it an entry ranks by
    ``sqrt(P) |v|``, as in Optimal Brain Damage.

    Parameters
    ----------
    probes : sequence of arrays
        The vectors ``r_s``, shaped as the parameter; at least one.
    products : sequence of arrays
        ``H r_s``, of the same shapes.

    Returns
    -------
    array
        Shaped as the parameter, float32 or wider.

    Raises
    ------
    ValueError
        If there is no sample, or not one product for every probe.

    References
    ----------
    Hutchinson 1990, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines"; LeCun et al. 1989, "Optimal Brain Damage".

    Examples
    --------
    >>> import numpy
    >>> hessian, r = numpy.diag([2.0, -1.0]), numpy.asarray([1.0, -1.0])
    >>> hutchinson([r], [hessian @ r])
    array([2., 0.])
    """
    if not probes or len(probes) != len(products):
        raise ValueError(
            f"products must be one for every probe, and at least one, got {len(products)} for "
            f"{len(probes)}"
        )
    xp = array_namespace(*probes, *products)
    dtype = wide_dtype(xp, products)
    total = xp.zeros_like(products[0], dtype=dtype)
    for r, product in zip(probes, products, strict=True):
        total = total + xp.astype(r, dtype) * xp.astype(product, dtype)
    return xp.where(total > 0, total / len(probes), xp.zeros_like(total))
