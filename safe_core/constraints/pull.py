"""A pull brings the weights that are to be zero towards it, and leaves the others free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from safe_core._dtypes import scalar_like, wide_dtype
from safe_core.backends import Array
from safe_core.schedules import Schedule
from safe_core.step import Operation

from .dual import DualUpdates

__all__ = ["Pull", "pulled"]


@dataclass(frozen=True)
class Pull(DualUpdates):
    """Constraint that moves the weights off the support of z by a fraction of their gap.

    After every base step, where z = 0::

        x <- x - (1 - exp(-penalty(t))) * (x - z + u)

    This is the exact flow of the quadratic penalty of `ADMM` over one unit of time. The sum of
    ``penalty(t)`` over the run is the logarithm of the factor by which it shrinks the gap. The
    learning rate, the momentum and the scale of the loss do not change it, so one number
    serves every base optimizer. `ADMM` also pulls the weights on the support towards where they
    were at the last dual update, which slows their training; a pull leaves them free.

    Dual updates are those of `ADMM`: after every ``dual_update_interval`` steps
    ``v = x + u;  z = proj_C^P(v);  u = v - z``, from ``z = proj(x_0)`` and ``u = 0``.

    Attributes
    ----------
    penalty : schedule
        Rate of the pull by step, per step. A non-negative number is accepted.
    dual_update_interval : int
        Steps K between two dual updates.
    state_dtype : {None, "bfloat16"}
        Dtype of the stored ``z - u``, as in `ADMM`.

    Raises
    ------
    TypeError, ValueError
        If an attribute has the wrong type or is out of range.

    See Also
    --------
    safe_core.safe : Derives the schedule from the number of steps.

    Examples
    --------
    >>> from safe_core import Method, schedules
    >>> method = Method(0.9, Pull(schedules.cosine(0.4, steps=1000), dual_update_interval=8))
    >>> [operation.name for operation in method.plan().operations]
    ['OBSERVE_GRADIENTS', 'BASE_STEP', 'PULL', 'UPDATE_STATE']
    """

    penalty: Schedule = 0.1  # type: ignore[assignment, misc]
    dual_update_interval: int = 32
    state_dtype: str | None = None

    penalty_spans_run: ClassVar[bool] = True
    if_far: ClassVar[str] = "raise the rate of the pull, or give the method steps= and no penalty"

    def __post_init__(self) -> None:
        self.check_fields()

    @property
    def after_base(self) -> tuple[Operation, ...]:
        """Operations after the base step: the pull."""
        return (Operation.PULL,)


def pulled(x: Array, anchor: Array, support: Array, penalty: float | Array) -> Array:
    """Return ``x - (1 - exp(-penalty)) * (x - anchor)`` off the support, and x on it.

    Parameters
    ----------
    x, anchor, support : array
        One parameter after the base step, and its state.
    penalty : float or scalar array
        Rate of the pull at this step.

    Returns
    -------
    array
        Shaped as ``x``, in float32 or wider.

    Examples
    --------
    >>> import numpy
    >>> x, anchor = numpy.asarray([3.0, 1.0]), numpy.asarray([2.0, 0.0])
    >>> pulled(x, anchor, numpy.asarray([True, False]), float(numpy.log(2)))
    array([3. , 0.5])
    """
    xp = array_namespace(x)
    dtype = wide_dtype(xp, [x, anchor])
    x, anchor = (xp.astype(a, dtype, copy=False) for a in (x, anchor))
    gap = xp.where(support, xp.zeros_like(x), x - anchor)
    rate = xp.asarray(scalar_like(penalty, gap), dtype=dtype)
    return xp.astype(x + xp.expm1(-rate) * gap, dtype, copy=False)
