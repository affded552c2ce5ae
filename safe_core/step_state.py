"""The state that a method keeps between steps, on immutable arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from array_api_compat import array_namespace

from safe_core.backends import Array

from . import _checks
from ._dtypes import check_real_floating, wide_dtype
from .constraints import ArrayInfo, SplitState
from .importance import Importance
from .method import Method
from .own_zeros import check_own_zeros

__all__ = ["StepState", "check_sparse", "no_direction", "no_motion", "start"]


@dataclass
class StepState:
    """State that a method keeps between steps, as lists of arrays.

    Attributes
    ----------
    split : SplitState
        State of the constraint, for the sparse parameters.
    importance : list of arrays or None
        State of the importance. None if P = 1.
    flat : list of arrays
        Direction that steps between perturbations reuse, for all parameters. Empty if the
        method reuses none.
    motion : array or None
        What a radius in steps depends on, see `safe_core.motion`. None for other radii.
    """

    split: SplitState
    importance: list[Array] | None = None
    flat: list[Array] = field(default_factory=list)
    motion: Array | None = None


def start(
    method: Method,
    params: Sequence[Array],
    sparse: Sequence[int],
    info: ArrayInfo,
    importance: Importance | None = None,
) -> StepState:
    """Return the state of a method before step 0.

    Parameters
    ----------
    method : Method
    params : sequence of arrays
        All trainable parameters.
    sparse : sequence of int
        Positions of the sparse parameters in ``params``.
    info : ArrayInfo
        Names and layouts of the sparse parameters.
    importance : Importance, optional
        Overrides the importance of the method.

    Returns
    -------
    StepState

    Raises
    ------
    TypeError
        If a sparse parameter is not a plain array of real floating numbers.
    ValueError
        If ``sparse`` or ``info`` does not match ``params``, a pattern does not fit, or the method
        is `safe_core.keep_zeros` and no weight has a zero.

    Examples
    --------
    >>> import numpy
    >>> import safe_core
    >>> info = ArrayInfo(("x",), (None,))
    >>> start(safe_core.admm(0.5), [numpy.asarray([1.0, 3.0])], [0], info).split.support
    [array([False,  True])]
    """
    check_sparse(params, sparse, info)
    method.sparsity.check_names(info.names)
    values = [params[i] for i in sparse]
    for x, name in zip(values, info.names, strict=True):
        check_real_floating(array_namespace(x), x, name)
    check_own_zeros(method, info.names, values)
    flat = no_direction(params) if method.plan().reuses else []
    source = method.importance if importance is None else importance
    held = None if source is None else source.init(values)
    joint = method.sparsity.joint
    metric = None if source is None else source.first_metric(held, joint=joint)
    motion = no_motion(values) if method.measures_steps else None
    return StepState(method.init(values, info, metric), held, flat, motion)


def no_motion(params: Sequence[Array]) -> Array:
    """Return the state of `safe_core.motion` before step 0, zeros in float32 or wider."""
    xp = array_namespace(params[0])
    return xp.zeros(3, dtype=wide_dtype(xp, params))


def check_sparse(params: Sequence[Array], sparse: Sequence[int], info: ArrayInfo) -> None:
    """Refuse positions that are not those of parameters, or of which ``info`` knows nothing."""
    if not all(0 <= i < len(params) for i in sparse):
        raise ValueError(
            f"sparse must hold positions among {len(params)} parameters, got {list(sparse)!r}"
        )
    if len(info.names) != len(sparse) or len(info.layouts) != len(sparse):
        raise ValueError(
            f"info must name {len(sparse)} sparse parameters and their layouts, got "
            f"{_checks.shown(info)}"
        )


def no_direction(params: Sequence[Array]) -> list[Array]:
    """Return zeros for all parameters, the direction to reuse before the first perturbation."""
    return [
        array_namespace(p).zeros_like(p, dtype=wide_dtype(array_namespace(p), [p])) for p in params
    ]
