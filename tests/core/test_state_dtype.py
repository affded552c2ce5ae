"""Anchors in bfloat16: rounded without a bias, by the same bits everywhere, and resumed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_backends import BFLOAT16, Backend, assert_same
from hypothesis import given
from hypothesis import strategies as st
from short_runs import short_run
from stochastic_rounding import rounded
from torch import nn

import safe_core
from safe_core import ArrayInfo, SplitState, Unstructured
from safe_core.adapters.optax import finalize, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.backends import backend_of
from safe_core.constraints.splitting import dual_update, init, recover

TARGETS = ArrayInfo(("x",), (None,))
NARROW = [Backend.TORCH, Backend.JAX, Backend.JAX_JIT]
narrow = pytest.mark.parametrize("xp", NARROW, ids=lambda xp: xp.value)
EDGES = [0.0, -0.0, 1e-45, -1e-40, 1.0, -2.5, 3.4028235e38, -3.4028235e38, 1 + 2.0**-23]


def round_all(arrays: list[Any], step: Any) -> list[Any]:
    return backend_of(arrays[0]).stochastic_bfloat16(arrays, step=step)


@narrow
@given(
    x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    step=st.integers(0, 2**31 - 1),
)
def test_rounding_is_the_same_function_of_value_and_step_everywhere(
    xp: Backend, x: list[float], step: int
) -> None:
    given = [np.asarray((x + EDGES)[:9], np.float32), np.asarray(EDGES, np.float32)]
    at = np.asarray(step, np.int32) if xp.traces else step
    assert_same(xp.run(round_all, given, at), [rounded(v, step) for v in given])


@narrow
def test_rounding_is_up_or_down_and_right_on_average(xp: Backend) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000).astype(np.float32)
    toward_zero = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    spacing = np.abs((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32) - toward_zero
    total, steps = np.zeros(x.size), 400
    for step in range(steps):
        at = np.asarray(step, np.int32) if xp.traces else step
        got = xp.run(round_all, [x], at)[0].astype(np.float32)
        assert np.all((got == toward_zero) | (got == toward_zero + spacing))
        total += got
    # A mean of 400 draws of at most one half of deviation: 0.025 of a spacing.
    deviations = (total / steps - x) / np.abs(spacing)
    assert np.abs(deviations).max() < 5 * 0.025
    assert abs(deviations.mean()) < 5 * 0.025 / np.sqrt(x.size)


@functools.cache
def updater(state_dtype: str | None, relaxation: float = 1.0) -> Any:
    options: Any = {"relaxation": relaxation, "state_dtype": state_dtype}

    def run(x: Any, anchor: Any, support: Any, step: Any) -> SplitState:
        state = SplitState([anchor], [support])
        return dual_update([x], state, Unstructured(0.5), TARGETS, step=step, **options)

    return run


@narrow
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16], ids=str)
@pytest.mark.parametrize("relaxation", [1.0, 1.7])
def test_an_update_rounds_what_the_wide_update_computes(
    xp: Backend, dtype: Any, relaxation: float
) -> None:
    rng = np.random.default_rng(1)
    x, anchor = (rng.normal(size=200).astype(np.float32).astype(dtype) for _ in range(2))
    wide = np.float64 if dtype == np.float64 else np.float32
    anchor, support = anchor.astype(BFLOAT16), np.arange(200) % 2 == 0
    step = np.asarray(7, np.int32) if xp.traces else 7
    want = xp.run(updater(None, relaxation), x, anchor.astype(wide), support, step)
    got = xp.run(updater("bfloat16", relaxation), x, anchor, support, step)
    assert_same(got.support, want.support)
    assert_same(got.anchor, [rounded(want.anchor[0].astype(np.float32), 7)])


@narrow
def test_small_increments_of_the_dual_add_up(xp: Backend) -> None:
    # u grows by 1e-3 a step: from 0.5 on, rounding to the nearest would lose every one.
    x = np.full(1000, 1e-3, np.float32)
    x[::2] = 100.0
    support = np.arange(1000) % 2 == 0
    anchor = np.where(support, x, -0.5).astype(BFLOAT16)
    for step in range(300):
        at = np.asarray(step, np.int32) if xp.traces else step
        state = xp.run(updater("bfloat16"), x, anchor, support, at)
        anchor = state.anchor[0]
    u = recover(SplitState([anchor.astype(np.float32)], [support]))[1][0]
    assert u[1::2].mean() == pytest.approx(0.8, abs=0.01)
    nearest = np.float32(0.5).astype(BFLOAT16)
    assert (nearest.astype(np.float32) + np.float32(1e-3)).astype(BFLOAT16) == nearest


# Refusals


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state_dtype must be one of None, .*, got 'fp8'"):
        safe_core.safe(0.5, state_dtype="fp8")
    rising = safe_core.schedules.linear(1.0, steps=5, initial=0.5)
    with pytest.raises(ValueError, match="state_dtype must be None under rescale_dual"):
        safe_core.admm(0.5, penalty=rising, rescale_dual=True, state_dtype="bfloat16")
    x = [np.ones(4)]
    with pytest.raises(TypeError, match="state_dtype must be None where the library has no bf"):
        init(x, Unstructured(0.5), TARGETS, state_dtype="bfloat16")
    state = init(x, Unstructured(0.5), TARGETS)
    with pytest.raises(ValueError, match="step must be given to round to a state_dtype, got None"):
        dual_update(x, state, Unstructured(0.5), TARGETS, state_dtype="bfloat16")


# In the adapters


def method(**changes: Any) -> safe_core.Method:
    options = {"rho": 0.05, "penalty": 0.1, "dual_update_interval": 3, "state_dtype": "bfloat16"}
    return safe_core.safe(0.75, **{**options, **changes})


class Run:
    def __init__(self, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
        self.data = torch.randn(32, 8).to(dtype), torch.randn(32, 2).to(dtype)
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = SparseOptimizer(base, method(**changes), model=self.model)

    def steps(self, count: int) -> list[torch.Tensor]:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(self.data[0]), self.data[1])
            loss.backward()
            return loss

        for _ in range(count):
            self.optimizer.step(closure)
        return [p.detach().clone() for p in self.model.parameters()]

    def held(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(s["anchor"], s["support"]) for s in self.optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torch_keeps_three_bytes_and_stays_close(dtype: torch.dtype) -> None:
    run, wide = Run(dtype), Run(dtype, state_dtype=None)
    run.steps(1)
    wide.steps(1)
    params = run.optimizer.sparse_parameters().values()
    for (anchor, support), p in zip(run.held(), params, strict=True):
        assert (anchor.dtype, support.dtype, anchor.shape) == (torch.bfloat16, torch.bool, p.shape)
    got, want = run.steps(30), wide.steps(30)
    for a, b in zip(got, want, strict=True):
        assert not torch.equal(a, b) or a.ndim == 1
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    sizes = [(a.element_size() + s.element_size()) for a, s in run.held()]
    assert sizes == [3, 3]


def test_an_update_in_torch_writes_the_anchor_in_place() -> None:
    run = Run()
    run.steps(1)
    before = [(a.data_ptr(), a.clone()) for a, _ in run.held()]
    run.steps(2)
    for (address, old), (anchor, _) in zip(before, run.held(), strict=True):
        assert anchor.data_ptr() == address
        assert not torch.equal(anchor, old)


@short_run
def test_torch_resumes_bit_for_bit_and_finalizes_the_parameters_themselves() -> None:
    first, second = Run(), Run()
    first.steps(4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert [a.dtype for a, _ in second.held()] == [torch.bfloat16] * 2
    for a, b in zip(first.steps(9), second.steps(9), strict=True):
        assert torch.equal(a, b)
    trained = {k: p.detach().clone() for k, p in second.optimizer.sparse_parameters().items()}
    second.optimizer.finalize()
    for name, p in second.optimizer.sparse_parameters().items():
        assert torch.equal(p, torch.where(p != 0, trained[name], 0))
    zeros = sum(int((p == 0).sum()) for p in second.optimizer.sparse_parameters().values())
    assert zeros == 120


@pytest.mark.filterwarnings("ignore:16-bit parameters round:UserWarning")
def test_sixteen_bit_parameters_take_the_penalty_in_32_bits() -> None:
    run = Run(torch.bfloat16, penalty=0.3)
    run.steps(3)
    weight = run.model[0].weight
    anchor = run.optimizer.state[weight]["anchor"]
    before = weight.detach().clone()
    gradient = torch.randn_like(weight)
    seen = []
    run.optimizer.base.step = lambda: seen.append(weight.grad.clone())
    run.optimizer.allow_unperturbed = True
    weight.grad = gradient.clone()
    run.optimizer.step()
    want = gradient.float() + 0.3 * (before.float() - anchor.float())
    assert torch.equal(seen[0], want.bfloat16())


@short_run
@pytest.mark.usefixtures("single_precision")
def test_optax_keeps_bfloat16_in_one_program_and_finalizes_the_parameters_themselves() -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 8), (32, 2)))
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32), "bias": jnp.zeros(2)}
    tx, traces = sparse_optimizer(optax.sgd(0.1), method()), []

    def loss(params: Any) -> Any:
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(10):
        assert state.anchor["kernel"].dtype == jnp.bfloat16
        params, state = step(params, state)
    assert len(traces) == 1
    final = finalize(params, state, method())
    wide = sparse_optimizer(optax.sgd(0.1), method(state_dtype=None)).init(params)
    with pytest.raises(TypeError, match=r"state.anchor of kernel .*'bfloat16', got float32"):
        tx.update(jax.grad(loss)(params), wide, params, grad_fn=jax.grad(loss))
    kept = np.asarray(final["kernel"]) != 0
    assert kept.sum() == 4
    np.testing.assert_array_equal(
        np.asarray(final["kernel"])[kept], np.asarray(params["kernel"])[kept]
    )
