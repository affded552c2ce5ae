"""SparseGPT: prune column by column; later columns compensate each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from .. import _checks
from ..layout import OUTPUT_INPUT, Layout
from ..patterns import Pattern
from ..patterns.counts import kept_counts
from ..projection import Projection
from .base import LayerSolver
from .problem import (
    Form,
    finished,
    live_diagonal,
    mean_diagonal,
    read_form,
    read_matrices,
    read_pattern,
    rescaled,
    unit_scaled,
)

__all__ = ["SparseGPT"]


@dataclass(frozen=True)
class SparseGPT(LayerSolver):
    """Optimal brain surgery along the columns, in all rows at once.

    With ``H^-1 = U^T U`` for the damped ``H``, U upper triangular, the columns are pruned in
    order, and the columns after column j compensate its error,

    ``e_j = (w_j - v_j) / U_jj``,  ``w_k <- w_k - e_j U_jk`` for ``k > j``,

    which is optimal given all columns before them. The entries with the smallest
    ``|w_ij| / U_jj`` are pruned, chosen one block of columns at a time.

    Attributes
    ----------
    damping : float
        Added to the diagonal of H, relative to the mean of its non-zero entries.
    block_size : int
        Columns whose support is chosen at once. Under N:M it is one group.

    Notes
    -----
    As published, entries compete within a block of columns, yet the total counts are exact:
    after n columns, ``floor(sparsity * n)`` entries of each row are pruned, or that fraction of
    all rows in the scopes "tensor" and "global". A last N:M group that stays dense is updated
    like the rest. Inputs that are always zero, ``H_jj = 0``, get the value 0.

    It can be traced by jit, but the program grows with the number of columns: compile it for
    narrow layers only. In eager mode JAX compiles once for each of a few block shapes.

    Raises
    ------
    TypeError, ValueError
        If ``damping`` is negative or ``block_size`` is not a positive integer.

    References
    ----------
    Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
    in One-Shot", Algorithm 1.

    Examples
    --------
    >>> import numpy
    >>> weight, gram = numpy.asarray([[1.0, 2.0]]), numpy.asarray([[2.0, 1.0], [1.0, 2.0]])
    >>> SparseGPT(damping=0.0)(weight, gram, 0.5).values  # 2 takes on half of what 1 did
    array([[0. , 2.5]])
    """

    name = "sparsegpt"

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        _checks.real("damping", self.damping, low=0.0)
        _checks.integer("block_size", self.block_size, low=1)

    def __call__(
        self, weight: Array, gram: Any, sparsity: Any, *, layout: Layout | None = None
    ) -> Projection:
        """Prune a layer.

        Parameters
        ----------
        weight : array
            ``W``, real floating, shape (output, input) unless ``layout`` says otherwise.
        gram : Gram or array
            ``H``, shape (inputs, inputs).
        sparsity : float, str, Unstructured or NM
            Target sparsity; under scope "global" the layer is the pool.
        layout : Layout, optional
            Roles of the axes, each an input or an output.

        Returns
        -------
        Projection
            ``values`` and ``support``, shaped as the weights.

        Raises
        ------
        TypeError
            If ``sparsity`` is a Block or Channel, or an argument is of another kind.
        ValueError
            If ``gram`` is not a Gram matrix of the layer's inputs, ``damping`` is too small
            to factor it, a pruned value is too large for the dtype of the weights, or the
            pattern does not fit. Values are checked unless they are traced.
        """
        pattern = read_pattern(sparsity, self)
        if pattern.ranks != "entries":
            raise TypeError(
                "sparsity must be Unstructured, NM or another pattern of single entries for "
                f"SparseGPT, which decides column by column, got {pattern!r}"
            )
        w, h, form = read_matrices(weight, gram, layout)
        pattern.check((form.outputs, form.inputs), OUTPUT_INPUT, "weight")
        xp = array_namespace(w)
        live, _ = live_diagonal(xp, h)
        w, exponent = unit_scaled(xp, xp.where(live, w, xp.zeros_like(w)))
        if 0 not in w.shape:
            sweep = _Sweep(pattern, self.block_size, form, xp)
            pruned = sweep.run(w, self._factor(xp, unit_scaled(xp, h)[0]), 0)
            values, support = rescaled(xp, pruned.values, exponent), pruned.support
        else:
            values, support = w, xp.ones_like(w, dtype=xp.bool)
        return finished(form, values, support, weight)

    def _factor(self, xp: Any, h: Array) -> Array:
        """Return the upper triangular U of ``H^-1 = U^T U``, for damped H of mean diagonal 1."""
        live, diagonal = live_diagonal(xp, h)
        added = xp.where(live, self.damping * xp.ones_like(diagonal), xp.ones_like(diagonal))
        h = h / mean_diagonal(xp, h) + xp.tril(xp.triu(xp.broadcast_to(added, h.shape)))
        try:
            # H = R R^T with R upper triangular, by Cholesky from the last row up; U = R^-1.
            upper = xp.flip(xp.linalg.cholesky(xp.flip(h)))
            factor = xp.triu(xp.linalg.inv(upper))
        except backend_of(h).linalg_errors() as error:
            raise self._too_small() from error
        if backend_of(factor).is_concrete(factor) and not bool(xp.all(xp.isfinite(factor))):
            raise self._too_small()
        return factor

    def _too_small(self) -> ValueError:
        return ValueError(
            "damping must be larger for this gram, which is not positive definite in its dtype "
            f"with damping={self.damping!r}: raise damping, or add up more inputs"
        )


class _Columns(NamedTuple):
    """Pruned columns; ``errors`` are those that later columns compensate."""

    values: Array
    support: Array
    errors: Array


class _Sweep(NamedTuple):
    """One pass over the columns of a layer.

    Columns are halved recursively down to single ones, and the update from the left half to the
    right is one product: the paper's lazy batches at every scale. There are few shapes, all
    static, and only the selection may wait for a device.
    """

    pattern: Pattern
    block_size: int
    form: Form
    xp: Any

    def run(self, w: Array, u: Array, start: int, keep: Array | None = None) -> _Columns:
        """Prune the columns ``w``, the first of which is ``start``; u is their part of U."""
        xp, width = self.xp, w.shape[1]
        unit = self.pattern.group or self.block_size
        if keep is None and width <= unit:
            keep = self.choose(w / xp.linalg.diagonal(u), start)
        if keep is not None and width == 1:
            values = xp.where(keep, w, xp.zeros_like(w))
            return _Columns(values, keep, (w - values) / u)
        step = unit if keep is None else 1
        cut = step * -(-width // (2 * step))
        keeps = (None, None) if keep is None else (keep[:, :cut], keep[:, cut:])
        left = self.run(w[:, :cut], u[:cut, :cut], start, keeps[0])
        rest = w[:, cut:] - left.errors @ u[:cut, cut:]
        right = self.run(rest, u[cut:, cut:], start + cut, keeps[1])
        return _Columns(*(xp.concat(pair, axis=1) for pair in zip(left, right, strict=True)))

    def choose(self, scores: Array, start: int) -> Array:
        """Return the support of a block of columns, which keeps the largest scores."""
        xp, width = self.xp, scores.shape[1]
        size = self.pattern.group
        if size is not None:
            if width < size:
                return xp.ones_like(scores, dtype=xp.bool)
            return read_form(scores, None).select(scores, self.pattern)
        rows = 1 if self.pattern.by_output else self.form.outputs
        before, after = (
            kept_counts(self.pattern.fractions(), rows * columns)[-1]
            for columns in (start, start + width)
        )
        kept, backend = (after - before,), backend_of(scores)
        if rows == 1:
            return backend.keep_largest_per_row(scores, counts=kept, stage=0)
        stored = self.form.stored(scores)
        return self.form.columns(backend.keep_largest([stored], counts=kept, stage=0)[0])
