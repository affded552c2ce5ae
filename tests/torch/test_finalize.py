"""`SparseOptimizer.finalize` says what it did, and warns where it should not be trusted."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import safe_core
from safe_core import NM, FinalizeWarning, Mask, Unstructured
from safe_core.adapters.torch import SparseOptimizer

INF, NAN = float("inf"), float("nan")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def trained(method: Any, steps: int, **options: Any) -> tuple[nn.Sequential, SparseOptimizer]:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model, **options)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 4, generator=generator)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


def test_what_finalize_did_is_kept() -> None:
    method = safe_core.safe(0.5, rho=0.05, penalty=1.0, dual_update_interval=32)
    model, optimizer = trained(method, 120)
    assert optimizer.finalized is None
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    assert optimizer.finalize() is None  # type: ignore[func-returns-value]
    after = [model[0].weight.detach(), model[2].weight.detach()]
    done = optimizer.finalized
    assert done is not None
    assert done.steps == 120
    assert [row.name for row in done.tensors] == ["0.weight", "2.weight"]
    for row, x, y in zip(done.tensors, before, after, strict=True):
        assert row.entries == x.numel()
        assert row.zeroed == int(((x != 0) & (y == 0)).sum())
        assert row.nonzero == int((y != 0).sum())
        assert row.distance == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    flat = [torch.cat([x.flatten() for x in weights]) for weights in (before, after)]
    assert done.distance == pytest.approx(float((flat[0] - flat[1]).norm() / flat[0].norm()))
    assert 0 < done.distance < 0.1  # no warning, which would be an error here
    optimizer.finalize(freeze=True)
    assert optimizer.finalized is not None
    assert (optimizer.finalized.distance, optimizer.finalized.zeroed) == (0.0, 0)


def test_a_run_shorter_than_the_interval_is_named_at_the_callers_line() -> None:
    _, optimizer = trained(safe_core.safe(0.5, penalty=0.1), 5)
    text = "no dual update happened in 5 steps, fewer than dual_update_interval=32"
    with pytest.warns(FinalizeWarning, match=text) as found:
        optimizer.finalize()
    assert len(found) == 1
    assert found[0].filename == __file__
    optimizer.finalize()  # the weights are on the support now, so nothing is left to say
    optimizer.finalize(freeze=True)


def test_a_weak_penalty_is_named_with_its_distance() -> None:
    _, optimizer = trained(safe_core.admm(0.9, penalty=0.0, dual_update_interval=1), 3)
    with pytest.warns(FinalizeWarning, match=r"removes .* = 0\.\d\d of the weights \(0.weight 0"):
        optimizer.finalize()
    assert optimizer.finalized is not None
    assert optimizer.finalized.distance > 0.1


def test_a_layer_that_becomes_zero_is_named() -> None:
    model, optimizer = trained(safe_core.magnitude(Unstructured(0.5, scope="global")), 1)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    with pytest.warns(FinalizeWarning, match=r"sets all entries to zero in 2.weight$"):
        optimizer.finalize()
    assert optimizer.finalized is not None
    assert optimizer.finalized.emptied == ["2.weight"]


def test_pruning_at_once_is_what_magnitude_means() -> None:
    _, optimizer = trained(safe_core.magnitude(0.5), 3)
    optimizer.finalize()
    assert optimizer.finalized is not None
    assert optimizer.finalized.distance > 0.1


@pytest.mark.parametrize("given", [{}, {"importance": None}])
def test_an_importance_that_was_never_called_is_named(given: dict[str, Any]) -> None:
    def importance(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise AssertionError

    method = safe_core.magnitude(0.5, importance_interval=4)
    _, optimizer = trained(method, 3, importance=importance)
    if given:  # P = 1 by request
        optimizer.finalize(**given)
        return
    with pytest.warns(FinalizeWarning, match="importance was never refreshed in 3 steps"):
        optimizer.finalize()


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), safe_core.Channel(0.5)])
@pytest.mark.parametrize("freeze", [False, True])
def test_weights_that_are_not_finite_are_not_projected(
    bad: float, pattern: Any, freeze: bool
) -> None:
    model, optimizer = trained(safe_core.admm(pattern), 1)
    with torch.no_grad():
        model[2].weight[1, 1] = bad
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity in 2.weight \(1 of 64"):
        optimizer.finalize(freeze=freeze)
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was, rtol=0, atol=0, equal_nan=True)
    assert not optimizer.frozen
    assert optimizer.finalized is None


def test_each_group_is_judged_by_its_own_sparsity() -> None:
    model = network()
    schedule = safe_core.schedules.linear_sparsity(0.5, steps=4)
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "sparsity": Unstructured(schedule)},
    ]
    base = torch.optim.SGD(groups, lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.Method(0.5, Mask()), model=model)
    for _ in range(2):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(FinalizeWarning, match="sparsity was at 0.25 of 0.5 after 2 steps"):
        optimizer.finalize()


def test_a_copy_keeps_what_was_done_and_a_loaded_state_starts_anew() -> None:
    _, optimizer = trained(safe_core.magnitude(0.5), 1)
    optimizer.finalize()
    assert copy.deepcopy(optimizer).finalized == optimizer.finalized
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.finalized is None


def test_weights_whose_squares_overflow_are_named() -> None:
    model, optimizer = trained(safe_core.admm(0.5, penalty=0.0, dual_update_interval=1), 1)
    with torch.no_grad():
        model[0].weight.mul_(1e25)  # squares overflow in float32
    assert optimizer.report().advice[0].cause == "diverged"
    with pytest.warns(FinalizeWarning, match="norm of the weights is not finite"):
        optimizer.finalize()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e25  # nothing large is removed, but the rest is lost beside it
    with pytest.warns(FinalizeWarning, match="norm of the weights is not finite"):
        optimizer.finalize()


def test_the_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = trained(safe_core.magnitude(0.5), 1)
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)

        def spy(x: Any, *rest: Any, name: str = name, read: Any = read) -> Any:
            reads.append(name)
            return read(x, *rest)

        monkeypatch.setattr(torch.Tensor, name, spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.finalize()
    assert reads == ["tolist"]


# The length of the run, steps after finalize, and closures that do not train


def test_a_run_over_its_steps_is_named_but_not_its_fine_tuning() -> None:
    model, optimizer = trained(safe_core.safe(0.5, steps=20), 30)
    with pytest.warns(FinalizeWarning, match="step: the run takes 31 steps, and the m") as found:
        optimizer.step(closure_of(model, optimizer))
    assert found[0].filename == __file__
    for _ in range(9):
        optimizer.step(closure_of(model, optimizer))  # warns once
    with pytest.warns(FinalizeWarning, match="takes 40 steps, and the method was made for 20"):
        optimizer.finalize()
    model, optimizer = trained(safe_core.safe(0.5, steps=20), 20)
    optimizer.finalize(freeze=True)
    for _ in range(20):
        optimizer.step(closure_of(model, optimizer))
    optimizer.finalize()


def closure_of(model: nn.Sequential, optimizer: SparseOptimizer) -> Any:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.filterwarnings("ignore:finalize:safe_core.FinalizeWarning")
@pytest.mark.parametrize("method", [safe_core.safe(0.5), safe_core.magnitude(0.5)])
def test_the_first_step_that_moves_the_zeros_warns_once(method: Any) -> None:
    model, optimizer = trained(method, 2)
    with pytest.raises(ValueError, match=r"0\.weight \(.* many\).*: call finalize\(\) first$"):
        optimizer.check_sparsity()
    optimizer.finalize()
    optimizer.check_sparsity()
    closure = closure_of(model, optimizer)
    with pytest.warns(
        FinalizeWarning, match=r"step\(\) after finalize\(\) moves the zeros"
    ) as found:
        optimizer.step(closure)
    assert found[0].filename == __file__
    saved = optimizer.state_dict()
    optimizer.step(closure)
    with pytest.raises(ValueError, match=r": steps were taken after finalize\(\), so call it agai"):
        optimizer.check_sparsity()
    # A new optimizer that loads the state warns, too.
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    resumed = SparseOptimizer(base, method, model=model)
    resumed.load_state_dict(saved)
    with pytest.warns(FinalizeWarning, match=r"step\(\) after finalize\(\) moves the zeros"):
        resumed.step(closure_of(model, resumed))
    with pytest.raises(ValueError, match=r": steps were taken after finalize\(\), so call it agai"):
        resumed.check_sparsity()


class Parts(nn.Module):
    """A model with a layer that the loss does not reach, and one that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.head = (nn.Linear(8, 8) for _ in range(3))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.head(self.body(x)))


def parts(method: Any, **options: Any) -> tuple[Parts, SparseOptimizer]:
    torch.manual_seed(0)
    model = Parts()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, SparseOptimizer(base, method, model=model, **options)


@pytest.mark.parametrize("steps", [9, 10])
def test_a_weight_without_a_gradient_is_named_after_ten_steps(steps: int) -> None:
    model, optimizer = parts(safe_core.safe(0.5, steps=10))
    for _ in range(steps):
        optimizer.step(closure_of(model, optimizer))
    texts = [item.text for item in optimizer.report().advice if item.cause == "gradient"]
    named = "unused.weight never had a gradient, but its entries count towards the sparsity"
    assert [named in text for text in texts] == [True] * (steps == 10)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.finalize()
    assert any(named in str(w.message) for w in found) == (steps == 10)


def test_a_weight_that_was_frozen_is_named_as_the_reason() -> None:
    model, optimizer = trained(safe_core.safe(0.75, steps=20), 2)
    model[0].weight.requires_grad_(False)
    for _ in range(18):
        optimizer.step(closure_of(model, optimizer))
    with pytest.warns(
        FinalizeWarning, match=r"\(0\.weight did not move in the last step: requires"
    ):
        optimizer.finalize()


def test_a_model_that_was_frozen_for_export_is_judged_as_it_was_trained() -> None:
    model, optimizer = trained(safe_core.admm(0.5, penalty=1e-5, dual_update_interval=1), 3)
    model.requires_grad_(False)
    with pytest.warns(FinalizeWarning, match="removes") as found:
        optimizer.finalize()
    assert "did not move" not in str(found[0].message)


@pytest.mark.parametrize(
    "method", [safe_core.safe(Unstructured(0.5, scope="tensor"), steps=20), safe_core.keep_zeros()]
)
def test_a_weight_that_competes_with_no_other_needs_no_gradient(method: Any) -> None:
    model, optimizer = parts(method)
    with torch.no_grad():
        model.unused.weight[0] = 0
    for _ in range(20):
        optimizer.step(closure_of(model, optimizer))
    assert all(item.cause != "gradient" for item in optimizer.report().advice)


@pytest.mark.filterwarnings("ignore::safe_core.DenseWeightWarning")
def test_a_weight_that_joins_late_has_its_own_ten_steps() -> None:
    model = Parts()
    model.unused.weight.requires_grad_(False)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = SparseOptimizer(base, safe_core.safe(0.5, steps=40), model=model, where=chosen)
    found = []
    for late in (False, True):
        for _ in range(10):
            optimizer.step(closure_of(model, optimizer))
        found.append([item.cause for item in optimizer.report().advice])
        model.unused.weight.requires_grad_(True)
        assert "gradient" not in [item.cause for item in optimizer.report().advice] or late
    assert ["gradient" in causes for causes in found] == [False, True]


def chosen(name: str, p: torch.Tensor) -> bool:
    return p.ndim == 2


@pytest.mark.parametrize("cleared", [False, True])
def test_a_block_without_its_gradients_is_named(cleared: bool) -> None:
    model, optimizer = trained(safe_core.safe(0.5, steps=20), 0)
    model(torch.ones(2, 8)).square().mean().backward()
    with optimizer.perturbed():
        if cleared:
            model(torch.ones(2, 8)).square().mean().backward()
    if cleared:
        optimizer.zero_grad()
    text = "no block since zero_grad" if cleared else r"a perturbed\(\) block without backward"
    with pytest.raises(ValueError, match=f"Got {text}"):
        optimizer.step()


def test_a_parameter_of_two_names_is_asked_for_by_its_first() -> None:
    text = "must be named 'head.weight', the first of its names, got 'tied.weight'"
    for arguments in (
        {"method": safe_core.safe(0.5, steps=9), "where": ["tied.weight"]},
        {"method": safe_core.safe({"tied.weight": 0.5}, steps=9)},
    ):
        with pytest.raises(ValueError, match=text):
            parts(**arguments)


@pytest.mark.filterwarnings("ignore:finalize:safe_core.FinalizeWarning")
@pytest.mark.parametrize(
    "method",
    [safe_core.iht(0.5), safe_core.gmp(safe_core.schedules.cubic(0.5, steps=2))],
)
def test_steps_that_keep_the_zeros_are_silent(method: Any) -> None:
    model, optimizer = trained(method, 2)
    optimizer.finalize()
    optimizer.step(closure_of(model, optimizer))
    optimizer.check_sparsity()
    optimizer.finalize(freeze=True)
    optimizer.step(closure_of(model, optimizer))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(ValueError, match=r": the weights were changed after finalize\(\)"):
        optimizer.check_sparsity()


@pytest.mark.parametrize("method", [safe_core.safe(0.5), safe_core.admm(0.5)])
def test_a_closure_without_backward_is_an_error(method: Any) -> None:
    model, optimizer = trained(method, 0)
    with pytest.raises(ValueError, match=r"closure must call loss\.backward\(\): no parameter has"):
        optimizer.step(lambda: model(torch.ones(2, 8)).mean())
    assert optimizer.step(lambda: None) is None  # a trainer skips a batch in this way
    assert optimizer.steps == 0
    for p in model[2].parameters():
        p.requires_grad_(False)  # then some parameters have no gradient, rightly
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.steps == 1


def test_a_closure_that_leaves_old_gradients_is_not_called_none() -> None:
    model, optimizer = trained(safe_core.safe(0.5), 1)
    with pytest.raises(ValueError, match="Got a closure that leaves the gradients as they were"):
        optimizer.step(lambda: model(torch.ones(2, 8)).mean())
