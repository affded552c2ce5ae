"""Comparators and variants: the core on plain arrays, and what the adapters keep of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import linear_problem
import numpy as np
import optax
import pytest
import torch
from array_backends import Backend
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import ArrayInfo, GradientAscent, Layout, Method, schedules
from safe_core.adapters.jax import importance as optax_importance
from safe_core.adapters.jax.reporting import report
from safe_core.adapters.optax import finalize, sparse_optimizer
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch import importance as torch_importance
from safe_core.adapters.torch import trainers as torch_trainers
from safe_core.functional import FunctionalStep, start
from safe_core.reconstruction import Reconstruction

NAMES = ["sg multi", "decoupled", "pull", "radius in steps", "untuned safe", "untuned admm", "iht"]
NAMES += ["gmp", "imp", "magnitude", "cram", "cram plus multi"]
ADASAP = ["adasap", "adasap with SAM and Taylor", "adasap with a global norm"]
NAMES += ADASAP
CUBIC = schedules.cubic(0.6, steps=4)
every_case = pytest.mark.parametrize("name", NAMES)

# The core


class Loop(NamedTuple):
    """A training loop of one's own: the steps of a method on a list of one weight and one bias."""

    method: Method
    xp: Backend

    INFO = ArrayInfo(("w",), (Layout((1,), (0,)),))

    def run(self, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The weight and its support after every step of `linear_problem`."""
        problem = linear_problem.Problem.make()
        params = [self.xp.asarray(problem.weight), self.xp.asarray(problem.bias)]
        state = start(self.method, params, [0], self.INFO)
        buffers = [0 * x for x in params]

        def gradients(params: list[Any]) -> list[Any]:
            found = problem.gradient(*map(self.xp.to_numpy, params))
            return [self.xp.asarray(g) for g in found]

        def momentum(gradients: list[Any]) -> list[Any]:
            buffers[:] = [
                linear_problem.MOMENTUM * m + g for m, g in zip(buffers, gradients, strict=True)
            ]
            return [-linear_problem.RATE * m for m in buffers]

        for t in range(steps):
            step = FunctionalStep(self.method, params, [0], self.INFO, t, gradients, momentum)
            step.learning_rate = linear_problem.RATE
            step.layouts = [*self.INFO.layouts, None]
            params, state = step.run(gradients(params), state)
            yield self.xp.to_numpy(params[0]), self.xp.to_numpy(state.split.support[0])


@every_case
@pytest.mark.parametrize("xp", [Backend.NUMPY, Backend.STRICT, Backend.TORCH], ids=str)
def test_the_parts_of_a_method_make_its_steps(name: str, xp: Backend) -> None:
    method, recipe = linear_problem.CASES[name]
    points = linear_problem.trajectory(linear_problem.Problem.make(), recipe)
    for (w, support), point in zip(Loop(method, xp).run(recipe.steps), points, strict=True):
        np.testing.assert_allclose(w, point.weight, rtol=1e-11, atol=1e-15)
        np.testing.assert_array_equal(support, point.z != 0)


def test_draws_are_the_same_of_every_library_and_never_change() -> None:
    table = schedules.random_sparsity((0.5, 0.7, 0.9), seed=3)
    steps = np.asarray([0, 1, 2, 3, 1000, 2**16, 2**31 - 2])
    wanted = [table.stage(int(t)) for t in steps]
    assert wanted == [0, 1, 0, 1, 2, 1, 0]
    for integers in (steps, torch.tensor(steps), jnp.asarray(steps, jnp.int32)):
        assert [int(i) for i in table.stage(integers)] == wanted
    assert [float(x) for x in table.table] == [0.5, 0.7, 0.9, 0.9]
    assert table(0) == 0.5


@pytest.mark.parametrize("stride", [1, 32])
def test_draws_are_uniform_and_independent_from_one_to_the_next(stride: int) -> None:
    drawn = schedules.random_sparsity((0.1, 0.2, 0.3)).stage(stride * np.arange(9001))
    pairs = np.bincount(3 * drawn[:-1] + drawn[1:], minlength=9)
    assert np.sum((pairs - 1000) ** 2 / 1000) < 26.1  # 0.1% of chi-squared with 8 degrees exceed it


def test_a_random_sparsity_ends_at_its_largest() -> None:
    x, targets = [np.arange(1.0, 11.0)], ArrayInfo(("x",), (None,))
    method = safe_core.cram(schedules.random_sparsity((0.9, 0.2)))
    assert method.finalize(x, targets)[0].tolist() == [0.0] * 9 + [10.0]
    zeros = [int(np.sum(~method.support_at(x, targets, t)[0])) for t in range(40)]
    assert set(zeros) == {2, 9}


def test_nothing_comes_back_under_a_mask() -> None:
    method = safe_core.gmp(schedules.linear_sparsity(0.5, steps=2))
    split = safe_core.SplitState([], [np.asarray([True, False, True, True])])
    after = method.update([np.asarray([1.0, 9.0, 2.0, 3.0])], split, 1, ArrayInfo(("x",), (None,)))
    assert after.support[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("pattern", "importance", "wanted"),
    [
        (schedules.linear_sparsity(0.75, 1), [1.0, 0.0, 0.0, 0.0], [True, False, False, True]),
        (safe_core.Channel(schedules.linear_sparsity(0.5, 1)), [0.0] * 4, [True] * 4),
    ],
    ids=["entries", "channels"],
)
def test_nothing_comes_back_where_what_is_left_has_no_importance(
    xp: Backend, pattern: Any, importance: list[float], wanted: list[bool]
) -> None:
    def update(w: Any, mask: Any, importance: Any) -> Any:
        split, targets = safe_core.SplitState([], [mask]), ArrayInfo(("w",), (Layout((1,), (0,)),))
        return safe_core.gmp(pattern).update([w], split, 0, targets, [importance]).support[0]

    w = np.asarray([[9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    mask = np.asarray([[False] * 4, [True] * 4])
    support = xp.run(update, w, mask, np.asarray([[1.0] * 4, importance]))
    assert support.tolist() == [[False] * 4, wanted]


def test_linear_sparsity_rises_in_equal_steps() -> None:
    table = schedules.linear_sparsity(0.9, steps=90, initial=0.3, start=10, every=30)
    assert [float(x) for x in table.table] == [0.3, 0.5, 0.7, 0.9]
    assert [table(t) for t in (0, 39, 40, 99, 100, 200)] == [0.3, 0.3, 0.5, 0.7, 0.9, 0.9]
    assert len(schedules.linear_sparsity(0.9, 1000).table) == 101


def test_gradient_ascent_follows_the_gradient_at_its_length(xp: Backend) -> None:
    def perturb(*gradients: Any) -> Any:
        return GradientAscent(0.5).perturbation([None, None], gradients, rho=0.5)

    e = xp.run(perturb, np.asarray([3.0, 0.0]), np.asarray([[-4.0]]))
    assert [x.tolist() for x in e] == [[1.5, 0.0], [[-2.0]]]
    bad = xp.run(perturb, np.asarray([np.inf, 1.0]), np.asarray([[-4.0]]))
    assert [x.tolist() for x in bad] == [[0.0, 0.0], [[0.0]]]


# OBD

CURVATURE = np.asarray([[2.0, -1.0, 0.5], [-1.0, 3.0, 0.0], [0.5, 0.0, -4.0]])


def test_every_sign_together_gives_the_diagonal(xp: Backend) -> None:
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(8, 3)
    products = signs @ CURVATURE

    def estimate(probes: Any, products: Any) -> Any:
        return safe_core.importance.hutchinson(probes, products)

    found = xp.run(estimate, list(signs), list(products))
    np.testing.assert_allclose(found, [2.0, 3.0, 0.0], atol=1e-15)
    assert found.dtype == np.float64


def test_both_frameworks_estimate_the_diagonal_of_a_hessian() -> None:
    w = np.asarray([1.0, -2.0, 3.0])  # of sum c x^3 the Hessian is diagonal: 6 c x
    found = optax_importance.hessian_diagonal(
        lambda p, c: jnp.sum(c * p["w"] ** 3) + p["b"],
        {"w": jnp.asarray(w), "b": jnp.asarray(1.0)},
        jnp.asarray([1.0, 1.0, 2.0]),
        key=jax.random.key(0),
        samples=2,
    )
    np.testing.assert_allclose(found["w"], [6.0, 0.0, 36.0])
    assert found["b"] == 0
    params = {"w": nn.Parameter(torch.tensor(w)), "b": nn.Parameter(torch.tensor(1.0))}
    loss = lambda: (torch.tensor([1.0, 1.0, 2.0]) * params["w"] ** 3).sum() + params["b"]  # noqa: E731
    with torch.no_grad():  # as within a step
        mine = torch_importance.hessian_diagonal(loss, params, samples=2)
    np.testing.assert_allclose(mine["w"], [6.0, 0.0, 36.0])
    assert mine["b"] == 0
    a = torch.tensor(CURVATURE)
    x = nn.Parameter(torch.tensor(w))
    generator = torch.Generator().manual_seed(0)
    mixed = torch_importance.hessian_diagonal(
        lambda: x @ a @ x / 2, {"x": x}, samples=400, generator=generator
    )
    np.testing.assert_allclose(mixed["x"], [2.0, 3.0, 0.0], atol=0.2)


def test_a_dual_update_asks_for_the_diagonal_of_a_hessian() -> None:
    model, curvature = nn.Linear(3, 1, bias=False), torch.tensor([[1.0, 3.0, 2.0]])

    def loss() -> torch.Tensor:
        return (curvature * model.weight**2).sum()

    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        safe_core.iht(0.5),
        model=model,
        importance=lambda params: torch_importance.hessian_diagonal(loss, params),
    )
    loss().backward()
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["importance"], 2 * curvature)


# The PyTorch adapter


class Run:
    """A small network; equal arguments give equal runs."""

    def __init__(self, method: Method, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.inputs, self.targets = torch.randn(16, 6), torch.randn(16, 4)
        groups = [{"params": [self.model[0].weight]}, {"params": [self.model[2].weight]}]
        groups += [{"params": [self.model[0].bias, self.model[2].bias]}]
        base = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        self.optimizer = SparseOptimizer(base, method, model=self.model, **options)

    def loss(self) -> torch.Tensor:
        return nn.functional.mse_loss(self.model(self.inputs), self.targets)

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def by_phases(self, scale: float = 1.0) -> None:
        """A step phase by phase, with a loss scaled by ``scale``."""
        self.optimizer.zero_grad()
        (scale * self.loss()).backward()
        if self.optimizer.perturbs:
            with self.optimizer.perturbed(loss_scale=scale):
                (scale * self.loss()).backward()
        if self.optimizer.projects:
            with self.optimizer.projected():
                (scale * self.loss()).backward()
        for p in self.model.parameters():
            p.grad /= scale
        self.optimizer.step()

    def state(self) -> list[torch.Tensor]:
        split = self.optimizer.split()
        tensors = [*self.model.parameters(), *split.anchor, *split.support]
        return [t.detach().clone() for t in tensors]


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@short_run
@every_case
def test_a_run_resumes_and_ends_exactly_sparse(name: str) -> None:
    method = linear_problem.CASES[name][0]
    first = Run(method).train(5)
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    held = {key for entry in state["state"].values() for key in entry if key.startswith("safe_")}
    assert ("safe_anchor" in held) == method.constraint.has_anchor
    second = Run(method)
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    assert_same(second.train(5).state(), first.train(5).state())
    figures = second.optimizer.report().scalars()
    others = {"cram plus multi": 0.7, "sg multi": 0.7, **dict.fromkeys(ADASAP, 0.5)}
    zeros = 80 - int(80 * others.get(name, 0.6))
    second.optimizer.finalize()
    second.optimizer.check_sparsity()
    kept = sum(int((w != 0).sum()) for w in second.optimizer.sparse_parameters().values())
    assert kept == zeros
    assert figures["achieved"] == 1 - kept / 80
    assert (figures["zeros"] > 0) == (name in ("gmp", "imp", *ADASAP))


@every_case
def test_phases_with_a_scaled_loss_are_the_closure(name: str) -> None:
    method = linear_problem.CASES[name][0]
    one, two = Run(method).train(4), Run(method)
    for _ in range(4):
        two.by_phases(scale=2.0**10)
    assert_same(two.state(), one.state())


class Wrapped(NamedTuple):
    """An optimizer as Accelerate wraps it."""

    optimizer: SparseOptimizer
    scaler: torch.amp.GradScaler | None


@pytest.mark.parametrize("told", [None, 8.0])
def test_the_ascent_of_a_wrapped_optimizer_is_told_the_scale_of_the_loss(
    told: float | None,
) -> None:
    scaler = None if told else torch.amp.GradScaler("cpu", init_scale=8.0)
    moved = []
    for scale in (1.0, 8.0):
        run = Run(safe_core.cram(0.5))
        (scale * run.loss()).backward()
        inner = run.optimizer
        optimizer, given = (Wrapped(inner, scaler), told) if scale > 1 else (inner, None)
        with torch_trainers.perturbed(optimizer, loss_scale=given):
            moved.append([p.detach().clone() for p in run.model.parameters()])
    assert_same(*moved)


@pytest.mark.parametrize("name", ["sg multi", "cram plus multi"])
def test_parameters_come_back_and_clipping_sees_the_sum(name: str) -> None:
    run = Run(linear_problem.CASES[name][0]).train(2)
    optimizer, before = run.optimizer, run.state()
    optimizer.zero_grad()
    run.loss().backward()
    first = [p.grad.clone() for p in run.model.parameters()]
    with optimizer.perturbed():
        run.loss().backward()
        second = [p.grad.clone() for p in run.model.parameters()]
    wanted = [a + b for a, b in zip(first, second, strict=True)]
    if optimizer.projects:
        with optimizer.projected():
            zeros = sum(int((w == 0).sum()) for w in optimizer.sparse_parameters().values())
            assert zeros == int(80 * linear_problem.MULTI(2))
            run.loss().backward()
            wanted = [a + p.grad for a, p in zip(second, run.model.parameters(), strict=True)]
    assert_same([p.grad for p in run.model.parameters()], wanted)
    assert_same(run.state(), before)


@pytest.mark.parametrize("rate", [torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)])
def test_the_rate_of_a_decoupled_penalty_may_be_a_tensor(rate: torch.Tensor) -> None:
    run = Run(safe_core.admm(0.5, penalty=0.3, decoupled=True))
    wanted = run.train(1).state()
    run = Run(safe_core.admm(0.5, penalty=0.3, decoupled=True))
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    for a, b in zip(run.train(1).state(), wanted, strict=True):
        torch.testing.assert_close(a, b)


@short_run
def test_a_frozen_support_needs_no_projected_gradient() -> None:
    run = Run(linear_problem.CASES["sg"][0]).train(3)
    run.optimizer.finalize(freeze=True)
    assert not run.optimizer.projects
    run.train(2).optimizer.check_sparsity()


def test_a_mask_holds_between_prunings_and_nothing_comes_back() -> None:
    run = Run(safe_core.imp_sam(schedules.linear_sparsity(0.8, steps=6, every=3)))
    weights = list(run.optimizer.sparse_parameters().values())
    gone, counts = torch.zeros(80, dtype=torch.bool), []
    for _ in range(8):
        run.train(1)
        zero = torch.cat([w.detach().flatten() == 0 for w in weights])
        assert zero[gone].all()
        gone = zero
        counts.append(int(zero.sum()))
    assert counts == [0, 0, 32, 32, 32, 64, 64, 64]


def test_the_sparsity_of_a_group_rises_by_its_own_schedule() -> None:
    run = Run(safe_core.gmp(schedules.cubic(0.5, steps=2)))
    run.optimizer.param_groups[1]["sparsity"] = schedules.linear_sparsity(0.5, steps=4)
    counts = []
    for _ in range(5):
        run.train(1)
        counts.append([int((run.model[i].weight == 0).sum()) for i in (0, 2)])
    assert counts == [[21, 4], [24, 8], [24, 12], [24, 16], [24, 16]]


# The JAX adapter


def jax_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(6, 4))), "bias": jnp.zeros(4)}


def jax_loss(params: Any) -> Any:
    return jnp.sum(jnp.tanh(params["kernel"] + params["bias"]) ** 2)


@pytest.mark.parametrize("name", ["gmp", "cram plus multi"])
def test_a_step_is_traced_once_and_reports(name: str) -> None:
    method = linear_problem.CASES[name][0]
    tx, traces = sparse_optimizer(optax.sgd(0.1), method), []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        grad_fn = jax.grad(jax_loss)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = jax_params()
    state = tx.init(params)
    structure = jax.tree.structure(state)
    for _ in range(11):
        params, state = step(params, state)
    assert len(traces) == 1
    assert jax.tree.structure(state) == structure
    kept = 24 - int(24 * (0.7 if "multi" in name else 0.6))
    sparse = finalize(params, state, method)["kernel"]
    assert int((sparse != 0).sum()) == kept
    achieved = report(params, state, method).scalars()["achieved"]
    assert float(achieved) == pytest.approx(1 - kept / 24)


# Refusals

V, T = ValueError, TypeError
MULTI = schedules.random_sparsity((0.5, 0.7))
RECIPE = Reconstruction(safe_core.gmp(CUBIC))


def torch_with(method: Method, **group: Any) -> Any:
    weight = nn.Parameter(torch.ones(2, 2))
    base = torch.optim.SGD([{"params": [weight], **group}], lr=0.1)
    return SparseOptimizer(base, method, where=lambda name, p: True)


def jax_with(method: Method, **options: Any) -> Any:
    return sparse_optimizer(optax.sgd(0.1), method, **options)


class WithoutRate(torch.optim.Optimizer):
    """A base that knows no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def without_rate() -> Any:
    base = WithoutRate([nn.Parameter(torch.ones(2, 2))])
    method = safe_core.admm(0.5, decoupled=True)
    return SparseOptimizer(base, method, where=lambda name, p: True)


def another_state(method: Method, other: Method) -> Any:
    state, params = jax_with(other).init(jax_params()), jax_params()
    return jax_with(method).update(params, state, params)


def backward(run: Run) -> Run:
    run.loss().backward()
    return run


def enter(block: Any) -> None:
    with block:
        raise AssertionError("the block must not be entered")


def unprojected() -> Any:
    run = backward(Run(safe_core.safe(0.5, projected_gradient=True)))
    with run.optimizer.perturbed():
        run.loss().backward()
    run.optimizer.step()


@pytest.mark.parametrize("steps", [1, 30, 5000])
def test_gradual_pruning_of_a_run_rises_as_safe_does(steps: int) -> None:
    rising = safe_core.safe(0.9, steps=steps).sparsity
    assert safe_core.gmp(0.9, steps=steps) == safe_core.gmp(rising)
    assert safe_core.imp_sam(0.9, steps=steps, rho=0.05) == safe_core.imp_sam(rising, rho=0.05)


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("decoupled", lambda: safe_core.admm(0.5, decoupled=1), T, "1"),
    (
        "reuse",
        lambda: safe_core.safe(0.5, perturbation_interval=2, reuse=0.1, projected_gradient=True),
        V,
        "SAM(",
    ),
    ("projected_gradient", lambda: safe_core.admm(0.5, projected_gradient=1), T, "1"),
    ("sparsity", lambda: safe_core.gmp(0.5), V, "sparsity=0.5"),
    ("sparsity", lambda: safe_core.imp_sam("2:4"), V, "NM("),
    ("sparsity", lambda: RECIPE.bound(safe_core.Unstructured(0.5), 9), V, "sparsity=0.5"),
    ("sparsity", lambda: safe_core.gmp(MULTI), V, "RandomSparsity("),
    ("sparsity", lambda: safe_core.gmp("2:4", steps=9), V, "NM("),
    ("steps", lambda: safe_core.gmp(CUBIC, steps=9), V, "9 and Unstructured("),
    ("sparsity", lambda: safe_core.gmp({"a": 0.5, "b": 0.9}, steps=9), V, "ByName("),
    ("steps", lambda: safe_core.imp_sam(0.5, steps=0), V, "0"),
    ("interval", lambda: safe_core.iht(0.5, interval=0), V, "0"),
    ("interval", lambda: safe_core.cram(0.5, importance_interval=1.5), T, "1.5"),
    ("interval", lambda: safe_core.magnitude(0.5, importance_interval=0), V, "0"),
    ("plus", lambda: safe_core.cram(0.5, plus="yes"), T, "'yes'"),
    ("rho", lambda: safe_core.cram(0.5, rho=-1.0), V, "-1.0"),
    ("adaptive", lambda: safe_core.imp_sam(CUBIC, adaptive=2), T, "2"),
    ("values", lambda: schedules.random_sparsity(()), V, "0"),
    ("values", lambda: schedules.random_sparsity((0.5, 1.0)), V, "1.0"),
    ("values", lambda: schedules.random_sparsity(0.5), T, "0.5"),
    ("seed", lambda: schedules.random_sparsity((0.5,), seed=-1), V, "-1"),
    ("steps", lambda: schedules.linear_sparsity(0.5, 0), V, "0"),
    ("penalty", lambda: safe_core.safe(0.5, penalty=MULTI), T, "RandomSparsity("),
    ("products", lambda: safe_core.importance.hutchinson([], []), V, "0"),
    ("samples", lambda: torch_importance.hessian_diagonal(print, {}, samples=0), V, "0"),
    ("params", lambda: torch_importance.hessian_diagonal(print, {}), V, "none"),
    ("loss_fn", lambda: torch_importance.hessian_diagonal(3.0, {}), T, "float"),
    (
        "loss_fn",
        lambda: optax_importance.hessian_diagonal(None, {}, key=jax.random.key(0)),
        T,
        "NoneType",
    ),
    ("penalty", lambda: torch_with(safe_core.iht(0.5), penalty=0.1), V, "0.1"),
    ("lr", without_rate, V, "WithoutRate"),
    ("learning_rate", lambda: jax_with(safe_core.admm(0.5, decoupled=True)), V, "None"),
    ("learning_rate", lambda: jax_with(safe_core.admm(0.5), learning_rate=0.1), V, "0.1"),
    ("penalty", lambda: jax_with(safe_core.iht(0.5), penalty=0.1), V, "0.1"),
    (
        "grad_fn",
        lambda: another_state(*[safe_core.admm(0.5, projected_gradient=True)] * 2),
        V,
        "None",
    ),
    ("state.anchor", lambda: another_state(safe_core.admm(0.5), safe_core.iht(0.5)), V, ""),
    ("state.anchor", lambda: another_state(safe_core.iht(0.5), safe_core.admm(0.5)), V, ""),
    (
        "projected()",
        lambda: enter(backward(Run(safe_core.admm(0.5))).optimizer.projected()),
        V,
        "Method(",
    ),
    (
        "projected()",
        lambda: enter(
            backward(Run(safe_core.safe(0.5, projected_gradient=True))).optimizer.projected()
        ),
        V,
        "None",
    ),
    (
        "projected()",
        lambda: enter(Run(safe_core.admm(0.5, projected_gradient=True)).optimizer.projected()),
        V,
        "needs the gradients",
    ),
    (
        "loss_scale",
        lambda: enter(backward(Run(safe_core.cram(0.5))).optimizer.perturbed(loss_scale=0.0)),
        V,
        "0.0",
    ),
    ("optimizer.projected()", unprojected, V, "None"),
]


@pytest.mark.parametrize(
    ("argument", "make", "kind", "value"),
    BAD,
    ids=[f"{i}-{argument}" for i, (argument, _, _, _) in enumerate(BAD)],
)
def test_a_bad_argument_is_refused_by_name_and_value(
    argument: str, make: Callable[[], Any], kind: type[Exception], value: str
) -> None:
    with pytest.raises(kind) as refusal:
        make()
    message = str(refusal.value)
    assert argument in message
    assert value in message


def test_no_block_is_entered_within_another() -> None:
    run = backward(Run(safe_core.safe(0.5, projected_gradient=True)))
    with run.optimizer.perturbed():
        with pytest.raises(ValueError, match=r"projected\(\) must not be .* within perturbed\(\)"):
            enter(run.optimizer.projected())
        run.loss().backward()
    with run.optimizer.projected():
        with pytest.raises(ValueError, match=r"step\(\) must come after the projected\(\) block"):
            run.optimizer.step()
        run.loss().backward()
    run.optimizer.step()
    assert run.optimizer.steps == 1
