"""Runs with derived numbers in PyTorch: precision, resuming, and the end of a run."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from pulled_runs import BASES, STEPS, UNTUNED, Run, assert_same, size
from short_runs import short_run
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as distributed

import safe_core
from safe_core import FinalizeWarning, untuned

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


# Resuming


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


@pytest.mark.every_second
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
def test_a_sparsity_that_has_not_risen_is_reported(sparsity: Any) -> None:
    run = Run(safe_core.safe(sparsity, steps=60)).train(15)
    with pytest.warns(FinalizeWarning) as found:
        run.optimizer.finalize()
    (text,) = [str(w.message) for w in found]
    assert text.count("the sparsity was at") == 1
    assert "after 15 steps" in text


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
    *squares, shrinkage = run.optimizer._run.motion().tolist()
    step, x = map(math.sqrt, squares)
    unit = step * min(step / x * STEPS / untuned.TRAVEL, 1) ** 2 * math.exp(-shrinkage)
    assert unit > 0
    assert size(run.perturbation()) == pytest.approx(
        float(run.optimizer.method.radius(run.optimizer.steps)) * unit, rel=1e-3
    )


def test_what_shows_the_run_knows_the_pull() -> None:
    run = Run(UNTUNED).train(10)
    assert "Pull with SAM" in repr(run.optimizer)
    method = repr(run.optimizer.method)
    assert "Pull(penalty=Cosine(" in method
    assert "in_steps=True" in method
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
