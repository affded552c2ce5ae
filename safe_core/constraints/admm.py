"""ADMM: a penalty pulls x towards a sparse copy z, which dual updates move after x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from safe_core import _checks
from safe_core.backends import Array
from safe_core.schedules import Schedule
from safe_core.step import Operation

from . import splitting
from .base import SplitState
from .dual import DualUpdates
from .float8 import FLOAT8

__all__ = ["ADMM"]


@dataclass(frozen=True)
class ADMM(DualUpdates):
    """Constraint that couples x to a sparse copy z by a penalty and a dual variable u.

    Every step adds ``penalty(t) * (x - z + u)`` to the gradient. After every
    ``dual_update_interval`` steps a dual update computes::

        v = relaxation * x + (1 - relaxation) * z + u
        z = proj_C^P(v);  u = v - z

    The start is ``z = proj(x_0)`` and ``u = 0``.

    Attributes
    ----------
    penalty : schedule
        Penalty parameter lambda by step. A non-negative number is accepted.
    dual_update_interval : int
        Steps K between two dual updates.
    relaxation : float
        Over-relaxation alpha in (0, 2); 1 is plain ADMM.
    rescale_dual : bool
        Whether u is multiplied by ``penalty(t - 1) / penalty(t)`` when the penalty changes.
        u is the dual variable divided by lambda, so this keeps the dual variable itself. After a
        penalty of 0, which has no such quotient, u stays as it is.
    state_dtype : {None, "bfloat16", "float8_e4m3fn"}
        Dtype of the stored ``z - u``. None is float32, or the dtype of the parameter if that
        is wider: 5 bytes per float32 parameter, with the support. "bfloat16" needs 3 bytes,
        and rounds stochastically at dual updates. "float8_e4m3fn" stores z in float8 and u in
        bfloat16, rounded to nearest, as ELSA-L is published; it needs 3 bytes too. NumPy has
        neither. They cannot be combined with ``rescale_dual``.
    decoupled : bool
        Whether the penalty is a step of its own, ``x -= learning rate * penalty(t) *
        (x_t - z + u)``, next to the base step (Algorithm 1, line 13). An adaptive base
        optimizer then does not rescale the penalty.
    first_dual_update : int, optional
        Steps before the first dual update, from 1 to the interval, which is the default. With 1
        the updates follow the steps 0, K, 2 K and so on.
    packed_support : bool
        Whether adapters store the support in an eighth of a byte for each entry. They unpack it at
        dual updates and reports only. With a bfloat16 state, z and u then take 2.125 bytes. In
        float8 z itself shows the support, so there is none to pack.

    Raises
    ------
    TypeError, ValueError
        If an attribute has the wrong type or is out of range.

    References
    ----------
    Boyd et al. 2011, "Distributed Optimization and Statistical Learning via the Alternating
    Direction Method of Multipliers"; Lee et al. 2025, Algorithm 1.

    Examples
    --------
    >>> from safe_core import Unstructured
    >>> constraint = ADMM(penalty=0.1, dual_update_interval=8)
    >>> [t for t in range(20) if constraint.is_due(Unstructured(0.5), t)]
    [7, 15]
    """

    penalty: Schedule = 1e-3  # type: ignore[assignment,misc]
    dual_update_interval: int = 32
    relaxation: float = 1.0
    rescale_dual: bool = False
    state_dtype: str | None = None
    decoupled: bool = False
    first_dual_update: int | None = None
    packed_support: bool = False

    state_dtypes: ClassVar[tuple[str | None, ...]] = (None, "bfloat16", FLOAT8)

    def __post_init__(self) -> None:
        self.check_fields()
        if not 0 < _checks.real("relaxation", self.relaxation) < 2:
            raise ValueError(f"relaxation must be in (0, 2), got {self.relaxation!r}")
        for name in ("rescale_dual", "decoupled", "packed_support"):
            _checks.flag(name, getattr(self, name))
        first = self.first_dual_update
        if first is not None and not (
            _checks.integer("first_dual_update", first, low=1) <= self.dual_update_interval
        ):
            raise ValueError(
                "first_dual_update must not be above dual_update_interval="
                f"{self.dual_update_interval}, got {first!r}"
            )
        if self.rescale_dual and getattr(self.penalty, "has_zero_after_start", True):
            raise ValueError(
                "penalty must be known to stay positive after step 0, because rescale_dual "
                f"divides by it, got {self.penalty!r}"
            )
        if self.rescale_dual and self.state_dtype is not None:
            raise ValueError(
                "state_dtype must be None under rescale_dual, which changes the stored u at "
                f"every step, got {self.state_dtype!r}"
            )
        if self.packed_support and self.state_dtype == FLOAT8:
            raise ValueError(
                f"packed_support must be False with state_dtype={FLOAT8!r}, whose z shows the "
                "support, got True"
            )

    @property
    def support_dtype(self) -> str:  # type: ignore[override]
        """The dtype of supports that adapters store."""
        if self.state_dtype == FLOAT8:
            return FLOAT8
        return "uint8" if self.packed_support else "bool"

    @property
    def allows_other_penalty(self) -> bool:  # type: ignore[override]
        """False with `rescale_dual`, whose ratio comes from the schedule of the penalty."""
        return not self.rescale_dual

    @property
    def before_base(self) -> tuple[Operation, ...]:
        """Operations before the base step: rescale u if asked, then apply the penalty."""
        rescale = (Operation.RESCALE_DUAL,) if self.rescale_dual else ()
        penalty = Operation.MEASURE_PULL if self.decoupled else Operation.ADD_PENALTY
        return (*rescale, penalty)

    @property
    def after_base(self) -> tuple[Operation, ...]:
        """Operations after the base step: apply the pull of a decoupled penalty."""
        return (Operation.APPLY_PULL,) if self.decoupled else ()

    @property
    def steps_before_update(self) -> int:
        """Steps before the first dual update."""
        first = self.first_dual_update
        return self.dual_update_interval if first is None else first

    def rescale(self, split: SplitState, step: int | Array) -> SplitState:
        """Return the state with u rescaled for the penalty of ``step``."""
        if not self.rescale_dual:
            return split
        return splitting.rescale_dual(split, self.dual_ratio(step))

    def dual_ratio(self, step: int | Array) -> float | Array:
        """Return ``penalty(t - 1) / penalty(t)``, and 1 without `rescale_dual`."""
        # Step 0 has no penalty before it; its schedule may even start at 0.
        if not self.rescale_dual or (isinstance(step, int) and step == 0):
            return 1.0
        ratio = self._ratio(step)
        if isinstance(step, int):
            return ratio
        xp = array_namespace(step)
        return xp.where(step > 0, ratio, xp.ones_like(ratio))

    def _ratio(self, step: int | Array) -> float | Array:
        before, now = self.penalty(step - 1), self.penalty(step)
        if isinstance(before, int | float):
            return before / now if before else 1.0
        xp = array_namespace(before)
        return xp.where(before == 0, xp.ones_like(before), before / now)
