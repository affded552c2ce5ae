"""Perturb every output channel within a radius of its own, as AdaSAP does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from . import _checks
from ._dtypes import wide_dtype
from .direction import Direction, norm
from .layout import Layout, resolve
from .perturbations import Perturbation, adapted
from .schedules import Schedule

__all__ = ["ChannelSAM"]

# Norms that are equal differ by rounding if their terms are added in another order. Without a
# tolerance this noise would decide which channel gets the largest radius.
_ROUNDING = 32


@dataclass(frozen=True)
class ChannelSAM(Perturbation):
    """Perturbation with a radius per output channel, larger for channels of smaller norm.

    With the norms ``s_i = |w_i|_2`` of all output channels, channel i is perturbed by::

        rho_i = rho - (s_i - s_min) / (s_max - s_min) * (1 - min_ratio) * rho
        e_i   = rho_i * T^2 g_i / |T g_i|_2

    So the channel of smallest norm has the radius ``rho``, and that of largest norm
    ``min_ratio * rho``. If all norms are equal, all radii are ``rho``. A channel that is all zero
    counts as removed: it does not enter ``s_min``, and has the radius ``rho`` if it still has a
    gradient.

    Channels are those of the sparse parameters, whose layouts are known. All other parameters,
    such as biases, norms and dense layers, are perturbed together, ``e = rho * T^2 g / |T g|`` with
    one norm over all of them.

    Attributes
    ----------
    rho : float or schedule
        Largest radius, in the norm ``|T^-1 e_i|_2``.
    min_ratio : float
        Smallest radius as a fraction of ``rho``, in [0, 1].
    adaptive : bool
        Whether ``T = |x| + eta`` for weights, as in `ASAM`; otherwise ``T = 1``.
    eta : float
        See `ASAM`.
    scope : {"global", "tensor"}
        Whether ``s_min`` and ``s_max`` run over the channels of all parameters, as in the paper, or
        of each tensor. Use the scope of the pattern. Each slice along batch axes is one tensor.
    norm : {"channel", "global"}
        Whether ``|T g_i|`` is that of the channel, or that of all parameters. With "global" only
        the radii differ by channel, and ``|T^-1 e|`` over all parameters is at most ``rho``.
    interval, reuse : int, float
        See `Perturbation`.

    Raises
    ------
    TypeError, ValueError
        As `ASAM`, or if ``min_ratio`` is not in [0, 1], or another argument is not one of its
        options.

    References
    ----------
    Bair et al. 2023, "Adaptive Sharpness-Aware Pruning for Robust Sparse Networks" (AdaSAP),
    section 3.1. The printed equations 2 and 3 give negative radii, and equation 6 lacks T in the
    norm; the formulas above are those of its text.

    Examples
    --------
    >>> import numpy
    >>> x, g = numpy.asarray([[3.0, 4.0], [0.0, 1.0]]), numpy.ones((2, 2))
    >>> layouts = [Layout(input_axes=(1,), output_axes=(0,))]
    >>> (e,) = ChannelSAM(0.5, min_ratio=0.2).perturbation([x], [g], rho=0.5, layouts=layouts)
    >>> numpy.linalg.norm(e, axis=1).round(6)
    array([0.1, 0.5])
    """

    rho: Schedule | float = 0.1
    min_ratio: float = 0.1
    adaptive: bool = False
    eta: float = 0.01
    scope: Literal["global", "tensor"] = "global"
    norm: Literal["channel", "global"] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if _checks.real("min_ratio", self.min_ratio, low=0.0) > 1:
            raise ValueError(f"min_ratio must be in [0, 1], got {self.min_ratio!r}")
        _checks.flag("adaptive", self.adaptive)
        _checks.real("eta", self.eta, low=0.0)
        _checks.choice("scope", self.scope, ("global", "tensor"))
        _checks.choice("norm", self.norm, ("channel", "global"))

    def direction(
        self,
        params: Sequence[Array],
        gradients: Sequence[Array],
        *,
        rho: float | Array,
        layouts: Sequence[Layout | None] | None = None,
    ) -> Direction:
        """Return e as ``rho`` and vectors that are scaled by channel."""
        if self.adaptive:
            scaled, twice = adapted(params, gradients, self.eta)
        else:
            scaled = twice = list(gradients)
        channels = _channels(params, scaled, layouts)
        shares = iter(self._shares([found for found in channels if found is not None]))
        total = norm(scaled)
        if self.norm == "global":
            vectors = [
                v if found is None else found.times(v, next(shares))
                for v, found in zip(twice, channels, strict=True)
            ]
            return Direction(vectors, total, rho)
        others = [v for v, found in zip(scaled, channels, strict=True) if found is None]
        rest = _inverse(norm(others)) if others else None
        vectors = [
            _times(v, rest)
            if found is None
            else found.times(v, next(shares) * _inverse(found.lengths))
            for v, found in zip(twice, channels, strict=True)
        ]
        # The vectors are divided already. A norm that is not usable still makes all of e zero.
        xp = array_namespace(total)
        usable = xp.isfinite(total) & (total > 0)
        return Direction(vectors, xp.where(usable, xp.ones_like(total), total), rho)

    def _shares(self, channels: Sequence[_Channels]) -> list[Array]:
        """Return ``rho_i / rho`` for the channels of every array."""
        if not channels:
            return []
        xp = array_namespace(channels[0].sizes)
        largest = self._largest(channels, [found.sizes for found in channels])
        # The distances to s_max need only maxima, which are one reduction over all shards.
        gaps = [top - found.sizes for top, found in zip(largest, channels, strict=True)]
        alive = [
            xp.where(found.sizes > 0, gap, xp.zeros_like(gap))
            for gap, found in zip(gaps, channels, strict=True)
        ]
        shares = []
        for gap, spread, top in zip(gaps, self._largest(channels, alive), largest, strict=True):
            differ = spread > _ROUNDING * float(xp.finfo(gap.dtype).eps) * top
            ratio = gap / xp.where(differ, spread, xp.ones_like(spread))
            # Channels that are removed are further from s_max than s_min is.
            ratio = xp.where(differ & (ratio < 1), ratio, xp.ones_like(ratio))
            shares.append(1 - (1 - self.min_ratio) * (1 - ratio))
        return shares

    def _largest(self, channels: Sequence[_Channels], values: Sequence[Array]) -> list[Array]:
        """Return the largest of ``values`` that each array's channels compete with."""
        if self.scope == "tensor":
            return [found.largest(value) for found, value in zip(channels, values, strict=True)]
        xp = array_namespace(values[0])
        largest = xp.max(backend_of(values[0]).peaks(values))
        return [xp.astype(largest, value.dtype, copy=False) for value in values]


class _Channels(NamedTuple):
    """Norms of the output channels of one array, with axes of length 1 for the others.

    ``sizes`` are those of the weights, and ``lengths`` those of ``T g``.
    """

    layout: Layout
    inner: tuple[int, ...]
    sizes: Array
    lengths: Array

    def largest(self, values: Array) -> Array:
        """Return the largest value of every slice along the batch axes."""
        xp = array_namespace(values)
        axes = tuple(a for a in range(values.ndim) if a not in self.layout.batch_axes)
        if not axes or 0 in values.shape:
            return values
        return xp.max(values, axis=axes, keepdims=True)

    def times(self, vectors: Array, factor: Array) -> Array:
        """Return ``factor * vectors``, in float32 or wider and sharded as the vectors."""
        backend = backend_of(vectors)
        # Shards of the factor are whole channels, and those of the vectors must fit them.
        whole = backend.regrouped(vectors, units=dict.fromkeys(self.inner, 0))
        return backend.resharded_as(vectors, _times(whole, factor))


def _channels(
    params: Sequence[Array], scaled: Sequence[Array], layouts: Sequence[Layout | None] | None
) -> list[_Channels | None]:
    """Return the channels of every array, or None where the output axes are unknown."""
    found: list[_Channels | None] = []
    known = [None] * len(params) if layouts is None else layouts
    for i, (x, g, layout) in enumerate(zip(params, scaled, known, strict=True)):
        if layout is None or not layout.output_axes:
            found.append(None)
            continue
        roles = resolve(layout, x.ndim, f"parameter {i}")
        outer = roles.output_axes + roles.batch_axes
        inner = tuple(axis for axis in range(x.ndim) if axis not in outer)
        found.append(_Channels(roles, inner, _lengths(x, inner), _lengths(g, inner)))
    return found


def _lengths(x: Array, inner: tuple[int, ...]) -> Array:
    """Return the Euclidean norms along ``inner``, in float32 or wider."""
    xp, backend = array_namespace(x), backend_of(x)
    wide = xp.astype(x, wide_dtype(xp, [x]), copy=False)
    if not inner or not math.prod(x.shape):
        return xp.abs(wide)
    whole = backend.regrouped(wide, units=dict.fromkeys(inner, 0))
    # A plain sum of squares, like that of `norm`.
    return backend.shardwise(
        lambda part: xp.sqrt(xp.sum(part * part, axis=inner, keepdims=True)), whole
    )


def _times(vectors: Array, factor: Any) -> Array:
    """Return ``factor * vectors``, in float32 or wider."""
    xp = array_namespace(vectors)
    wide = xp.astype(vectors, wide_dtype(xp, [vectors]), copy=False)
    return xp.astype(factor, wide.dtype, copy=False) * wide


def _inverse(lengths: Any) -> Any:
    """Return ``1 / lengths``, and 1 where a length is not usable.

    The vectors of a length of 0 are 0, and one that is not finite makes all of e zero.
    """
    xp = array_namespace(lengths)
    usable = (lengths > 0) & xp.isfinite(lengths)
    return 1 / xp.where(usable, lengths, xp.ones_like(lengths))
