"""ELSA in both frameworks against a plain NumPy implementation, over 300 steps in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from stochastic_rounding import rounded
from torch import nn

import safe_core
from safe_core import SplitState, schedules
from safe_core.adapters.optax import find_state, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.constraints.float8 import dequantised
from safe_core.packing import unpacked

STEPS, RATE, BETAS, CLIP = 300, 5e-3, (0.9, 0.95), 1.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(40, 8))
TARGETS = INPUTS @ RNG.normal(size=(8, 6))
WEIGHT, BIAS = RNG.normal(size=(6, 8)), RNG.normal(size=6)
# The last inputs matter most, so the score of ELSA differs from the magnitude.
INPUTS *= np.geomspace(0.3, 3, 8)


Rounding = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def published(z: np.ndarray, u: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    """Return z after float8, and u after bfloat16."""
    z, u = z.astype(np.float32), u.astype(np.float32)
    scale = np.abs(z).max() * np.float32(1.05 / 448)
    small = (z * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn)
    return small.astype(np.float32) * scale, u.astype(ml_dtypes.bfloat16).astype(np.float32)


def little(z: np.ndarray, u: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return z and u, one of which is zero, after stochastic rounding of their difference."""
    found = rounded((z - u).astype(np.float32), step).astype(np.float32)
    return np.where(z != 0, found, 0), np.where(z != 0, 0, -found)


class Case(NamedTuple):
    """Arguments of `elsa`, and what they mean for the reference."""

    options: dict[str, Any]
    penalty: Callable[[int], float] = lambda t: 0.05
    interval: int = 8
    first: int = 8
    clips: bool = True
    rescales: bool = False
    rounds: Rounding | None = None

    @property
    def method(self) -> safe_core.Method:
        given = {"sparsity": 0.7, "penalty": 0.05, "dual_update_interval": 8, **self.options}
        return safe_core.elsa(**given)


CASES = {
    "objective": Case({}),
    "magnitude": Case({"score": "magnitude"}),
    "not clipped": Case({}, clips=False),
    "2:4": Case({"sparsity": "2:4"}),
    "published phase": Case({"first_dual_update": 1}, first=1),
    "linear from 0": Case(
        {"penalty": schedules.linear(0.1, steps=200), "first_dual_update": 1},
        penalty=lambda t: 0.1 * min(t / 200, 1),
        first=1,
        rescales=True,
    ),
    "exponential": Case(
        {"penalty": schedules.exponential(0.1, steps=200, initial=0.001)},
        penalty=lambda t: 0.001 * 100 ** min(t / 200, 1),
        rescales=True,
    ),
    "published state": Case(
        {"state_dtype": "float8_e4m3fn", "first_dual_update": 1}, first=1, rounds=published
    ),
    "little state": Case({"state_dtype": "bfloat16", "packed_support": True}, rounds=little),
}
every_case = pytest.mark.parametrize("name", CASES)


def gradients(weight: np.ndarray, bias: np.ndarray) -> list[np.ndarray]:
    residual = INPUTS @ weight.T + bias - TARGETS
    return [residual.T @ INPUTS / len(INPUTS), residual.mean(axis=0)]


def reference(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield x, z and u after every step."""
    params = [WEIGHT.copy(), BIAS.copy()]
    m, v = ([np.zeros_like(p) for p in params] for _ in range(2))

    def project(point: np.ndarray, score: np.ndarray) -> np.ndarray:
        if case.options.get("sparsity") == "2:4":
            groups = score.reshape(-1, 4)
            zero = np.argsort(groups, axis=1, kind="stable")[:, :2]
            mask = np.ones_like(groups)
            np.put_along_axis(mask, zero, 0, axis=1)
            return point * mask.reshape(point.shape)
        kept = point.ravel().copy()
        kept[np.argsort(score.ravel(), kind="stable")[: math.floor(0.7 * point.size)]] = 0
        return kept.reshape(point.shape)

    z, u = project(WEIGHT, np.abs(WEIGHT)), np.zeros_like(WEIGHT)
    if case.rounds:
        z, u = case.rounds(z, u, 0)
    for t in range(STEPS):
        g = gradients(*params)
        norm = math.sqrt(sum(np.sum(x**2) for x in g))
        if case.clips and norm > CLIP:
            g = [x * CLIP / norm for x in g]
        if case.rescales and t > 0 and case.penalty(t - 1) > 0:
            u = u * case.penalty(t - 1) / case.penalty(t)
        g[0] = g[0] + case.penalty(t) * (params[0] - z + u)
        for i, x in enumerate(g):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * x
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * x**2
            first, second = m[i] / (1 - BETAS[0] ** (t + 1)), v[i] / (1 - BETAS[1] ** (t + 1))
            params[i] = params[i] - RATE * (1 - t / STEPS) * first / (np.sqrt(second) + 1e-8)
        if t >= case.first - 1 and (t + 1 - case.first) % case.interval == 0:
            point = params[0] + u
            magnitude = case.options.get("score") == "magnitude"
            z = project(point, np.abs(point) if magnitude else v[0] * point**2)
            u = point - z
            if case.rounds:
                z, u = case.rounds(z, u, t + 1)
        yield params[0], z, u


def torch_parts(case: Case) -> tuple[nn.Linear, SparseOptimizer]:
    model = nn.Linear(8, 6).double()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(WEIGHT))
        model.bias.copy_(torch.as_tensor(BIAS))
    base = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS, eps=1e-8)
    return model, SparseOptimizer(base, case.method, model=model)


def torch_step(case: Case, model: nn.Linear, optimizer: SparseOptimizer, t: int) -> None:
    optimizer.zero_grad()
    residual = model(torch.as_tensor(INPUTS)) - torch.as_tensor(TARGETS)
    # Two parts of the batch: accumulated gradients are those of the whole.
    for part in residual.split(20):
        (part.square().sum() / (2 * len(INPUTS))).backward(retain_graph=True)
    if case.clips:
        # torch's own adds 1e-6 to the norm, which is more than the tolerance.
        held = [p.grad for p in model.parameters()]
        norm = nn.utils.get_total_norm(held)
        for g in held:
            g.mul_((CLIP / norm).clamp(max=1))
    for group in optimizer.param_groups:
        group["lr"] = RATE * (1 - t / STEPS)
    optimizer.step()


# At this penalty the weights are still far from z.
@pytest.mark.every_second
@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
@every_case
def test_torch_takes_the_steps_of_the_reference(name: str) -> None:
    case = CASES[name]
    model, optimizer = torch_parts(case)
    for t, (x, z, u) in enumerate(reference(case)):
        torch_step(case, model, optimizer, t)
        found = optimizer.split()
        np.testing.assert_allclose(model.weight.detach(), x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.anchor[0].double(), z - u, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(found.support[0], z != 0)
        assert not (z * u).any()
    optimizer.finalize()
    assert int((model.weight == 0).sum()) == (24 if "2:4" in name else math.floor(0.7 * 48))


# PyTorch runs every second case in every check, and JAX the others and the first.
REPEATED = list(CASES)[2::2]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in REPEATED else ()) for name in CASES],
)
def test_jax_takes_the_steps_of_the_reference(name: str) -> None:
    case = CASES[name]
    params = {"kernel": jnp.asarray(WEIGHT.T), "bias": jnp.asarray(BIAS)}
    base = optax.adam(lambda t: RATE * (1 - t.astype(float) / STEPS), *BETAS, eps=1e-8)
    clip = optax.clip_by_global_norm(CLIP) if case.clips else optax.identity()
    tx = optax.chain(clip, sparse_optimizer(base, case.method))
    state, traces = tx.init(params), []

    def loss(params):
        residual = INPUTS @ params["kernel"] + params["bias"] - TARGETS
        return (residual**2).sum() / (2 * len(INPUTS))

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for x, z, u in reference(case):
        params, state = step(params, state)
        held = find_state(state)
        anchor, support = held.anchor["kernel"], held.support["kernel"]
        if held.scale:
            found = dequantised(SplitState([anchor], [support], [held.scale["kernel"]]))
        else:
            found = SplitState([anchor], [unpacked(support, anchor)])
        np.testing.assert_allclose(params["kernel"].T, x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.anchor[0].T, z - u, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(found.support[0].T, z != 0)
    assert len(traces) == 1


@pytest.mark.parametrize("after", [1, 7, 8, 150, 201])
def test_a_run_resumes_to_the_same_bits_while_the_penalty_changes(after: int) -> None:
    case = CASES["linear from 0"]
    whole, optimizer = torch_parts(case)
    for t in range(210):
        if t == after:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        torch_step(case, whole, optimizer, t)
    model, second = torch_parts(case)
    model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for t in range(after, 210):
        torch_step(case, model, second, t)
    assert torch.equal(model.weight, whole.weight)
    assert torch.equal(second.split().anchor[0], optimizer.split().anchor[0])


def test_arguments_choose_the_parts() -> None:
    plain = safe_core.elsa(0.9)
    assert (plain.sparsity.scope, plain.constraint.rescale_dual) == ("tensor", False)
    assert isinstance(plain.importance, safe_core.SecondMoment)
    assert safe_core.elsa(0.9, score="magnitude").importance is None
    rises = schedules.linear(0.1, steps=10)
    assert safe_core.elsa(0.9, penalty=rises).constraint.rescale_dual
    assert not safe_core.elsa(0.9, penalty=rises, state_dtype="bfloat16").constraint.rescale_dual
    by_layer = safe_core.elsa({"a": 0.5, "b": "2:4"})
    assert by_layer.sparsity.of("a") == safe_core.Unstructured(0.5, "tensor")
    with pytest.raises(ValueError, match="score must be"):
        safe_core.elsa(0.9, score="taylor")
    with pytest.raises(ValueError, match=r"first_dual_update must not be above .*=32, got 33"):
        safe_core.elsa(0.9, first_dual_update=33)
    with pytest.raises(ValueError, match="first_dual_update must be at least 1, got 0"):
        safe_core.elsa(0.9, first_dual_update=0)
    with pytest.raises(ValueError, match=r"initial must be above 0, got 0\.0"):
        schedules.exponential(0.1, 10, 0.0)


def test_zeros_are_exact_where_weights_tie() -> None:
    model = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = SparseOptimizer(base, safe_core.elsa(0.58, dual_update_interval=1), model=model)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert int((~optimizer.split().support[0]).sum()) == 58
