"""Corruptions are the published ones, and attacks reach the optimum where it is known."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import array_api_compat.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_backends import Backend
from scipy import ndimage

from safe_core.study.robustness import CORRUPTIONS, PGD, corrupt, masking_report, pgd
from safe_core.study.robustness import jax as jax_attacks
from safe_core.study.robustness import torch as torch_attacks
from safe_core.study.robustness.corruptions import disk_kernel, motion_blur

RNG = np.random.default_rng(0)
SMOOTH = ndimage.gaussian_filter(RNG.normal(size=(4, 32, 32, 3)), (0, 2, 2, 0))
IMAGES = np.round(255 * np.clip(0.5 + 3 * SMOOTH, 0, 1)).astype(np.uint8)

# Two classes, 6 inputs: the loss is softplus(-margin), and its gradient has one direction.
WEIGHT = RNG.standard_normal((6, 2))
ACROSS = WEIGHT[:, 0] - WEIGHT[:, 1]
INPUTS = RNG.uniform(0.3, 0.7, (5, 6))
LABELS = np.asarray([0, 1, 0, 1, 1])
AGAINST = np.where(LABELS == 0, -1, 1)[:, None] * ACROSS  # the direction of rising loss


@functools.cache
def attacker(framework: str, attack: PGD) -> Any:
    """An attacker of the linear model."""
    if framework == "torch":
        return torch_attacks.attacker(lambda x, weight: x @ weight, attack)
    return jax_attacks.attacker(lambda x, weight: x @ weight, attack)


def attacked(framework: str, attack: PGD, inputs: np.ndarray = INPUTS, seed: int = 0) -> Any:
    """Inputs attacked on the linear model, as a NumPy array."""
    of = torch.from_numpy if framework == "torch" else jnp.asarray
    fool = attacker(framework, attack)
    return np.asarray(fool(of(inputs), of(LABELS), seed, of(WEIGHT)))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_linf_attack_reaches_the_corner_of_ball_and_range(framework):
    attack = PGD("linf", 0.1, high=0.75)
    wanted = np.clip(INPUTS + 0.1 * np.sign(AGAINST), 0, 0.75)
    assert (wanted == 0.75).any()
    np.testing.assert_allclose(attacked(framework, attack), wanted, rtol=1e-12)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_l2_attack_reaches_the_point_of_the_ball_along_the_weights(framework):
    attack = PGD("l2", 0.2, random_start=False)
    direction = AGAINST / np.linalg.norm(AGAINST, axis=1, keepdims=True)
    np.testing.assert_allclose(attacked(framework, attack), INPUTS + 0.2 * direction, rtol=1e-12)
    # From a random start nearly so, in 10 steps of a quarter of the radius.
    change = attacked(framework, replace(attack, random_start=True)) - INPUTS
    np.testing.assert_allclose(np.linalg.norm(change, axis=1), 0.2, rtol=1e-9)
    assert ((change * direction).sum(axis=1) > 0.97 * 0.2).all()


def test_frameworks_agree_and_stay_in_ball_and_range():
    attack = PGD("l2", 0.4, steps=3, low=0.2, high=0.72)
    found = attacked("torch", attack, seed=4)
    np.testing.assert_allclose(found, attacked("jax", attack, seed=4), rtol=1e-12)
    assert np.abs(found - attacked("jax", attack, seed=5)).max() > 1e-3
    assert (np.linalg.norm(found - INPUTS, axis=1) <= 0.4 * (1 + 1e-12)).all()
    assert found.max() == 0.72


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_step_on_every_backend(xp: Backend, norm):
    attack = PGD(norm, 0.4, step_share=0.5, high=0.8)
    origin = np.asarray([[0.5, 0.7], [0.1, 0.2], [0.4, 0.4]], np.float32)
    gradient = np.asarray([[3e-30, 4e-30], [0, 0], [-3, 4]], np.float32)
    unit = np.asarray([[0.6, 0.8], [0, 0], [-0.6, 0.8]])
    change = 0.2 * (unit if norm == "l2" else np.sign(gradient))
    namespace = {Backend.TORCH: torch_attacks.xp, Backend.JAX: jnp, Backend.JAX_JIT: jnp}
    module = namespace.get(xp, array_api_compat.numpy)
    if xp is Backend.STRICT:
        module = xp.asarray(origin).__array_namespace__()
    found = xp.run(functools.partial(pgd.step, attack, xp=module), origin, origin, gradient)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.minimum(origin + change, 0.8), rtol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball_evenly(norm):
    noise = pgd.start(PGD(norm, 2.0), (4000, 3), seed=0)
    lengths = np.abs(noise).max(axis=1) if norm == "linf" else np.linalg.norm(noise, axis=1)
    assert lengths.max() <= 2
    # In three dimensions half the radius holds an eighth of the ball.
    assert np.mean(lengths < 1) == pytest.approx(1 / 8, abs=0.02)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.1)


def test_parameters_and_their_gradients_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.BatchNorm1d(2))
    inputs, labels = torch.from_numpy(INPUTS).float(), torch.from_numpy(LABELS)
    fool = torch_attacks.attacker(model, PGD("linf", 0.1))
    with pytest.raises(ValueError, match="logits_fn must be in evaluation mode"):
        fool(inputs, labels)
    model.eval()
    with torch.no_grad():
        moved = fool(inputs, labels)
    assert (moved != inputs).any()
    assert not moved.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_inputs_out_of_range_are_refused(framework):
    with pytest.raises(ValueError, match=r"inputs must be in \[0.0, 1.0\] and not be normalised"):
        attacked(framework, PGD("linf", 0.1), INPUTS * 2 - 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "l1", "radius": 1}, "norm must be one of 'linf', 'l2', got 'l1'"),
        ({"norm": "l2", "radius": -1}, "radius must be"),
        ({"norm": "l2", "radius": 1, "steps": 0}, "steps must be at least 1"),
        ({"norm": "l2", "radius": 1, "low": 1}, "low must be below high, got 1 and 1.0"),
    ],
)
def test_attacks_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PGD(**kwargs)


def test_report_finds_no_fault_in_a_plain_model_and_masked_gradients_in_another():
    rng = np.random.default_rng(1)
    weight = torch.from_numpy(rng.standard_normal((20, 3)))
    inputs = torch.from_numpy(rng.uniform(0, 1, (30, 20)))
    labels = (inputs @ weight).argmax(1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x @ weight

    def saturated(x: torch.Tensor) -> torch.Tensor:
        # The same answers, with no gradient to follow: the loss is 0 to the last bit.
        return 1e5 * (x @ weight)

    def misleading(x: torch.Tensor) -> torch.Tensor:
        # The same answers, with the gradient of others.
        return x.detach() @ weight + (x - x.detach()) @ -weight

    reports = [
        masking_report(
            fn,
            functools.partial(torch_attacks.attacker, fn),
            inputs,
            labels,
            attack=PGD("l2", 0.05, random_start=fn is plain),
        )
        for fn in (plain, saturated, misleading)
    ]
    assert reports[0].faults == ()
    assert reports[0].losses[-1] > reports[0].noise_losses[-1] > reports[0].losses[0]
    assert reports[0].radii == pytest.approx((0, 0.025, 0.05, 0.1, 0.2))
    assert "an attack without bound leaves 100% right" in reports[1].faults
    assert any(fault.startswith("random noise beats") for fault in reports[1].faults)
    assert reports[2].faults[0].startswith("the loss falls with the radius")


def test_report_takes_jax():
    def logits(x: Any) -> jax.Array:
        return x @ jnp.asarray(WEIGHT)

    labels = np.argmax(INPUTS @ WEIGHT, axis=1)
    report = masking_report(
        logits,
        functools.partial(jax_attacks.attacker, logits),
        jnp.asarray(INPUTS),
        jnp.asarray(labels),
        attack=PGD("linf", 0.1, random_start=False),
        factors=(1,),
    )
    margins = np.abs(INPUTS @ ACROSS) - 0.1 * np.abs(ACROSS).sum()
    assert report.losses[1] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    assert report.faults == ()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity(name):
    distances = []
    for severity in range(1, 6):
        found = corrupt(IMAGES, name, severity, seed=1)
        assert (found.shape, found.dtype) == (IMAGES.shape, np.uint8)
        distances.append(np.mean((found.astype(float) - IMAGES) ** 2))
    # Two severities of motion blur differ in the length of a line, whose end weighs nothing.
    assert all(b > 0.98 * a for a, b in itertools.pairwise(distances))
    assert distances[-1] > 1.5 * distances[0] > 0
    np.testing.assert_array_equal(found, corrupt(IMAGES, name, 5, seed=1))
    grey = corrupt(IMAGES[:, :8, :10, :1], name, 2)
    assert grey.shape == (4, 8, 10, 1)
    random = name.endswith("noise") or name == "motion_blur"
    assert (found != corrupt(IMAGES, name, 5, seed=2)).any() == random


def test_noise_has_the_published_strength():
    grey = np.full((8, 32, 32, 3), 128, np.uint8)

    def deviation(name: str, severity: int) -> float:
        return float(corrupt(grey, name, severity).std() / 255)

    assert deviation("gaussian_noise", 2) == pytest.approx(0.06, rel=0.03)
    assert deviation("shot_noise", 4) == pytest.approx(np.sqrt(128 / 255 / 75), rel=0.03)
    hit = corrupt(grey, "impulse_noise", 5)
    assert np.mean(hit != 128) == pytest.approx(0.07, rel=0.1)
    assert np.mean(hit == 255) == pytest.approx(np.mean(hit == 0), rel=0.1)


def test_brightness_keeps_hue_and_contrast_the_mean():
    image = np.asarray([[[[200, 100, 50], [0, 0, 0]]]], np.uint8)
    bright = corrupt(image, "brightness", 5)[0, 0]  # value raised by 0.3, up to 1
    np.testing.assert_allclose(bright[0], [255, 127, 63], atol=1)
    np.testing.assert_array_equal(bright[1], [76, 76, 76])
    flat = corrupt(image, "contrast", 5)[0, 0]
    np.testing.assert_allclose(flat[0], [115, 57.5, 28.75], atol=1)
    np.testing.assert_allclose(flat[1], [85, 42.5, 21.25], atol=1)


def test_blurs_are_averages():
    wanted = np.pad(np.full((3, 3), 1 / 9), 1)
    np.testing.assert_allclose(disk_kernel(1.5, 0.1), wanted, atol=1e-12)
    x = np.zeros((2, 9, 9, 1))
    x[:, 4, 4] = 1
    level, diagonal = motion_blur(x, 2, 1.0, np.asarray([0.0, 45.0]))[..., 0]
    weights = np.exp(-(np.arange(5) ** 2) / 2)
    weights /= weights.sum()
    np.testing.assert_allclose(level[4, :5], weights[::-1])
    # 0 to 4 pixels along the diagonal are 0, 1, 1, 2 and 3 along each axis.
    weights = np.bincount([0, 1, 1, 2, 3], weights)
    np.testing.assert_allclose(np.diag(diagonal)[1:5], weights[::-1])
    np.testing.assert_allclose([level.sum(), diagonal.sum()], 1)


@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (IMAGES, "rain", 1, "name must be one of"),
        (IMAGES, "contrast", 6, "severity must be from 1 to 5, got 6"),
        (IMAGES / 255, "contrast", 1, "images must be uint8 .* got float64"),
        (IMAGES[0], "contrast", 1, r"images must be uint8 .* shape \(32, 32, 3\)"),
    ],
)
def test_corruptions_are_checked(images, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity)
