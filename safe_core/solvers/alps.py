"""ALPS: ADMM on the support of a layer, then conjugate gradients on its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from safe_core.backends import Array, backend_of

from .. import _checks
from ..layout import Layout
from ..projection import Projection
from .base import LayerSolver
from .problem import (
    finished,
    live_diagonal,
    mean_diagonal,
    read_matrices,
    read_pattern,
    rescaled,
    unit_scaled,
)

__all__ = ["ALPS"]

Select = Callable[[Array], Array]
"""``v (outputs, inputs) -> support``."""


@dataclass(frozen=True)
class ALPS(LayerSolver):
    """ADMM for the support, with a growing penalty; least squares on it for the values.

    H is damped, and weights are scaled so that every input has norm 1 (``W_ij sqrt(H_jj)``; the
    first support is then nearly Wanda's). With dense weights A, sparse D and dual V:

    ``W = A + (rho (D - A) - V) (H + rho)^-1``, ``D = proj(W + V / rho)``,
    ``V = V + rho (W - D)``

    Every ``interval`` iterations rho grows: by 1.3 if a tenth of the support has changed since
    the last check, by 1.2 if a two-hundredth has, by 1.1 if any entry has. The loop ends when
    none has changed. ``refinements`` conjugate gradient steps, independent in each row, then
    approach the best values on that support. A row that errs less with its dense values keeps
    them. If Wanda errs less on the layer, its support is refined and returned instead.

    Attributes
    ----------
    damping : float
        Added to the diagonal of H, relative to the mean of its non-zero entries, before inputs
        are scaled. It pulls the values towards the dense weights where H has small
        eigenvalues or an input is nearly always zero.
    rho : float
        Initial penalty, positive.
    interval : int
        Iterations between two checks of the support.
    iterations : int
        Maximum number of ADMM iterations.
    refinements : int
        Number of conjugate gradient steps.

    Notes
    -----
    One eigendecomposition serves every rho. Inputs that are always zero, ``H_jj = 0``, get
    the value 0.

    Every ``interval`` iterations the host reads whether the support still changes. Otherwise
    an iteration waits for the device only if the selection does, once in the scopes "tensor"
    and "global" on CUDA. The number of iterations depends on values, so the solver cannot be
    traced by jit.

    Conjugate gradients amplify rounding until they have converged: libraries agree on the
    support, except for near-ties, and on the error, but not on the last digits of values.

    Layers of a hundred inputs or more converge in a few dozen iterations. In layers of a few
    inputs the same support may recur by chance while rho is small, which ends the loop early.

    Raises
    ------
    TypeError, ValueError
        If a number is of another kind, ``damping`` or ``refinements`` is negative, or
        another is not positive.

    References
    ----------
    Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
    Large Language Models", Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy
    >>> rng = numpy.random.default_rng(0)
    >>> weight, mixing = rng.normal(size=(4, 16)), rng.normal(size=(16, 16))
    >>> values, support = ALPS()(weight, mixing.T @ mixing, 0.5)
    >>> int(support.sum()), int(numpy.count_nonzero(values))
    (32, 32)
    """

    name = "alps"

    damping: float = 0.01
    rho: float = 0.1
    interval: int = 3
    iterations: int = 300
    refinements: int = 10

    def __post_init__(self) -> None:
        _checks.real("damping", self.damping, low=0.0)
        if _checks.real("rho", self.rho, low=0.0) == 0:
            raise ValueError(f"rho must be positive, got {self.rho!r}")
        _checks.integer("interval", self.interval, low=1)
        _checks.integer("iterations", self.iterations, low=1)
        _checks.integer("refinements", self.refinements, low=0)

    def memory(self, outputs: int, inputs: int, itemsize: int = 4) -> int:
        """Return the bytes that one layer needs, see `LayerSolver.memory`.

        H, the eigendecomposition of its damped form and its work space are eight matrices.
        """
        return self._bytes(8, outputs, inputs, itemsize)

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
        sparsity : float, str or pattern
            Any pattern; under scope "global" the layer is the pool.
        layout : Layout, optional
            Roles of the axes, each an input or an output.

        Returns
        -------
        Projection
            ``values`` and ``support``, shaped as the weights.

        Raises
        ------
        TypeError
            If an argument is of another kind, or is traced.
        ValueError
            If ``gram`` is not a Gram matrix of the layer's inputs, the pattern does not fit, or
            a pruned value is too large for the dtype of the weights.
        """
        pattern = read_pattern(sparsity, self)
        w, h, form = read_matrices(weight, gram, layout)
        if not (backend_of(w).is_concrete(w) and backend_of(h).is_concrete(h)):
            raise TypeError(
                "weight and gram must not be traced for ALPS, whose length depends on their "
                "values: call it outside jit"
            )

        def choose(v: Array) -> Array:
            return form.matrix(form.select(form.array(v), pattern))

        xp = array_namespace(w)
        if 0 in w.shape:
            return finished(form, w, choose(w), weight)
        live, _ = live_diagonal(xp, h)
        dense, exponent = unit_scaled(xp, xp.where(live, w, xp.zeros_like(w)))
        values, support = self._solve(xp, dense, unit_scaled(xp, h)[0], choose)
        return finished(form, rescaled(xp, values, exponent), support, weight)

    def _solve(self, xp: Any, w: Array, h: Array, choose: Select) -> tuple[Array, Array]:
        """Return values and support of ALPS or of Wanda, whichever errs less."""
        live, diagonal = live_diagonal(xp, h)
        added = xp.where(live, self.damping * mean_diagonal(xp, h), xp.zeros_like(diagonal))
        norms = xp.sqrt(diagonal + added)
        unit = h + xp.tril(xp.triu(xp.broadcast_to(added, h.shape)))
        unit = unit / norms[:, None] / norms

        def refined(start: Array, support: Array) -> tuple[Array, Array]:
            found = self._refine(xp, w * norms, unit, start * norms, support) / norms
            # Conjugate gradients may not have converged, and damping is not part of the error.
            plain = _kept(xp, w, support)
            errors, others = (_errors(xp, w - values, h) for values in (found, plain))
            better = others < errors
            return xp.where(better, plain, found), xp.sum(xp.where(better, others, errors))

        sparse, support = self._search(xp, w * norms, unit, choose)
        values, error = refined(sparse / norms, support)
        simple = choose(w * xp.sqrt(diagonal))
        if bool(xp.sum(_errors(xp, w - _kept(xp, w, simple), h)) < error):
            return refined(_kept(xp, w, simple), simple)[0], simple
        return values, support

    def _search(self, xp: Any, dense: Array, h: Array, choose: Select) -> tuple[Array, Array]:
        """Return sparse weights and their support, by ADMM."""
        eigenvalues, vectors = xp.linalg.eigh(h)
        # Rounding makes some eigenvalues of a singular matrix negative.
        eigenvalues = xp.clip(eigenvalues, min=0.0)
        support = before = choose(dense)
        sparse, dual = _kept(xp, dense, support), xp.zeros_like(dense)
        rho, inverse = self.rho, h
        for t in range(self.iterations):
            if t % self.interval == 0:
                if t:
                    growth = self._growth(xp, support, before)
                    if growth == 1:
                        break
                    rho *= growth
                inverse = (vectors / (eigenvalues + rho)) @ vectors.mT
                before = support
            v = dense + (rho * (sparse - dense) - dual) @ inverse + dual / rho
            support = choose(v)
            sparse = _kept(xp, v, support)
            dual = rho * (v - sparse)
        return sparse, support

    def _growth(self, xp: Any, support: Array, before: Array) -> float:
        """Return the factor of rho for this change of the support; reads two numbers."""
        counts = xp.stack([xp.count_nonzero(support ^ before), xp.count_nonzero(support)])
        changed, kept = (int(count) for count in counts)
        for share, factor in ((0.1, 1.3), (0.005, 1.2)):
            if changed and changed >= share * kept:
                return factor
        return 1.1 if changed else 1.0

    def _refine(self, xp: Any, dense: Array, h: Array, sparse: Array, support: Array) -> Array:
        """Reduce the error on a fixed support by conjugate gradients in each row."""

        def product(x: Array) -> Array:
            return _kept(xp, x @ h, support)

        residual = product(dense - sparse)
        direction, norm = residual, _row_sums(xp, residual * residual)
        for _ in range(self.refinements):
            image = product(direction)
            step = _ratio(xp, norm, _row_sums(xp, direction * image))
            sparse = sparse + step * direction
            residual = residual - step * image
            previous, norm = norm, _row_sums(xp, residual * residual)
            direction = residual + _ratio(xp, norm, previous) * direction
        return sparse


def _kept(xp: Any, x: Array, support: Array) -> Array:
    return xp.where(support, x, xp.zeros_like(x))


def _errors(xp: Any, change: Array, h: Array) -> Array:
    """Return the reconstruction error of each row, at least 0."""
    return xp.clip(_row_sums(xp, (change @ h) * change), 0.0, None)


def _row_sums(xp: Any, x: Array) -> Array:
    return xp.sum(x, axis=1, keepdims=True)


def _ratio(xp: Any, a: Array, b: Array) -> Array:
    """Return ``a / b``, and 0 where b is 0, in rows that have converged."""
    done = b <= 0
    return xp.where(done, xp.zeros_like(a), a / xp.where(done, xp.ones_like(b), b))
