"""Report how far each parameter is from the constraint, and what to change if it stays far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from ._dtypes import wide_dtype
from ._installed import require
from .advice import Advice, Course, Figures, advise
from .backends import Array, backend_of
from .constraints import ArrayInfo, SplitState
from .constraints.base import select_support
from .direction import norm
from .method import Method
from .patterns import Pattern
from .projection import apply_support

__all__ = ["Report", "TensorReport", "outlook", "sums"]


class TensorReport(NamedTuple):
    """Figures of one sparse parameter at one step.

    Some figures describe an update that has not happened: what finalizing or a dual update
    would do now. Computing them changes no state.

    Attributes
    ----------
    name : str
    entries : int
    asked : float
        Final sparsity of the pattern. It is that of this parameter if the distribution names
        it, else that of all parameters together.
    achieved : float
        Fraction of entries that finalizing now would set to zero. In the scope "global" it
        differs from ``asked``, because parameters compete.
    zeros : float
        Fraction of entries that are zero now.
    distance : float
        ``|x - proj(x)|_2``, the norm of what finalizing now would remove.
    mask_change : float
        Fraction of entries that a dual update now would add to the support or drop from it.
    primal_residual : float
        ``|x - z|_2``.
    dual_residual : float
        ``lambda * |z_now - z|_2``, where ``z_now`` is z after a dual update now.
    norm : float
        ``|x|_2``.
    off_support : float
        Norm of the entries of x off the support of z, the mask of this step. While the sparsity
        rises it shows the distance at the sparsity of the step, and ``distance`` that at the
        final one.
    masked : float
        Fraction of entries that the mask of this step removes, which is its sparsity.
    """

    name: str
    entries: int
    asked: float
    achieved: float
    zeros: float
    distance: float
    mask_change: float
    primal_residual: float
    dual_residual: float
    norm: float
    off_support: float
    masked: float

    @classmethod
    def of(
        cls, name: str, entries: int, pattern: Pattern, found: Sequence[Any], penalty: Any
    ) -> TensorReport:
        """Return the figures of one parameter, computed from its `sums`."""
        removed, zeros, distance, changed, primal, dual, norm, off, masked = found
        n = max(entries, 1)  # an array may be empty
        return cls(
            name=name,
            entries=entries,
            asked=pattern.sparsity_of(name),
            achieved=removed / n,
            zeros=zeros / n,
            distance=distance**0.5,
            mask_change=changed / n,
            primal_residual=primal**0.5,
            dual_residual=penalty * dual**0.5,
            norm=norm**0.5,
            off_support=off**0.5,
            masked=masked / n,
        )


class Report(NamedTuple):
    """Figures of all sparse parameters at one step, and advice. ``str`` is its `summary`.

    Attributes
    ----------
    step : int, or integer array in JAX
        Number of base steps taken.
    tensors : list of TensorReport
        One entry per sparse parameter.
    dense_value, sparse_value : float, or scalar array in JAX, optional
        What the function ``evaluate`` of the user returned at x and at proj(x).
    course : Course, optional
        What `advice` needs to know of the run.

    Examples
    --------
    >>> row = TensorReport("0.weight", 8, 0.5, 0.5, 0.0, 3.0, 0.25, 4.0, 0.1, 5.0, 3.0, 0.5)
    >>> report = Report(7, [row], dense_value=0.98, sparse_value=0.91)
    >>> report.scalars()["distance"], report.relative_distance
    (3.0, 0.6)
    >>> print(report)
    step 7: distance 0.6 of |x|, 0.6 off the mask; mask change 0.25; 0.98 at x, 0.91 at proj(x)
    """

    step: Any
    tensors: list[TensorReport]
    dense_value: Any = None
    sparse_value: Any = None
    course: Course | None = None

    @property
    def relative_distance(self) -> Any:
        """``|x - proj(x)|_2 / |x|_2`` over all parameters together; 0 if x is zero.

        It is the relative distance that `finalize` would remove now.
        """
        return self._relative("distance")

    @property
    def relative_off_support(self) -> Any:
        """Norm of the entries off the mask of this step, relative to ``|x|_2``."""
        return self._relative("off_support")

    @property
    def is_finite(self) -> bool:
        """Whether the norms of the parameters are finite. In JAX, outside of `jax.jit` only."""
        return math.isfinite(float(self._norm("norm")))

    @property
    def replaced(self) -> Any:
        """Half of the mask entries that a dual update now would change, by the kept entries.

        At a constant sparsity, it is the fraction of the kept weights that it would replace.
        """
        kept = sum(row.entries * (1 - row.masked) for row in self.tensors)
        changed = sum(row.entries * row.mask_change for row in self.tensors)
        return _ratio(changed / 2, kept)

    @property
    def advice(self) -> list[Advice]:
        """What to change, with its reason; an empty list if the run is on course.

        In JAX it reads the figures, so outside of `jax.jit` only.
        """
        if self.course is None:
            return []
        figures = Figures(
            step=int(self.step),
            # A ratio to a norm beyond the range of float32 would be 0.
            distance=float(self.relative_distance) if self.is_finite else math.nan,
            off_support=float(self.relative_off_support),
            replaced=float(self.replaced),
            emptied=[r.name for r in self.tensors if r.entries and float(r.achieved) == 1],
        )
        return advise(figures, self.course)

    def summary(self) -> str:
        """Return the totals and the advice in one line for each."""
        length = None if self.course is None else self.course.length
        texts = [
            f"distance {float(self.relative_distance):.3g} of |x|, "
            f"{float(self.relative_off_support):.3g} off the mask",
            f"mask change {float(self._mean('mask_change')):.3g}",
        ]
        if self.dense_value is not None:
            values = (float(self.dense_value), float(self.sparse_value))
            texts.append("{:.4g} at x, {:.4g} at proj(x)".format(*values))
        step = f"step {int(self.step)}" + ("" if length is None else f" of {length}")
        lines = [f"{step}: {'; '.join(texts)}"]
        if self.course is not None:
            lines += [f"{item.cause}: {item.text}" for item in self.advice] or [
                "on course to the constraint"
            ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def scalars(self) -> dict[str, float]:
        """Return totals and all figures of every parameter as one flat dict, for a logger.

        Fractions are averaged with the number of entries as weights, and norms are added in
        quadrature, so that totals are those of the concatenated parameters.
        """
        found = {key: self._mean(key) for key in ("achieved", "zeros", "mask_change", "masked")}
        for key in ("distance", "primal_residual", "dual_residual", "norm", "off_support"):
            found[key] = self._norm(key)
        for key in ("relative_distance", "relative_off_support", "replaced"):
            found[key] = getattr(self, key)
        for key in ("dense_value", "sparse_value"):
            if getattr(self, key) is not None:
                found[key] = getattr(self, key)
        for row in self.tensors:
            for key in TensorReport._fields[3:]:
                found[f"{key}/{row.name}"] = getattr(row, key)
        return found

    def _mean(self, key: str) -> Any:
        entries = sum(row.entries for row in self.tensors)
        return sum(row.entries * getattr(row, key) for row in self.tensors) / max(entries, 1)

    def _norm(self, key: str) -> Any:
        return sum(getattr(row, key) ** 2 for row in self.tensors) ** 0.5

    def _relative(self, key: str) -> Any:
        return _ratio(self._norm(key), self._norm("norm"))

    def log(self, writer: Any, prefix: str = "safe_core") -> None:
        """Write `scalars` to a `torch.utils.tensorboard.SummaryWriter` or a compatible writer."""
        for key, value in self.scalars().items():
            writer.add_scalar(f"{prefix}/{key}", float(value), int(self.step))

    def table(self) -> Any:
        """Return a `rich.table.Table` for `rich.print`. It needs the package rich."""
        require("Report.table", "rich", extra="demo")
        from rich.table import Table

        table = Table(title=f"step {self.step}", caption=self.summary(), padding=(0, 0))
        table.add_column("name", overflow="fold", ratio=1)
        shown = TensorReport._fields[2 : TensorReport._fields.index("norm")]
        table.add_column("entries", justify="right", no_wrap=True)
        for key in shown:
            table.add_column(key.removesuffix("_residual"), justify="right", no_wrap=True)
        for row in self.tensors:
            figures = (f"{getattr(row, key):.3g}" for key in shown)
            table.add_row(row.name, f"{row.entries:,}", *figures)
        return table


def _ratio(part: Any, whole: Any) -> Any:
    """Return ``part / whole``, or 0 if both are 0, for numbers and for arrays."""
    if isinstance(whole, (int, float)):
        return part / whole if whole else 0.0
    xp = array_namespace(whole)
    return part / xp.where(whole == 0, xp.ones_like(whole), whole)


def outlook(
    method: Method,
    params: Sequence[Array],
    split: SplitState,
    step: int | Array,
    info: ArrayInfo,
    importance: Sequence[Array | None] | None,
    pattern: Pattern | None = None,
) -> tuple[SplitState, SplitState, list[Array]]:
    """Return the split, the split after a dual update now, and the final support.

    `sums` compares the three. Anchors are in float32 or wider: a rounded state would add its
    rounding to the residuals.

    Examples
    --------
    >>> import numpy
    >>> from safe_core import admm
    >>> x, info = [numpy.asarray([3.0, 1.0])], ArrayInfo(("x",), (None,))
    >>> method = admm(0.5)
    >>> outlook(method, x, method.init(x, info), 0, info, None)[2]
    [array([ True, False])]
    """
    constraint, pattern = method.constraint, pattern or method.sparsity
    final = select_support(params, pattern, info, importance, step=None)
    if not constraint.has_anchor:
        # Without anchors z is x on the support and u is zero.
        wide = [array_namespace(x).astype(x, _wide(x), copy=False) for x in params]
        now = constraint.update(params, split, pattern, info, step, importance).support
        found = [SplitState(apply_support(wide, s), s) for s in (split.support, now)]
        return found[0], found[1], final
    held = [array_namespace(a).astype(a, _wide(a), copy=False) for a in split.anchor]
    before, exact = SplitState(held, split.support), constraint.exact()
    return before, exact.update(params, before, pattern, info, step, importance), final


def _wide(a: Array) -> Any:
    return wide_dtype(array_namespace(a), [a])


def sums(
    values: Sequence[Array], split: SplitState, update: SplitState, final: Sequence[Array]
) -> list[Array]:
    """Return nine counts and squared norms for each parameter, as one float array.

    They are: entries that ``final``, the support of the final projection, removes; zeros; the
    square of ``distance``; entries of the support that ``update``, a dual update now,
    changes; the squares of ``primal_residual``, ``|z_now - z|_2``, ``norm`` and
    ``off_support``; and entries off the support. All are sums over entries, so those of local
    shards add up to those of the parameter.

    Examples
    --------
    >>> import numpy
    >>> x, kept = numpy.asarray([3.0, 1.0, 0.0]), numpy.asarray([True, False, False])
    >>> held = SplitState([x], [kept])
    >>> sums([x], held, held, [kept])
    [array([ 2.,  1.,  1.,  0.,  1.,  0., 10.,  1.,  2.])]
    """
    # Measure one array at a time, which needs little memory. Arrays of one shape and dtype share
    # a program.
    states = zip(values, final, *split[:2], *update[:2], strict=True)
    return [backend_of(x).as_program(_sums_of, (), x, *others) for x, *others in states]


def _sums_of(
    x: Array, kept: Array, anchor: Array, old: Array, anchor_now: Array, new: Array
) -> Array:
    """Return the `sums` of one parameter."""
    # z is the anchor on the support.
    a, b = apply_support([anchor, anchor_now], [old, new])
    xp = array_namespace(x)
    parts = [
        xp.sum(~kept),
        xp.sum(x == 0),
        norm([xp.where(kept, xp.zeros_like(x), x)]) ** 2,
        xp.sum(old != new),
        norm([xp.astype(x, a.dtype, copy=False) - a]) ** 2,
        norm([b - a]) ** 2,
        norm([x]) ** 2,
        norm([xp.where(old, xp.zeros_like(x), x)]) ** 2,
        xp.sum(~old),
    ]
    dtype = parts[2].dtype
    return xp.stack([xp.astype(part, dtype) for part in parts])
