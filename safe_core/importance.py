"""Importances supply the diagonal P of the weighted projection.

An importance is a frozen dataclass with three methods on lists of arrays: `init` makes its
state, `refresh` updates the state at dual updates, and `metric` turns the state into P. The
class attribute `reads` declares the input of `refresh`. To add one, derive from `Importance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace, is_array_api_obj

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import check_real_floating, wide_dtype
from .random_numbers import check_seed, uniform

__all__ = [
    "Computed",
    "Given",
    "Importance",
    "RandomOrder",
    "SecondMoment",
    "SquaredGradient",
    "hutchinson",
    "wanda",
]


_LEAST = 1e-15

Reads = Literal["gradients", "params", "model", "second_moments"] | None


class Importance:
    """Base class of importances. By default P is constant.

    The arrays of one call belong to the sparse parameters, in their order.
    """

    reads: ClassVar[Reads] = None
    """The input of `refresh` at a dual update.

    "gradients": the loss gradients of the step, before the penalty. "params": the sparse
    parameters after the base step. "model": all trainable parameters after the base step.
    "second_moments": the base optimizer's running averages of squared gradients after its
    step, such as Adam's. None: `refresh` is never called and P is constant.
    """

    has_state_from_start: ClassVar[bool] = True
    """Whether `init` returns a state. If not, P is 1 until the first `refresh`."""

    def init(self, params: Sequence[Array]) -> list[Array] | None:
        """Return the state before step 0, or None if there is none yet."""
        raise NotImplementedError

    def first_metric(self, state: Sequence[Array] | None, *, joint: bool) -> list[Array] | None:
        """Return P for the first projection; None where it is 1.

        Only a constant P is known then. One that is refreshed at dual updates has seen nothing
        yet, so z starts from the plain magnitudes.
        """
        if state is None or self.reads is not None:
            return None
        return self.metric(state, joint=joint)

    def refresh(self, state: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        """Return the state after a dual update, where ``values`` is the input named by `reads`."""
        return list(state)

    def metric(self, state: Sequence[Array], *, joint: bool) -> list[Array]:
        """Return P, where ``joint`` says that all arrays compete in one pool."""
        return list(state)


@dataclass(frozen=True)
class Given(Importance):
    """Constant P, given by the user as arrays.

    Attributes
    ----------
    place : callable
        ``place(params)`` returns the arrays, checked and with the axes of the parameters.

    Examples
    --------
    >>> import numpy
    >>> Given(lambda params: [numpy.asarray([4.0, 1.0])]).init([numpy.ones(2)])
    [array([4., 1.])]
    """

    place: Callable[[Sequence[Array]], list[Array]]

    def init(self, params: Sequence[Array]) -> list[Array]:
        """Return the given arrays, with the axes of ``params``."""
        return self.place(params)


@dataclass(frozen=True)
class Computed(Importance):
    """P computed by the user's function of the parameters, called at dual updates.

    P is 1 before the first dual update.

    Attributes
    ----------
    compute : callable
        ``compute(params)`` returns P for the sparse parameters.
    reads : {"params", "model"}
        The argument of the function: the sparse parameters, or all trainable ones.

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
        """Return None, because the function is first called at a dual update."""
        return None

    def refresh(self, state: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        """Return the result of the function."""
        return self.compute(values)


@dataclass(frozen=True)
class SquaredGradient(Importance):
    """Squared loss gradient, averaged over dual updates.

    ``m <- decay * m + (1 - decay) * g^2`` and ``P = m``. This estimates the diagonal of the
    empirical Fisher information; with ``decay=0`` entries rank as by SNIP. The gradient g is
    taken at the perturbed point, unscaled and before the penalty. The average starts at zero
    without bias correction, because a common factor changes no projection. P is 1 until a
    gradient is seen: with an all-zero P every score ties, and the tie rule keeps the entries
    of lowest index.

    Attributes
    ----------
    decay : float
        Weight of the previous average, in [0, 1).

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
        """Return zeros of the shapes of ``params``, in float32 or wider."""
        return _zeros(params)

    def refresh(self, state: Sequence[Array], gradients: Sequence[Array]) -> list[Array]:
        """Return the average with ``gradients**2`` included; skip entries that are not finite."""
        refreshed = []
        for m, g in zip(state, gradients, strict=True):
            xp = array_namespace(m)
            wide = xp.astype(g, m.dtype)
            new = self.decay * m + (1 - self.decay) * (wide * wide)
            # A loss scaler overflows now and then; one NaN must not stay in the average.
            refreshed.append(xp.where(xp.isfinite(new), new, m))
        return refreshed

    def metric(self, state: Sequence[Array], *, joint: bool) -> list[Array]:
        """Return ``m``, or 1 for a pool whose ``m`` are all still zero."""
        return _one_until_seen(state, joint=joint)


@dataclass(frozen=True)
class SecondMoment(Importance):
    """Running average of squared gradients of the base optimizer, ``P = v``.

    Entries then rank by ``sqrt(v) |x + u|``, the objective-aware score of ELSA. The base
    optimizer must keep second moments, as Adam does. v is used without Adam's bias
    correction, which is one factor per tensor and changes no order within a tensor.

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
        """Return zeros of the shapes of ``params``, in float32 or wider."""
        return _zeros(params)

    def refresh(self, state: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        """Return a copy of the second moments; non-finite entries keep their old value."""
        refreshed = []
        for old, new in zip(state, values, strict=True):
            xp = array_namespace(old)
            wide = xp.astype(new, old.dtype)
            refreshed.append(xp.where(xp.isfinite(wide), wide, old))
        return refreshed

    def metric(self, state: Sequence[Array], *, joint: bool) -> list[Array]:
        """Return ``v``, or 1 for a pool whose ``v`` are all still zero."""
        return _one_until_seen(state, joint=joint)


@dataclass(frozen=True)
class RandomOrder(Importance):
    """Constant P that ranks the entries of the initial weights in random order.

    ``P = (r / x_0)^2`` with r uniform in (0, 1), so the score ``sqrt(P) |x_0|`` is r. The first
    projection then keeps random entries, whatever the pattern. Later ones rank by
    ``r |x| / |x_0|``. Entries of x_0 below 1e-15, such as zeros, rank last.

    With it a method prunes at random at initialisation::

        Method(Unstructured(0.9, "tensor"), Mask(), importance=RandomOrder(seed=0))

    Attributes
    ----------
    seed : int
        In ``[0, 2**32)``. The order depends on the seed, and on the positions of the entries in
        the arrays.

    Raises
    ------
    TypeError, ValueError
        If ``seed`` is not an integer in this range.

    Examples
    --------
    >>> import numpy
    >>> x = numpy.asarray([9.0, 1.0, -4.0])
    >>> (P,) = RandomOrder(seed=0).init([x])
    >>> (numpy.sqrt(P) * abs(x)).round(3)
    array([0.768, 0.884, 0.046])
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def init(self, params: Sequence[Array]) -> list[Array]:
        """Return P for the entries of ``params``, in float32 or wider."""
        found = []
        for r, x in zip(uniform(params, self.seed), params, strict=True):
            xp = array_namespace(r)
            size = xp.abs(xp.astype(backend_of(x).detached(x), r.dtype))
            # The square of the inverse must not overflow in float32.
            ranked = size >= _LEAST
            ratio = r / xp.where(ranked, size, xp.ones_like(size))
            found.append(xp.where(ranked, ratio * ratio, xp.zeros_like(ratio)))
        return found


def _zeros(params: Sequence[Array]) -> list[Array]:
    return [
        array_namespace(x).zeros_like(x, dtype=wide_dtype(array_namespace(x), [x])) for x in params
    ]


def _one_until_seen(state: Sequence[Array], *, joint: bool) -> list[Array]:
    """Return the arrays, or ones for a pool that is all zero.

    With P = 0 all scores would tie, and the tie rule would keep the entries of lowest index.
    """
    if not state:
        return []
    xp = array_namespace(*state)
    seen = backend_of(state[0]).peaks(state) > 0
    return [
        xp.where(xp.any(seen) if joint else seen[i], m, xp.ones_like(m))
        for i, m in enumerate(state)
    ]


def wanda(activations: Any, axis: int | None = None) -> Any:
    """Return Wanda's importance of each input feature, the diagonal of ``A^T A``.

    ``P_j = sum_n A_nj^2``. The score ``sqrt(P_j) |w_ij|`` of an entry is then Wanda's
    ``|w_ij| * |A_j|_2``.

    A convolution has one feature per input channel, summed over all samples and positions, and
    P is the same for the whole window. It equals the diagonal of ``A^T A`` of the unfolded inputs
    except for windows wider than 1, whose entries skip some positions at borders and with strides.

    Parameters
    ----------
    activations : array
        Inputs of a layer, real floating, such as (..., features). To use several batches, add up
        the results of one call per batch.
    axis : int, optional
        Axis of the features: -1 for linear layers and for the convolutions of Flax, 1 for
        batches (N, C, ...) of the convolutions of PyTorch, 0 for those of Equinox. It is
        required for more than two axes, where the shape cannot tell. The default is the last.

    Returns
    -------
    array
        Shape (features,), float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If ``activations`` is not real floating or has no axes, or ``axis`` is missing or is not
        one of its axes.

    References
    ----------
    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language
    Models"; Lee et al. 2025, section 3.4.

    Examples
    --------
    >>> import numpy
    >>> wanda(numpy.asarray([[1.0, 2.0], [3.0, 0.0]]))
    array([10.,  4.])
    >>> images = numpy.ones((2, 3, 5, 5))  # 3 channels of 5 x 5 pixels
    >>> wanda(images, axis=1)
    array([50., 50., 50.])
    """
    if not is_array_api_obj(activations):
        raise TypeError(f"activations must be an array, got {type(activations)!r}")
    xp = array_namespace(activations)
    check_real_floating(xp, activations, "activations")
    if activations.ndim == 0:
        raise ValueError("activations must have shape (..., features), got a scalar")
    place = _feature_axis(axis, tuple(activations.shape))
    wide = xp.astype(activations, wide_dtype(xp, [activations]))
    return xp.sum(wide * wide, axis=tuple(i for i in range(activations.ndim) if i != place))


def _feature_axis(axis: Any, shape: tuple[int, ...]) -> int:
    """Return the axis of the features, not negative, or raise."""
    ndim = len(shape)
    if axis is None:
        if ndim > 2:
            raise ValueError(
                "axis must name the axis of the features if activations have more than two axes: "
                "-1 for a linear layer, 1 for a batch (N, C, ...) of a convolution of PyTorch, "
                f"got None and shape {shape}"
            )
        return ndim - 1
    if not _checks.integer("axis", axis, low=-ndim) < ndim:
        raise ValueError(f"axis must be less than {ndim} for shape {shape}, got {axis!r}")
    return int(axis) % ndim


def hutchinson(probes: Sequence[Any], products: Sequence[Any]) -> Any:
    """Estimate the diagonal of a Hessian from Hessian-vector products; clip it at 0.

    ``P = max(0, mean_s r_s * (H r_s))`` over samples s, where the entries of r are -1 or 1
    with equal probability. The estimate is unbiased before clipping, because
    ``E[r_i H_ij r_j]`` is zero unless ``i = j``. Entries then rank by ``sqrt(P) |v|``, as in
    Optimal Brain Damage.

    Parameters
    ----------
    probes : sequence of arrays
        Vectors ``r_s``, shaped as the parameter. At least one.
    products : sequence of arrays
        Products ``H r_s``, one for each probe, of the same shapes.

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
            "products must hold one product for each probe, and at least one, got "
            f"{len(products)} for {len(probes)} probes"
        )
    xp = array_namespace(*probes, *products)
    dtype = wide_dtype(xp, products)
    total = xp.zeros_like(products[0], dtype=dtype)
    for r, product in zip(probes, products, strict=True):
        total = total + xp.astype(r, dtype) * xp.astype(product, dtype)
    # P defines a norm, so it cannot be negative. A where, not a maximum, also drops NaN.
    return xp.where(total > 0, total / len(probes), xp.zeros_like(total))
