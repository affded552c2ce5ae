"""A base step that 16-bit parameters round away is warned of, once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def sparse_model(dtype: torch.dtype, threshold: float = 0.05) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(32, 32, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight *= model.weight.abs() > threshold
    return model


def optimizer_of(model: nn.Module, rate: float, method: safe_core.Method) -> SparseOptimizer:
    return SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=rate), method, model=model)


def step(model: nn.Module, optimizer: SparseOptimizer, scale: float = 1.0) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = scale * (model(torch.ones(4, 32, dtype=model.weight.dtype)) - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def run(model: nn.Module, optimizer: SparseOptimizer, steps: int = 31) -> None:
    for _ in range(steps):
        step(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "threshold"),
    [(safe_core.keep_zeros(), 0.05), (safe_core.safe(0.5, rho=1.0), 0.0)],
    ids=["keep_zeros", "safe"],
)
def test_lost_steps_are_warned_of_once(
    dtype: torch.dtype, method: safe_core.Method, threshold: float
) -> None:
    model = sparse_model(dtype, threshold)
    optimizer = optimizer_of(model, 1e-7, method)
    run(model, optimizer)
    told = r"16-bit parameters round the steps away: 32 steps at learning rate 1e-07 moved \d"
    with pytest.warns(UserWarning, match=told) as record:
        step(model, optimizer)
    assert [warning.filename for warning in record] == [__file__]
    run(model, optimizer, 40)  # a second warning would be an error


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["zero", "gradients"])
@pytest.mark.parametrize(
    ("dtype", "rate"),
    [(torch.float32, 1e-7), (torch.bfloat16, 1e-2), (torch.bfloat16, 0.0)],
    ids=["float32", "large", "no rate"],
)
def test_steps_that_arrive_are_not_warned_of(dtype: torch.dtype, rate: float, scale: float) -> None:
    model = sparse_model(dtype)
    optimizer = optimizer_of(model, rate, safe_core.keep_zeros())
    for _ in range(40):
        step(model, optimizer, scale)


lr_scheduler = torch.optim.lr_scheduler
SCHEDULES = {
    "linear": lambda base, rate: lr_scheduler.LinearLR(base, 1e-5, total_iters=50),
    "one cycle": lambda base, rate: lr_scheduler.OneCycleLR(base, rate, 160, div_factor=1e5),
    "from zero": lambda base, rate: lr_scheduler.LambdaLR(base, lambda step: min(step / 50, 1.0)),
}


@pytest.mark.parametrize("which", SCHEDULES)
@pytest.mark.parametrize(("rate", "lost"), [(1e-2, False), (1e-7, True)], ids=["large", "lost"])
def test_a_warm_up_is_judged_after_its_end(which: str, rate: float, lost: bool) -> None:
    model = sparse_model(torch.bfloat16)
    optimizer = optimizer_of(model, rate, safe_core.keep_zeros())
    schedule = SCHEDULES[which](optimizer, rate)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(100):
            step(model, optimizer)
            schedule.step()
    assert len(found) == lost


def test_nothing_is_copied_while_the_learning_rate_rises() -> None:
    model = sparse_model(torch.bfloat16)
    optimizer = optimizer_of(model, 1e-2, safe_core.keep_zeros())
    schedule = SCHEDULES["linear"](optimizer, 1e-2)
    held = []
    for _ in range(60):
        step(model, optimizer)
        held.append(optimizer._run.window.samples is not None)
        schedule.step()
    assert held == [True] + 50 * [False] + 9 * [True]


class Kahan(torch.optim.Optimizer):
    """SGD that adds up what it rounds away."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            exact = self.state[p].setdefault("exact", p.float())
            exact -= self.param_groups[0]["lr"] * p.grad.float().sign()
            p.copy_(exact)


def test_a_base_that_keeps_what_it_rounds_away_is_not_warned_of() -> None:
    model = sparse_model(torch.bfloat16)
    base = Kahan(model.parameters(), lr=1e-5)
    before = model.weight.detach().clone()
    optimizer = SparseOptimizer(base, safe_core.keep_zeros(), model=model)
    step(model, optimizer)
    assert float((model.weight != before).float().mean()) < 0.04  # one step looks lost
    run(model, optimizer, 40)


def test_a_resumed_run_was_judged_at_its_beginning() -> None:
    model = sparse_model(torch.bfloat16)
    optimizer = optimizer_of(model, 1e-2, safe_core.keep_zeros())
    run(model, optimizer, 40)
    resumed = optimizer_of(model, 1e-7, safe_core.keep_zeros())
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 1e-7
    resumed.load_state_dict(state)
    run(model, resumed, 40)


def test_a_radius_of_zero_is_not_named() -> None:
    model = sparse_model(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = optimizer_of(model, 1e-2, safe_core.keep_zeros())
        assert repr(optimizer).startswith("SparseOptimizer(AdamW, Mask), steps taken: 0")
        optimizer.param_groups[0]["rho"] = 0.1
        assert "(AdamW, Mask with SAM)" in repr(optimizer)
