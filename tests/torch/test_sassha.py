"""Sassha in PyTorch: every step is that of plain NumPy, alone and as the base of SAFE."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from sassha_reference import CASES, PLAIN, UNDER_SAFE, Problem, Recipe
from torch import Tensor, nn
from torch.nn import functional

import safe_core
from safe_core.adapters.torch import RandomState, Sassha, SparseOptimizer
from safe_core.adapters.torch.products import HessianEstimates
from safe_core.random_numbers import rademacher

PROBLEM = Problem.make()
GROUPS = Recipe(rate=(0.02, 0.05), rho=(0.1, 0.3), decay=(0.5, 0.1))


def draw(seed: int = 0) -> Any:
    return lambda c: rademacher(PROBLEM.start, seed, c)


class Run:
    """The problem of the reference, trained by Sassha alone or under a method."""

    def __init__(self, recipe: Recipe, method: Any = None, **settings: Any) -> None:
        self.model = nn.Linear(6, 4).double()
        for p, x in zip(self.model.parameters(), PROBLEM.start, strict=True):
            p.data = torch.tensor(x)
        self.data = torch.tensor(PROBLEM.inputs), torch.tensor(PROBLEM.targets)
        each = zip(self.model.parameters(), recipe.rate, recipe.rho, recipe.decay, strict=True)
        keys = ("params", "lr", "rho", "weight_decay")
        groups = [dict(zip(keys, ([p], *values), strict=True)) for p, *values in each]
        self.optimizer: Any = Sassha(
            groups,
            betas=recipe.betas,
            hessian_interval=recipe.interval,
            eps=recipe.eps,
            power=recipe.power,
            bias_correction=recipe.correction,
            ascent="momentum" if recipe.momentum else "gradient",
            **settings,
        )
        if method is not None:
            self.optimizer = SparseOptimizer(self.optimizer, method, model=self.model)
        self.calls = 0

    def loss(self, rows: slice = slice(None)) -> Tensor:
        residual = self.model(self.data[0][rows]) - self.data[1][rows]
        return residual.cosh().log().sum() / len(self.data[0])

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        self.optimizer.backward(loss)
        return loss

    def step(self) -> Any:
        return self.optimizer.step(self.closure)

    def step_by_passes(self, backward: Any) -> None:
        self.optimizer.zero_grad()
        backward()
        if self.optimizer.perturbs:
            with self.optimizer.perturbed():
                backward()
        self.optimizer.step()

    def params(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def assert_near(got: list[Tensor], wanted: Any) -> None:
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("recipe", [*CASES.values(), GROUPS], ids=[*CASES, "groups"])
def test_every_step_is_that_of_numpy(recipe: Recipe) -> None:
    run = Run(recipe, seed=3)
    for point in recipe.steps(PROBLEM, draw(3)):
        run.step()
        assert_near(run.params(), point)
    assert run.calls == recipe.length * (2 if recipe.rho[0] and not recipe.momentum else 1)
    assert np.linalg.norm(point[0] - PROBLEM.start[0]) > 1


@pytest.mark.parametrize("name", list(UNDER_SAFE))
def test_every_step_under_a_method_is_that_of_numpy(name: str) -> None:
    method, safe = UNDER_SAFE[name]
    run = Run(PLAIN, method)
    first = run.optimizer.split().support[0]
    for *point, support in safe.steps(PROBLEM, PLAIN, draw()):
        run.step()
        assert_near(run.params(), point)
        np.testing.assert_array_equal(run.optimizer.split().support[0], support)
    assert (first.numpy() != support).any(), "the support must move to be tested"


def test_passes_and_micro_batches_take_the_same_step_as_a_closure() -> None:
    for method in (None, safe_core.safe(0.6, rho=0.1, penalty=0.1, dual_update_interval=2)):
        recipe = Recipe(interval=2) if method is None else PLAIN._replace(interval=2)
        closure, passes, parts = (Run(recipe, method) for _ in range(3))

        def halves(run: Run = parts) -> None:
            for rows in (slice(0, 7), slice(7, 20)):
                run.optimizer.backward(run.loss(rows))

        for _ in range(6):
            closure.step()
            passes.step_by_passes(lambda run=passes: run.optimizer.backward(run.loss()))
            parts.step_by_passes(halves)
        assert_same(passes.params(), closure.params())
        for a, b in zip(parts.params(), closure.params(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", [None, UNDER_SAFE["safe"][0]], ids=["alone", "safe"])
@pytest.mark.parametrize("kind", ["saved", "copied"])
def test_a_resumed_run_has_the_same_bits(kind: str, method: Any) -> None:
    recipe = GROUPS._replace(interval=4) if method is None else PLAIN._replace(interval=4)
    run = Run(recipe, method, seed=5)
    for _ in range(6):
        run.step()
    if kind == "copied":
        resumed = copy.deepcopy(run)
    else:
        file = io.BytesIO()
        torch.save([run.model.state_dict(), run.optimizer.state_dict()], file)
        file.seek(0)
        # The seed of the groups is saved, too.
        model, state = torch.load(file, weights_only=True)
        resumed = Run(recipe, method)
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(state)
    for _ in range(6):
        run.step()
        resumed.step()
    assert_same(resumed.params(), run.params())


def test_parameters_that_join_late_count_for_themselves() -> None:
    recipe = Recipe(interval=4)
    run, alone = Run(recipe), Run(recipe)
    late = nn.Parameter(torch.tensor([2.0, -1.0]).double())
    for _ in range(6):
        run.step()
    run.optimizer.add_param_group({"params": [late], "rho": 0.0, "lr": 0.1})
    state = run.optimizer.state
    loss = run.loss
    run.loss = lambda: loss() + (late**2).sum()  # type: ignore[method-assign, assignment, misc]
    run.step()
    assert (state[late]["step"], state[late]["hessian_count"]) == (1, 1)
    # One step from the start: m / (1 - b1) is the gradient, and D / (1 - b2) its slope, 2.
    wanted = torch.tensor([2.0, -1.0]).double() * (1 - 0.1 * 2 / (2**0.5 + 1e-3))
    torch.testing.assert_close(late.detach(), wanted, rtol=1e-12, atol=0)
    weight = run.model.weight
    assert (state[weight]["step"], state[weight]["hessian_count"]) == (7, 2)
    alone.step()


def test_buffers_are_updated_once_a_step() -> None:
    for ascent in ("gradient", "momentum"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = Sassha(model.parameters(), ascent=ascent, model=model)
        x = torch.randn(8, 3)

        def closure(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean() + model(x).sum()
            optimizer.backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert int(model[1].num_batches_tracked) == 2 * 3


def test_replay_draws_the_same_dropout_masks() -> None:
    p = nn.Parameter(torch.ones(50))
    optimizer = Sassha([p])
    found = []
    random = RandomState.record()

    def backward() -> None:
        found.append(functional.dropout(p, 0.5))
        optimizer.backward((found[-1] ** 2).sum())

    backward()
    with optimizer.perturbed(replay=random):
        backward()
    assert torch.equal(found[0] != 0, found[1] != 0)


def test_x_is_restored_and_the_step_is_lost_if_a_block_raises() -> None:
    run = Run(Recipe())
    before = run.params()
    moved = []

    def fail() -> None:
        with run.optimizer.perturbed():
            moved.extend(run.params())
            raise KeyError

    run.optimizer.backward(run.loss())
    with pytest.raises(KeyError):
        fail()
    assert not torch.equal(moved[0], before[0])
    assert_same(run.params(), before)
    run.optimizer.backward(run.loss())
    with pytest.raises(ValueError, match="needs a gradient at the perturbed point"):
        run.optimizer.step()


def test_loss_scaling_changes_nothing() -> None:
    scaled, plain = Run(Recipe(interval=1)), Run(Recipe(interval=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def backward() -> None:
        loss = scaler.scale(scaled.loss())
        scaled.optimizer.backward(loss, loss_scale=scaler.get_scale())

    for _ in range(3):
        scaled.optimizer.zero_grad()
        backward()
        with scaled.optimizer.perturbed():
            backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        plain.step()
    assert_same(scaled.params(), plain.params())


def test_a_product_that_overflows_leaves_its_average() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = Sassha([p], lr=0.1, rho=0.0, hessian_interval=1)
    optimizer.backward((p**2).sum())
    optimizer.step()
    before = optimizer.state[p]["hessian_diagonal"].clone()
    optimizer.zero_grad()
    # The slope is 0 at 0, and the curvature infinite.
    with torch.no_grad():
        p[0] = 0
    optimizer.backward((p.abs() ** 1.5).sum())
    optimizer.step()
    diagonal = optimizer.state[p]["hessian_diagonal"]
    assert diagonal[0] == before[0]
    assert diagonal[1] != before[1]
    assert p.isfinite().all()


def test_a_step_that_initialises_for_a_checkpoint_does_not_count() -> None:
    run, fresh = Run(PLAIN), Run(PLAIN)
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.optimizer.step()
    assert {state["step"] for state in run.optimizer.state.values()} == {0}
    for group in run.optimizer.param_groups:
        group["lr"] = 0.02
    for each in (run, fresh):
        each.step()
    assert_same(run.params(), fresh.params())
    run.optimizer.zero_grad(set_to_none=False)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.optimizer.step()  # in training a step counts, also with zero gradients
    assert {state["step"] for state in run.optimizer.state.values()} == {2}


def test_a_learning_rate_can_be_a_tensor_and_parameters_can_be_transposed() -> None:
    runs = [Run(PLAIN) for _ in range(2)]
    for group in runs[1].optimizer.param_groups:
        group["lr"] = torch.tensor([group["lr"]], dtype=torch.float64)
    weight = runs[1].model.weight
    weight.data = weight.data.t().contiguous().t()
    for run in runs:
        for _ in range(3):
            run.step()
    for a, b in zip(*(run.params() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


# Errors


def test_a_missing_hessian_product_is_named_and_changes_nothing() -> None:
    for method in (None, UNDER_SAFE["safe"][0]):
        run = Run(Recipe() if method is None else PLAIN, method)

        def closure(run: Run = run) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss()
            loss.backward()
            return loss

        before = run.params()
        with pytest.raises(ValueError, match=r"call optimizer.backward\(loss\) instead of loss"):
            run.optimizer.step(closure)
        assert_same(run.params(), before)
        run.step()
        assert run.optimizer.step(closure) is not None  # no product is due at this step


@pytest.mark.parametrize("method", [None, UNDER_SAFE["safe"][0]], ids=["alone", "safe"])
def test_only_one_gradient_of_due_steps_has_a_second_graph(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    add = HessianEstimates.add

    def counted(*given: Any) -> None:
        calls.append(run.calls)
        add(*given)

    monkeypatch.setattr(HessianEstimates, "add", counted)
    run = Run(Recipe(interval=3) if method is None else PLAIN._replace(interval=3), method)
    base, found = getattr(run.optimizer, "base", run.optimizer), []
    for _ in range(6):
        found.append(base.needs_product)
        run.step()
    assert found == [True, False, False, True, False, False]
    assert calls == [2, 8]  # the second of the two calls of a closure


def test_an_unperturbed_step_is_allowed_and_a_block_replaces_its_product() -> None:
    method = UNDER_SAFE["safe"][0]
    allowed, wanted, plain = (
        Run(PLAIN, method),
        Run(PLAIN, method),
        Run(PLAIN, UNDER_SAFE["admm"][0]),
    )
    allowed.optimizer.allow_unperturbed = True
    for run in (allowed, wanted):
        run.step_by_passes(lambda run=run: run.optimizer.backward(run.loss()))
    assert_same(allowed.params(), wanted.params())
    allowed = Run(PLAIN, method)
    allowed.optimizer.allow_unperturbed = True
    allowed.closure()
    allowed.optimizer.step()
    plain.step()
    assert_same(allowed.params(), plain.params())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"rho": -0.1}, "rho must be a finite number of at least 0, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"hessian_interval": 0}, "hessian_interval must be at least 1, got 0"),
        ({"eps": "small"}, "eps must be a Python number, got 'small'"),
        ({"power": -1.0}, "power must be a finite number of at least 0, got -1"),
        ({"bias_correction": True}, "bias_correction must be one of 'corrected', 'published', 'n"),
        ({"ascent": "up"}, "ascent must be one of 'gradient', 'momentum', got 'up'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Sassha([nn.Parameter(torch.ones(2))], **settings)


def test_a_group_is_checked_and_left_out_if_it_does_not_fit() -> None:
    run = Run(Recipe())
    late = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="eps must be a finite number"):
        run.optimizer.add_param_group({"params": [late], "eps": -1.0})
    assert len(run.optimizer.param_groups) == 2
    with pytest.raises(TypeError, match="must be real floating, got dtype"):
        run.optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.complex64)]})


def test_calls_in_the_wrong_place_are_refused() -> None:
    run = Run(Recipe())
    optimizer = run.optimizer
    with (
        pytest.raises(ValueError, match="needs the gradients of a first backward"),
        optimizer.perturbed(),
    ):
        pass
    with pytest.raises(TypeError, match="loss must be a tensor, got"):
        optimizer.backward(1.0)
    with pytest.raises(ValueError, match="loss_scale must be positive, got 0"):
        optimizer.backward(run.loss(), loss_scale=0)
    optimizer.backward(run.loss())
    with pytest.raises(ValueError, match="set rho=0, because its method perturbs"):
        optimizer.step()
    with optimizer.perturbed():
        for call in (optimizer.step, optimizer.perturbed().__enter__):
            with pytest.raises(ValueError, match="must come after the perturbed"):
                call()
    with pytest.raises(TypeError, match="closure must be a function or None"):
        optimizer.step(3)


def test_a_base_that_perturbs_is_refused_under_a_method() -> None:
    model = nn.Linear(4, 2)
    for method in (safe_core.safe(0.5, steps=10), safe_core.admm(0.5, steps=10)):
        with pytest.raises(ValueError, match=r"base must not perturb, .* got Sassha with rho > 0"):
            SparseOptimizer(Sassha(model.parameters()), method, model=model)
    with pytest.raises(ValueError, match="compile must be False for a second-order base"):
        SparseOptimizer(Sassha(model.parameters(), rho=0.0), method, model=model, compile=True)


def test_a_first_order_base_has_no_backward() -> None:
    model = nn.Linear(4, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.admm(0.5, steps=10), model=model)
    assert not hasattr(optimizer, "backward")
    with pytest.raises(AttributeError, match=r"SGD has no backward\(\): call loss.backward"):
        optimizer.backward(torch.zeros(()))


def test_products_of_an_abandoned_step_do_not_count() -> None:
    for method in (None, UNDER_SAFE["safe"][0], UNDER_SAFE["admm"][0]):
        run, other = Run(PLAIN, method), Run(PLAIN, method)
        run.closure()
        run.step()
        other.step()
        assert_same(run.params(), other.params())


def test_a_closure_without_gradients_takes_no_step() -> None:
    run = Run(Recipe())
    before = run.params()
    assert run.optimizer.step(lambda: 5.0) == 5.0
    assert_same(run.params(), before)
    assert not run.optimizer.state
