"""A base step that 16-bit parameters round away is warned of, once."""

from __future__ import annotations

import warnings

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
    optimizer = optimizer_of(model, 1e-6, method)
    before = model.weight.detach().clone()
    told = r"16-bit parameters round the steps away: .* at learning rate 1e-06 moved \d"
    with pytest.warns(UserWarning, match=told) as record:
        step(model, optimizer)
    assert [warning.filename for warning in record] == [__file__]
    assert bool(((model.weight == before) | (before.abs() < 0.01)).all())
    step(model, optimizer)  # a second warning would be an error


def test_gradients_of_zero_tell_nothing() -> None:
    model = sparse_model(torch.bfloat16)
    optimizer = optimizer_of(model, 1e-6, safe_core.keep_zeros())
    step(model, optimizer, scale=0.0)
    with pytest.warns(UserWarning, match="16-bit parameters round the steps away"):
        step(model, optimizer)


@pytest.mark.parametrize(
    ("dtype", "rate"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["float32", "large"]
)
def test_steps_that_arrive_are_not_warned_of(dtype: torch.dtype, rate: float) -> None:
    model = sparse_model(dtype)
    step(model, optimizer_of(model, rate, safe_core.keep_zeros()))


def test_a_warm_up_is_judged_at_its_full_rate() -> None:
    model = sparse_model(torch.bfloat16)
    optimizer = optimizer_of(model, 1e-2, safe_core.keep_zeros())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-5, total_iters=3)
    for _ in range(5):
        step(model, optimizer)
        schedule.step()


def test_a_radius_of_zero_is_not_named() -> None:
    model = sparse_model(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = optimizer_of(model, 1e-2, safe_core.keep_zeros())
        assert repr(optimizer).startswith("SparseOptimizer(AdamW, Mask), steps taken: 0")
        optimizer.param_groups[0]["rho"] = 0.1
        assert "(AdamW, Mask with SAM)" in repr(optimizer)
