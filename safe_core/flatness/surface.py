"""A loss around one point, and everything that is measured there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from safe_core.backends import Array
from safe_core.layout import Layout

from .ascent import Sharpness, sharpness
from .landscape import Landscape, filter_direction, landscape
from .spectrum import Eigenvalues, Trace, eigenvalues, trace
from .vectors import Coordinates, Operator

__all__ = ["Loss", "LossSurface"]


class Loss(Protocol):
    """A loss of some parameters on some batches, as an adapter hands it over."""

    @property
    def batches(self) -> int:
        """How many batches there are."""

    def arrays(self) -> list[Array]:
        """The parameters now, those that are trained."""

    def support(self) -> list[Array | None] | None:
        """The entries that may vary, None for all of an array or of all arrays."""

    def layouts(self) -> list[Layout | None]:
        """The roles of the axes of each array, None where it has no filters."""

    def value(self, arrays: Sequence[Array]) -> Any:
        """The mean loss over the batches at other parameters."""

    def value_and_gradient(
        self, arrays: Sequence[Array], batch: int
    ) -> tuple[Any, Sequence[Array]]:
        """The loss of one batch at other parameters, and its gradient."""

    def hessian_product(self) -> Operator:
        """``v -> H v``, H the Hessian of the mean loss at the parameters now."""

    def listed(self, structure: Any) -> list[Array]:
        """The arrays of a structure such as the user's parameters."""

    def structured(self, arrays: Sequence[Array]) -> Any:
        """Arrays in the structure of the user's parameters."""


@dataclass(frozen=True)
class LossSurface:
    """The loss around a network, from ``loss_surface`` of an adapter.

    ``f(x)`` is the mean over the batches, each with the same weight, as a function of the
    parameters that are trained. Given a support, only entries on it are variables: f is then
    a function of the kept weights.

    Attributes
    ----------
    loss : Loss
        The binding to a framework.

    Examples
    --------
    >>> import numpy
    >>> class Bowl:  # f(x) = x_1^2 + 3 x_2^2
    ...     def arrays(self):
    ...         return [numpy.zeros(2)]
    ...     def support(self):
    ...         return None
    ...     def hessian_product(self):
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
        """Return the k largest eigenvalues of the Hessian, with errors and vectors.

        As `safe_core.flatness.eigenvalues`. The vectors have the structure of the parameters.
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
        """Return an estimate of the trace of the Hessian, as `safe_core.flatness.trace`."""
        return trace(
            self.loss.hessian_product(),
            self.loss.arrays(),
            samples,
            sketch=sketch,
            seed=seed,
            support=self.loss.support(),
        )

    def sharpness(self, rho: float, *, steps: int = 1, seed: int = 0) -> Sharpness:
        """Return the rise of the loss within a ball, batch by batch.

        As `safe_core.flatness.sharpness` of the loss of each batch alone.
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
        """Return the loss along a line or on a plane, as `safe_core.flatness.landscape`.

        Parameters
        ----------
        directions : int or list
            1 or 2 random directions from `safe_core.flatness.filter_direction`, or the
            directions themselves in the structure of the parameters, such as eigenvectors. Of
            these the part on the support counts.
        radius, points
            Of the grid.
        seed, vectors
            Of random directions. Networks of the same parameters and support meet the same
            normal draws under one seed.
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
