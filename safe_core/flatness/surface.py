"""Bind the measurements of flatness to a loss around one point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from safe_core.backends import Array
from safe_core.layout import Layout

from .ascent import Sharpness, sharpness
from .landscape import Landscape, filter_direction, landscape
from .moments import Moment, hessian_moment
from .spectrum import Eigenvalues, Trace, eigenvalues, trace
from .vectors import Coordinates, Operator

__all__ = ["Loss", "LossSurface"]


class Loss(Protocol):
    """Interface of a loss on some batches, which an adapter implements."""

    @property
    def batches(self) -> int:
        """The number of batches."""

    def arrays(self) -> list[Array]:
        """Return the trainable parameters at present."""

    def support(self) -> list[Array | None] | None:
        """Return masks of the entries that may vary; None means all of an array, or of all."""

    def layouts(self) -> list[Layout | None]:
        """Return the axis roles of each array, None for arrays without filters."""

    def value(self, arrays: Sequence[Array]) -> Any:
        """Return the mean loss over the batches at ``arrays``."""

    def value_and_gradient(
        self, arrays: Sequence[Array], batch: int
    ) -> tuple[Any, Sequence[Array]]:
        """Return the loss of one batch at ``arrays``, and its gradient."""

    def hessian_product(self, batch: int | None = None) -> Operator:
        """Return ``v -> H v``, with the Hessian of the mean loss, or of the loss of one batch."""

    def listed(self, structure: Any) -> list[Array]:
        """Return the arrays of a structure like that of the user's parameters."""

    def structured(self, arrays: Sequence[Array]) -> Any:
        """Return arrays in the structure of the user's parameters."""


@dataclass(frozen=True)
class LossSurface:
    """Loss around a network; ``loss_surface`` of an adapter makes it.

    ``f(x)`` is the mean over the batches as a function of the trainable parameters. Every
    batch has the same weight, whatever its size. With a support, f is a function of the kept
    weights only.

    Attributes
    ----------
    loss : Loss
        Binding to a framework.

    Examples
    --------
    >>> import numpy
    >>> class Bowl:  # f(x) = x_1^2 + 3 x_2^2
    ...     def arrays(self):
    ...         return [numpy.zeros(2)]
    ...     def support(self):
    ...         return None
    ...     def hessian_product(self, batch=None):
    ...         return lambda v: [numpy.asarray([2.0, 6.0]) * v[0]]
    ...     def structured(self, arrays):
    ...         return arrays
    >>> [round(value, 4) for value in LossSurface(Bowl()).eigenvalues(k=2).values]
    [6.0, 2.0]
    """

    loss: Loss

    def eigenvalues(
        self,
        k: int = 1,
        *,
        which: Literal["largest", "smallest", "magnitude"] = "largest",
        iterations: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> Eigenvalues:
        """Return k extreme eigenvalues of the Hessian, with errors and vectors.

        See `safe_core.flatness.eigenvalues`. The vectors have the structure of the parameters.
        """
        found = eigenvalues(
            self.loss.hessian_product(),
            self.loss.arrays(),
            k,
            which=which,
            iterations=iterations,
            tolerance=tolerance,
            seed=seed,
            support=self.loss.support(),
        )
        return found._replace(vectors=[self.loss.structured(v) for v in found.vectors])

    def trace(self, samples: int = 100, *, sketch: int = 0, seed: int = 0) -> Trace:
        """Estimate the trace of the Hessian; see `safe_core.flatness.trace`."""
        return trace(
            self.loss.hessian_product(),
            self.loss.arrays(),
            samples,
            sketch=sketch,
            seed=seed,
            support=self.loss.support(),
        )

    def moment(
        self,
        order: int = 2,
        *,
        iterations: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> Moment:
        """Return how much the Hessians of the batches differ.

        See `safe_core.flatness.hessian_moment`. It depends on the size of the batches: take that
        of training.
        """
        return hessian_moment(
            [partial(self.loss.hessian_product, i) for i in range(self.loss.batches)],
            self.loss.arrays(),
            order,
            iterations=iterations,
            tolerance=tolerance,
            seed=seed,
            support=self.loss.support(),
        )

    def sharpness(self, rho: float, *, steps: int = 1, seed: int = 0) -> Sharpness:
        """Return the largest rise of the loss within a ball, for every batch alone.

        See `safe_core.flatness.sharpness`.
        """
        arrays, support = self.loss.arrays(), self.loss.support()
        found = []
        for i in range(self.loss.batches):
            found.append(
                sharpness(
                    lambda at, i=i: self.loss.value_and_gradient(at, i),  # type: ignore[misc]
                    arrays,
                    rho,
                    steps=steps,
                    seed=seed,
                    support=support,
                )
            )
        return Sharpness(found)

    def landscape(
        self,
        directions: int | Sequence[Any] = 1,
        *,
        radius: float = 1.0,
        points: int = 51,
        seed: int = 0,
        vectors: bool = False,
    ) -> Landscape:
        """Evaluate the loss along a line or on a plane; see `safe_core.flatness.landscape`.

        Parameters
        ----------
        directions : int or list
            Number of random directions from `safe_core.flatness.filter_direction`, 1 or 2, or
            the directions themselves in the structure of the parameters, such as
            eigenvectors. Entries of directions off the support are ignored.
        radius, points
            Half-width and resolution of the grid.
        seed, vectors
            Arguments of `safe_core.flatness.filter_direction`. One seed gives the same draws
            for networks with parameters of the same shapes and the same support.
        """
        arrays, support = self.loss.arrays(), self.loss.support()
        if isinstance(directions, int):
            if directions not in (1, 2):
                raise ValueError(f"directions must be 1 or 2, got {directions!r}")
            layouts = self.loss.layouts()
            chosen = [
                filter_direction(
                    arrays, layouts, seed=seed, index=i, vectors=vectors, support=support
                )
                for i in range(directions)
            ]
        else:
            kept = Coordinates.of(arrays, support)
            chosen = [kept.unpack(kept.pack(self.loss.listed(d), "direction")) for d in directions]
        return landscape(self.loss.value, arrays, chosen, radius=radius, points=points)
