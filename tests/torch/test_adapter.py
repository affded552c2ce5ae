"""What `SparseOptimizer` promises of one step, and of the points between steps."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from fractions import Fraction

import linear_problem
import numpy as np
import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import Layout, SquaredGradient, schedules
from safe_core.adapters.torch import SparseOptimizer

INF, NAN = float("inf"), float("nan")


class Run:
    """A small network with its data and optimizer; equal arguments give equal runs."""

    def __init__(self, method=None, base=None, dtype=torch.float32, sign=1, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        self.inputs = torch.randn(16, 6, dtype=dtype)
        self.targets = torch.randn(16, 4, dtype=dtype)
        self.sign = sign
        self.calls = 0
        method = method or safe_core.safe(0.5, rho=0.1, penalty=0.1, dual_update_interval=2)
        base = base or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
        self.optimizer = SparseOptimizer(
            base(self.model.parameters()), method, model=self.model, **options
        )

    @property
    def params(self):
        return list(self.model.parameters())

    def loss(self):
        return self.sign * nn.functional.mse_loss(self.model(self.inputs), self.targets)

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self):
        return self.optimizer.step(self.closure)

    def step_by_phases(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        with self.optimizer.perturbed():
            self.loss().backward()
        self.optimizer.step()

    def state(self):
        """Copies of every tensor that a step may change."""
        split = self.optimizer.split()
        return [t.detach().clone() for t in [*self.params, *split.anchor, *split.support]]


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def assert_same_bits(got, wanted):
    assert len(got) == len(wanted)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == b.dtype, i
        # -0 equals 0 in value and differs in bits.
        a, b = (t.detach().contiguous().view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b), i


def gradient(run):
    """The loss gradient at the present parameters, from outside the optimizer."""
    return torch.autograd.grad(run.loss(), run.params)


def ascent(run, rho):
    """``rho g / |g|``, written out."""
    g = gradient(run)
    length = math.sqrt(sum(float((t.double() ** 2).sum()) for t in g))
    return [rho * t / length for t in g]


# The step


@pytest.mark.parametrize("name", list(linear_problem.CASES))
def test_every_step_is_the_one_written_out_in_numpy(name):
    method, recipe = linear_problem.CASES[name]
    problem = linear_problem.Problem.make()
    model = nn.Linear(6, 4).double()
    model.weight.data = torch.tensor(problem.weight)
    model.bias.data = torch.tensor(problem.bias)
    base = torch.optim.SGD(
        model.parameters(), lr=linear_problem.RATE, momentum=linear_problem.MOMENTUM
    )
    optimizer = SparseOptimizer(base, method, model=model)
    inputs, targets = torch.tensor(problem.inputs), torch.tensor(problem.targets)

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().sum() / (2 * len(inputs))
        loss.backward()
        return loss

    first = optimizer.split().support[0]
    for point in linear_problem.trajectory(problem, recipe):
        optimizer.step(closure)
        split = optimizer.split()
        np.testing.assert_allclose(model.weight.detach(), point.weight, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(model.bias.detach(), point.bias, rtol=1e-11, atol=1e-11)
        np.testing.assert_array_equal(split.support[0], point.z != 0)
        for anchor in split.anchor:
            np.testing.assert_allclose(anchor, point.z - point.u, rtol=1e-10, atol=1e-14)
    assert len(split.anchor) == method.constraint.has_anchor
    assert not torch.equal(first, split.support[0]), "the support must move to be tested"
    if method.constraint.has_anchor:
        assert (split.anchor[0][~split.support[0]] != 0).any(), "so must u"


def test_closure_and_phases_give_the_same_bits():
    one, two = Run(), Run()
    for _ in range(7):
        one.step()
        two.step_by_phases()
        assert_same_bits(two.state(), one.state())


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        (safe_core.safe(0.5), 2),
        (safe_core.safe(0.5, rho=schedules.linear(0.1, steps=9)), 2),
        (safe_core.safe(0.5, rho=0.0), 1),
        (safe_core.admm(0.5), 1),
    ],
    ids=["safe", "safe with a schedule", "safe without radius", "admm"],
)
def test_closure_is_called_once_per_gradient(method, calls):
    run = Run(method)
    run.step()
    assert run.calls == calls


def test_returned_loss_is_that_at_x():
    run, moved = (Run(safe_core.safe(0.5, rho=1.0)) for _ in "ab")
    at_x, e = run.loss(), ascent(run, 1.0)
    with torch.no_grad():
        torch._foreach_add_(moved.params, e)
    assert moved.loss() > at_x
    assert torch.equal(run.step(), at_x)


def test_a_whole_batch_in_two_halves_is_the_same_step():
    whole, halves = Run(dtype=torch.float64), Run(dtype=torch.float64)

    def accumulate():
        for rows in (slice(0, 8), slice(8, 16)):
            output = halves.model(halves.inputs[rows])
            (nn.functional.mse_loss(output, halves.targets[rows]) / 2).backward()

    for _ in range(3):
        whole.step()
        halves.optimizer.zero_grad()
        accumulate()
        with halves.optimizer.perturbed():
            accumulate()
        halves.optimizer.step()
    for a, b in zip(halves.params, whole.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0)


def test_clipping_between_the_phases_acts_on_the_loss_gradient_only():
    run = Run(
        safe_core.safe(0.5, rho=0.1, penalty=10.0),
        lambda params: torch.optim.SGD(params, lr=0.1),
        dtype=torch.float64,
    )
    x, anchors = copies(run.params), copies(run.optimizer.split().anchor)
    run.loss().backward()
    with run.optimizer.perturbed():
        run.loss().backward()
    g = copies(p.grad for p in run.params)
    length = math.sqrt(sum(float((t**2).sum()) for t in g))
    assert length > 0.01
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.optimizer.step()
    anchors = [anchors[0], x[1], anchors[1], x[3]]  # no penalty on biases
    for p, old, g_i, anchor in zip(run.params, x, g, anchors, strict=True):
        wanted = old - 0.1 * (0.01 * g_i / length + 10.0 * (old - anchor))
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("importance", [None, SquaredGradient(0.5)])
def test_maximising_is_minimising_the_negated_loss(base, importance):
    method = safe_core.safe(
        0.5, rho=0.1, penalty=0.1, dual_update_interval=2, importance=importance
    )
    low = Run(method, lambda params: base(params, lr=0.05))
    high = Run(method, lambda params: base(params, lr=0.05, maximize=True), sign=-1)
    for _ in range(5):
        low.step()
        high.step()
        assert_same_bits(high.state(), low.state())


def test_a_group_that_maximises_is_perturbed_downhill():
    def base(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "maximize": True}, {"params": rest}], lr=0.1)

    run, plain = Run(base=base), Run()
    inside = []
    for r in (run, plain):
        x = copies(r.params)
        r.loss().backward()
        with r.optimizer.perturbed():
            inside.append([p.detach() - old for p, old in zip(r.params, x, strict=True)])
    torch.testing.assert_close(inside[0][0], -inside[1][0], rtol=1e-4, atol=1e-7)
    assert_same_bits(inside[0][1:], inside[1][1:])


@short_run
def test_sparsity_follows_a_cubic_schedule_to_its_last_count():
    sparsity = schedules.cubic(0.8, steps=8, initial=0.1, every=2)
    run = Run(safe_core.safe(sparsity, rho=0.1, penalty=0.1, dual_update_interval=2))
    size, stages = 80, 4

    def zeros(stage):
        left = (1 - Fraction(min(stage, stages), stages)) ** 3
        return math.floor(size * (Fraction(8, 10) - Fraction(7, 10) * left))

    for step in range(12):
        off = sum(int((~s).sum()) for s in run.optimizer.split().support)
        assert off == zeros(step // 2), step
        run.step()
    run.optimizer.finalize()
    assert sum(int((w == 0).sum()) for w in run.optimizer.sparse_parameters().values()) == 64


OTHERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}  # do not take any dense real parameter
DENSE_OPTIMIZERS = [
    found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name not in OTHERS
]


@short_run
@pytest.mark.parametrize("base", DENSE_OPTIMIZERS, ids=lambda base: base.__name__)
def test_every_dense_optimizer_ends_exactly_sparse(base):
    run = Run(base=lambda params: base(params, lr=0.01))
    before = copies(run.params)
    loss = run.loss()
    for _ in range(6):
        run.step()
    assert run.loss() < loss
    assert all(not torch.equal(a, b) for a, b in zip(run.params, before, strict=True))
    run.optimizer.finalize()
    weights = run.optimizer.sparse_parameters()
    assert list(weights) == ["0.weight", "2.weight"]
    assert sum(int((w == 0).sum()) for w in weights.values()) == 40
    assert all(p.isfinite().all() for p in run.params)


# The perturbed block


def test_parameters_inside_are_x_plus_e_and_outside_x():
    run = Run()
    x, e = copies(run.params), ascent(run, 0.1)
    pointers = [p.data_ptr() for p in run.params]
    run.loss().backward()
    with run.optimizer.perturbed():
        assert all(p.grad is None for p in run.params)
        for p, old, e_i in zip(run.params, x, e, strict=True):
            torch.testing.assert_close(p.detach() - old, e_i, rtol=1e-4, atol=1e-7)
        moves = torch.cat([(p.detach() - o).ravel() for p, o in zip(run.params, x, strict=True)])
        assert float(moves.norm()) == pytest.approx(0.1, rel=1e-5)
        assert [p.data_ptr() for p in run.params] == pointers
    assert_same_bits(run.params, x)
    assert [p.data_ptr() for p in run.params] == pointers


@short_run
def test_storage_of_parameters_never_moves():
    run = Run()
    pointers = [p.data_ptr() for p in run.params]
    for _ in range(4):
        run.step()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.optimizer.finalize()
    assert [p.data_ptr() for p in run.params] == pointers


def test_parameters_are_restored_when_the_block_raises():
    run = Run()
    x = copies(run.params)
    run.loss().backward()
    with pytest.raises(RuntimeError, match="from the block"), run.optimizer.perturbed():
        raise RuntimeError("from the block")
    assert_same_bits(run.params, x)
    with pytest.raises(ValueError, match="perturbed"):
        run.optimizer.step()
    assert_same_bits(run.params, x)


def test_parameters_are_restored_when_the_closure_raises():
    run = Run()
    x = copies(run.params)

    def closure():
        if run.calls == 1:
            raise RuntimeError("second call")
        return run.closure()

    with pytest.raises(RuntimeError, match="second call"):
        run.optimizer.step(closure)
    assert_same_bits(run.params, x)
    assert run.optimizer.steps == 0
    other = Run()
    other.step()
    run.step()
    assert_same_bits(run.state(), other.state())


@pytest.mark.parametrize("passes", ["first", "second"])
def test_a_parameter_of_one_pass_only_is_restored(passes):
    torch.manual_seed(0)
    both, one = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([both, one])
    method = safe_core.safe(0.5, rho=0.5, penalty=0.2)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model=model)
    inputs = torch.randn(8, 4)

    def backward(used):
        output = both(inputs) + one(inputs) if used else both(inputs)
        output.square().sum().backward()

    x = copies(model.parameters())
    anchor = optimizer.split().anchor[1].clone()
    backward(passes == "first")
    with optimizer.perturbed():
        moved = not torch.equal(one.weight, x[2])
        assert moved == (passes == "first")
        backward(passes == "second")
    assert_same_bits(list(model.parameters()), x)
    loss_gradient = 0 if one.weight.grad is None else one.weight.grad.clone()
    assert (one.weight.grad is None) == (passes == "first")
    optimizer.step()
    wanted = x[2] - 0.1 * (loss_gradient + 0.2 * (x[2] - anchor))
    torch.testing.assert_close(one.weight.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_the_split_starts_at_x_even_within_the_block():
    run = Run(safe_core.safe(0.5, rho=5.0))
    expected = safe_core.project([run.params[0].detach(), run.params[2].detach()], 0.5).values
    run.loss().backward()
    with run.optimizer.perturbed():
        assert_same_bits(run.optimizer.split().anchor, expected)


def test_negative_zeros_survive_the_block():
    run = Run()
    with torch.no_grad():
        run.model[0].weight[0] = -0.0
    x = copies(run.params)
    run.loss().backward()
    with run.optimizer.perturbed():
        run.loss().backward()
    assert_same_bits(run.params, x)


def test_a_method_without_perturbation_has_phases_at_x():
    phases, closure = (Run(safe_core.admm(0.5, penalty=0.1, dual_update_interval=2)) for _ in "ab")
    for _ in range(4):
        x = copies(phases.params)
        phases.optimizer.zero_grad()
        phases.loss().backward()
        with phases.optimizer.perturbed():
            assert_same_bits(phases.params, x)
            assert all(p.grad is None for p in phases.params)
            phases.loss().backward()
        phases.optimizer.step()
        closure.step()
    assert_same_bits(phases.state(), closure.state())


def test_a_sparse_gradient_cannot_be_perturbed_along():
    embedding, linear = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)
    model = nn.Sequential(embedding, linear)
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), safe_core.safe(0.5), model=model
    )
    model(torch.arange(3)).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"), optimizer.perturbed():
        pass


# Calls out of order


def test_a_step_without_a_perturbed_gradient_names_both_ways():
    run = Run()
    before = run.state()
    run.loss().backward()
    gradients = copies(p.grad for p in run.params)
    with pytest.raises(ValueError, match=r"closure=.*optimizer\.perturbed\(\)"):
        run.optimizer.step()
    assert_same_bits(run.state(), before)
    assert_same_bits([p.grad for p in run.params], gradients)
    assert run.optimizer.steps == 0


def test_a_perturbed_gradient_serves_one_step():
    run = Run()
    run.step_by_phases()
    run.loss().backward()
    with pytest.raises(ValueError, match="perturbed"):
        run.optimizer.step()


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_step_with_zero_learning_rates_needs_no_perturbed_gradient(rate):
    run = Run(base=lambda params: torch.optim.Adam(params, lr=rate))
    x = copies(run.params)
    run.loss().backward()
    run.optimizer.step()
    assert_same_bits(run.params, x)
    assert "exp_avg" in run.optimizer.base.state[run.params[0]]


def test_one_positive_learning_rate_needs_a_perturbed_gradient():
    def base(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest}], lr=0.1)

    run = Run(base=base)
    run.loss().backward()
    with pytest.raises(ValueError, match="perturbed"):
        run.optimizer.step()


def test_allow_unperturbed_makes_plain_admm_of_it():
    options = {"penalty": 0.1, "dual_update_interval": 2}
    lax = Run(safe_core.safe(0.5, rho=0.5, **options), allow_unperturbed=True)
    admm = Run(safe_core.admm(0.5, **options))
    for _ in range(4):
        for run in (lax, admm):
            run.closure()
            run.optimizer.step()
    assert_same_bits(lax.state(), admm.state())


def test_perturbed_needs_gradients():
    run = Run()
    with pytest.raises(ValueError, match=r"first loss\.backward\(\)"), run.optimizer.perturbed():
        pass


@pytest.mark.parametrize(
    "call", ["perturbed", "step", "closure", "finalize", "load_state_dict", "state_dict"]
)
def test_a_call_within_the_block_is_an_error_and_loses_nothing(call):
    run, other = Run(), Run()
    saved = run.optimizer.state_dict()

    def misplaced():
        run.loss().backward()
        if call == "perturbed":
            with run.optimizer.perturbed():
                pass
        elif call == "step":
            run.optimizer.step()
        elif call == "closure":
            run.step()
        elif call == "finalize":
            run.optimizer.finalize()
        elif call == "state_dict":
            run.optimizer.state_dict()
        else:
            run.optimizer.load_state_dict(saved)

    x = copies(run.params)
    run.loss().backward()
    with run.optimizer.perturbed():
        with pytest.raises(ValueError, match=r"within|block"):
            misplaced()
        run.optimizer.zero_grad()
        run.loss().backward()
    assert_same_bits(run.params, x)
    run.optimizer.step()
    other.step()
    assert_same_bits(run.state(), other.state())
    assert run.calls == 0


# Numerics


@pytest.mark.parametrize("power", [-20, 10, 30])
def test_scaling_the_first_loss_does_not_change_e(power):
    inside = []
    for scale in (1.0, 2.0**power):
        run = Run()
        (run.loss() * scale).backward()
        with run.optimizer.perturbed():
            inside.append(copies(run.params))
    assert_same_bits(inside[1], inside[0])


def test_a_gradient_scaler_changes_nothing():
    scaled, plain = Run(), Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(5):
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss()).backward()
        with scaled.optimizer.perturbed():
            scaler.scale(scaled.loss()).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        plain.step()
        assert_same_bits(scaled.state(), plain.state())


def test_a_gradient_scaler_skips_a_step_that_overflows():
    method = safe_core.safe(0.5, dual_update_interval=1, importance=SquaredGradient())
    run = Run(method)
    before = run.state()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    (scaler.scale(run.loss()) * 1e3).backward()
    with run.optimizer.perturbed():
        assert_same_bits(run.params, before[:4])
        (scaler.scale(run.loss()) * 1e3).backward()
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**127
    assert_same_bits(run.state(), before)
    assert run.optimizer.steps == 0


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("place", ["weight", "bias"])
def test_a_first_gradient_that_is_not_finite_is_skipped(bad, place):
    method = safe_core.safe(
        0.5, rho=0.1, penalty=0.1, dual_update_interval=1, importance=SquaredGradient(0.5)
    )
    run = Run(method)
    admm = Run(
        safe_core.admm(0.5, penalty=0.1, dual_update_interval=1, importance=SquaredGradient(0.5))
    )
    x = copies(run.params)
    run.loss().backward()
    getattr(run.model[0], place).grad.view(-1)[0] = bad
    with run.optimizer.perturbed():
        assert_same_bits(run.params, x)
        run.loss().backward()
    run.optimizer.step()
    admm.step()
    assert_same_bits(run.state(), admm.state())
    for entry in run.optimizer.state.values():
        assert all(t.isfinite().all() for t in entry.values())


def test_a_bad_second_gradient_does_not_reach_the_importance():
    method = safe_core.safe(0.5, dual_update_interval=1, importance=SquaredGradient(0.5))
    run = Run(method, lambda params: torch.optim.SGD(params, lr=0.0))
    run.loss().backward()
    with run.optimizer.perturbed():
        run.loss().backward()
    run.model[0].weight.grad[0, 0] = INF
    run.optimizer.step()
    importance = run.optimizer.state[run.model[0].weight]["importance"]
    assert importance.isfinite().all()
    assert importance[0, 0] == 0
    assert (importance.view(-1)[1:] > 0).all()


def test_a_zero_gradient_gives_no_perturbation():
    run = Run()
    x = copies(run.params)
    (0 * run.loss()).backward()
    with run.optimizer.perturbed():
        assert_same_bits(run.params, x)


def run_in_block(run, scale=1.0):
    (scale * run.loss()).backward()
    with run.optimizer.perturbed():
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_16_bit_parameters_is_warned_of_once(dtype):
    run = Run(safe_core.safe(0.5, rho=2e-6), dtype=dtype)
    x = copies(run.params)
    run.loss().backward()
    with (
        pytest.warns(UserWarning, match="16-bit parameters round") as record,
        run.optimizer.perturbed(),
    ):
        pass
    assert [warning.filename for warning in record] == [__file__]
    run_in_block(run)  # a second warning would be an error
    assert_same_bits(run.params, x)


def test_a_warning_that_is_raised_leaves_the_parameters_at_x():
    run = Run(safe_core.safe(0.5, rho=1e-3), dtype=torch.bfloat16)
    with torch.no_grad():
        for p in run.params:
            p.fill_(100).view(-1)[0] = 0  # only the zeros move
            p.grad = torch.ones_like(p)
    x = copies(run.params)
    with pytest.raises(UserWarning, match="16-bit"), run.optimizer.perturbed():
        pass
    assert_same_bits(run.params, x)


@pytest.mark.parametrize(
    ("method", "dtype", "scale"),
    [
        (safe_core.safe(0.5, rho=2e-6), torch.float32, 1.0),
        (safe_core.safe(0.5, rho=0.2), torch.bfloat16, 1.0),
        (safe_core.safe(0.5, rho=1.0), torch.bfloat16, 0.0),
        (safe_core.safe(0.5, rho=1.0), torch.bfloat16, INF),
        (safe_core.safe(0.5, rho=1.0, adaptive=True), torch.bfloat16, 1.0),
        (safe_core.admm(0.5), torch.bfloat16, 1.0),
    ],
    ids=["float32", "large", "zero gradient", "infinite gradient", "asam", "admm"],
)
def test_no_warning_without_rounding(method, dtype, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_in_block(Run(method, dtype=dtype), scale)


def test_rounding_is_judged_at_the_first_perturbation_that_there_is():
    rho = schedules.linear(2e-6, steps=1)
    run = Run(safe_core.safe(0.5, rho=rho), dtype=torch.bfloat16)
    run.step()
    with pytest.warns(UserWarning, match="16-bit"):
        run.step()


@short_run
def test_bfloat16_parameters_keep_their_dtype_beside_float32_anchors():
    run = Run(safe_core.safe(0.5, rho=0.5, importance=SquaredGradient()), dtype=torch.bfloat16)
    for _ in range(3):
        run.step()
    split = run.optimizer.split()
    assert [a.dtype for a in split.anchor] == [torch.float32] * 2
    assert [s.dtype for s in split.support] == [torch.bool] * 2
    run.optimizer.finalize()
    assert all(p.dtype == torch.bfloat16 for p in run.params)


# Importance


def test_an_importance_function_is_called_at_dual_updates_with_the_new_parameters():
    seen = []

    def importance(params):
        seen.append((run.optimizer.steps, {name: p.clone() for name, p in params.items()}))
        return {name: torch.ones(()) for name in params}

    method = safe_core.safe(0.5, rho=0.1, penalty=0.1, dual_update_interval=3)
    run, plain = Run(method, importance=importance), Run(method)
    for step in range(7):
        run.step()
        plain.step()
        if (step + 1) % 3 == 0:
            at, params = seen[-1]
            assert at == step
            assert list(params) == ["0.weight", "2.weight"]
            assert_same_bits(list(params.values()), [run.params[0], run.params[2]])
    assert len(seen) == 2
    assert_same_bits(run.state(), plain.state())


def flat(tensors):
    return torch.cat([t.detach().ravel() for t in tensors])


def half(v, importance):
    """The 40 of 80 entries with the largest ``P v^2``, as one flat mask."""
    scores = flat([x.abs() * p.sqrt() for x, p in zip(v, importance, strict=True)])
    return scores >= scores.sort().values[40]


@pytest.mark.parametrize("given", ["mapping", "function"])
def test_importance_decides_what_is_kept(given):
    torch.manual_seed(1)
    names, shapes = ("0.weight", "2.weight"), ((8, 6), (4, 8))
    per_entry = [torch.rand(s) for s in shapes]
    per_input = [torch.rand(s[1]) for s in shapes]
    for p, full in ((per_entry, per_entry), (per_input, [q[None, :] for q in per_input])):
        mapping = dict(zip(names, p, strict=True))
        run = Run(
            safe_core.safe(0.5, rho=0.1, penalty=0.1, dual_update_interval=1),
            importance=mapping if given == "mapping" else lambda params, p=mapping: p,
        )
        start = [run.params[0].detach(), run.params[2].detach()]
        known = full if given == "mapping" else [torch.ones(()), torch.ones(())]
        before = run.optimizer.split()
        assert torch.equal(flat(before.support), half(start, known))
        run.step()
        weights = [run.params[0].detach(), run.params[2].detach()]
        u = [torch.where(s, 0, -a) for a, s in zip(*before[:2], strict=True)]
        v = [w + u_i for w, u_i in zip(weights, u, strict=True)]
        got = flat(run.optimizer.split().support)
        assert torch.equal(got, half(v, full))
        assert not torch.equal(got, half(v, [torch.ones(()), torch.ones(())]))


@short_run
def test_finalize_takes_the_last_importance_another_or_none():
    method = safe_core.safe(
        0.5, rho=0.1, penalty=0.1, dual_update_interval=2, importance=SquaredGradient(0.5)
    )
    run = Run(method)
    for _ in range(5):
        run.step()
    weights = copies(run.optimizer.sparse_parameters().values())
    last = [run.optimizer.state[p]["importance"] for p in (run.params[0], run.params[2])]
    given = [torch.rand_like(w) for w in weights]
    names = ("0.weight", "2.weight")
    results = []
    for argument, p in (
        ((), last),
        ((None,), [torch.ones_like(w) for w in weights]),
        ((dict(zip(names, given, strict=True)),), given),
    ):
        twin = copy.deepcopy(run)
        twin.optimizer.finalize(*argument)
        kept = half(weights, p)
        got = flat(twin.optimizer.sparse_parameters().values())
        assert_same_bits([got], [torch.where(kept, flat(weights), 0)])
        results.append(kept)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


# Arguments


def options(**changes):
    model = nn.Linear(4, 4)
    return {
        "base": torch.optim.SGD(model.parameters(), lr=0.1),
        "method": safe_core.safe(0.5),
        "model": model,
        **changes,
    }


BAD_ARGUMENTS = {
    "base is no optimizer": (lambda o: {"base": None}, TypeError, "^base "),
    "base is wrapped": (lambda o: {"base": SparseOptimizer(**o)}, TypeError, "^base "),
    "base needs a closure": (
        lambda o: {"base": torch.optim.LBFGS(o["model"].parameters())},
        TypeError,
        "^base .*LBFGS",
    ),
    "method": (lambda o: {"method": 0.5}, TypeError, "^method "),
    "model": (lambda o: {"model": list(o["model"].parameters())}, TypeError, "^model "),
    "where": (lambda o: {"where": "weight"}, TypeError, "^where "),
    "layout": (lambda o: {"layout": 1}, TypeError, "^layout "),
    "layout of a name": (lambda o: {"layout": {"weight": (1, 0)}}, TypeError, "^layout of weight"),
    "layout returned": (lambda o: {"layout": lambda name, p: 0}, TypeError, "^layout of weight"),
    "layout has other axes": (
        lambda o: {"method": safe_core.safe("2:4"), "layout": safe_core.Layout((2,), (0,))},
        ValueError,
        "input_axes of weight",
    ),
    "allow_unperturbed": (lambda o: {"allow_unperturbed": 1}, TypeError, "^allow_unperturbed "),
    "importance": (lambda o: {"importance": 1.0}, TypeError, "^importance "),
    "importance twice": (
        lambda o: {
            "importance": {"weight": torch.ones(4)},
            "method": safe_core.safe(0.5, importance=SquaredGradient()),
        },
        ValueError,
        "^importance .*SquaredGradient",
    ),
    "importance of a bias": (
        lambda o: {"importance": {"weight": torch.ones(4), "bias": torch.ones(4)}},
        ValueError,
        "^importance .*bias",
    ),
    "importance is lacking": (lambda o: {"importance": {}}, ValueError, "^importance .*weight"),
    "importance is negative": (
        lambda o: {"importance": {"weight": -torch.ones(4)}},
        ValueError,
        "^importance of weight",
    ),
    "importance is not finite": (
        lambda o: {"importance": {"weight": torch.full((4,), NAN)}},
        ValueError,
        "^importance of weight",
    ),
    "importance has another shape": (
        lambda o: {"importance": {"weight": torch.ones(3)}},
        ValueError,
        "^importance of weight",
    ),
    "complex parameters": (
        lambda o: {
            "base": torch.optim.SGD([*o["model"].parameters(), nn.Parameter(torch.zeros(2) * 1j)])
        },
        TypeError,
        r"param_groups\[0\]\[2\] must be real",
    ),
    "2:4 of five": (
        lambda o: {
            "method": safe_core.safe("2:4"),
            "model": (model := nn.Linear(5, 4)),
            "base": torch.optim.SGD(model.parameters()),
        },
        ValueError,
        "input axis of weight",
    ),
}


@pytest.mark.parametrize("name", list(BAD_ARGUMENTS))
def test_a_bad_argument_is_named(name):
    change, error, message = BAD_ARGUMENTS[name]
    good = options()
    SparseOptimizer(**good)
    with pytest.raises(error, match=message):
        SparseOptimizer(**{**good, **change(good)})


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        ("first", TypeError, "importance must be a mapping"),
        (1.0, TypeError, "importance must be a mapping"),
        ({}, ValueError, "lacks 'weight'"),
        ({"weight": -torch.ones(4)}, ValueError, "importance of weight"),
    ],
)
def test_a_bad_importance_of_finalize_changes_nothing(importance, error, message):
    given = options()
    optimizer = SparseOptimizer(**given)
    x = copies(given["model"].parameters())
    with pytest.raises(error, match=message):
        optimizer.finalize(importance)
    assert_same_bits(list(given["model"].parameters()), x)


def test_what_an_importance_function_returns_is_checked():
    run = Run(safe_core.admm(0.5, dual_update_interval=1), importance=lambda params: [1.0])
    with pytest.raises(TypeError, match="importance must be a mapping"):
        run.step()


def test_a_step_after_a_block_without_backward_is_an_error():
    model = nn.Linear(4, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SparseOptimizer(base, safe_core.safe(0.5), model=model)
    before = model.weight.detach().clone()
    model(torch.ones(3, 4)).sum().backward()
    with optimizer.perturbed():
        model(torch.ones(3, 4)).sum()
    with pytest.raises(ValueError, match="step\\(\\) needs a gradient at the perturbed point"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.step(torch.ones(()))


def test_a_layout_of_an_unknown_name_is_an_error():
    model = nn.Linear(4, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="layout names 'nope'"):
        SparseOptimizer(base, safe_core.safe(0.5), model=model, layout={"nope": Layout()})
