"""Radii by channel follow AdaSAP's formula, stages follow one another, and `adasap` joins them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_backends import BFLOAT16, Backend, assert_same
from torch import nn

import safe_core
from safe_core import ASAM, SAM, Channel, ChannelSAM, Layout, Method, Staged, schedules
from safe_core.adapters.optax import sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer

ROWS, COLUMNS = Layout((1,), (0,)), Layout((-2,), (-1,))
EXPERTS = Layout(input_axes=(2,), output_axes=(1,), batch_axes=(0,))


@functools.cache
def perturb(kind: ChannelSAM, *layouts: Layout | None) -> Any:
    def run(params: Any, gradients: Any) -> Any:
        return kind.perturbation(params, gradients, rho=0.5, layouts=layouts)

    return run


def weights(*norms: float, seed: int = 0) -> np.ndarray:
    """A weight (output, input) whose rows have these norms."""
    rows = np.random.default_rng(seed).normal(size=(len(norms), 6))
    return rows * (np.asarray(norms) / np.linalg.norm(rows, axis=1))[:, None]


def gradient(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def radii(e: np.ndarray, x: np.ndarray | None = None, eta: float = 0.01) -> np.ndarray:
    """The norm of ``T^-1 e`` of every row."""
    return np.linalg.norm(e if x is None else e / (np.abs(x) + eta), axis=1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_radii_fall_from_rho_to_the_smallest_as_norms_rise(xp: Backend, adaptive: bool) -> None:
    x, g = weights(1.0, 3.0, 2.0, 5.0), gradient((4, 6))
    kind = ChannelSAM(0.5, min_ratio=0.2, adaptive=adaptive)
    (e,) = xp.run(perturb(kind, ROWS), [x], [g])
    t = np.abs(x) + 0.01 if adaptive else np.ones_like(x)
    found = radii(e, x if adaptive else None)
    np.testing.assert_allclose(found, [0.5, 0.3, 0.4, 0.1], rtol=1e-13)
    direction = t**2 * g / np.linalg.norm(t * g, axis=1, keepdims=True)
    np.testing.assert_allclose(e, found[:, None] * direction, rtol=1e-13)


def test_norms_compare_over_all_layers_or_within_each(xp: Backend) -> None:
    x = [weights(1.0, 3.0), weights(2.0, 5.0).T]
    g = [gradient((2, 6)), gradient((6, 2))]

    def found(scope: Any) -> list[float]:
        first, second = xp.run(perturb(ChannelSAM(0.5, 0.0, scope=scope), ROWS, COLUMNS), x, g)
        return [*radii(first), *radii(second.T)]

    np.testing.assert_allclose(found("global"), [0.5, 0.25, 0.375, 0.0], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found("tensor"), [0.5, 0.0, 0.5, 0.0], rtol=1e-13, atol=1e-15)


def test_a_convolution_and_a_stack_have_the_channels_of_their_slices(xp: Backend) -> None:
    x, g = gradient((2, 3, 4, 5)), gradient((2, 3, 4, 5), seed=2)
    kind = ChannelSAM(0.5, min_ratio=0.1, scope="tensor")
    flat = xp.run(perturb(kind, ROWS), [x.reshape(2, 60)], [g.reshape(2, 60)])
    (window,) = xp.run(perturb(kind, ROWS), [x], [g])
    np.testing.assert_allclose(window.reshape(2, 60), flat[0], rtol=1e-13)
    (stack,) = xp.run(perturb(kind, EXPERTS), [x], [g])
    apart = xp.run(perturb(kind, ROWS, ROWS), list(x), list(g))
    np.testing.assert_allclose(stack, np.stack(apart), rtol=1e-13)


def test_parameters_without_channels_share_one_norm(xp: Backend) -> None:
    x = [weights(1.0, 2.0), np.ones(3), np.ones((2, 2))]
    g = [gradient((2, 6)), gradient((3,)), gradient((2, 2))]
    alone = xp.run(perturb(ASAM(0.5), None, None), x[1:], g[1:])
    _, *others = xp.run(perturb(ChannelSAM(0.5, adaptive=True), ROWS, None, None), x, g)
    for a, b in zip(others, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
    for plain in (ChannelSAM(0.5), ChannelSAM(0.5, norm="global")):
        without = plain.perturbation(x, g, rho=0.5)
        for a, b in zip(without, SAM(0.5).perturbation(x, g, rho=0.5), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13)


def test_the_global_norm_leaves_the_radii(xp: Backend) -> None:
    x, g = [weights(1.0, 3.0), np.ones(2)], [gradient((2, 6)), gradient((2,))]
    kind = ChannelSAM(0.5, min_ratio=0.2, norm="global")
    e = xp.run(perturb(kind, ROWS, None), x, g)
    length = np.sqrt(sum(np.sum(a**2) for a in g))
    np.testing.assert_allclose(e[0], np.asarray([[0.5], [0.1]]) * g[0] / length, rtol=1e-13)
    np.testing.assert_allclose(e[1], 0.5 * g[1] / length, rtol=1e-13)


# Edge cases


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_equal_norms_and_one_channel_get_rho(xp: Backend, scope: Any) -> None:
    kind = ChannelSAM(0.5, min_ratio=0.2, scope=scope)
    x, g = weights(2.0, 2.0, 2.0), gradient((3, 6))
    (e,) = xp.run(perturb(kind, ROWS), [x], [g])
    np.testing.assert_allclose(radii(e), 0.5, rtol=1e-13)
    (e,) = xp.run(perturb(kind, ROWS), [x[:1]], [g[:1]])
    np.testing.assert_allclose(radii(e), 0.5, rtol=1e-13)


def test_norms_that_differ_by_rounding_are_equal(xp: Backend) -> None:
    row = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    x = np.stack([row, row[::-1], np.roll(row, 333)])
    g = gradient((3, 1000)).astype(np.float32)
    (e,) = xp.run(perturb(ChannelSAM(0.5, min_ratio=0.0), ROWS), [x], [g])
    np.testing.assert_allclose(radii(e), 0.5, rtol=1e-5)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_removed_channels_do_not_enter_the_smallest_norm(xp: Backend, scope: Any) -> None:
    kind = ChannelSAM(0.5, min_ratio=0.2, scope=scope)
    x, g = weights(0.0, 1.0, 2.0, 3.0), gradient((4, 6))
    (e,) = xp.run(perturb(kind, ROWS), [x], [g])
    np.testing.assert_allclose(radii(e), [0.5, 0.5, 0.3, 0.1], rtol=1e-13)
    g[0] = 0  # as under a mask
    (e,) = xp.run(perturb(kind, ROWS), [x], [g])
    assert not e[0].any()
    np.testing.assert_allclose(radii(e[1:]), [0.5, 0.3, 0.1], rtol=1e-13)
    (e,) = xp.run(perturb(kind, ROWS), [0 * x], [g])
    np.testing.assert_allclose(radii(e), [0, 0.5, 0.5, 0.5], rtol=1e-13)


@pytest.mark.parametrize("norm", ["channel", "global"])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_gradient_that_is_zero_or_not_finite_gives_zero(
    xp: Backend, bad: float, norm: Any
) -> None:
    g = np.zeros((2, 6)) if not bad else gradient((2, 6))
    g[1, 1] = bad
    kind = ChannelSAM(0.5, norm=norm)
    e = xp.run(perturb(kind, ROWS, None), [weights(1.0, 2.0), np.ones(2)], [g, np.zeros(2)])
    assert_same(e, [np.zeros_like(g), np.zeros(2)])


@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_16_bit_parameters_compute_in_float32(xp: Backend, dtype: np.dtype) -> None:
    if dtype not in xp.dtypes:
        dtype = np.dtype(np.float32)
    x, g = np.ones((2, 1024), dtype), np.full((2, 1024), 300, dtype)
    (e,) = xp.run(perturb(ChannelSAM(0.5), ROWS), [x], [g])
    assert e.dtype == np.float32
    np.testing.assert_allclose(e, 0.5 / 32, rtol=1e-6)


# Stages


def test_a_staged_perturbation_changes_at_its_step(xp: Backend) -> None:
    first = ChannelSAM(0.5, min_ratio=0.2)
    second = SAM(schedules.linear(2.0, steps=10, initial=1.0))
    method = Method(0.5, perturbation=Staged(first, second, start=3))
    x, g = [weights(1.0, 2.0)], [gradient((2, 6))]

    def at(step: Any, params: Any, gradients: Any) -> Any:
        return method.perturb(params, gradients, step, layouts=[ROWS])

    for step in (0, 2, 3, 5):
        part, rho = (first, 0.5) if step < 3 else (second, 1 + step / 10)
        wanted = part.perturbation(x, g, rho=rho, layouts=[ROWS])
        for t in (step, np.asarray(step)):
            # The radius of a traced step has the precision of float32.
            np.testing.assert_allclose(xp.run(at, t, x, g)[0], wanted[0], rtol=1e-6)
    assert [method.radius(t) for t in (2, 3)] == [0.5, pytest.approx(1.3)]


def test_a_staged_perturbation_takes_the_options_of_both_stages() -> None:
    staged = Staged(SAM(0.1, interval=3, reuse=0.5), ASAM(0.2, interval=3, reuse=0.5), 4)
    assert (staged.interval, staged.reuse, staged.is_zero) == (3, 0.5, False)
    assert Staged(SAM(0), SAM(0), 4).is_zero
    nested = Staged(SAM(0.1), Staged(SAM(0.2), SAM(0.3), 8), 4)
    assert [nested.rho(t) for t in (0, 4, 8)] == [0.1, 0.2, 0.3]
    assert nested == Staged(SAM(0.1), Staged(SAM(0.2), SAM(0.3), 8), 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Staged(SAM(0.1), 0.1, 3), "second must be a perturbation, got 0.1"),
        (lambda: Staged(SAM(0.1), SAM(0.1), -1), "start must be at least 0, got -1"),
        (lambda: Staged(SAM(0.1, in_steps=True), SAM(0.1), 3), "first must be normalised"),
        (lambda: Staged(SAM(0.1), safe_core.GradientAscent(0.1), 3), "second must be normalised"),
        (lambda: Staged(SAM(0.1, interval=2), SAM(0.1), 3), "interval must be the same .*2 and 1"),
        (lambda: Staged(SAM(0.1), SAM(0.1), 3).direction([], [], rho=1), "step must be given"),
        (lambda: ChannelSAM(0.1, min_ratio=1.5), r"min_ratio must be in \[0, 1\], got 1.5"),
        (lambda: ChannelSAM(0.1, scope="row"), "scope must be one of .*'row'"),
        (lambda: ChannelSAM(0.1, norm="l1"), "norm must be one of .*'l1'"),
        (lambda: ChannelSAM(0.1, adaptive=1), "adaptive must be True or False, got 1"),
        (lambda: safe_core.adasap(0.5), "steps must be given unless .* got None"),
        (lambda: safe_core.adasap("2:4", steps=9), "sparsity must be a Python number"),
        (lambda: safe_core.adasap(safe_core.NM(2, 4), steps=9), "sparsity must be a fraction"),
        (
            lambda: safe_core.adasap(schedules.random_sparsity((0.1, 0.2)), steps=9),
            "sparsity must be a fraction",
        ),
        (
            lambda: safe_core.adasap(schedules.cubic(0.5, 4), steps=9),
            "steps must be left out if the sparsity is a schedule, .* got 9",
        ),
        (
            lambda: safe_core.adasap(0.5, steps=9, rho_max=0.1, rho_min=0.2),
            r"rho_max must be at least rho_min, 0\.2, got 0\.1",
        ),
    ],
)
def test_a_bad_argument_is_named(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_adasap_takes_its_stages_from_the_steps_or_from_a_schedule() -> None:
    def stages(method: Method) -> tuple[int, int, int, int]:
        schedule = method.sparsity.schedule
        return schedule.start, schedule.steps, schedule.every, method.perturbation.start

    assert stages(safe_core.adasap(0.8, steps=90 * 1251)) == (12510, 1230, 30, 13740)
    assert stages(safe_core.adasap(0.8, steps=1000)) == (111, 11, 1, 122)
    assert stages(safe_core.adasap(0.8, steps=1)) == (0, 1, 1, 1)
    given = schedules.exponential_sparsity(0.5, steps=8, start=5, every=2)
    method = safe_core.adasap(Channel(given, "tensor"), adaptive=False)
    assert stages(method) == (5, 8, 2, 13)
    plain = ChannelSAM(0.1, min_ratio=0.01 / 0.1, scope="tensor")
    assert method.perturbation == Staged(plain, SAM(0.05), 13)
    first = safe_core.adasap(0.5, steps=90).perturbation.first
    assert first == ChannelSAM(2.0, min_ratio=0.01 / 2.0, adaptive=True)
    assert [t for t in range(20) if method.is_due(t)] == [6, 8, 10, 12]


# In the adapters


def test_a_param_group_scales_all_radii_of_its_channels() -> None:
    model = nn.Linear(6, 3).double()
    base = torch.optim.SGD([{"params": model.parameters(), "rho": 0.25}], lr=0.1)
    method = Method(0.5, perturbation=ChannelSAM(0.5, min_ratio=0.2))
    optimizer = SparseOptimizer(base, method, model=model)
    x = model.weight.detach().clone()
    model(torch.ones(1, 6).double()).square().sum().backward()
    with optimizer.perturbed():
        moved = radii((model.weight.detach() - x).numpy())
    assert sorted([moved.min(), moved.max()]) == pytest.approx([0.05, 0.25])


def test_removal_follows_the_importance_and_the_channels_stay_away_in_jax() -> None:
    schedule = schedules.exponential_sparsity(0.5, steps=4, start=2, every=2)
    method = safe_core.adasap(
        Channel(schedule, "tensor"), importance=safe_core.SquaredGradient(0.0)
    )
    tx = sparse_optimizer(optax.sgd(0.01, momentum=0.9), method)
    params = {"kernel": jnp.asarray(weights(1.0, 2.0, 3.0, 4.0).T)}
    # The loss does not depend on the two largest channels, so Taylor's importance removes them.
    scale = jnp.asarray([1.0, 2.0, 0.0, 0.0])

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        grad_fn = jax.grad(lambda p: ((p["kernel"].sum(0) * scale - 1) ** 2).sum())
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state, zeros, traces = tx.init(params), [], []
    for _ in range(9):
        params, state = step(params, state)
        zeros.append(np.asarray(params["kernel"] == 0).all(axis=0).tolist())
    assert [sum(z) for z in zeros] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert zeros[-1] == [False, False, True, True]
    assert len(traces) == 1
