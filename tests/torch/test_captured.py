"""Steps that are replayed as CUDA graphs do what the same steps do one by one.

A stand-in records and replays the operations on the CPU. A test at the end uses a GPU.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_calls import on_an_accelerator  # noqa: F401
from recorded_graphs import recorded_graphs  # noqa: F401
from torch import Tensor, nn

import safe_core
from safe_core import NM, Block, schedules
from safe_core.adapters.torch import CapturedStep, RandomState, SparseOptimizer
from safe_core.adapters.torch import captured as graphs

pytestmark = pytest.mark.filterwarnings("ignore:.*penalty:UserWarning")
recorded = pytest.mark.usefixtures("recorded_graphs")

STEPS = 40
ADMM = {"penalty": 0.1, "dual_update_interval": 16}
METHODS = {
    "derived": safe_core.safe(0.6, steps=4000),
    "constant": safe_core.safe(0.6, rho=0.1, **ADMM),
    "scheduled": safe_core.safe(
        0.6,
        rho=schedules.linear(0.0, steps=STEPS, initial=0.2),
        penalty=schedules.cosine(0.3, steps=STEPS),
        dual_update_interval=16,
    ),
    "decoupled": safe_core.admm(0.6, **ADMM, decoupled=True),
    "rescaled": safe_core.admm(
        0.6,
        penalty=schedules.linear(0.5, steps=STEPS, initial=0.1),
        dual_update_interval=16,
        rescale_dual=True,
    ),
    "adaptive": safe_core.safe(0.6, rho=0.5, **ADMM, adaptive=True),
    "N:M": safe_core.safe(NM(2, 4), rho=0.1, **ADMM),
    "blocks": safe_core.safe(Block((2, 2), 0.5, "global"), steps=4000),
    "reuse": safe_core.safe(0.6, rho=0.1, **ADMM, perturbation_interval=3, reuse=0.5),
    "rounded": safe_core.safe(0.6, steps=4000, state_dtype="bfloat16"),
    "packed": safe_core.elsa(
        0.6, score="magnitude", rescale_dual=False, state_dtype="bfloat16", packed_support=True
    ),
    "gradual": safe_core.baselines.gmp(schedules.cubic(0.6, steps=32, every=16)),
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=torch.tensor(0.01), fused=True, capturable=True)


class Training:
    """A small network on batches that lie in the same memory."""

    def __init__(
        self,
        method: Any,
        base: Callable[[Any], torch.optim.Optimizer] = sgd,
        *,
        scaler: torch.amp.GradScaler | None = None,
        groups: bool = False,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)
        self.model = nn.Sequential(*layers).to(device)
        params: Any = list(self.model.parameters())
        if groups:
            params = [{"params": params[:1]}, {"params": params[1:], "rho": 0.03, "penalty": 0.2}]
        self.optimizer = SparseOptimizer(base(params), method, model=self.model, **options)
        self.scaler = scaler
        self.batches = torch.randn(STEPS, 16, 8), torch.randn(STEPS, 16, 4)
        self.x, self.y = torch.empty(16, 8, device=device), torch.empty(16, 4, device=device)
        self.factor = torch.ones((), device=device)  # of the loss at x + e
        self.overflows: set[int] = set()
        self.calls = 0
        self.losses: list[float] = []

    def backward(self, factor: Tensor | float = 1.0) -> Tensor:
        loss = factor * nn.functional.mse_loss(self.model(self.x), self.y)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def step(self) -> Tensor:
        self.calls += 1
        optimizer = self.optimizer
        optimizer.zero_grad()
        loss = self.backward()
        if optimizer.perturbs:
            with optimizer.perturbed():
                self.backward(self.factor)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        return loss.detach()

    def run(self, take: Callable[[], Tensor], steps: range = range(STEPS)) -> Training:
        for i in steps:
            self.x.copy_(self.batches[0][i])
            self.y.copy_(self.batches[1][i])
            self.factor.fill_(float("inf") if i in self.overflows else 1.0)
            self.losses.append(float(take()))
        return self

    def captured(self) -> CapturedStep:
        return CapturedStep(self.optimizer, self.step)

    @property
    def values(self) -> list[Tensor]:
        own = [x for split in self.optimizer.split() for x in split if x is not None]
        return [x.float() for x in (*self.model.state_dict().values(), *own)]


def assert_same(got: Training, wanted: Training, **close: float) -> None:
    close = close or {"rtol": 1e-5, "atol": 1e-6}
    assert got.optimizer.steps == wanted.optimizer.steps
    torch.testing.assert_close(got.losses, wanted.losses, **close)
    torch.testing.assert_close(got.values, wanted.values, **close)


@recorded
@pytest.mark.parametrize("base", [sgd, adam])
@pytest.mark.parametrize("name", METHODS)
def test_replays_train_as_steps_do(name: str, base: Any) -> None:
    wanted = Training(METHODS[name], base)
    wanted.run(wanted.step)
    got = Training(METHODS[name], base)
    got.run(got.captured())
    if name in ("rounded", "packed"):  # the next number of bfloat16 is 2**-8 away
        assert_same(got, wanted, rtol=2**-7, atol=1e-3)
    else:
        assert_same(got, wanted)
    assert got.calls < wanted.calls / 2  # the others were replayed


@recorded
def test_groups_follow_their_own_settings() -> None:
    wanted = Training(METHODS["scheduled"], groups=True)
    wanted.run(wanted.step)
    got = Training(METHODS["scheduled"], groups=True)
    got.run(got.captured())
    assert_same(got, wanted)


@recorded
def test_a_closure_is_captured_too() -> None:
    def closure_of(training: Training) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            training.optimizer.zero_grad()
            return training.backward()

        return lambda: training.optimizer.step(closure).detach()

    wanted, got = Training(METHODS["derived"]), Training(METHODS["derived"])
    wanted.run(closure_of(wanted))
    got.run(CapturedStep(got.optimizer, closure_of(got)))
    assert_same(got, wanted)


@recorded
@pytest.mark.parametrize("name", ["derived", "scheduled", "decoupled", "rescaled", "reuse"])
def test_a_scaler_skips_steps_with_overflow(name: str) -> None:
    def trained(capture: bool) -> Training:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
        training = Training(METHODS[name], adam, scaler=scaler)
        for i in (0, 1, 2, 9, 10, 16, 21, 29, 30, 38):
            training.batches[1][i] = 1e38  # the square overflows
        training.overflows = {18, 23, 24, 25, 34}
        training.run(training.captured() if capture else training.step)
        return training

    wanted, got = trained(False), trained(True)
    assert got.calls < wanted.calls * 0.8
    assert wanted.scaler is not None
    assert got.scaler is not None
    assert got.scaler.get_scale() == wanted.scaler.get_scale()
    got.losses, wanted.losses = [], []  # infinite at overflow
    assert_same(got, wanted)


@recorded
def test_the_learning_rate_follows_a_tensor() -> None:
    def trained(capture: bool) -> Training:
        training = Training(METHODS["derived"], adam)
        (group,) = training.optimizer.param_groups
        take: Any = training.captured() if capture else training.step
        for i in range(STEPS):
            group["lr"].fill_(0.01 * (1 - i / STEPS))
            training.run(take, range(i, i + 1))
        return training

    assert_same(trained(True), trained(False))


@recorded
def test_gradients_of_a_replay_can_be_read() -> None:
    training = Training(METHODS["constant"])
    captured = training.captured()
    found = []
    for i in range(12):
        training.run(captured, range(i, i + 1))
        gradient = training.model[0].weight.grad
        assert gradient is not None
        found.append(gradient.clone())
    assert training.calls < 12
    assert all(not torch.equal(a, b) for a, b in pairwise(found))


@recorded
def test_a_state_that_is_loaded_goes_on() -> None:
    whole = Training(METHODS["scheduled"], adam)
    whole.run(whole.captured(), range(10))
    file = io.BytesIO()
    torch.save([whole.model.state_dict(), whole.optimizer.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file)

    other = Training(METHODS["scheduled"], adam)
    captured = other.captured()
    other.run(captured, range(20, 30))
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(state)
    for training, take in ((other, captured), (whole, whole.step)):
        training.losses = []
        training.run(take, range(10, STEPS))
    assert_same(other, whole)


@recorded
def test_a_final_support_trains_on() -> None:
    def trained(capture: bool) -> Training:
        training = Training(METHODS["constant"])
        take: Any = training.captured() if capture else training.step
        training.run(take, range(20))
        training.optimizer.finalize(freeze=True)
        return training.run(take, range(20, STEPS))

    wanted, got = trained(False), trained(True)
    torch.testing.assert_close(got.losses, wanted.losses)
    torch.testing.assert_close(got.model.state_dict(), wanted.model.state_dict())
    got.optimizer.check_sparsity()


@recorded
def test_a_schedule_of_the_user_may_end() -> None:
    def radius(step: int) -> float:
        return [0.1, 0.2, 0.3, 0.2][step // 10]

    method = safe_core.safe(0.6, rho=radius, **ADMM)
    wanted, got = Training(method), Training(method)
    wanted.run(wanted.step)
    got.run(got.captured())
    assert_same(got, wanted)


@recorded
def test_a_number_that_changes_is_refused() -> None:
    training = Training(METHODS["constant"])
    captured = training.captured()
    training.run(captured, range(8))
    steps = training.optimizer.steps
    training.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match=r"lr of a param group must stay 0\.05.*got 0\.01"):
        training.run(captured, range(8, 9))
    assert training.optimizer.steps == steps


@recorded
def test_a_base_that_cannot_skip_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training = Training(METHODS["constant"], sgd, scaler=scaler)
    captured = training.captured()
    training.run(captured, range(3))
    with pytest.raises(ValueError, match=r"base must skip steps with overflow.*SGD"):
        training.run(captured, range(3, 4))


@recorded
@pytest.mark.parametrize("taken", [0, 2])
def test_a_step_must_be_one_step(taken: int) -> None:
    training = Training(METHODS["constant"])

    def some() -> Tensor:
        for _ in range(taken if training.optimizer.steps >= 3 else 1):
            training.step()
        return torch.zeros(())

    with pytest.raises(ValueError, match=f"one step of the optimizer.*got {taken} steps"):
        training.run(CapturedStep(training.optimizer, some), range(8))


@recorded
def test_methods_that_project_in_a_step_are_refused() -> None:
    training = Training(safe_core.cram(0.5))
    with pytest.raises(ValueError, match="must not take gradients at a projected point"):
        training.captured()


@recorded
def test_random_numbers_that_are_replayed_are_refused() -> None:
    training = Training(METHODS["constant"], replay_rng=True)
    with pytest.raises(ValueError, match="replay_rng of the optimizer must be False"):
        training.captured()


def test_the_host_has_no_graphs() -> None:
    training = Training(METHODS["constant"])
    with pytest.raises(ValueError, match="one CUDA device, got parameters on cpu"):
        training.captured()


def test_arguments_are_checked() -> None:
    training = Training(METHODS["constant"])
    with pytest.raises(TypeError, match="optimizer must be a SparseOptimizer"):
        CapturedStep(training.optimizer.base, training.step)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step must be a function"):
        CapturedStep(training.optimizer, None)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("name", "scaled"),
    [*((name, False) for name in METHODS), ("derived", True), ("scheduled", True)],
)
def test_graphs_of_a_gpu_train_as_steps_do(name: str, scaled: bool) -> None:
    def base(params: Any) -> torch.optim.Optimizer:
        rate = torch.tensor(0.01, device="cuda")
        return torch.optim.AdamW(params, lr=rate, fused=True, capturable=True)

    def trained(capture: bool) -> Training:
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0) if scaled else None
        training = Training(METHODS[name], base, scaler=scaler, device="cuda")
        return training.run(training.captured() if capture else training.step)

    assert_same(trained(True), trained(False), rtol=1e-3, atol=1e-4)


@pytest.mark.long  # compiling takes most of it
@recorded
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_steps_are_captured() -> None:
    wanted, got = Training(METHODS["scheduled"]), Training(METHODS["scheduled"], compile=True)
    wanted.run(wanted.step)
    got.run(got.captured())
    assert_same(got, wanted)


@recorded
@pytest.mark.parametrize("name", ["rescaled", "reuse"])  # they put new tensors into the state
def test_a_recording_that_fails_changes_nothing(name: str) -> None:
    training, fails = Training(METHODS[name]), False

    def step() -> Tensor:
        loss = training.step()
        if fails:
            raise RuntimeError("out of memory")
        return loss

    captured = CapturedStep(training.optimizer, step)
    training.run(captured, range(20))
    other = Training(METHODS[name])
    other.run(other.step, range(20))
    captured._recorded.clear()  # record anew
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        training.run(captured, range(20, 21))
    assert_same(training, other)
    fails = False
    training.run(captured, range(20, STEPS))
    other.run(other.step, range(20, STEPS))
    assert_same(training, other)


@recorded
def test_replays_after_finalize_warn_of_lost_zeros() -> None:
    training = Training(METHODS["constant"])
    captured = training.captured()
    training.run(captured, range(10))
    training.optimizer.finalize()
    with pytest.warns(safe_core.FinalizeWarning, match="moves the zeros"):
        training.run(captured, range(10, 11))


@recorded
def test_a_tensor_of_the_host_is_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    # The learning rate alone lies on the host.
    monkeypatch.setattr(graphs, "on_host", lambda x: x.ndim == 0)
    training = Training(METHODS["constant"], adam)
    captured = training.captured()
    training.run(captured, range(8))
    training.optimizer.param_groups[0]["lr"].fill_(0.5)
    with pytest.raises(ValueError, match=r"lr of a param group must stay 0\.0\d+.*got 0\.5"):
        training.run(captured, range(8, 9))


@recorded
@pytest.mark.parametrize("base", [sgd, adam])
def test_a_state_from_before_the_first_step_starts_anew(base: Any) -> None:
    training, other = Training(METHODS["constant"], base), Training(METHODS["constant"], base)
    model = {key: value.clone() for key, value in training.model.state_dict().items()}
    state = copy.deepcopy(training.optimizer.state_dict())
    captured = training.captured()
    training.run(captured, range(10))
    training.model.load_state_dict(model)
    training.optimizer.load_state_dict(state)
    training.losses = []
    training.run(captured)
    assert_same(training, other.run(other.step))


@recorded
def test_parameters_that_move_are_recorded_anew() -> None:
    training, other = Training(METHODS["constant"]), Training(METHODS["constant"])
    captured = training.captured()
    for i in range(STEPS):
        training.run(captured, range(i, i + 1))
        if i == 12:
            kept = [p.data for p in training.model.parameters()]  # not freed, so that p moves
            for p in training.model.parameters():
                p.data = p.data.clone()
    assert_same(training, other.run(other.step))
    assert kept[0].data_ptr() != training.model[0].weight.data_ptr()
    assert training.calls < STEPS / 2


@recorded
def test_options_that_come_or_become_tensors_are_recorded_anew() -> None:
    def fused(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True)

    def trained(capture: bool) -> Training:
        training = Training(METHODS["constant"], fused)
        take: Any = training.captured() if capture else training.step
        (group,) = training.optimizer.param_groups
        training.run(take, range(10))
        group["lr"], group["name"] = torch.tensor(0.02), "weights"
        training.run(take, range(10, 20))
        group["rho"] = 0.02
        return training.run(take, range(20, STEPS))

    wanted, got = trained(False), trained(True)
    assert_same(got, wanted)
    assert got.calls < STEPS * 0.6


@recorded
def test_a_scheduler_within_the_step_is_refused() -> None:
    training = Training(METHODS["constant"], adam)
    scheduler = torch.optim.lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, total_iters=20)

    def step() -> Tensor:
        loss = training.step()
        scheduler.step()
        return loss

    with pytest.raises(ValueError, match="step must not change lr of a param group"):
        training.run(CapturedStep(training.optimizer, step), range(8))


@recorded
def test_a_step_within_a_block_is_refused() -> None:
    training = Training(METHODS["constant"])
    captured = training.captured()
    training.run(captured, range(6))
    with (
        training.optimizer.sparse_weights(),
        pytest.raises(ValueError, match="a captured step must come after the sparse_weights"),
    ):
        captured()


@recorded
def test_random_states_are_refused_while_recording() -> None:
    training = Training(METHODS["constant"])

    def step() -> Tensor:
        training.optimizer.zero_grad()
        replay = RandomState.record()
        training.backward()
        with training.optimizer.perturbed(replay):
            loss = training.backward()
        training.optimizer.step()
        return loss.detach()

    with pytest.raises(ValueError, match="replay must be None within a CapturedStep"):
        training.run(CapturedStep(training.optimizer, step), range(8))


@recorded
def test_a_base_that_is_not_capturable_is_refused() -> None:
    def base(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, fused=True)

    with pytest.raises(ValueError, match="capturable=True, which AdamW needs"):
        Training(METHODS["constant"], base).captured()


@recorded
def test_layers_without_a_gradient_are_named_after_replays() -> None:
    training = Training(METHODS["constant"])
    both = nn.ModuleDict({"used": training.model, "unused": nn.Linear(8, 8)})
    optimizer = SparseOptimizer(sgd(both.parameters()), METHODS["constant"], model=both)
    training.optimizer = optimizer
    training.run(CapturedStep(optimizer, training.step))
    with pytest.warns(safe_core.FinalizeWarning, match="unused.weight"):
        optimizer.finalize()


@recorded
def test_an_error_while_recording_says_so() -> None:
    training = Training(METHODS["constant"])
    captured = CapturedStep(training.optimizer, lambda: training.step().item())
    training.run(captured, range(3))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing") as caught:
        captured()
    assert "while CapturedStep recorded the step" in caught.value.__notes__[0]
