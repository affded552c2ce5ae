"""The ADMM state machine over one stored array instead of two.

ADMM splits the weights x from a sparse copy z and couples the two by a scaled dual
variable u. Right after a dual update ``u = v - z`` with ``z = proj(v)``: z lives on
the support and u off it. So one array ``anchor = z - u`` and a boolean ``support``
hold both, exactly, and the gradient of the penalty ``lambda/2 |x - z + u|^2`` is
``lambda * (x - anchor)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from array_api_compat import array_namespace

from safe_core import _checks
from safe_core._dtypes import scalar_like, wide_dtype
from safe_core.backends import Array, backend_of
from safe_core.patterns import Pattern
from safe_core.perturbations import norm
from safe_core.projection import apply_support

from .base import ArrayInfo, SplitState, select_support

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
    """Start at ``z = proj(x_0)`` and ``u = 0``.

    Parameters
    ----------
    params : sequence of arrays
        The parameters ``x_0`` to be made sparse.
    pattern : pattern
        The constraint; the initial sparsity of one that changes over time.
    info : ArrayInfo
        Names and layouts of ``params``.
    importance : sequence of arrays or None, optional
        P, broadcastable to the parameters; 1 where None.
    state_dtype : {None, "bfloat16"}
        What anchors are stored in; None is float32 or the parameter's wider dtype.

    Returns
    -------
    SplitState

    Raises
    ------
    TypeError
        If ``state_dtype`` is "bfloat16" and the library has none.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import Unstructured
    >>> state = init([numpy.asarray([1.0, 3.0])], Unstructured(0.5), ArrayInfo(("x",), (None,)))
    >>> state.anchor, state.support
    ([array([0., 3.])], [array([False,  True])])
    """
    _checks.choice("state_dtype", state_dtype, (None, "bfloat16"))
    _check_storable(params, state_dtype)
    wide = _widened(params)
    support = select_support(wide, pattern, info, importance, step=0)
    anchor = apply_support(wide, support)
    return SplitState(_rounded(anchor, 0) if state_dtype else anchor, support)


def penalty_gradient(x: Array, anchor: Array, penalty: float | Array) -> Array:
    """``penalty * (x - anchor)``, the gradient of ``penalty / 2 * |x - z + u|^2``.

    Parameters
    ----------
    x, anchor : array
        One parameter, unperturbed, and its anchor.
    penalty : float or scalar array
        The penalty parameter lambda.

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
    """Return z and u.

    ``z = where(support, anchor, 0)`` and ``u = where(support, 0, -anchor)``.

    Parameters
    ----------
    state : SplitState

    Returns
    -------
    z, u : lists of arrays
        Shapes and dtypes of the anchors.

    Examples
    --------
    >>> import numpy
    >>> recover(SplitState([numpy.asarray([2.0, 3.0])], [numpy.asarray([True, False])]))
    ([array([2., 0.])], [array([ 0., -3.])])
    """
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
    """``v = alpha x + (1 - alpha) z + u``, then ``z = proj(v)`` and ``u = v - z``.

    Where x is not finite, z stands in for it: no NaN reaches anchor or support.

    With a ``state_dtype`` of "bfloat16" v is computed and the support chosen as without,
    and then ``z - u`` is rounded up or down at random, with the probabilities that make
    its mean right: so u grows at the right pace by increments that rounding to the
    nearest would lose. The draw is a hash of v and the step, and a run repeats bit for
    bit.

    Parameters
    ----------
    params : sequence of arrays
        The parameters x after the step of the base optimizer.
    state : SplitState
        The split before the update.
    pattern : pattern
        The constraint.
    info : ArrayInfo
        Names and layouts of ``params``.
    importance : sequence of arrays or None, optional
        P, broadcastable to the parameters; 1 where None.
    relaxation : float
        Over-relaxation alpha; 1 is plain ADMM.
    step : int or integer array, optional
        The stage of a sparsity that changes over time; None is its end. A
        ``state_dtype`` needs it.
    state_dtype : {None, "bfloat16"}
        What anchors are stored in, as in `init`.
    workspace : sequence of arrays, optional
        Of the shapes of the parameters and the dtypes of v, to be written over. Given,
        the split is updated in place where arrays can be.

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
    _checks.choice("state_dtype", state_dtype, (None, "bfloat16"))
    if state_dtype is not None and step is None:
        raise ValueError("step must be given to round to a state_dtype, got None")
    _check_storable(params, state_dtype)
    backend = backend_of(params[0])
    fn = partial(_relaxed, relaxation, backend.known_finite(params))
    v = backend.blockwise(fn, _widened(params), state.anchor, state.support, out=workspace)
    support = select_support(v, pattern, info, importance, step=step)
    in_place = None if workspace is None else state.anchor
    if state_dtype is None:
        return SplitState(backend.blockwise(_anchor, v, support, out=in_place), support)
    anchor = backend.blockwise(_anchor, v, support, out=workspace)
    return SplitState(_rounded(anchor, step, in_place), support)


def _relaxed(relaxation: float, finite: bool, x: Array, anchor: Array, support: Array) -> Array:
    """``v = alpha x + (1 - alpha) z + u``, and z + u where x is not finite."""
    xp = array_namespace(x)
    anchor = xp.astype(anchor, x.dtype, copy=False)
    if relaxation == 1:
        v = x - xp.where(support, xp.zeros_like(anchor), anchor)
    else:
        v = relaxation * x + xp.where(support, (1 - relaxation) * anchor, -anchor)
    if finite:
        return v
    # Where the base optimizer let a NaN into x, the split stays with x = z.
    return xp.where(xp.isfinite(v), v, xp.where(support, anchor, -anchor))


def _anchor(v: Array, support: Array) -> Array:
    """``z - u`` with ``z = proj(v)`` and ``u = v - z``."""
    return array_namespace(v).where(support, v, -v)


def _rounded(
    anchor: Sequence[Array], step: int | Array | None, out: Sequence[Array] | None = None
) -> list[Array]:
    """Anchors in bfloat16, rounded stochastically."""
    if not anchor:
        return []
    single = [array_namespace(a).astype(a, array_namespace(a).float32, copy=False) for a in anchor]
    return backend_of(anchor[0]).stochastic_bfloat16(single, step=step, out=out)


def _check_storable(params: Sequence[Array], state_dtype: str | None) -> None:
    """Raise where ``state_dtype`` is set and the library of the parameters has no bfloat16."""
    if state_dtype is not None and params and not backend_of(params[0]).has_bfloat16():
        raise TypeError(
            "state_dtype must be None where the library has no bfloat16, got "
            f"{state_dtype!r} and an array of type {type(params[0])!r}"
        )


def is_projected(support: Sequence[Array], pattern: Pattern, info: ArrayInfo) -> bool:
    """Whether supports are exactly what the pattern allows, with these layouts.

    The support of its own indicator is itself then, and another one otherwise.

    Parameters
    ----------
    support : sequence of bool arrays
        Concrete, of the parameters that ``info`` describes.
    pattern : pattern
        The constraint, at its final sparsity.
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
    """``ratio * a`` in the dtype of a, computed in float32 or wider."""
    xp = array_namespace(a)
    wide = xp.astype(a, wide_dtype(xp, [a]), copy=False)
    return xp.astype(scalar_like(ratio, wide) * wide, a.dtype, copy=False)


def rescale_dual(state: SplitState, ratio: float | Array) -> SplitState:
    """Multiply u by ``ratio = lambda_old / lambda_new``.

    u is the dual variable divided by lambda; when lambda changes, this keeps the dual
    variable itself (Boyd et al. 2011, section 3.4.1).

    Parameters
    ----------
    state : SplitState
    ratio : float or scalar array
        Finite; 1 leaves every bit as it is.

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
    """``|x - z|_2``: how far the weights are from their sparse copy.

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
    """``lambda * |z - z_previous|_2``: how far the sparse copy moved in a dual update.

    Parameters
    ----------
    state, previous : SplitState
        After and before the update.
    penalty : float or scalar array
        The penalty parameter lambda.

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
    """16-bit parameters in float32, others as they are."""
    return [
        array_namespace(x).astype(x, wide_dtype(array_namespace(x), [x]), copy=False)
        for x in params
    ]
