"""`SparseOptimizer` in training loops as people write them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from short_runs import short_run
from torch import nn

import safe_core
from safe_core import NM, Unstructured, schedules
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.modules import RandomState, recalibrate
from safe_core.report import Report, TensorReport

METHOD = safe_core.safe(0.75, rho=0.1, penalty=0.2, dual_update_interval=2)


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *extra, nn.Tanh(), nn.Linear(16, 4))


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 8, generator=generator), torch.randn(32, 4, generator=generator)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def step(model: nn.Module, optimizer: SparseOptimizer, data: Any = None) -> None:
    x, y = batch() if data is None else data

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# Settings of a param group


def grouped(**settings: Any) -> tuple[nn.Sequential, SparseOptimizer]:
    model = network()
    groups = [{"params": model[0].parameters(), **settings}, {"params": model[2].parameters()}]
    return model, SparseOptimizer(sgd(groups), METHOD, model=model)


def test_radii_of_groups_share_one_norm() -> None:
    model, optimizer = grouped(rho=0.3)
    x = copies(model)
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    length = torch.sqrt(sum((g**2).sum() for g in gradients))
    with optimizer.perturbed():
        for i, p in enumerate(model.parameters()):
            rho = 0.3 if i < 2 else 0.1
            torch.testing.assert_close(p.detach(), x[i] + rho * gradients[i] / length)


def test_a_group_without_radius_is_not_perturbed_and_alone_needs_no_second_gradient() -> None:
    model, optimizer = grouped(rho=0.0)
    x = copies(model)
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()
    assert optimizer.perturbs
    with optimizer.perturbed():
        assert torch.equal(model[0].weight, x[0])
        assert not torch.equal(model[2].weight, x[2])
    optimizer.param_groups[1]["rho"] = 0.0
    assert not optimizer.perturbs


@pytest.mark.parametrize("penalty", [0.7, schedules.linear(1.4, steps=2)])
def test_a_group_has_its_own_penalty(penalty: Any) -> None:
    model, optimizer = grouped(penalty=penalty)
    step(model, optimizer)
    anchors = optimizer.split().anchor
    x, seen = copies(model), []
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.allow_unperturbed = True
    optimizer.base.step = lambda: seen.extend(p.grad.clone() for p in model.parameters())
    optimizer.step()
    torch.testing.assert_close(seen[0], 0.7 * (x[0] - anchors[0]))
    torch.testing.assert_close(seen[2], 0.2 * (x[2] - anchors[1]))


@short_run
def test_groups_of_one_sparsity_are_projected_together() -> None:
    model, optimizer = grouped(sparsity="2:4")
    for _ in range(4):
        step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert all("sparsity" not in group for group in saved["param_groups"])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["sparsity"] == "2:4"
    wanted = [
        safe_core.project(model[0].weight.detach(), NM(2, 4)).values,
        safe_core.project(model[2].weight.detach(), Unstructured(0.75)).values,
    ]
    optimizer.finalize()
    assert torch.equal(model[0].weight, wanted[0])
    assert torch.equal(model[2].weight, wanted[1])
    optimizer.check_sparsity()


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        ({"rho": -1}, METHOD, "rho of a param group must be a finite number"),
        ({"penalty": "high"}, METHOD, "penalty of a param group must be a non-negative Python"),
        ({"sparsity": 1.5}, METHOD, "sparsity of a param group must be a fraction"),
        ({"rho": 0.1}, safe_core.admm(0.5), "rho of a param group must be left out for a method"),
        (
            {"penalty": 0.1},
            safe_core.admm(0.5, penalty=0.1, rescale_dual=True),
            "penalty of a param group must be left out under rescale_dual",
        ),
    ],
)
def test_a_bad_setting_of_a_group_is_named(settings: Any, method: Any, message: str) -> None:
    model = network()
    groups = [{"params": model.parameters(), **settings}]
    with pytest.raises((TypeError, ValueError), match=message):
        SparseOptimizer(sgd(groups), method, model=model)


# Normalisation layers


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm1d(16),
        lambda: nn.BatchNorm1d(16, momentum=None),
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten()
        ),
    ],
    ids=["batch", "cumulative", "instance"],
)
def test_running_statistics_are_updated_once_at_x(layer: Any) -> None:
    model = network(layer())
    reference = copy.deepcopy(model)
    optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    reference(batch()[0])
    step(model, optimizer)
    assert len(list(model.buffers())) == 3
    for got, want in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, want)
    for module in model.modules():
        assert getattr(module, "track_running_stats", True)
        assert getattr(module, "momentum", 1) != 0


def test_layers_that_are_evaluated_stay_as_they_are() -> None:
    model = network(nn.BatchNorm1d(16))
    model[1].eval()
    optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    before = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        wanted = model(batch()[0])
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()
    for p in model.parameters():
        p.grad.zero_()
    with optimizer.perturbed():
        assert torch.equal(model(batch()[0]), wanted)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_recalibration_averages_over_the_samples_asked_for() -> None:
    model = network(nn.BatchNorm1d(16)).eval()
    model[1].running_mean.fill_(7)
    data = [batch(seed) for seed in range(9)]
    recalibrate(model, data, samples=70)
    hidden = [model[0](x).detach() for x, _ in data[:3]]  # 96 is the first to reach 70
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0)
    )
    assert not model.training
    recalibrate(model, data)
    assert int(model[1].num_batches_tracked) == 9
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        recalibrate(model, data, samples=0)


# Random numbers


@pytest.mark.parametrize("phases", [False, True])
def test_the_second_pass_may_draw_the_dropout_of_the_first(phases: bool) -> None:
    masks: list[torch.Tensor] = []
    model = network(nn.Dropout(0.5))
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model, replay_rng=not phases)
    x, y = batch()
    for _ in range(2):
        if phases:
            random = RandomState.record()
            nn.functional.mse_loss(model(x), y).backward()
            with optimizer.perturbed(replay=random):
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            step(model, optimizer)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_dropout_is_drawn_anew_by_default() -> None:
    masks: list[torch.Tensor] = []
    model = network(nn.Dropout(0.5))
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    step(model, SparseOptimizer(sgd(model.parameters()), METHOD, model=model))
    assert not torch.equal(masks[0], masks[1])


# Mixed precision


@pytest.mark.parametrize("overflows", ["first", "second", "both"])
def test_a_step_that_the_scaler_skips_changes_nothing(overflows: str) -> None:
    model = network()
    optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, y = batch()

    def backward(bad: bool) -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss * (torch.inf if bad else 1)).backward()

    def one(first: bool, second: bool) -> None:
        optimizer.zero_grad()
        backward(first)
        with optimizer.perturbed():
            backward(second)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    one(False, False)
    before = copy.deepcopy([copies(model), optimizer.split(), optimizer.steps])
    momentum = [s["momentum_buffer"].clone() for s in optimizer.base.state.values()]
    one(overflows in ("first", "both"), overflows in ("second", "both"))
    if overflows == "first":  # no direction to perturb along, and a gradient at x
        assert optimizer.steps == 2
        return
    assert optimizer.steps == before[2] == 1
    for got, want in zip(copies(model), before[0], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(optimizer.split(), before[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for s, want in zip(optimizer.base.state.values(), momentum, strict=True):
        assert torch.equal(s["momentum_buffer"], want)
    one(False, False)
    assert optimizer.steps == 2


# After training


def trained(steps: int = 4) -> tuple[nn.Sequential, SparseOptimizer]:
    model = network()
    optimizer = SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), METHOD, model=model)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


@short_run
def test_a_frozen_support_stays_while_its_weights_train_on() -> None:
    model, optimizer = trained()
    optimizer.finalize(freeze=True)
    assert all(set(s) == {"support"} for s in optimizer.state.values())
    support = [s["support"].clone() for s in optimizer.state.values()]
    for seed in range(5):
        before = copies(model)
        step(model, optimizer, batch(seed))
        for p, mask in zip((model[0].weight, model[2].weight), support, strict=True):
            assert not p[~mask].any()
        optimizer.check_sparsity()
    assert not torch.equal(before[0], model[0].weight)
    optimizer.finalize()
    assert optimizer.frozen


@short_run
def test_a_frozen_run_drops_the_direction_that_it_reused() -> None:
    model = network()
    method = safe_core.safe(0.75, rho=0.1, perturbation_interval=2, reuse=0.5)
    optimizer = SparseOptimizer(sgd(model.parameters()), method, model=model)
    step(model, optimizer)
    optimizer.finalize(freeze=True)
    step(model, optimizer)
    step(model, optimizer)
    assert [set(s) for s in optimizer.state.values()] == [{"support"}] * 2
    assert not optimizer._phases.first
    optimizer.check_sparsity()


def test_cleared_gradients_give_up_the_perturbed_phase() -> None:
    model, optimizer = trained(1)
    x, y = batch()
    nn.functional.mse_loss(model(x), y).backward()
    with optimizer.perturbed():
        nn.functional.mse_loss(model(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="needs a gradient at the perturbed point"):
        optimizer.step()


def test_an_optimizer_prints_its_sparse_weights() -> None:
    model = network()
    patterns = safe_core.ByName({"2.weight": "2:4"}, default=0.75)
    optimizer = SparseOptimizer(sgd(model.parameters()), safe_core.safe(patterns), model=model)
    step(model, optimizer)
    assert repr(optimizer).splitlines() == [
        "SparseOptimizer(SGD, ADMM with SAM), steps taken: 1",
        "  0.weight (16, 8): 0.75, scope global",
        "  2.weight (4, 16): 2:4",
        "sparse: 2 of 2 weights, 192 of 192 entries",
    ]


def test_a_long_list_of_sparse_weights_is_cut() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(23)))
    lines = repr(SparseOptimizer(sgd(model.parameters()), METHOD, model=model)).splitlines()
    assert lines[20:22] == ["  19.weight (2, 2): 0.75, scope global", "  and 3 more"]


def test_an_outer_autocast_computes_the_second_gradient_at_the_perturbed_point() -> None:
    results = []
    for outer in (True, False):
        model = network()
        optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
        x, y = batch()
        with autocast() if outer else nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                with nullcontext() if outer else autocast():
                    loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                with optimizer.perturbed():
                    with nullcontext() if outer else autocast():
                        loss = nn.functional.mse_loss(model(x), y)
                    loss.backward()
                optimizer.step()
                torch.clear_autocast_cache()  # the base has moved the parameters as well
        results.append(copies(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_closure_may_clear_in_place_and_leave_a_parameter_out() -> None:
    model = network()
    unused = nn.Linear(4, 4)
    params = [*model.parameters(), *unused.parameters()]
    for p in unused.parameters():
        p.grad = torch.ones_like(p)
    optimizer = SparseOptimizer(sgd(params), METHOD, model=nn.ModuleList([model, unused]))
    x, y = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.steps == 3


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_closure_that_clears_nothing_is_refused(backwards: int) -> None:
    model, optimizer = trained(1)
    optimizer.zero_grad()
    x, y = batch()
    nn.functional.mse_loss(model(x), y).backward()
    smallest = min(model.parameters(), key=torch.numel)
    earlier = smallest.grad.clone()

    def closure() -> torch.Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        for _ in range(backwards):
            loss.backward(retain_graph=True)
        return loss

    before = copies(model)
    with pytest.raises(ValueError, match="closure must clear the gradients"):
        optimizer.step(closure)
    # No number of ours is left in the gradients.
    torch.testing.assert_close(smallest.grad, (1 + backwards) * earlier)
    assert all(torch.equal(a, b) for a, b in zip(copies(model), before, strict=True))


def test_a_closure_that_fails_leaves_the_gradients() -> None:
    model, optimizer = trained(1)
    before = [p.grad.clone() for p in model.parameters()]

    def closure() -> None:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(closure)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_closure_that_skips_its_batch_takes_no_step() -> None:
    model, optimizer = trained(1)
    before = copy.deepcopy([copies(model), optimizer.split()])
    optimizer.zero_grad()
    assert optimizer.step(lambda: None) is None
    assert optimizer.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(copies(model), before[0], strict=True))
    for got, want in zip(optimizer.split(), before[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@short_run
def test_the_sparsity_of_a_group_may_change_between_steps() -> None:
    model, optimizer = grouped()
    step(model, optimizer)
    optimizer.param_groups[0]["sparsity"] = 0.25
    step(model, optimizer)
    optimizer.finalize()
    assert int((model[0].weight == 0).sum()) == 32
    assert int((model[2].weight == 0).sum()) == 48
    optimizer.param_groups[0]["sparsify"] = False
    step(model, optimizer)
    assert list(optimizer.sparse_parameters()) == ["2.weight"]
    assert "anchor" not in optimizer.state[model[0].weight]


def test_parameters_may_be_exchanged_before_training_and_not_after() -> None:
    # As Accelerate does with those of FSDP.
    for steps in (0, 1):
        model, optimizer = trained(steps)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        optimizer.param_groups[0]["params"] = list(model.parameters())
        if steps:
            with pytest.raises(ValueError, match="got others in place of 1: create the opt"):
                step(model, optimizer)
        else:
            step(model, optimizer)
            assert optimizer.state[model[0].weight]["support"].sum() > 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sparsify": 0}, TypeError, r"sparsify of param_groups\[0\] must be True or False, got 0"),
        ({"sparsity": 1.5}, ValueError, "sparsity of a param group must be a fraction"),
    ],
)
def test_a_wrong_selection_by_a_group_is_named(
    settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        grouped(**settings)


@pytest.mark.parametrize("setting", ["rho", "penalty"])
def test_a_schedule_of_a_group_is_checked_at_its_step(setting: str) -> None:
    model, optimizer = grouped(**{setting: lambda step: 0.1 - 0.1 * step})
    step(model, optimizer)
    step(model, optimizer)
    with pytest.raises(ValueError, match=f"{setting} of a param group at step 2 must be a finite"):
        step(model, optimizer)


def test_weights_that_are_not_numbers_are_not_projected() -> None:
    model, optimizer = trained(1)
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    before = copies(model)
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in 2.weight"):
        optimizer.finalize()
    for a, b in zip(copies(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@short_run
def test_freezing_clears_momentum_off_the_support() -> None:
    model, optimizer = trained(3)
    optimizer.finalize(freeze=True)
    weight = model[0].weight
    off = ~optimizer.state[weight]["support"]
    moments = [t for t in optimizer.base.state[weight].values() if t.shape == weight.shape]
    assert len(moments) == 2
    assert all((t[off] == 0).all() and (t[~off] != 0).any() for t in moments)


@short_run
def test_a_frozen_optimizer_takes_no_new_sparse_parameters() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "sparsify": True, "sparsity": 0.5}]
    optimizer = SparseOptimizer(sgd(groups), METHOD)
    optimizer.finalize(freeze=True)
    extra = {"params": model[2].parameters(), "sparsify": True, "sparsity": 0.5}
    with pytest.raises(ValueError, match="must not be sparse once the support is frozen"):
        optimizer.add_param_group(extra)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({**extra, "sparsify": False})
    step(model, optimizer)
    assert len(optimizer.param_groups) == 2


def test_recalibration_needs_batches_of_tensors() -> None:
    model = network(nn.BatchNorm1d(16))
    before = model[1].running_mean.clone().add_(1.0)
    model[1].running_mean.copy_(before)
    with pytest.raises(ValueError, match="batches must not be empty"):
        recalibrate(model, [])
    with pytest.raises(TypeError, match=r"got one tensor: pass \[x\] or x\.split"):
        recalibrate(model, torch.ones(2, 8))
    with pytest.raises(TypeError, match=r"batches must be tensors.*dict"):
        recalibrate(model, [{"x": torch.ones(2, 8)}])
    assert torch.equal(model[1].running_mean, before)
    recalibrate(network(), [])  # nothing to estimate


def test_a_failed_recalibration_restores_batch_normalisation() -> None:
    model = network(nn.BatchNorm1d(16)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recalibrate(model, [torch.ones(2, 8), torch.ones(2, 9)])
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_random_numbers_go_on_after_a_replay_as_if_there_was_none() -> None:
    torch.manual_seed(3)
    state = RandomState.record()
    torch.rand(2)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    torch.rand(2)
    with RandomState.replayed(state):
        torch.rand(7)
    assert torch.equal(torch.rand(2), wanted)


def test_a_replay_is_a_recorded_state() -> None:
    model, optimizer = trained(1)
    step(model, optimizer)
    with (
        pytest.raises(TypeError, match="replay must be a RandomState or None, got True"),
        optimizer.perturbed(replay=True),  # type: ignore[arg-type]
    ):
        pass


@short_run
def test_the_perturbation_of_a_frozen_support_lies_on_it() -> None:
    model, optimizer = trained()
    optimizer.finalize(freeze=True)
    x = copies(model)
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()
    with optimizer.perturbed():
        moved = [p.detach() - x_i for p, x_i in zip(model.parameters(), x, strict=True)]
        length = torch.sqrt(sum((e**2).sum() for e in moved))
        assert float(length) == pytest.approx(0.1, rel=1e-4)
        assert not model[0].weight[~optimizer.state[model[0].weight]["support"]].any()


@short_run
def test_a_frozen_support_is_loaded_and_applied() -> None:
    model, optimizer = trained()
    optimizer.finalize(freeze=True)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    other, second = trained(0)
    second.load_state_dict(saved)
    assert second.frozen
    second.check_sparsity()  # whatever the weights were before
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for _ in range(3):
        step(model, optimizer)
        step(other, second)
    for a, b in zip(copies(model), copies(other), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="before the support is frozen"):
        second.report()
    with pytest.raises(ValueError, match="before the support is frozen"):
        second.split()


@short_run
@pytest.mark.parametrize("freeze", [False, True])
def test_lost_sparsity_is_found_and_named(freeze: bool) -> None:
    model, optimizer = trained()
    with pytest.raises(ValueError, match=r"non-zeros in 0.weight \(\d+ too many\), 2.weight"):
        optimizer.check_sparsity()
    optimizer.finalize(freeze=freeze)
    optimizer.check_sparsity()
    with torch.no_grad():
        model[2].weight.add_(torch.randn(4, 2) @ torch.randn(2, 16))  # merged, as LoRA is
    with pytest.raises(ValueError, match=r"non-zeros in .*2\.weight"):
        optimizer.check_sparsity()


# Insight


def test_a_report_is_what_its_formulas_say_and_changes_nothing() -> None:
    model, optimizer = trained(5)  # between two dual updates
    before = copy.deepcopy([copies(model), optimizer.split(), optimizer.steps])
    report = optimizer.report()
    for got, want in zip(optimizer.split(), before[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    weights = [model[0].weight.detach(), model[2].weight.detach()]
    final = safe_core.project(weights, 0.75)
    split = optimizer.split()
    z = [torch.where(s, a, 0) for a, s in zip(split.anchor, split.support, strict=True)]
    u = [torch.where(s, 0, -a) for a, s in zip(split.anchor, split.support, strict=True)]
    now = safe_core.project([x + u_i for x, u_i in zip(weights, u, strict=True)], 0.75)
    assert (report.step, [row.name for row in report.tensors]) == (5, ["0.weight", "2.weight"])
    for i, row in enumerate(report.tensors):
        assert (row.entries, row.asked, row.zeros) == (weights[i].numel(), 0.75, 0)
        off = ~final.support[i]
        assert row.achieved == pytest.approx(float(off.float().mean()))
        assert row.distance == pytest.approx(float(weights[i][off].norm()), rel=1e-5)
        mask_change = (now.support[i] != split.support[i]).float().mean()
        assert row.mask_change == pytest.approx(float(mask_change))
        assert row.primal_residual == pytest.approx(float((weights[i] - z[i]).norm()), rel=1e-5)
        moved = 0.2 * float((now.values[i] - z[i]).norm())
        assert row.dual_residual == pytest.approx(moved, rel=1e-4)
    scalars = report.scalars()
    assert scalars["achieved"] == pytest.approx(0.75)
    assert scalars["mask_change/0.weight"] == report.tensors[0].mask_change
    total = sum(row.distance**2 for row in report.tensors) ** 0.5
    assert scalars["distance"] == pytest.approx(total)


def test_a_report_of_a_narrow_state_rounds_nothing_of_its_own() -> None:
    model = network()
    method = safe_core.safe(0.75, penalty=0.2, dual_update_interval=2, state_dtype="bfloat16")
    optimizer = SparseOptimizer(sgd(model.parameters()), method, model=model)
    step(model, optimizer)
    (anchor, support, _), weights = optimizer.split(), [model[0].weight, model[2].weight]
    now = safe_core.project(
        [
            w.detach() - torch.where(s, 0, a.float())
            for w, a, s in zip(weights, anchor, support, strict=True)
        ],
        0.75,
    )
    for row, z_now, a, s in zip(
        optimizer.report().tensors, now.values, anchor, support, strict=True
    ):
        moved = 0.2 * float((z_now - torch.where(s, a.float(), 0)).norm())
        assert row.dual_residual == pytest.approx(moved, rel=1e-5)


def test_a_report_of_nothing_has_figures() -> None:
    assert Report(3, []).scalars()["achieved"] == 0
    empty = TensorReport("e", 0, 0.5, *[0] * 9)
    assert Report(3, [empty]).scalars()["distance/e"] == 0


def test_a_report_is_logged_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Writer:
        def __init__(self) -> None:
            self.calls: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.calls.append((tag, value, step))

    _, optimizer = trained(3)
    report, writer = optimizer.report(), Writer()
    report.log(writer)
    assert {f"safe_core/{k}": v for k, v in report.scalars().items()} == {
        tag: value for tag, value, step in writer.calls if step == 3
    }
    import rich

    rich.print(report.table())
    printed = capsys.readouterr().out
    assert "step 3" in printed
    assert "2.wei" in printed


# The optimizer contract


SCHEDULERS = {
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        ],
        [2],
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "several steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=9),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 8),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=4),
    "chained": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ExponentialLR(o, 0.9), torch.optim.lr_scheduler.LinearLR(o)]
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kind_of_scheduler_drives_the_base(name: str) -> None:
    model = network()
    optimizer = SparseOptimizer(sgd(model.parameters()), METHOD, model=model)
    plain = sgd([nn.Parameter(torch.zeros(1))])
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    for _ in range(6):
        step(model, optimizer)
        plain.step()
        for scheduler in (ours, theirs):
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
        assert optimizer.base.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert plain.param_groups[0]["lr"] != 0.1


@short_run
def test_averaged_weights_are_sparse_once_projected_by_their_own_support() -> None:
    model, optimizer = trained(2)
    average = torch.optim.swa_utils.AveragedModel(model)
    for seed in range(4):
        step(model, optimizer, batch(seed))
        average.update_parameters(model)
    optimizer.finalize()
    projected = safe_core.project(
        {k: p.detach() for k, p in average.module.named_parameters() if p.ndim == 2}, 0.75
    )
    kept = sum(int(mask.sum()) for mask in projected.support.values())
    assert kept == (8 * 16 + 16 * 4) // 4


def test_a_learning_rate_may_be_a_tensor() -> None:
    model = network()
    base = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    optimizer = SparseOptimizer(base, METHOD, model=model)
    other = network()
    same = SparseOptimizer(torch.optim.Adam(other.parameters(), lr=0.01), METHOD, model=other)
    for _ in range(3):
        step(model, optimizer)
        step(other, same)
        base.param_groups[0]["lr"].mul_(0.5)
        same.param_groups[0]["lr"] *= 0.5
    for a, b in zip(copies(model), copies(other), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    eager, model = network(), network()
    compiled = torch.compile(model, backend="aot_eager")
    pairs = [(eager, eager), (compiled, model)]
    optimizers = [SparseOptimizer(sgd(m.parameters()), METHOD, model=m) for _, m in pairs]
    for _ in range(3):
        for (run, _), optimizer in zip(pairs, optimizers, strict=True):
            step(run, optimizer)
    for a, b in zip(copies(eager), copies(model), strict=True):
        torch.testing.assert_close(a, b)
