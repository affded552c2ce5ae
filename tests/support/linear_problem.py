"""A linear regression problem, and a NumPy implementation of the whole method for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

import safe_core
from safe_core import SquaredGradient, schedules

STEPS, RATE, MOMENTUM = 12, 0.1, 0.9


class Point(NamedTuple):
    """Parameters and ADMM variables after a step; without ADMM, z is the last projection."""

    weight: np.ndarray  # (output, input)
    bias: np.ndarray
    z: np.ndarray
    u: np.ndarray


class Problem(NamedTuple):
    """The problem ``f(W, b) = |X W^T + b - Y|^2 / (2 n)`` and a starting point, in float64."""

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
    """The settings of a method; those that may change are functions of the step."""

    rho: Callable[[int], float] = lambda t: 0.2
    penalty: Callable[[int], float] = lambda t: 0.3
    interval: int = 3
    sparsity: Callable[[int], Any] = lambda t: Fraction(6, 10)
    relaxation: float = 1.0
    rescales: bool = False
    adaptive: bool = False
    decay: float | None = None
    perturbed_every: int = 1
    reuse: float = 0.0
    normalised: bool = True
    compressed: bool = False
    added: str = ""  # "x" or "C(x)"
    decoupled: bool = False
    in_steps: bool = False
    full_step: float = 0.0
    max_growth: float = 0.0
    pulled: bool = False
    least: float | None = None  # of rho, for the channel of largest norm
    norm: str = "channel"
    uniform_from: int = STEPS
    uniform_rho: float = 0.0
    channels: bool = False
    after: str = "dual"  # or "hard", "mask", "nothing"
    steps: int = STEPS


def trajectory(problem: Problem, recipe: Recipe) -> Iterator[Point]:
    """Yield the point after every step of SGD with momentum."""

    def keep(v: np.ndarray, t: int) -> np.ndarray:
        if recipe.channels:
            scores = np.sum((1 if m is None or not m.any() else m) * v**2, axis=1)
            gone = np.argsort(scores, kind="stable")[: math.floor(recipe.sparsity(t) * len(v))]
            return np.where(np.isin(np.arange(len(v)), gone)[:, None], 0, v)
        zeros = math.floor(recipe.sparsity(t) * v.size)
        importance = np.ones_like(v) if m is None or not m.any() else m
        order = np.argsort(np.sqrt(importance).ravel() * np.abs(v).ravel(), kind="stable")
        kept = v.ravel().copy()
        kept[order[:zeros]] = 0
        return kept.reshape(v.shape)

    w, b = problem.weight, problem.bias
    m = None if recipe.decay is None else np.zeros_like(w)
    z, u = keep(w, 0), np.zeros_like(w)
    w_buffer, b_buffer = np.zeros_like(w), np.zeros_like(b)
    flat = np.zeros(w.size + b.size)
    lengths: list[float] = []
    sizes: list[float] = []
    shrinkage = 0.0

    def gradient(w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gw, gb = problem.gradient(w, b)
        return np.where(z != 0, gw, 0) if recipe.after == "mask" else gw, gb

    for t in range(recipe.steps):
        gw, gb = g0w, g0b = gradient(w, b)
        scale = np.abs(w) + 0.01 if recipe.adaptive else np.ones_like(w)
        length = math.sqrt(np.sum((scale * gw) ** 2) + np.sum(gb**2)) if recipe.normalised else 1
        first = np.concatenate([gw.ravel(), gb])
        if t % recipe.perturbed_every == 0:
            unit = math.sqrt(np.mean(np.square(lengths))) if lengths else 0.0
            if recipe.full_step and lengths:
                size = math.sqrt(np.mean(np.square(sizes)))
                unit *= min(unit / size / recipe.full_step, 1) ** 2
            rho = recipe.rho(t) * (unit * math.exp(-shrinkage) if recipe.in_steps else 1)
            if recipe.least is None:
                moved, moved_b = w + rho * scale**2 * gw / length, b + rho * gb / length
            elif t >= recipe.uniform_from:
                rho = recipe.uniform_rho
                moved, moved_b = w + rho * scale**2 * gw / length, b + rho * gb / length
            else:
                moved, moved_b = by_channel(recipe, rho, w, b, scale, gw, gb)
            gw, gb = gradient(keep(moved, t) if recipe.compressed else moved, moved_b)
            second = np.concatenate([gw.ravel(), gb])
            if recipe.max_growth:
                grows = np.linalg.norm(second) > recipe.max_growth * np.linalg.norm(first)
                shrinkage = shrinkage + 1 / 4 if grows else max(shrinkage - 1 / 50, 0)
            flat = second - (second @ first) / (first @ first) * first
        elif recipe.reuse:
            added = recipe.reuse * np.linalg.norm(first) / np.linalg.norm(flat) * flat
            gw, gb = gw + added[: w.size].reshape(w.shape), gb + added[w.size :]
        if recipe.rescales and t > 0:
            u = u * (recipe.penalty(t - 1) / recipe.penalty(t))
        if recipe.added:
            added = (g0w, g0b) if recipe.added == "x" else gradient(keep(w, t), b)
            gw, gb = gw + added[0], gb + added[1]
        has_penalty = recipe.after == "dual" and not recipe.pulled
        pull = recipe.penalty(t) * (w - z + u) if has_penalty else np.zeros_like(w)
        w_buffer = MOMENTUM * w_buffer + (gw if recipe.decoupled else gw + pull)
        b_buffer = MOMENTUM * b_buffer + gb
        if t % 8 == 0:
            sizes.append(float(np.linalg.norm(w)))
        w, b = w - RATE * w_buffer, b - RATE * b_buffer
        if t % 8 == 0:
            lengths.append(RATE * np.linalg.norm(w_buffer))
        if recipe.decoupled:
            w = w - RATE * pull
        if recipe.pulled:
            w = np.where(z != 0, w, w - (1 - math.exp(-recipe.penalty(t))) * (w - z + u))
        if recipe.after == "mask":
            w = np.where(z != 0, w, 0)
            if recipe.sparsity(t + 1) != recipe.sparsity(t):
                if m is not None:
                    m = recipe.decay * m + (1 - recipe.decay) * gw**2
                w = z = keep(w, t + 1)
        elif (t + 1) % recipe.interval == 0:
            if m is not None:
                m = recipe.decay * m + (1 - recipe.decay) * gw**2
            if recipe.after != "dual":
                z = keep(w, t + 1)
                w = z if recipe.after == "hard" else w
                yield Point(w, b, z, u)
                continue
            v = recipe.relaxation * w + (1 - recipe.relaxation) * z + u
            z = keep(v, t + 1)
            u = v - z
        yield Point(w, b, z, u)


def by_channel(
    recipe: Recipe,
    rho: float,
    w: np.ndarray,
    b: np.ndarray,
    scale: np.ndarray,
    gw: np.ndarray,
    gb: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the point that AdaSAP moves to, channel by channel."""
    sizes = [np.linalg.norm(row) for row in w]
    alive = [s for s in sizes if s > 0]
    moved, bias_length = w.copy(), np.linalg.norm(gb)
    if recipe.norm == "global":
        bias_length = math.hypot(bias_length, np.linalg.norm(scale * gw))
    for i, s in enumerate(sizes):
        spread = max(alive) - min(alive)
        share = (s - min(alive)) / spread if s > 0 else 0.0
        radius = rho - share * (rho - recipe.least * rho)
        length = np.linalg.norm(scale[i] * gw[i])
        length = bias_length if recipe.norm == "global" else length
        if length:
            moved[i] += radius * scale[i] ** 2 * gw[i] / length
    return moved, b + rho * gb / bias_length


def _method(**changes: Any) -> safe_core.Method:
    defaults = {"sparsity": 0.6, "rho": 0.2, "penalty": 0.3, "dual_update_interval": 3}
    return safe_core.safe(**{**defaults, **changes})


# Of three equally likely, by seed 0.
DRAWN = [0.5, 0.7, 0.5, 0.7, 0.3, 0.5, 0.7, 0.5, 0.5, 0.7, 0.5, 0.7, 0.5]
MULTI = schedules.random_sparsity((0.3, 0.5, 0.7))


def drawn(t: int) -> Fraction:
    return Fraction(str(DRAWN[t]))


def gradual(power: int) -> Callable[[int], Fraction]:
    """Return a sparsity from 0 to 0.6 in 3 stages of 3 steps, starting at step 1."""
    stage = lambda t: Fraction(min(max(t - 1, 0) // 3, 3), 3)  # noqa: E731
    return lambda t: Fraction(6, 10) * (1 - (1 - stage(t)) ** power)


def untuned(method: safe_core.Method, *, perturbs: bool) -> tuple[safe_core.Method, Recipe]:
    """Return a method made from a number of steps, with the schedules that were derived."""
    schedule, constraint, e = method.sparsity.schedule, method.constraint, method.perturbation
    return method, Recipe(
        rho=e.rho if perturbs else lambda t: 0.0,
        penalty=constraint.penalty,
        interval=constraint.dual_update_interval,
        sparsity=lambda t: schedule.table[schedule.stage(t)],
        in_steps=True,
        full_step=e.full_step if perturbs else 0.0,
        max_growth=e.max_growth if perturbs else 0.0,
        pulled=True,
    )


def in_steps(rho: float, **options: float) -> tuple[safe_core.Method, Recipe]:
    """Return ADMM with a radius in steps."""
    e = safe_core.SAM(rho, in_steps=True, **options)
    method = safe_core.Method(0.6, safe_core.ADMM(0.3, 3), perturbation=e)
    return method, Recipe(rho=lambda t: rho, in_steps=True, **options)


def adasap(every: int = 2, rho: float = 0.4, **options: Any) -> tuple[safe_core.Method, Recipe]:
    """Return AdaSAP that removes half of the channels in three stages of ``every`` steps."""
    start = 3 * every // 2
    schedule = schedules.exponential_sparsity(0.5, steps=3 * every, start=start, every=every)
    channels = safe_core.Channel(schedule, scope="tensor")
    method = safe_core.adasap(channels, rho_max=rho, rho_min=rho / 4, rho=rho / 2, **options)
    return method, Recipe(
        rho=lambda t: rho,
        sparsity=lambda t: 1 - Fraction(0.5 ** (min(max((t - start) // every, 0), 3) / 3)),
        adaptive=options.get("adaptive", True),
        decay=None if "importance" not in options else 0.7,
        least=0.25,
        norm=options.get("norm", "channel"),
        uniform_from=start + 3 * every,
        uniform_rho=rho / 2,
        channels=True,
        after="mask",
        steps=6 * every,
    )


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
    "sg": (_method(projected_gradient=True), Recipe(added="C(x)")),
    "sg multi": (
        _method(sparsity=MULTI, projected_gradient=True),
        Recipe(added="C(x)", sparsity=drawn),
    ),
    "decoupled": (_method(decoupled=True), Recipe(decoupled=True)),
    "pull": (
        safe_core.Method(0.6, safe_core.Pull(0.3, 3), perturbation=safe_core.SAM(0.2)),
        Recipe(pulled=True),
    ),
    "radius in steps": in_steps(1.5),
    "full radius from a length on": in_steps(1.5, full_step=0.2),
    "radius shrinks where the gradient grows": in_steps(6.0, max_growth=1.1),
    "untuned safe": untuned(safe_core.safe(0.6, steps=2 * STEPS), perturbs=True),
    "untuned admm": untuned(safe_core.admm(0.6, steps=2 * STEPS), perturbs=False),
    "iht": (
        safe_core.iht(0.6, interval=3, importance=SquaredGradient(0.7)),
        Recipe(rho=lambda t: 0.0, decay=0.7, after="hard"),
    ),
    "gmp": (
        safe_core.gmp(schedules.cubic(0.6, steps=9, start=1, every=3)),
        Recipe(rho=lambda t: 0.0, sparsity=gradual(3), after="mask"),
    ),
    "imp": (
        safe_core.imp_sam(schedules.linear_sparsity(0.6, steps=9, start=1, every=3), rho=0.2),
        Recipe(sparsity=gradual(1), after="mask"),
    ),
    "adasap": adasap(),
    # Normalised gradients amplify rounding near the minimum, the more the larger the radius.
    "adasap over 300 steps": adasap(every=50, rho=0.02),
    "adasap with SAM and Taylor": adasap(adaptive=False, importance=SquaredGradient(0.7)),
    "adasap with a global norm": adasap(norm="global"),
    "magnitude": (
        safe_core.magnitude(0.6, importance_interval=3),
        Recipe(rho=lambda t: 0.0, after="nothing"),
    ),
    "cram": (
        safe_core.cram(0.6, rho=0.2, importance_interval=3, importance=SquaredGradient(0.7)),
        Recipe(normalised=False, compressed=True, decay=0.7, after="nothing"),
    ),
    "cram plus multi": (
        safe_core.cram(MULTI, rho=0.2, plus=True, importance_interval=3),
        Recipe(normalised=False, compressed=True, added="x", sparsity=drawn, after="nothing"),
    ),
}
"""Methods of the library with the settings of the reference that they must match."""
