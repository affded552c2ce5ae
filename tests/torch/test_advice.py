"""`SparseOptimizer.report` shows what the projected network would lose, and what to change."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from digits import Digits, digits
from torch import Tensor, nn

import safe_core
from safe_core import Unstructured
from safe_core.adapters.torch import SparseOptimizer
from safe_core.report import Report
from safe_core.schedules import cosine

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 4
METHOD = safe_core.safe(0.75, rho=0.1, penalty=0.1, dual_update_interval=2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def trained(steps: int = 3, method: Any = METHOD, **options: Any) -> Any:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


def weights(model: nn.Sequential) -> list[Tensor]:
    return [model[0].weight.detach(), model[2].weight.detach()]


def test_norms_are_those_of_the_parameters() -> None:
    model, optimizer = trained()
    report, support = optimizer.report(), optimizer.split().support
    off = [x * ~kept for x, kept in zip(weights(model), support, strict=True)]
    for row, x, rest in zip(report.tensors, weights(model), off, strict=True):
        assert row.norm == pytest.approx(float(x.norm()), rel=1e-5)
        assert row.off_support == pytest.approx(float(rest.norm()), rel=1e-5)
    whole = torch.cat([x.flatten() for x in weights(model)]).norm()
    rest = torch.cat([x.flatten() for x in off]).norm()
    assert report.relative_off_support == pytest.approx(float(rest / whole), rel=1e-5)
    with pytest.warns(safe_core.FinalizeWarning):
        optimizer.finalize()
    assert report.relative_distance == pytest.approx(optimizer.finalized.distance, rel=1e-5)


def test_a_function_is_evaluated_at_x_and_at_the_projection() -> None:
    model, optimizer = trained()
    before, state = copy.deepcopy(weights(model)), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    seen = []

    def evaluate() -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append([w.clone() for w in weights(model)])
        return nn.functional.cross_entropy(model(X), Y)

    report = optimizer.report(evaluate)
    projected = safe_core.project(before, 0.75).values
    for got, wanted in zip(seen, (before, projected, before), strict=False):
        assert all(map(torch.equal, got, wanted))
    assert len(seen) == 2
    assert all(map(torch.equal, weights(model), before))
    assert all(map(torch.equal, (p.grad for p in model.parameters()), gradients))
    assert str(optimizer.state_dict()) == str(state)
    with torch.no_grad():
        assert report.dense_value == float(evaluate())
    with optimizer.sparse_weights(), torch.no_grad():
        assert report.sparse_value == float(evaluate())
    assert type(report.dense_value) is type(report.sparse_value) is float
    assert f"{report.dense_value:.4g} at x, {report.sparse_value:.4g} at" in report.summary()


def test_the_accuracy_may_be_a_number_of_python_or_numpy() -> None:
    _, optimizer = trained()
    assert optimizer.report(lambda: 3).sparse_value == 3.0
    assert optimizer.report(lambda: torch.ones(3).numpy().mean()).sparse_value == 1.0


@pytest.mark.parametrize("value", [None, torch.ones(2), "0.5", [1.0]])
def test_a_function_that_returns_no_number_is_refused(value: Any) -> None:
    model, optimizer = trained()
    with pytest.raises(TypeError, match="evaluate must return one number, got"):
        optimizer.report(lambda: value)
    before = copy.deepcopy(weights(model))
    values = iter([1.0, value])  # at the projection only
    with pytest.raises(TypeError, match="evaluate must return one number, got"):
        optimizer.report(lambda: next(values))
    assert all(map(torch.equal, weights(model), before))


def test_wrong_arguments_are_refused() -> None:
    _, optimizer = trained()
    with pytest.raises(TypeError, match=r"evaluate must be a function without arguments, got 0\.5"):
        optimizer.report(0.5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        optimizer.report(steps=0)
    with pytest.raises(TypeError, match=r"steps must be an integer, got 0\.5"):
        optimizer.report(steps=0.5)


def test_a_step_does_nothing_for_reports() -> None:
    _, silent = trained(4)
    _, optimizer = trained(4)
    optimizer.report(lambda: 1.0, steps=10)
    assert str(optimizer.state_dict()) == str(silent.state_dict())


def test_16_bit_parameters_are_known_by_name() -> None:
    _, optimizer = trained()
    assert optimizer.report().course.narrow == ()
    model = network()
    model[2].to(torch.bfloat16)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), METHOD, model=model)
    assert optimizer.report().course.narrow == ("2.weight",)


def test_the_penalty_of_a_group_is_the_one_of_the_run() -> None:
    model = network()
    groups = [{"params": model.parameters(), "penalty": cosine(0.1, steps=70), "sparsity": 0.5}]
    optimizer = SparseOptimizer(torch.optim.SGD(groups, lr=0.1), METHOD, model=model)
    course = optimizer.report().course
    assert course.length == 70
    assert [pattern.sparsity for pattern in course.patterns] == [0.5]


# Runs on digits


def reports(
    task: Digits, method: Any, steps: int | None, dtype: torch.dtype = torch.float32
) -> list[Report]:
    """Train LeNet-300-100 on digits, and return a report after each tenth of the run."""
    model = nn.Sequential()
    for weight, bias in task.layers:
        layer = nn.Linear(*weight.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        model.extend([layer, nn.ReLU()])
    model = model[:-1].to(dtype)
    inputs, labels = torch.from_numpy(task.inputs).to(dtype), torch.from_numpy(task.labels)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(task.order))

    def evaluate() -> Tensor:
        return (model(inputs).argmax(dim=1) == labels).float().mean()

    found = []
    for step, batch in enumerate(torch.from_numpy(task.order), start=1):

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            loss.backward()
            return loss

        optimizer.step(closure)
        rates.step()
        if step % (len(task.order) // 10) == 0:
            found.append(optimizer.report(evaluate, steps=steps))
    return found


def causes(found: list[Report]) -> list[list[str]]:
    return [[item.cause for item in report.advice] for report in found]


def test_a_good_run_is_on_course_at_every_tenth() -> None:
    task = digits(epochs=30)
    found = reports(task, safe_core.safe(0.95, steps=len(task.order)), None)
    assert causes(found) == [[]] * 10
    assert found[0].relative_distance > 0.5 > 0.01 > found[-1].relative_distance
    assert found[1].sparse_value < 0.9 * found[1].dense_value
    assert found[-1].sparse_value == pytest.approx(found[-1].dense_value, abs=0.01)
    assert found[-1].sparse_value > 0.99


T = 380  # 20 epochs
FAILURES = {
    "a small penalty": (safe_core.safe(0.95, dual_update_interval=8), T, "penalty"),
    "a penalty of unknown length": (safe_core.safe(0.95), None, "unknown"),
    "a run a third as long": (safe_core.safe(0.95, steps=3 * T), T, "length"),
    "a run three times as long": (safe_core.safe(0.95, steps=T // 3), None, "length"),
    "few dual updates": (safe_core.safe(0.95, steps=T, dual_update_interval=38), None, "interval"),
    "a large rate": (safe_core.safe(0.95, steps=T, rho=1e30), None, "diverged"),
}


@pytest.mark.filterwarnings("ignore:step. the run takes:safe_core.FinalizeWarning")
@pytest.mark.parametrize(("method", "steps", "cause"), FAILURES.values(), ids=list(FAILURES))
def test_a_failure_on_purpose_names_its_cause(method: Any, steps: int | None, cause: str) -> None:
    found = causes(reports(digits(epochs=20), method, steps))
    assert found[-2] == [cause]


def test_a_run_that_diverged_is_reported_and_not_projected() -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    report = optimizer.report(lambda: model[2].weight.sum())
    assert [item.cause for item in report.advice] == ["diverged"]
    assert math.isnan(report.sparse_value)
    assert "nan at proj(x)" in report.summary()


def test_a_small_penalty_on_16_bit_parameters_names_both() -> None:
    found = reports(digits(epochs=10), safe_core.safe(0.95), 190, torch.bfloat16)
    assert causes(found)[-1] == ["interval", "penalty", "rounding"]
    assert "0.weight, 2.weight, 4.weight" in found[-1].advice[-1].text


def test_a_mask_that_does_not_settle_is_named() -> None:
    task = digits(epochs=60)
    method = safe_core.safe(0.95, penalty=cosine(0.05, len(task.order)))
    assert causes(reports(task, method, None))[-1] == ["mask"]


def test_a_parameter_that_would_be_emptied_is_named() -> None:
    task = digits(epochs=10)
    found = reports(task, safe_core.magnitude(0.999), 190)
    assert causes(found) == [[]] * 4 + [["tensor"]] * 6
    assert "zero in 0.weight (" in found[-1].advice[0].text
    assert (
        causes(reports(task, safe_core.magnitude(Unstructured(0.999, scope="tensor")), 190))
        == [[]] * 10
    )
