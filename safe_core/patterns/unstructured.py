"""Zero single entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

from safe_core import _checks
from safe_core.layout import Layout
from safe_core.sparsity_tables import SparsityTable

from .base import FractionPattern, check_floor, check_fraction
from .counts import require_roles
from .distribution import by_names, by_rule

__all__ = ["Unstructured"]


@dataclass(frozen=True, repr=False)
class Unstructured(FractionPattern):
    """Pattern that zeroes the ``floor(sparsity * n)`` lowest of the n entries in each pool.

    Attributes
    ----------
    sparsity : float or sparsity schedule
        Fraction of zeros in [0, 1). A float is read as its printed decimal, 0.29 as 29/100.
    scope : {"global", "tensor", "row"}
        Pool in which entries compete: all tensors together, each tensor, or each output of
        each tensor. In an array whose layout names batch axes, such as a stack of scanned
        layers or of experts, every slice along these axes is one tensor. An array without a
        layout is one tensor.
    distribution : None, "erdos_renyi_kernel", or mapping of str to float
        Sparsity of each tensor, for scopes in which tensors do not compete. None gives
        ``sparsity`` to each. "erdos_renyi_kernel" prunes small tensors less, such that all
        together have ``sparsity``, up to rounding down in each row or stacked tensor; see
        `safe_core.patterns.erdos_renyi_kernel`. A mapping gives the sparsity of tensors by
        the names that reports show, and ``sparsity`` to the rest. Under a sparsity schedule
        the values of the mapping rise in proportion to it.
    floor : float
        In the scope "global": each tensor keeps at least this part, from 0 to 1, of the fraction
        that all tensors keep together, so a quarter of a percent for 0.25 at 99% zeros. The count
        is rounded down, but not to 0 as long as the sparsity allows one entry in every tensor. 0,
        the default, turns this off. A layer whose weights are small, for example because it has
        many inputs, can then lose all of them.

    Raises
    ------
    TypeError, ValueError
        If ``sparsity`` is not a number in [0, 1), ``scope`` or ``distribution`` is unknown, a
        distribution is given in the scope "global", or ``floor`` is not in [0, 1] or is given in
        another scope.

    Examples
    --------
    >>> Unstructured(0.9, scope="row")
    Unstructured(sparsity=0.9, scope='row', distribution=None)
    """

    sparsity: float | SparsityTable
    scope: Literal["global", "tensor", "row"] = "global"
    distribution: str | Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    floor: float = 0.0

    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        _checks.choice("scope", self.scope, ("global", "tensor", "row"))
        check_floor(self.floor, self.scope)
        if self.distribution is None:
            return
        if self.scope == "global":
            raise ValueError(
                "distribution must be None in scope 'global', where tensors compete, got "
                f"{_checks.shown(self.distribution)}"
            )
        object.__setattr__(self, "distribution", _frozen(self.distribution))

    @property
    def couples_arrays(self) -> bool:
        """Whether the mask of one array depends on the other arrays."""
        return self.joint or self.distribution is not None

    @property
    def named_arrays(self) -> tuple[str, ...]:
        """Names of the arrays with a sparsity of their own."""
        return tuple(self._by_name)

    @property
    def _by_name(self) -> dict[str, float]:
        return dict(self.distribution) if isinstance(self.distribution, tuple) else {}

    def renamed(self, rename: Callable[[str], str]) -> Unstructured:
        """Return the pattern with ``rename`` applied to the names of its distribution."""
        if not self._by_name:
            return self
        named = {rename(name): value for name, value in self._by_name.items()}
        return replace(self, distribution=named)

    def sparsity_of(self, name: str) -> float:
        """Return the final fraction of zeros required of the array ``name``."""
        return float(self._by_name.get(name, self.fractions()[-1]))

    def describe(self) -> str:
        """Return a short text for tables, such as ``"0.9, scope row"``."""
        rule = "" if self.distribution is None else f", distribution {self.distribution}"
        return f"{float(self.fractions()[-1]):g}, {self._described}{rule}"

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError if the distribution names an array that is not among ``names``."""
        unknown = [name for name in self._by_name if name not in names]
        if unknown:
            raise ValueError(
                f"distribution must name sparse tensors, {', '.join(names)}, got "
                f"{', '.join(unknown)}"
            )

    def check(self, shape: Sequence[int], layout: Layout | None, name: str) -> None:
        """Raise ValueError in the scope "row" if the layout of the array is unknown."""
        if self.by_output:
            require_roles(layout, name, "scope 'row'", shape=shape)

    def distributed(
        self,
        shapes: Sequence[tuple[int, ...]],
        layouts: Sequence[Layout | None],
        names: Sequence[str],
    ) -> Sequence[tuple[Fraction, ...]]:
        """Return the fraction of zeros of every array at every stage."""
        if isinstance(self.distribution, str):
            return by_rule(self.fractions(), shapes, layouts)
        return by_names(self.fractions(), self._by_name, names)


def _frozen(given: Any) -> str | tuple[tuple[str, Any], ...]:
    """Return a distribution as a hashable value, so that methods stay hashable."""
    if isinstance(given, str):
        _checks.choice("distribution", given, (None, "erdos_renyi_kernel"))
        return given
    try:
        pairs = dict(given)
    except (TypeError, ValueError):
        pairs = {}
    if not pairs or not all(isinstance(name, str) for name in pairs):
        raise TypeError(
            "distribution must be None, 'erdos_renyi_kernel' or a mapping of names to "
            f"sparsities, got {_checks.shown(given)}"
        )
    return tuple(
        (name, _checks.sparsity(f"distribution of {name}", x)) for name, x in pairs.items()
    )
