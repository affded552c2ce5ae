"""The pull and the radius in steps in PyTorch: kernels, param groups, precision, resuming."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from short_runs import short_run
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as distributed

import safe_core
from safe_core import SAM, FinalizeWarning, Method, Pull, SplitState, schedules
from safe_core.adapters.torch import SparseOptimizer, kernels
from safe_core.perturbations import MEASURE_INTERVAL

SHAPES = [(3,), (5, 7), (40, 11), (2, 3, 4), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEPS = 40


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


# The kernel


@pytest.fixture(params=[1, 30, 2**17], ids=lambda size: f"group-{size}")
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kernels, "_GROUP", request.param)
    return request.param


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pull_in_pieces_is_that_of_the_formula(
    group: int, dtype: torch.dtype, narrow: bool, transposed: bool
) -> None:
    def placed(found: list[Tensor]) -> list[Tensor]:
        return [t.mT.clone().mT if transposed and t.ndim > 1 else t for t in found]

    x = placed(tensors(0, dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    anchors = placed(tensors(1, torch.bfloat16 if narrow else wide))
    supports = placed([t > 0 for t in tensors(2)])
    before = [t.clone() for t in x]
    storages = [t.data_ptr() for t in x]
    kernels.pull_(x, SplitState(anchors, supports), 0.3)
    assert [t.data_ptr() for t in x] == storages
    for got, old, anchor, kept in zip(x, before, anchors, supports, strict=True):
        gap = old.double() - anchor.double()
        wanted = torch.where(kept, old.double(), old.double() + math.expm1(-0.3) * gap)
        torch.testing.assert_close(got, wanted.to(dtype))
        assert torch.equal(got[kept], old[kept])
        assert torch.equal(got == old, kept)


def test_the_support_keeps_what_is_not_finite_and_the_sign_of_zero(group: int) -> None:
    x = [torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0])]
    support = [torch.tensor([True] * 5 + [False])]
    bits = x[0].view(torch.int32).clone()
    kernels.pull_(x, SplitState([torch.full((6,), 3.0)], support), 0.5)
    assert torch.equal(x[0].view(torch.int32)[:5], bits[:5])


def test_many_tensors_are_pulled_in_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GROUP", 100)
    largest: list[int] = []
    subtract = torch._foreach_sub

    def counted(tensors: Any, *args: Any) -> Any:
        largest.append(max(t.numel() for t in tensors))
        return subtract(tensors, *args)

    monkeypatch.setattr(torch, "_foreach_sub", counted)
    x = [torch.ones(1000)] + [torch.ones(10) for _ in range(30)]
    anchors, supports = [torch.zeros_like(t) for t in x], [t < 0 for t in x]
    kernels.pull_(x, SplitState(anchors, supports), 0.5)
    assert len(largest) == 13  # 10 pieces of the first, 3 groups of the others
    assert max(largest) == 100
    assert all(torch.allclose(t, torch.tensor(math.exp(-0.5))) for t in x)


# Runs


class Run:
    """A small regression; equal arguments give equal runs."""

    def __init__(
        self,
        method: Method,
        base: Callable[..., Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        sign: int = 1,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
        self.data = torch.randn(32, 8).to(dtype), torch.randn(32, 4).to(dtype)
        self.sign = sign
        base = base or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
        self.optimizer = SparseOptimizer(
            base(self.model.parameters()), method, model=self.model, **options
        )

    def loss(self) -> Tensor:
        return self.sign * nn.functional.mse_loss(self.model(self.data[0]), self.data[1])

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def perturbation(self) -> list[Tensor]:
        """The perturbation of the next step."""
        params = list(self.model.parameters())
        before = [p.detach().clone() for p in params]
        self.closure()
        with self.optimizer.perturbed():
            moved = [p.detach() - old for p, old in zip(params, before, strict=True)]
        self.optimizer.zero_grad()
        return moved

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.ndim == 2]

    def state(self) -> list[Tensor]:
        split = self.optimizer.split()
        found = [*self.model.parameters(), *split.anchor, *split.support]
        return [t.detach().clone() for t in found]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def size(found: list[Tensor]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in found))


def first_step(run: Run, rate: float = 0.1) -> float:
    """The length of the first step of SGD on the sparse weights, which is taken without e."""
    run.closure()
    gradients = [p.grad.clone() for p in run.model.parameters() if p.ndim == 2]
    run.optimizer.zero_grad()
    return rate * size(gradients)


UNTUNED = safe_core.safe(0.75, steps=STEPS)
FIXED = Method(0.75, Pull(0.2, 4), perturbation=SAM(0.5, in_steps=True))
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5),
}


@pytest.mark.parametrize("base", BASES)
def test_the_pull_is_the_same_for_every_base_and_rate(base: str) -> None:
    method = Method(0.75, Pull(schedules.linear(0.3, 5, 0.1), 100))
    bases = {**BASES, "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0)}
    run = Run(method, bases[base])
    run.loss = lambda: 0 * sum(p.sum() for p in run.model.parameters())  # type: ignore[method-assign]
    before = [w.clone() for w in run.weights]
    run.train(3)
    factor = math.exp(-(0.1 + 0.14 + 0.18))
    for old, new, kept in zip(before, run.weights, run.optimizer.split().support, strict=True):
        assert torch.equal(new[kept], old[kept])
        torch.testing.assert_close(new[~kept], factor * old[~kept])


def test_a_parameter_without_a_gradient_is_pulled_too() -> None:
    run = Run(Method(0.75, Pull(0.2, 4)))
    before = run.weights[1].clone()
    nn.functional.mse_loss(run.model[0](run.data[0]), torch.zeros(32, 16)).backward()
    run.optimizer.step()
    assert run.model[2].weight.grad is None or not run.model[2].weight.grad.any()
    kept = run.optimizer.split().support[1]
    assert torch.equal(run.weights[1][kept], before[kept])
    torch.testing.assert_close(run.weights[1][~kept], math.exp(-0.2) * before[~kept])


def test_groups_have_penalties_radii_and_sparsities_of_their_own() -> None:
    def grouped(params: Any) -> torch.optim.Optimizer:
        first, bias, *rest = params
        own = {"penalty": schedules.linear(0.7, 1, 0.7), "rho": 2.0, "sparsity": 0.5}
        return torch.optim.SGD([{"params": [first], **own}, {"params": [bias, *rest]}], lr=0.1)

    run = Run(FIXED, grouped)
    unit = first_step(run)
    run.train(1)
    gradients = [p.grad.clone() for p in run.model.parameters() if run.closure() is not None]
    e, length = run.perturbation(), size(gradients)
    for moved, g, rho in zip(e, gradients, (2.0, 0.5, 0.5, 0.5), strict=True):
        torch.testing.assert_close(moved, rho * unit * g / length, rtol=1e-3, atol=1e-6)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = [w.clone() for w in run.weights]
    run.train(1)
    support = run.optimizer.split().support
    assert [int((~s).sum()) for s in support] == [64, 48]
    for old, new, kept, rate in zip(before, run.weights, support, (0.7, 0.2), strict=True):
        torch.testing.assert_close(new[~kept], math.exp(-rate) * old[~kept])
        assert torch.equal(new[kept], old[kept])


def test_maximizing_is_minimizing_the_negative() -> None:
    low = Run(UNTUNED, lambda params: torch.optim.SGD(params, lr=0.05))
    high = Run(UNTUNED, lambda params: torch.optim.SGD(params, lr=0.05, maximize=True), sign=-1)
    assert_same(high.train(9).state(), low.train(9).state())
    mixed = Run(
        Method(0.75, Pull(0.2, 4)),
        lambda params: torch.optim.SGD([{"params": list(params), "maximize": True}], lr=0.0),
    )
    before = [w.clone() for w in mixed.weights]
    mixed.train(1)
    for old, new, kept in zip(before, mixed.weights, mixed.optimizer.split().support, strict=True):
        torch.testing.assert_close(new[~kept], math.exp(-0.2) * old[~kept])


def test_a_group_with_its_own_sparsity_keeps_it_from_the_start_unless_it_is_a_schedule() -> None:
    def grouped(given: Any) -> Any:
        def make(params: Any) -> torch.optim.Optimizer:
            first, *rest = params
            return torch.optim.SGD([{"params": [first], "sparsity": given}, {"params": rest}], lr=0)

        return make

    zeros = []
    for given in (0.5, schedules.cubic(0.5, 20, every=1)):
        run = Run(UNTUNED, grouped(given)).train(1)
        zeros.append([int((~s).sum()) for s in run.optimizer.split().support])
        run.train(STEPS)
        assert [int((~s).sum()) for s in run.optimizer.split().support] == [64, 48]
    assert zeros[0][0] == 64
    assert 0 < zeros[1][0] < 64
    assert 0 < zeros[0][1] == zeros[1][1] < 48


# The radius


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_e_is_as_long_as_rho_steps(dtype: torch.dtype) -> None:
    run = Run(FIXED, dtype=dtype)
    unit = first_step(run)
    assert size(run.perturbation()) == 0  # no step was measured yet
    run.train(1)
    assert size(run.perturbation()) == pytest.approx(0.5 * unit, rel=1e-4)
    run.train(MEASURE_INTERVAL - 1)
    assert size(run.perturbation()) == pytest.approx(0.5 * unit, rel=1e-4)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.train(1)
    assert size(run.perturbation()) == pytest.approx(0.5 * unit / math.sqrt(2), rel=1e-4)


def test_weights_that_do_not_move_give_no_e() -> None:
    run = Run(FIXED, lambda params: torch.optim.SGD(params, lr=0.0)).train(3)
    assert all(not moved.any() for moved in run.perturbation())


def test_frozen_sparse_weights_are_no_part_of_the_unit() -> None:
    run = Run(FIXED)
    run.closure()
    length = 0.1 * size([run.model[2].weight.grad.clone()])
    run.optimizer.zero_grad()
    run.train(1)
    run.model[0].weight.requires_grad_(False)
    assert size(run.perturbation()) == pytest.approx(0.5 * length, rel=1e-4)
    run.model[2].weight.requires_grad_(False)  # biases are left
    assert size(run.perturbation()) == 0


# Precision


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_scale_of_the_loss_changes_nothing(accumulates: bool) -> None:
    runs = [Run(UNTUNED), Run(UNTUNED)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for scaled, run in enumerate(runs):
        for _ in range(9):
            run.optimizer.zero_grad()
            for _ in range(1 + accumulates):
                (scaler.scale(run.loss()) if scaled else run.loss()).backward()
            with run.optimizer.perturbed():
                for _ in range(1 + accumulates):
                    (scaler.scale(run.loss()) if scaled else run.loss()).backward()
            if scaled:
                scaler.unscale_(run.optimizer)
                scaler.step(run.optimizer)
                scaler.update()
            else:
                run.optimizer.step()
    assert_same(runs[1].state(), runs[0].state())


@pytest.mark.filterwarnings("ignore:16-bit parameters round")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_16_bit_parameters_end_near_the_constraint(
    dtype: torch.dtype, state_dtype: str | None
) -> None:
    method = safe_core.safe(0.75, steps=STEPS, state_dtype=state_dtype)
    run = Run(method, lambda params: torch.optim.SGD(params, lr=0.05), dtype=dtype).train(STEPS)
    held = torch.bfloat16 if state_dtype else torch.float32
    assert {a.dtype for a in run.optimizer.split().anchor} == {held}
    assert {w.dtype for w in run.weights} == {dtype}
    run.optimizer.finalize()  # a warning would be an error
    assert run.optimizer.finalized is not None
    assert run.optimizer.finalized.distance < 0.02


# Resuming, compiling


@short_run
@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("at", [1, 17])
def test_a_run_resumes_with_the_same_bits(base: str, state_dtype: str | None, at: int) -> None:
    method = safe_core.safe(0.75, steps=STEPS, state_dtype=state_dtype)
    first = Run(method, BASES[base]).train(at)
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = Run(method, BASES[base])
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    assert_same(second.train(9).state(), first.train(9).state())
    third = copy.deepcopy(second)
    assert_same(third.train(2).state(), second.train(2).state())


@short_run
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_distributed_checkpoint_resumes(frozen: bool, tmp_path: Any) -> None:
    runs = [Run(UNTUNED, BASES["adam"]) for _ in range(2)]
    runs[0].train(11)
    states = []
    for run in runs:
        if frozen:
            distributed.get_optimizer_state_dict(run.model, run.optimizer)
            run.optimizer.finalize(freeze=True)
        model, optimizer = distributed.get_state_dict(run.model, run.optimizer)
        states.append({"model": model, "optimizer": optimizer})
    checkpoint.save(states[0], checkpoint_id=tmp_path)
    checkpoint.load(states[1], checkpoint_id=tmp_path)
    model, optimizer = states[1].values()
    distributed.set_state_dict(
        runs[1].model,
        runs[1].optimizer,
        model_state_dict=model,
        optim_state_dict=optimizer,
    )
    first, second = (run.train(9) for run in runs)
    assert_same(list(second.model.parameters()), list(first.model.parameters()))
    assert size(first.perturbation()) > 0


def test_a_state_without_the_length_of_steps_is_refused() -> None:
    run = Run(UNTUNED).train(2)
    state = run.optimizer.state_dict()
    del state["state"][0]["safe_step_square"]
    with pytest.raises(
        ValueError, match=r"must hold a scalar safe_step_square for 0\.weight, got n"
    ):
        run.optimizer.load_state_dict(state)
    state["state"][0]["safe_step_square"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"safe_step_square for 0\.weight, got shape \(3,\)"):
        run.optimizer.load_state_dict(state)
    other = Run(safe_core.admm(0.75, steps=STEPS))
    state = run.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["safe_method"]
    with pytest.raises(ValueError, match=r"must hold no safe_step_square for 0\.weight, got shape"):
        other.optimizer.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("constraint", "base", "compiled"),
    [
        (Pull(0.2, 4), "sgd", False),
        (Pull(0.2, 4), "adam", False),
        (Pull(0.2, 4), "sgd", True),
        (safe_core.ADMM(0.3, 4), "adam", False),
        (safe_core.ADMM(0.3, 4), "adam", True),
        (safe_core.ADMM(0.3, 4, decoupled=True), "sgd", False),
        (safe_core.HardThreshold(4), "sgd", False),
        (safe_core.AtEnd(), "adam", False),
        (safe_core.Mask(), "sgd", False),
    ],
)
def test_the_steps_of_the_base_are_measured_alone(
    constraint: Any, base: str, compiled: bool
) -> None:
    sparsity = schedules.linear_sparsity(0.75, 2) if constraint == safe_core.Mask() else 0.75
    method = Method(sparsity, constraint, perturbation=SAM(0.5, in_steps=True))
    run = Run(method, BASES[base], compile=compiled)
    before: list[Tensor] = []
    squares: list[float] = []

    def start(*_: Any) -> None:  # where the base starts: at x, not at x + e
        before[:] = [w.clone() for w in run.weights]

    def end(*_: Any) -> None:
        moves = [w - old for w, old in zip(run.weights, before, strict=True)]
        squares.append(size(moves) ** 2)

    for t in range(2 * MEASURE_INTERVAL + 1):
        weights = [w.clone() for w in run.weights]
        hooks = [
            run.optimizer.base.register_step_pre_hook(start),
            run.optimizer.base.register_step_post_hook(end),
        ]
        if t % MEASURE_INTERVAL:
            for hook in hooks:
                hook.remove()
        run.train(1)
        for hook in hooks:
            hook.remove()
        if t % MEASURE_INTERVAL == 0 and not compiled:
            assert_same(before, weights)
    assert len(squares) == 3
    found = run.optimizer._run.step_square()
    assert found is not None
    assert float(found) == pytest.approx(sum(squares) / 3, rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_compiled_steps_are_the_eager_ones(base: str) -> None:
    eager, compiled = Run(UNTUNED, BASES[base]), Run(UNTUNED, BASES[base], compile=True)
    compiled.train(3)
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert programs > 0
    for got, want in zip(compiled.train(9).state(), eager.train(12).state(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs


# The end of a run


PATTERNS = {
    "fraction": 0.75,
    "dense": 0.0,
    "2:4": "2:4",
    "block": safe_core.Block((2, 2), 0.5),
    "channel": safe_core.ByName({"0.weight": safe_core.Channel(0.5)}, default=0.5),
    "by name": {"0.weight": "2:4", "2.weight": 0.5},
    "erdos-renyi": safe_core.Unstructured(0.75, scope="tensor", distribution="erdos_renyi_kernel"),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("make", [safe_core.safe, safe_core.admm])
def test_a_run_of_the_steps_given_ends_on_the_constraint(make: Any, name: str) -> None:
    run = Run(make(PATTERNS[name], steps=60), lambda params: torch.optim.Adam(params, lr=3e-3))
    run.train(60)
    run.optimizer.finalize()  # without a warning, which would be an error
    run.optimizer.check_sparsity()
    assert run.optimizer.finalized is not None
    assert run.optimizer.finalized.distance < 0.01
    shares = {"fraction": 0.75, "dense": 0.0, "erdos-renyi": 0.75}
    achieved = run.optimizer.report().scalars()["achieved"]
    assert achieved == pytest.approx(shares.get(name, 0.5))


@pytest.mark.parametrize("sparsity", [0.75, {"0.weight": 0.75, "2.weight": 0.5}], ids=str)
def test_half_a_run_is_reported(sparsity: Any) -> None:
    run = Run(safe_core.safe(sparsity, steps=60)).train(15)
    with pytest.warns(FinalizeWarning) as found:
        run.optimizer.finalize()
    (text,) = [str(w.message) for w in found]
    assert "the penalty was at" in text
    assert "because its schedule is 60 steps long" in text
    assert text.count("the schedule was at sparsity") == 1
    run = Run(safe_core.safe(sparsity, steps=60)).train(30)
    with pytest.warns(FinalizeWarning, match=r"penalty was at .* after 30 steps, because its sch"):
        run.optimizer.finalize()


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_after_freezing_nothing_pulls(base: str) -> None:
    run = Run(UNTUNED, BASES[base]).train(STEPS)
    run.optimizer.finalize(freeze=True)
    before = [w.clone() for w in run.weights]
    held = run.optimizer.state_dict()["state"].values()
    assert not any(key == "safe_anchor" for entry in held for key in entry)
    assert [o.name for o in run.optimizer._run.plan.operations] == [
        "BASE_STEP",
        "MEASURE_STEP",
        "MASK_PARAMETERS",
    ]
    run.train(5)
    run.optimizer.check_sparsity()
    for old, new in zip(before, run.weights, strict=True):
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)
    # The steps before the projection are still part of the unit.
    unit = math.sqrt(float(run.optimizer._run.step_square()))
    assert unit > 0
    assert size(run.perturbation()) == pytest.approx(
        float(run.optimizer.method.radius(run.optimizer.steps)) * unit, rel=1e-3
    )


def test_what_shows_the_run_knows_the_pull() -> None:
    run = Run(UNTUNED).train(10)
    text = repr(run.optimizer)
    assert "Pull(penalty=Cosine(" in text
    assert "in_steps=True" in text
    coverage = run.optimizer.coverage()
    assert [w.name for w in coverage.sparse] == ["0.weight", "2.weight"]
    figures = run.optimizer.report().scalars()
    weight = UNTUNED.constraint.penalty(10)
    assert figures["primal_residual"] > 0
    split = run.optimizer.split()
    info = run.optimizer._run.parameters.info(list(run.optimizer.sparse_parameters().values()))
    exact = UNTUNED.constraint.update(run.weights, split, UNTUNED.sparsity, info, 10)
    z, z_now = (
        [torch.where(s, a, 0) for a, s in zip(x.anchor, x.support, strict=True)]
        for x in (split, exact)
    )
    moved = size([b - a for a, b in zip(z, z_now, strict=True)])
    assert figures["dual_residual"] == pytest.approx(weight * moved, rel=1e-4)
    before = run.state()
    with run.optimizer.sparse_weights():
        zeros = sum(int((w == 0).sum()) for w in run.weights)
    assert zeros == 144
    assert_same(run.state(), before)


def test_reports_do_not_change_the_run() -> None:
    plain, watched = Run(UNTUNED).train(12), Run(UNTUNED)
    for _ in range(12):
        watched.train(1)
        watched.optimizer.report()
        with watched.optimizer.sparse_weights():
            watched.loss()
    assert_same(watched.state(), plain.state())


def test_a_model_without_sparse_zeros_never_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(safe_core.safe(0.0, steps=10)).train(5)
        run.optimizer.finalize()


@short_run
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_shortest_runs_end_exactly_sparse(steps: int) -> None:
    run = Run(safe_core.safe(0.75, steps=steps)).train(steps)
    run.optimizer.finalize()
    run.optimizer.check_sparsity()
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
