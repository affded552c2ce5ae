"""A linear regression, and the whole method on it written out in plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import safe_core
from safe_core import SquaredGradient, schedules

STEPS, RATE, MOMENTUM = 12, 0.1, 0.9


class Point(NamedTuple):
    """Parameters and both ADMM variables after a step."""

    weight: np.ndarray  # (output, input)
    bias: np.ndarray
    z: np.ndarray
    u: np.ndarray


class Problem(NamedTuple):
    """``f(W, b) = |X W^T + b - Y|^2 / (2 n)`` with a starting point, in float64."""

    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def make(cls) -> Problem:
        rng = np.random.default_rng(0)
        inputs, truth = rng.normal(size=(20, 6)), rng.normal(size=(4, 6))
        targets = inputs @ truth.T + 0.1 * rng.normal(size=(20, 4))
        return cls(inputs, targets, 0.5 * rng.normal(size=(4, 6)), rng.normal(size=4))

    def gradient(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        residual = self.inputs @ weight.T + bias - self.targets
        return residual.T @ self.inputs / len(self.inputs), residual.mean(axis=0)


class Recipe(NamedTuple):
    """The numbers of a method, as functions of the step where they may change."""

    rho: Callable[[int], float] = lambda t: 0.2
    penalty: Callable[[int], float] = lambda t: 0.3
    interval: int = 3
    sparsity: float = 0.6
    relaxation: float = 1.0
    rescales: bool = False
    adaptive: bool = False
    decay: float | None = None
    perturbed_every: int = 1
    reuse: float = 0.0


def trajectory(problem: Problem, recipe: Recipe) -> Iterator[Point]:
    """The points after every step with SGD under momentum, z and u in two arrays."""

    def keep(v: np.ndarray) -> np.ndarray:
        zeros = math.floor(recipe.sparsity * v.size)
        importance = np.ones_like(v) if m is None or not m.any() else m
        order = np.argsort(np.sqrt(importance).ravel() * np.abs(v).ravel(), kind="stable")
        kept = v.ravel().copy()
        kept[order[:zeros]] = 0
        return kept.reshape(v.shape)

    w, b = problem.weight, problem.bias
    m = None if recipe.decay is None else np.zeros_like(w)
    z, u = keep(w), np.zeros_like(w)
    w_buffer, b_buffer = np.zeros_like(w), np.zeros_like(b)
    flat = np.zeros(w.size + b.size)
    for t in range(STEPS):
        gw, gb = problem.gradient(w, b)
        scale = np.abs(w) + 0.01 if recipe.adaptive else np.ones_like(w)
        length = math.sqrt(np.sum((scale * gw) ** 2) + np.sum(gb**2))
        first = np.concatenate([gw.ravel(), gb])
        if t % recipe.perturbed_every == 0:
            gw, gb = problem.gradient(
                w + recipe.rho(t) * scale**2 * gw / length, b + recipe.rho(t) * gb / length
            )
            second = np.concatenate([gw.ravel(), gb])
            flat = second - (second @ first) / (first @ first) * first
        elif recipe.reuse:
            added = recipe.reuse * np.linalg.norm(first) / np.linalg.norm(flat) * flat
            gw, gb = gw + added[: w.size].reshape(w.shape), gb + added[w.size :]
        if recipe.rescales and t > 0:
            u = u * (recipe.penalty(t - 1) / recipe.penalty(t))
        w_buffer = MOMENTUM * w_buffer + gw + recipe.penalty(t) * (w - z + u)
        b_buffer = MOMENTUM * b_buffer + gb
        w, b = w - RATE * w_buffer, b - RATE * b_buffer
        if (t + 1) % recipe.interval == 0:
            if m is not None:
                m = recipe.decay * m + (1 - recipe.decay) * gw**2
            v = recipe.relaxation * w + (1 - recipe.relaxation) * z + u
            z = keep(v)
            u = v - z
        yield Point(w, b, z, u)


def _method(**changes: Any) -> safe_core.Method:
    defaults = {"sparsity": 0.6, "rho": 0.2, "penalty": 0.3, "dual_update_interval": 3}
    return safe_core.safe(**{**defaults, **changes})


CASES = {
    "safe": (_method(), Recipe()),
    "admm": (
        safe_core.admm(0.6, penalty=0.3, dual_update_interval=3),
        Recipe(rho=lambda t: 0.0),
    ),
    "every step": (_method(dual_update_interval=1), Recipe(interval=1)),
    "asam": (_method(adaptive=True, rho=0.5), Recipe(rho=lambda t: 0.5, adaptive=True)),
    "rho rises": (
        _method(rho=schedules.linear(0.3, steps=8)),
        Recipe(rho=lambda t: 0.3 * min(t / 8, 1.0)),
    ),
    "penalty rises": (
        _method(penalty=schedules.cosine(0.6, steps=10)),
        Recipe(penalty=lambda t: 0.3 * (1 - math.cos(math.pi * min(t / 10, 1.0)))),
    ),
    "relaxed": (_method(relaxation=1.6), Recipe(relaxation=1.6)),
    "rescaled": (
        _method(penalty=schedules.linear(0.9, steps=10, initial=0.1), rescale_dual=True),
        Recipe(penalty=lambda t: 0.1 + 0.08 * min(t, 10), rescales=True),
    ),
    "squared gradient": (_method(importance=SquaredGradient(0.7)), Recipe(decay=0.7)),
    "at times": (_method(perturbation_interval=2), Recipe(perturbed_every=2)),
    "reused": (
        _method(perturbation_interval=3, reuse=0.4),
        Recipe(perturbed_every=3, reuse=0.4),
    ),
}
"""Methods of the library, each with what it comes down to."""
