"""State of ADMM, stored as one array and a mask instead of two arrays.

ADMM splits the weights x from a sparse copy z and couples the two by a scaled dual variable
u. A dual update sets ``z = proj(v)`` and ``u = v - z``. The projection keeps entries of v or
zeroes them, so z is zero off the support and u is zero on it. One array ``anchor = z - u``
and a boolean ``support`` therefore hold both exactly::

    on the support:   z = anchor,  u = 0
    off the support:  z = 0,       u = -anchor

That saves a float per parameter, and the gradient of the penalty ``lambda/2 |x - z + u|^2``
is simply ``lambda * (x - anchor)``.
"""

from __future__ import annotations

from collections.abc import Sequence

from array_api_compat import array_namespace, is_array_api_obj

from safe_core import _checks
from safe_core._dtypes import scalar_like, wide_dtype
from safe_core.backends import Array, backend_of
from safe_core.direction import norm
from safe_core.patterns import Pattern
from safe_core.projection import apply_support

from .base import ArrayInfo, SplitState, select_support
from .float8 import FLOAT8, dequantised, quantised

__all__ = [
    "dual_residual",
    "dual_update",
    "init",
    "is_projected",
    "penalty_gradient",
    "primal_residual",
    "recover",
    "rescale_dual",
]


def init(
    params: Sequence[Array],
    pattern: Pattern,
    info: ArrayInfo,
    *,
    importance: Sequence[Array | None] | None = None,
    state_dtype: str | None = None,
) -> SplitState:
    """Return the state with ``z = proj(x_0)`` and ``u = 0``.

    Parameters
    ----------
    params : sequence of arrays
        Parameters ``x_0`` that are to become sparse.
    pattern : pattern
        Sparsity pattern. A sparsity schedule is taken at step 0.
    info : ArrayInfo
        Names and layouts of ``params``.
    importance : sequence of arrays or None, optional
        P, broadcastable to the parameters; 1 where None.
    state_dtype : {None, "bfloat16", "float8_e4m3fn"}
        Dtype of the anchors. None is float32, or the dtype of the parameter if wider. With
        float8 the state is that of `safe_core.constraints.float8.quantised`.

    Returns
    -------
    SplitState

    Raises
    ------
    TypeError
        If ``state_dtype`` is given and the library has no bfloat16.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import Unstructured
    >>> state = init([numpy.asarray([1.0, 3.0])], Unstructured(0.5), ArrayInfo(("x",), (None,)))
    >>> state.anchor, state.support
    ([array([0., 3.])], [array([False,  True])])
    """
    _checks.choice("state_dtype", state_dtype, (None, "bfloat16", FLOAT8))
    _check_storable(params, state_dtype)
    wide = _widened(params)
    support = select_support(wide, pattern, info, importance, step=0)
    anchor = apply_support(wide, support)
    if state_dtype == FLOAT8:
        return quantised(anchor, support)
    return SplitState(_rounded(anchor, 0) if state_dtype else anchor, support)


def penalty_gradient(x: Array, anchor: Array, penalty: float | Array) -> Array:
    """Return ``penalty * (x - anchor)``, the gradient of ``penalty / 2 * |x - z + u|^2``.

    Parameters
    ----------
    x, anchor : array
        One parameter and its anchor. x is unperturbed: SAFE perturbs the loss, not the
        penalty (Lee et al. 2025, Algorithm 1).
    penalty : float or scalar array
        Penalty parameter lambda.

    Returns
    -------
    array
        Shaped as ``x``, in float32, or float64 if either is.

    Examples
    --------
    >>> import numpy
    >>> penalty_gradient(numpy.asarray([1.0]), numpy.asarray([3.0]), 0.5)
    array([-1.])
    """
    xp = array_namespace(x)
    dtype = wide_dtype(xp, [x, anchor])
    x, anchor = (xp.astype(a, dtype, copy=False) for a in (x, anchor))
    difference = x - anchor
    return xp.astype(scalar_like(penalty, difference) * difference, dtype, copy=False)


def recover(state: SplitState) -> tuple[list[Array], list[Array]]:
    """Return z and u from the state.

    ``z = where(support, anchor, 0)`` and ``u = where(support, 0, -anchor)``.

    Parameters
    ----------
    state : SplitState

    Returns
    -------
    z, u : lists of arrays
        Arrays with the shapes and dtypes of the anchors.

    Examples
    --------
    >>> import numpy
    >>> recover(SplitState([numpy.asarray([2.0, 3.0])], [numpy.asarray([True, False])]))
    ([array([2., 0.])], [array([ 0., -3.])])
    """
    state = dequantised(state)
    z, u = [], []
    for anchor, support in zip(state.anchor, state.support, strict=True):
        xp = array_namespace(anchor)
        zero = xp.zeros_like(anchor)
        z.append(xp.where(support, anchor, zero))
        u.append(xp.where(support, zero, -anchor))
    return z, u


def dual_update(
    params: Sequence[Array],
    state: SplitState,
    pattern: Pattern,
    info: ArrayInfo,
    *,
    importance: Sequence[Array | None] | None = None,
    relaxation: float = 1.0,
    step: int | Array | None = None,
    state_dtype: str | None = None,
    workspace: Sequence[Array] | None = None,
) -> SplitState:
    """Return the state after ``v = alpha x + (1 - alpha) z + u; z = proj(v); u = v - z``.

    Where x is not finite, z is used in its place, so that no NaN reaches anchor or support.
    Where v would overflow, it is the largest finite number of its dtype.

    With ``state_dtype="bfloat16"`` v and the support are computed in full precision. Then
    ``z - u`` is rounded up or down at random such that its expectation is exact. u thus grows
    at the right pace even by increments that rounding to nearest would lose. The random bits
    are a hash of v and the step, so a run repeats bit for bit. With "float8_e4m3fn" z and u are
    rounded to nearest, see `safe_core.constraints.float8`.

    Parameters
    ----------
    params : sequence of arrays
        Parameters x after the base step.
    state : SplitState
        State before the update.
    pattern : pattern
        Sparsity pattern.
    info : ArrayInfo
        Names and layouts of ``params``.
    importance : sequence of arrays or None, optional
        P, broadcastable to the parameters; 1 where None.
    relaxation : float
        Over-relaxation alpha; 1 is plain ADMM.
    step : int or integer array, optional
        Step that selects the stage of a sparsity schedule; None selects the last stage. It is
        required with a ``state_dtype``.
    state_dtype : {None, "bfloat16", "float8_e4m3fn"}
        Dtype of the anchors, as in `init`.
    workspace : sequence of arrays, optional
        Arrays with the shapes of the parameters and the dtypes of v, which are overwritten.
        If given, the anchors of ``state`` are overwritten too, where arrays are mutable.

    Returns
    -------
    SplitState

    Raises
    ------
    ValueError
        If ``state_dtype`` is given and ``step`` is None.

    References
    ----------
    Boyd et al. 2011, "Distributed Optimization and Statistical Learning via the
    Alternating Direction Method of Multipliers", sections 3.1.1 and 3.4.3.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import Unstructured
    >>> pattern, info = Unstructured(0.5), ArrayInfo(("x",), (None,))
    >>> state = init([numpy.asarray([1.0, 3.0])], pattern, info)
    >>> dual_update([numpy.asarray([1.0, 3.0])], state, pattern, info).anchor
    [array([-1.,  3.])]
    """
    if not params:
        return state
    _checks.choice("state_dtype", state_dtype, (None, "bfloat16", FLOAT8))
    if state_dtype is not None and step is None:
        raise ValueError("step must be given to round to a state_dtype, got None")
    _check_storable(params, state_dtype)
    backend, state = backend_of(params[0]), dequantised(state)
    old = (_widened(params), state.anchor, state.support)
    static = (relaxation, backend.known_finite(params))
    v = backend.blockwise(_relaxed, *old, static=static, out=workspace)
    support = select_support(v, pattern, info, importance, step=step)
    # v was the last reader of the old anchors, so the new ones may overwrite them.
    in_place = None if workspace is None else state.anchor
    if state_dtype is None:
        return SplitState(backend.blockwise(_anchor, v, support, static=(), out=in_place), support)
    anchor = backend.blockwise(_anchor, v, support, static=(), out=workspace)
    if state_dtype == FLOAT8:
        return quantised(anchor, support)
    return SplitState(_rounded(anchor, step, in_place), support)


def _relaxed(relaxation: float, finite: bool, x: Array, anchor: Array, support: Array) -> Array:
    """Return ``v = alpha x + (1 - alpha) z + u``, or ``z + u`` where x is not finite."""
    # z and u are never written out: z is the anchor on the support, u minus the anchor off it.
    xp = array_namespace(x)
    anchor = xp.astype(anchor, x.dtype, copy=False)
    if relaxation == 1:
        v = x - xp.where(support, xp.zeros_like(anchor), anchor)
    else:
        v = relaxation * x + xp.where(support, (1 - relaxation) * anchor, -anchor)
    # Near the largest number the sum of finite x and u overflows; an infinite anchor would make
    # the penalty infinite. The nearest finite number is kept in its place.
    largest = float(xp.finfo(v.dtype).max)
    bounded = xp.clip(v, -largest, largest)
    if finite:
        return bounded
    # If the base optimizer let a NaN into x, an entry keeps its z and u as if x were z.
    return xp.where(xp.isfinite(x), bounded, xp.where(support, anchor, -anchor))


def _anchor(v: Array, support: Array) -> Array:
    """Return ``z - u`` with ``z = proj(v)`` and ``u = v - z``."""
    return array_namespace(v).where(support, v, -v)


def _rounded(
    anchor: Sequence[Array], step: int | Array | None, out: Sequence[Array] | None = None
) -> list[Array]:
    """Return the anchors in bfloat16, rounded stochastically."""
    if not anchor:
        return []
    single = [array_namespace(a).astype(a, array_namespace(a).float32, copy=False) for a in anchor]
    return backend_of(anchor[0]).stochastic_bfloat16(single, step=step, out=out)


def _check_storable(params: Sequence[Array], state_dtype: str | None) -> None:
    """Raise TypeError if ``state_dtype`` is set and the array library has no bfloat16."""
    if state_dtype is not None and params and not backend_of(params[0]).has_bfloat16():
        raise TypeError(
            "state_dtype must be None where the library has no bfloat16, got "
            f"{state_dtype!r} and an array of type {type(params[0])!r}"
        )


def is_projected(support: Sequence[Array], pattern: Pattern, info: ArrayInfo) -> bool:
    """Return whether the supports are allowed by the pattern with these layouts.

    Projecting the indicator of an allowed support (1 on it, 0 off it) selects that support
    again. Any other mask changes, for example one that was made with another layout.

    Parameters
    ----------
    support : sequence of bool arrays
        Supports of the parameters that ``info`` describes. They must not be traced.
    pattern : pattern
        Sparsity pattern; a sparsity schedule is taken at its end.
    info : ArrayInfo
        Names and layouts of the parameters.

    Returns
    -------
    bool

    Examples
    --------
    >>> import numpy
    >>> from safe_core import NM, Layout
    >>> mask, layout = numpy.asarray([[True, True], [False, False]]), Layout((0,), (1,))
    >>> is_projected([mask], NM(1, 2), ArrayInfo(("w",), (layout,)))
    True
    >>> is_projected([mask], NM(1, 2), ArrayInfo(("w",), (Layout((1,), (0,)),)))
    False
    """
    indicator = [array_namespace(s).astype(s, array_namespace(s).float32) for s in support]
    again = select_support(indicator, pattern, info, None, step=None)
    return all(bool(array_namespace(a).all(a == b)) for a, b in zip(again, support, strict=True))


def _scaled(ratio: float | Array, a: Array) -> Array:
    """Return ``ratio * a`` in the dtype of a, computed in float32 or wider, and finite."""
    xp = array_namespace(a)
    wide = xp.astype(a, wide_dtype(xp, [a]), copy=False)
    # A large ratio must not make u infinite. The margin leaves room for rounding.
    bound = 0.99 * float(xp.finfo(a.dtype).max)
    ratio = scalar_like(ratio, wide)
    bound = bound / (xp.clip(ratio, 1.0, None) if is_array_api_obj(ratio) else max(ratio, 1.0))
    return xp.astype(ratio * xp.clip(wide, -bound, bound), a.dtype, copy=False)


def rescale_dual(state: SplitState, ratio: float | Array) -> SplitState:
    """Multiply u by ``ratio = lambda_old / lambda_new``.

    u is the dual variable divided by lambda. When lambda changes, rescaling u keeps the dual
    variable itself (Boyd et al. 2011, section 3.4.1).

    Parameters
    ----------
    state : SplitState
    ratio : float or scalar array
        Finite ratio. A ratio of 1 changes no bit.

    Returns
    -------
    SplitState

    Examples
    --------
    >>> import numpy
    >>> state = SplitState([numpy.asarray([2.0, 3.0])], [numpy.asarray([True, False])])
    >>> rescale_dual(state, 0.5).anchor
    [array([2. , 1.5])]
    """
    anchor = [
        array_namespace(a).where(mask, a, _scaled(ratio, a))
        for a, mask in zip(state.anchor, state.support, strict=True)
    ]
    return SplitState(anchor, state.support)


def primal_residual(params: Sequence[Array], state: SplitState) -> Array:
    """Return ``|x - z|_2``, the distance of the weights from their sparse copy.

    Parameters
    ----------
    params : sequence of arrays
    state : SplitState

    Returns
    -------
    array
        A scalar.

    Examples
    --------
    >>> import numpy
    >>> state = SplitState([numpy.asarray([2.0, 3.0])], [numpy.asarray([True, False])])
    >>> float(primal_residual([numpy.asarray([5.0, 4.0])], state))
    5.0
    """
    z, _ = recover(state)
    return norm([x - z_i for x, z_i in zip(_widened(params), z, strict=True)])


def dual_residual(state: SplitState, previous: SplitState, penalty: float | Array) -> Array:
    """Return ``lambda * |z - z_previous|_2``, the move of the sparse copy in a dual update.

    Parameters
    ----------
    state, previous : SplitState
        States after and before the update.
    penalty : float or scalar array
        Penalty parameter lambda.

    Returns
    -------
    array
        A scalar.

    Examples
    --------
    >>> import numpy
    >>> before = SplitState([numpy.asarray([1.0])], [numpy.asarray([True])])
    >>> after = SplitState([numpy.asarray([4.0])], [numpy.asarray([True])])
    >>> float(dual_residual(after, before, 0.5))
    1.5
    """
    z, old = _widened(recover(state)[0]), _widened(recover(previous)[0])
    return penalty * norm([a - b for a, b in zip(z, old, strict=True)])


def _widened(params: Sequence[Array]) -> list[Array]:
    """Return 16-bit parameters in float32 and others unchanged."""
    return backend_of(params[0]).widened(params) if params else []
