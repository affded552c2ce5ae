"""A smooth problem with a known Hessian product, and Sassha for it in plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import safe_core

STEPS, LONG = 60, 300
Arrays = list[np.ndarray]
Draw = Callable[[int], Arrays]
"""``c -> z``, the random signs of the c-th Hessian product."""


class Problem(NamedTuple):
    """``f(W, b) = mean_n sum_k log cosh(X W^T + b - Y)`` and a starting point, in float64."""

    inputs: np.ndarray
    targets: np.ndarray
    start: Arrays  # W (output, input) and b

    @classmethod
    def make(cls) -> Problem:
        rng = np.random.default_rng(0)
        inputs, truth = rng.normal(size=(20, 6)), rng.normal(size=(4, 6))
        targets = inputs @ truth.T + 0.5 * rng.normal(size=(20, 4))
        return cls(inputs, targets, [0.5 * rng.normal(size=(4, 6)), rng.normal(size=4)])

    def gradient(self, x: Arrays) -> Arrays:
        slope = np.tanh(self.inputs @ x[0].T + x[1] - self.targets)
        return [slope.T @ self.inputs / len(slope), slope.mean(axis=0)]

    def product(self, x: Arrays, v: Arrays) -> Arrays:
        slope = np.tanh(self.inputs @ x[0].T + x[1] - self.targets)
        change = (1 - slope**2) * (self.inputs @ v[0].T + v[1])
        return [change.T @ self.inputs / len(slope), change.mean(axis=0)]


class Recipe(NamedTuple):
    """The settings of a run; pairs are those of W and b."""

    rate: tuple[float, float] = (0.02, 0.02)
    rho: tuple[float, float] = (0.1, 0.1)
    decay: tuple[float, float] = (0.0, 0.0)
    betas: tuple[float, float] = (0.9, 0.99)
    interval: int = 10
    eps: float = 1e-3
    power: float = 0.5
    correction: str = "corrected"
    momentum: bool = False
    length: int = STEPS

    def steps(self, problem: Problem, draw: Draw) -> Iterator[Arrays]:
        """Yield the parameters after every step of Sassha alone."""
        x, base = problem.start, Base(self, draw)
        for _ in range(self.length):
            along = base.m if self.momentum else problem.gradient(x)
            length = math.sqrt(sum(np.sum(a**2) for a in along))
            sign = -1 if self.momentum else 1
            e = [sign * r * a / (length or 1) for r, a in zip(self.rho, along, strict=True)]
            point = [a + b for a, b in zip(x, e, strict=True)]
            x = base.step(x, problem.gradient(point), lambda z, at=point: problem.product(at, z))
            yield x


class Base:
    """The averages of Sassha, and its step from a gradient and a Hessian product."""

    def __init__(self, recipe: Recipe, draw: Draw) -> None:
        self.recipe, self.draw = recipe, draw
        self.m, self.d = ([np.zeros_like(a) for a in draw(0)] for _ in range(2))
        self.t = self.c = 0

    def step(self, x: Arrays, g: Arrays, product: Callable[[Arrays], Arrays]) -> Arrays:
        r = self.recipe
        b1, b2 = r.betas
        if self.t % r.interval == 0:
            z = self.draw(self.c)
            h = [a * b for a, b in zip(z, product(z), strict=True)]
            self.d = [b2 * d + (1 - b2) * np.abs(a) for d, a in zip(self.d, h, strict=True)]
            self.c += 1
        self.m = [b1 * m + (1 - b1) * a for m, a in zip(self.m, g, strict=True)]
        self.t += 1
        counts = {
            "corrected": (1 - b1**self.t, 1 - b2**self.c),
            "published": (1 - b1**self.t, 1 - b2**self.t),
            "none": (1.0, 1.0),
        }
        first, second = counts[r.correction]
        return [
            (1 - rate * decay) * a - rate * (m / first) / ((d / second) ** r.power + r.eps)
            for a, m, d, rate, decay in zip(x, self.m, self.d, r.rate, r.decay, strict=True)
        ]


class Safe(NamedTuple):
    """SAFE with Sassha as its base, for the weights W."""

    rho: float = 0.1
    penalty: float = 0.1
    interval: int = 8
    zeros: int = 14
    adds_projected: bool = False
    perturbed_every: int = 1
    length: int = STEPS

    def steps(self, problem: Problem, recipe: Recipe, draw: Draw) -> Iterator[tuple[Any, ...]]:
        """Yield W, b and the support after every step."""
        base, x = Base(recipe, draw), problem.start
        z, u = self._keep(x[0]), np.zeros_like(x[0])
        for t in range(self.length):
            first = problem.gradient(x)
            length = math.sqrt(sum(np.sum(a**2) for a in first))
            rho = self.rho if t % self.perturbed_every == 0 else 0.0
            points = [[a + rho * b / length for a, b in zip(x, first, strict=True)]]
            if self.adds_projected:
                points.append([self._keep(x[0]), x[1]])
            g = _sums([problem.gradient(point) for point in points])
            g[0] = g[0] + self.penalty * (x[0] - z + u)
            x = base.step(
                x, g, lambda v, at=points: _sums([problem.product(point, v) for point in at])
            )
            if (t + 1) % self.interval == 0:
                v = x[0] + u
                z = self._keep(v)
                u = v - z
            yield *x, z != 0

    def _keep(self, v: np.ndarray) -> np.ndarray:
        kept = v.ravel().copy()
        kept[np.argsort(np.abs(kept), kind="stable")[: self.zeros]] = 0
        return kept.reshape(v.shape)


def _sums(parts: list[Arrays]) -> Arrays:
    return [sum(arrays) for arrays in zip(*parts, strict=True)]


CASES = {
    "default": Recipe(length=LONG),
    "published correction": Recipe(correction="published", rate=(0.005, 0.005)),
    "no correction": Recipe(correction="none", betas=(0.9, 0.9)),
    "every step": Recipe(interval=1),
    "momentum": Recipe(momentum=True, interval=3),
    "weight decay": Recipe(decay=(0.5, 0.5)),
    "decay of weights alone": Recipe(decay=(0.5, 0.0)),
    "without radius": Recipe(rho=(0.0, 0.0)),
    "other power": Recipe(power=0.8, betas=(0.0, 0.0)),
}
"""Settings that both frameworks have."""

PLAIN = Recipe(rho=(0.0, 0.0))
_SAFE = {"rho": 0.1, "penalty": 0.1, "dual_update_interval": 8}
UNDER_SAFE = {
    "safe": (safe_core.safe(0.6, **_SAFE), Safe(length=LONG)),
    "at times": (safe_core.safe(0.6, **_SAFE, perturbation_interval=3), Safe(perturbed_every=3)),
    "sg": (safe_core.safe(0.6, **_SAFE, projected_gradient=True), Safe(adds_projected=True)),
    "admm": (
        safe_core.admm(0.6, penalty=0.1, dual_update_interval=8),
        Safe(rho=0.0),
    ),
}
"""Methods of the library with the settings of the reference that they must match."""
