"""Steps that do not perturb pay for one gradient, and reuse what the last second one knew."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import safe_core
from safe_core.adapters.optax import sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer


def method(reuse: float = 0.5, interval: int = 3, rho: float = 0.05) -> safe_core.Method:
    return safe_core.safe(
        0.75,
        rho=rho,
        penalty=0.1,
        dual_update_interval=4,
        perturbation_interval=interval,
        reuse=reuse,
    )


class Run:
    def __init__(self, rule: safe_core.Method) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.data = torch.randn(32, 8), torch.randn(32, 2)
        base = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.optimizer = SparseOptimizer(base, rule, model=self.model)
        self.calls = 0

    def closure(self, rows: slice = slice(None)) -> torch.Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(self.data[0][rows]), self.data[1][rows])
        loss.backward()
        return loss

    def steps(self, count: int) -> list[torch.Tensor]:
        for _ in range(count):
            self.optimizer.step(self.closure)
        return [p.detach().clone() for p in self.model.parameters()]

    def phases(self, count: int) -> list[torch.Tensor]:
        for _ in range(count):
            self.closure()
            if self.optimizer.perturbs:
                with self.optimizer.perturbed():
                    self.closure()
            self.optimizer.step()
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("reuse", [0.0, 0.5])
def test_torch_takes_a_second_gradient_at_every_third_step(reuse: float) -> None:
    whole, phased = Run(method(reuse)), Run(method(reuse))
    for a, b in zip(whole.steps(7), phased.phases(7), strict=True):
        assert torch.equal(a, b)
    assert whole.calls == phased.calls == 7 + 3
    held = [whole.optimizer.state[p].get("flat_direction") for p in whole.model.parameters()]
    assert [h is not None for h in held] == [reuse > 0] * 4  # biases too: the norm is over all
    if reuse:
        total = sum(float((h.double() ** 2).sum()) for h in held)
        assert total == pytest.approx(1.0, rel=1e-5)


def test_reuse_changes_the_steps_between() -> None:
    plain, reusing = Run(method(0.0)), Run(method(0.5))
    for a, b in zip(plain.steps(1), reusing.steps(1), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(plain.steps(1), reusing.steps(1), strict=True))


def test_the_perturbed_block_leaves_x_at_a_step_between() -> None:
    run = Run(method(0.0))
    run.steps(1)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.closure()
    with run.optimizer.perturbed():
        for a, b in zip(run.model.parameters(), before, strict=True):
            assert torch.equal(a, b)
        run.closure()
    run.optimizer.step()


@pytest.mark.parametrize("done", [1, 2, 3])
def test_torch_resumes_between_two_perturbations(done: int) -> None:
    first, second = Run(method()), Run(method())
    first.steps(done)
    saved = copy.deepcopy([first.model.state_dict(), first.optimizer.state_dict()])
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    for a, b in zip(first.steps(5), second.steps(5), strict=True):
        assert torch.equal(a, b)
    # A method that reuses nothing keeps nothing.
    third = Run(method(0.0))
    with pytest.raises(ValueError, match=r"the same method: this is .*got .*reuse=0.5"):
        third.optimizer.load_state_dict(saved[1])
    for group in saved[1]["param_groups"]:
        del group["safe_method"]
    third.optimizer.load_state_dict(saved[1])
    assert not any("flat_direction" in s for s in third.optimizer.state.values())


def test_a_radius_of_a_group_reuses_where_the_method_has_none() -> None:
    run = Run(method(rho=0.0))
    run.optimizer.param_groups[0]["rho"] = 0.05
    same = Run(method())
    for a, b in zip(run.steps(5), same.steps(5), strict=True):
        assert torch.equal(a, b)


def test_maximising_reuses_the_mirrored_direction() -> None:
    up, down = Run(method()), Run(method())
    up.optimizer.param_groups[0]["maximize"] = True
    sign = {id(up): -1, id(down): 1}
    for run in (up, down):
        for _ in range(5):

            def closure(run: Run = run) -> torch.Tensor:
                run.optimizer.zero_grad()
                loss = nn.functional.mse_loss(run.model(run.data[0]), run.data[1])
                (sign[id(run)] * loss).backward()
                return loss

            run.optimizer.step(closure)
    for p, q in zip(up.model.parameters(), down.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_direction_of_another_shape_is_refused() -> None:
    run = Run(method())
    run.steps(1)
    state = copy.deepcopy(run.optimizer.state_dict())
    state["state"][1]["safe_flat_direction"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"safe_flat_direction of shape \(16,\) for parameter 1"):
        run.optimizer.load_state_dict(state)


def test_a_missing_gradient_counts_as_zero_in_the_direction() -> None:
    run = Run(method())
    last = run.model[2]
    run.closure()
    with run.optimizer.perturbed():
        run.closure()
        last.bias.grad = None
    run.optimizer.step()
    held = [run.optimizer.state[p]["flat_direction"] for p in run.model.parameters()]
    assert sum(float((h.double() ** 2).sum()) for h in held) == pytest.approx(1.0, rel=1e-5)
    run.closure()
    last.bias.grad = None
    length = torch.sqrt(
        sum((p.grad**2).sum() for p in run.model.parameters() if p is not last.bias)
    )
    run.optimizer.base.step = lambda: None
    run.optimizer.step()
    torch.testing.assert_close(last.bias.grad, 0.5 * length * held[3])


def test_gradients_may_share_memory_between_the_passes() -> None:
    plain, sharing = Run(method()), Run(method())
    wanted = plain.steps(2)
    memory = [torch.zeros_like(p) for p in sharing.model.parameters()]
    closure = sharing.closure

    def closure_in_place() -> torch.Tensor:
        loss = closure()
        for p, m in zip(sharing.model.parameters(), memory, strict=True):
            p.grad = m.copy_(p.grad)
        return loss

    sharing.closure = closure_in_place
    for a, b in zip(sharing.steps(2), wanted, strict=True):
        assert torch.equal(a, b)


def test_a_state_from_before_the_first_direction_has_a_place_for_it() -> None:
    state = Run(method()).optimizer.state_dict()["state"]
    assert [entry["safe_flat_direction"].abs().sum().item() for entry in state.values()] == [0] * 4


def test_a_block_that_raised_leaves_no_direction_behind() -> None:
    run = Run(method())
    run.closure()
    with pytest.raises(RuntimeError, match="lost"), run.optimizer.perturbed():
        raise RuntimeError("lost")
    assert not run.optimizer._phases.first


def test_the_ascent_may_take_half_of_the_batch() -> None:
    run = Run(method(0.0, 1))
    x = [p.detach().clone() for p in run.model.parameters()]
    half = slice(None, 16)
    loss = nn.functional.mse_loss(run.model(run.data[0][half]), run.data[1][half])
    g = torch.autograd.grad(loss, list(run.model.parameters()))
    length = torch.sqrt(sum((g_i**2).sum() for g_i in g))
    run.closure(half)
    with run.optimizer.perturbed():
        for p, x_i, g_i in zip(run.model.parameters(), x, g, strict=True):
            torch.testing.assert_close(p, x_i + 0.05 * g_i / length)
        run.closure()
        perturbed = [p.grad.clone() for p in run.model.parameters()]
    run.optimizer.base.step = lambda: None
    run.optimizer.step()
    # What is stepped along is the gradient of the whole batch, and the penalty of weights.
    for p, g_i in list(zip(run.model.parameters(), perturbed, strict=True))[1::2]:
        assert torch.equal(p.grad, g_i)


# JAX


def problem() -> tuple[dict[str, jax.Array], Any, list[int]]:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 8), (32, 2)))
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32), "bias": jnp.zeros(2)}
    calls: list[int] = []

    def loss(params: Any) -> Any:
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    def second(params: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        # Gradients may be wider than those at x.
        return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(params))

    return params, (jax.grad(loss), second), calls


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("reuse", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_jax_computes_a_second_gradient_at_every_third_step(reuse: float, dtype: Any) -> None:
    params, (grad_fn, second), calls = problem()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx, traces = sparse_optimizer(optax.sgd(0.1), method(reuse)), []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=second)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    assert (state.flat_direction is not None) == (reuse > 0)
    for _ in range(7):
        params, state = step(params, state)
    jax.effects_barrier()
    assert len(calls) == 3
    assert len(traces) == 1
    assert jax.tree.map(lambda p: p.dtype, params) == {"kernel": dtype, "bias": dtype}
    if reuse:
        assert {h.dtype for h in state.flat_direction.values()} == {jnp.dtype(jnp.float32)}
        assert float(optax.tree.norm(state.flat_direction)) == pytest.approx(1.0, rel=1e-5)


def test_jax_needs_the_state_of_the_same_method() -> None:
    params, (grad_fn, second), _ = problem()
    state = sparse_optimizer(optax.sgd(0.1), method(0.0)).init(params)
    tx = sparse_optimizer(optax.sgd(0.1), method(0.5))
    with pytest.raises(ValueError, match=r"state.flat_direction must be there for .* reuse=0.5"):
        tx.update(grad_fn(params), state, params, grad_fn=second)
