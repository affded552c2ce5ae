"""Blocks that are misused are refused; what looks similar and is right passes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.phases import _WATCHED_STEPS

SAFE = safe_core.safe(0.5, rho=0.1, penalty=0.2, dual_update_interval=2)
PLAIN = safe_core.admm(0.5, penalty=0.2, dual_update_interval=2)
GAUSSIAN = safe_core.safe(
    0.5, rho=0.1, penalty=0.2, dual_update_interval=2, projected_gradient=True
)


class Loop:
    """A model, its optimizer, and the loss of one of several batches."""

    def __init__(self, method: Any = SAFE, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        base = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = SparseOptimizer(base, method, model=self.model, **options)
        self.data = torch.randn(6, 8, 8), torch.randn(6, 8, 4)

    def backward(self, batch: int = 0) -> None:
        x, y = (part[batch] for part in self.data)
        nn.functional.mse_loss(self.model(x), y).backward()

    def block(self, batch: int = 0) -> None:
        with self.optimizer.perturbed():
            self.backward(batch)

    def passes(self) -> None:
        self.backward()
        if self.optimizer.perturbs:
            self.block()
        if self.optimizer.projects:
            with self.optimizer.projected():
                self.backward()

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    @property
    def hooks(self) -> int:
        params = list(self.model.parameters())
        found = [p._backward_hooks for p in params]
        found += [getattr(p, "_post_accumulate_grad_hooks", None) for p in params]
        return sum(len(hooks) for hooks in found if hooks)


def replaced_by_zeros(loop: Loop) -> None:
    for p in loop.model.parameters():
        p.grad = None if p.grad is None else torch.zeros_like(p.grad)


def zeroed_behind_the_version(loop: Loop) -> None:
    for p in loop.model.parameters():
        p.grad.data.zero_()  # type: ignore[union-attr]


def removed(loop: Loop) -> None:
    for p in loop.model.parameters():
        p.grad = None


CLEAR: dict[str, Callable[[Loop], Any]] = {
    "optimizer": lambda loop: loop.optimizer.zero_grad(),
    "optimizer in place": lambda loop: loop.optimizer.zero_grad(set_to_none=False),
    "base": lambda loop: loop.optimizer.base.zero_grad(),
    "base in place": lambda loop: loop.optimizer.base.zero_grad(set_to_none=False),
    "model": lambda loop: loop.model.zero_grad(),
    "model in place": lambda loop: loop.model.zero_grad(set_to_none=False),
    "zeros": replaced_by_zeros,
    "data": zeroed_behind_the_version,
    "none": removed,
}
every_way = pytest.mark.parametrize("way", CLEAR)
AROUND = [name for name in CLEAR if not name.startswith("optimizer")]


# Gradients of the last step


@pytest.mark.parametrize("method", [SAFE, PLAIN, GAUSSIAN], ids=["safe", "admm", "sg"])
def test_gradients_of_the_last_step_are_refused(method: Any) -> None:
    loop = Loop(method)
    loop.passes()
    loop.optimizer.step()

    def step() -> None:
        loop.passes()
        loop.optimizer.step()

    with pytest.raises(ValueError, match=r"to those of the last step.*zero_grad\(\) before"):
        step()
    assert loop.optimizer.steps == 1
    loop.optimizer.zero_grad()  # the right way, after the error
    loop.passes()
    loop.optimizer.step()


@every_way
@pytest.mark.parametrize("method", [SAFE, PLAIN, GAUSSIAN], ids=["safe", "admm", "sg"])
def test_every_way_to_clear_the_gradients_of_a_step_is_right(method: Any, way: str) -> None:
    loop = Loop(method)
    for _ in range(5):
        loop.passes()
        loop.optimizer.step()
        CLEAR[way](loop)
    assert loop.optimizer.steps == 5


@every_way
def test_clearing_just_before_the_backward_pass_is_right(way: str) -> None:
    loop = Loop()
    loop.passes()
    loop.optimizer.step()
    for _ in range(4):
        loop.model(torch.ones(1, 8)).sum()
        CLEAR[way](loop)
        loop.passes()
        loop.optimizer.step()


@every_way
def test_micro_batches_are_accumulated_on_purpose(way: str) -> None:
    loop = Loop()
    for _ in range(4):
        for batch in range(3):
            loop.backward(batch)
        with loop.optimizer.perturbed():
            for batch in range(3):
                loop.backward(batch)
        loop.optimizer.step()
        CLEAR[way](loop)
    assert loop.optimizer.steps == 4


def test_gradients_taken_without_accumulating_leave_no_trace() -> None:
    loop = Loop()
    loop.passes()
    loop.optimizer.step()
    torch.autograd.grad(loop.model(torch.ones(1, 8)).sum(), list(loop.model.parameters()))
    loop.optimizer.base.zero_grad()
    loop.passes()
    loop.optimizer.step()


def test_gradients_that_are_all_zero_may_be_added_to() -> None:
    loop = Loop(safe_core.admm(0.5, penalty=0.0))
    loop.model(torch.zeros(1, 8)).mul(0).sum().backward()
    loop.optimizer.step()
    loop.backward()
    loop.optimizer.step()


def test_a_closure_may_follow_a_step_by_blocks() -> None:
    loop = Loop()
    loop.passes()
    loop.optimizer.step()

    def closure() -> None:
        loop.optimizer.zero_grad()
        loop.backward()

    loop.optimizer.step(closure)
    assert loop.hooks == 0
    assert loop.optimizer.steps == 2


# One block per step


def test_a_block_for_every_micro_batch_is_refused() -> None:
    loop = Loop()
    loop.backward(0)
    loop.block(0)
    loop.backward(1)
    with pytest.raises(ValueError, match=r"once per step.*first, then open one block and run"):
        loop.block(1)


def test_a_block_right_after_a_block_is_refused() -> None:
    loop = Loop()
    loop.backward()
    loop.block(0)
    with pytest.raises(ValueError, match="once per step"):
        loop.block(1)


def test_clipping_between_blocks_hides_nothing() -> None:
    loop = Loop()
    loop.backward(0)
    loop.block(0)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
    loop.backward(1)
    with pytest.raises(ValueError, match="once per step"):
        loop.block(1)


@every_way
def test_a_step_that_a_scaler_skips_may_be_begun_anew(way: str) -> None:
    loop = Loop()
    for attempt in range(4):
        loop.passes()
        if attempt % 2:  # the scaler found infinities and does not call step()
            loop.optimizer.step()
        CLEAR[way](loop)
    assert loop.optimizer.steps == 2


def test_a_block_without_a_backward_pass_may_be_repeated() -> None:
    loop = Loop()
    loop.backward()
    with loop.optimizer.perturbed():
        pass
    loop.backward()
    loop.block()
    loop.optimizer.step()


# The gradients of a block reach the step


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("method", [SAFE, GAUSSIAN], ids=["safe", "sg"])
def test_gradients_cleared_after_a_block_are_missed(method: Any, way: str) -> None:
    loop = Loop(method)
    loop.passes()
    CLEAR[way](loop)
    loop.backward()
    name = "projected" if loop.optimizer.projects else "perturbed"
    with pytest.raises(ValueError, match=rf"of the {name}\(\) block, got gradients that were cle"):
        loop.optimizer.step()
    assert loop.optimizer.steps == 0


def test_gradients_cleared_before_the_projected_block_are_missed() -> None:
    loop = Loop(GAUSSIAN)
    loop.backward()
    loop.block()
    loop.model.zero_grad()
    loop.backward()
    with (
        pytest.raises(ValueError, match=r"projected\(\) needs the gradients of the perturbed\(\)"),
        loop.optimizer.projected(),
    ):
        raise AssertionError


def test_a_step_without_any_gradient_after_a_block_is_refused() -> None:
    loop = Loop()
    for _ in range(_WATCHED_STEPS + 1):  # this needs no watch
        loop.passes()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    loop.passes()
    loop.model.zero_grad()
    with pytest.raises(ValueError, match="cleared after it"):
        loop.optimizer.step()


def test_an_unperturbed_gradient_passes_by_request() -> None:
    loop = Loop(allow_unperturbed=True)
    loop.passes()
    loop.model.zero_grad()
    loop.backward()
    loop.optimizer.step()
    assert loop.optimizer.steps == 1


def scaled(loop: Loop) -> None:
    for gradient in loop.gradients:
        gradient.mul_(0.5)


def clipped(loop: Loop) -> None:
    nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)


def replaced(loop: Loop) -> None:
    for p in loop.model.parameters():
        p.grad = None if p.grad is None else p.grad.clamp(-0.1, 0.1)


def added_a_loss_at_x(loop: Loop) -> None:
    sum(p.square().sum() for p in loop.model.parameters()).backward()


def masked(loop: Loop) -> None:
    loop.model[0].weight.grad.zero_()
    loop.model[0].bias.grad = None


@pytest.mark.parametrize("process", [scaled, clipped, replaced, added_a_loss_at_x, masked])
@pytest.mark.parametrize("method", [SAFE, GAUSSIAN], ids=["safe", "sg"])
def test_gradients_may_be_processed_before_the_step(method: Any, process: Any) -> None:
    loop = Loop(method)
    for _ in range(4):
        loop.optimizer.zero_grad()
        loop.passes()
        process(loop)
        loop.optimizer.step()
    assert loop.optimizer.steps == 4


# What a watch leaves behind


def test_a_watch_ends_after_a_few_steps_and_leaves_no_hooks() -> None:
    loop = Loop()
    for step in range(6):
        loop.passes()
        loop.optimizer.step()
        assert bool(loop.hooks) == (step + 1 < _WATCHED_STEPS)
        loop.optimizer.zero_grad()
        assert loop.hooks == 0


def test_a_watched_run_can_be_copied_and_pickled() -> None:
    loop = Loop()
    loop.passes()
    loop.optimizer.step()
    for same in (copy.deepcopy(loop), pickle.loads(pickle.dumps(loop.optimizer))):
        assert same is not None
    twin = copy.deepcopy(loop)
    assert twin.hooks == 0
    twin.optimizer.zero_grad()
    twin.passes()
    twin.optimizer.step()


def test_a_watch_keeps_nothing_alive() -> None:
    loop = Loop()
    loop.passes()
    loop.optimizer.step()
    weight = weakref.ref(loop.model[0].weight)
    gc.disable()
    try:
        del loop
        assert weight() is None
    finally:
        gc.enable()


def test_a_watch_recompiles_no_model() -> None:
    loop = Loop()
    model = loop.model
    loop.model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            loop.passes()
            loop.optimizer.step()
            loop.optimizer.zero_grad()


# Closures


def logging_closure(loop: Loop, seen: list[float], **clear: bool) -> Callable[[], None]:
    def closure() -> None:
        seen.extend(float(g.abs().max()) for g in loop.gradients)
        loop.optimizer.zero_grad(**clear)
        loop.backward()
        seen.extend(float(g.abs().max()) for g in loop.gradients)

    return closure


@pytest.mark.parametrize("clear", [{}, {"set_to_none": False}])
def test_a_closure_sees_gradients_and_no_marks(clear: dict[str, bool]) -> None:
    loop, seen = Loop(), list[float]()
    for _ in range(3):
        loop.optimizer.step(logging_closure(loop, seen, **clear))
    assert seen
    assert max(seen) < 100
    assert loop.hooks == 0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", [SAFE, PLAIN, GAUSSIAN], ids=["safe", "admm", "sg"])
def test_gradients_may_be_cleared_before_the_closure(method: Any, set_to_none: bool) -> None:
    loops = [Loop(method), Loop(method)]
    for _ in range(3):
        loops[0].optimizer.zero_grad(set_to_none)
        loops[0].optimizer.step(loops[0].backward)

        def closure() -> None:
            loops[1].optimizer.zero_grad()
            loops[1].backward()

        loops[1].optimizer.step(closure)
    for a, b in zip(loops[0].model.parameters(), loops[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_closure_that_adds_to_gradients_is_refused_at_any_step() -> None:
    loop = Loop()
    for _ in range(5):
        loop.optimizer.zero_grad()
        loop.optimizer.step(loop.backward)
    with pytest.raises(ValueError, match="closure must clear the gradients"):
        loop.optimizer.step(loop.backward)
    assert loop.hooks == 0


def test_a_closure_that_fails_leaves_no_hooks() -> None:
    loop = Loop()
    loop.backward()

    def closure() -> None:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        loop.optimizer.step(closure)
    assert loop.hooks == 0


def test_a_differentiable_base_is_refused_by_name() -> None:
    model = nn.Linear(4, 4)
    base = torch.optim.Adam(model.parameters(), differentiable=True)
    with pytest.raises(ValueError, match=r"base must not be differentiable.*got Adam with diff"):
        SparseOptimizer(base, SAFE, model=model)
