"""What `SparseOptimizer` keeps between steps, saves, loads, copies and shares."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from short_runs import short_run
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as distributed

import safe_core
from safe_core import SquaredGradient
from safe_core.adapters.torch import SparseOptimizer
from safe_core.adapters.torch.checkpoint import described

BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def doubled_first_column(params):
    """An importance function that pickles."""
    return {name: 1.0 + (torch.arange(p.shape[1]) == 0) for name, p in params.items()}


SOURCES = {
    "none": (None, lambda dtype: None),
    "squared gradient": (SquaredGradient(0.7), lambda dtype: None),
    "given": (
        None,
        lambda dtype: {
            "0.weight": torch.linspace(0, 2, 6, dtype=dtype),
            "2.weight": torch.linspace(1, 3, 32, dtype=dtype).reshape(4, 8),
        },
    ),
    "function": (None, lambda dtype: doubled_first_column),
}


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


class Run:
    """A small network under training; batches depend on the step alone."""

    def __init__(self, base="sgd", dtype=torch.float32, source="none", seed=0, **method):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        own, given = SOURCES[source]
        # A radius that bfloat16 does not round away.
        parts = {"rho": 0.5, "penalty": 0.1, "dual_update_interval": 3, "importance": own}
        self.optimizer = SparseOptimizer(
            {**BASES, "plain sgd": plain_sgd}[base](self.model.parameters()),
            safe_core.safe(0.5, **{**parts, **method}),
            model=self.model,
            importance=given(dtype),
        )

    def train(self, steps):
        for step in range(self.optimizer.steps, self.optimizer.steps + steps):
            generator = torch.Generator().manual_seed(step)
            dtype = self.model[0].weight.dtype
            inputs = torch.randn(16, 6, generator=generator).to(dtype)
            targets = torch.randn(16, 4, generator=generator).to(dtype)

            def closure(inputs=inputs, targets=targets):
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(inputs), targets)
                loss.backward()
                return loss

            self.optimizer.step(closure)
        return self

    def save(self):
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        return file

    def load(self, file):
        weights, state = torch.load(file, weights_only=True)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        return self


def snapshot(run):
    """Copies of everything that training depends on."""
    optimizer = run.optimizer
    held = {"steps": optimizer.steps}
    for i, p in enumerate(run.model.parameters()):
        held[f"parameter {i}"] = p
        for owner, state in (("base", optimizer.base.state), ("ours", optimizer.state)):
            entries = state.get(p, {})
            held |= {f"{owner} {key} {i}": value for key, value in entries.items()}
    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for key, value in held.items()
    }


def assert_same(got, wanted):
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype, key
            assert torch.equal(got[key], value), key
        else:
            assert got[key] == value, key


# Save and load


@short_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("base", list(BASES))
def test_a_run_resumes_bit_for_bit(base, source, dtype):
    # Steps 4 and 5 lie between two dual updates.
    first = Run(base, dtype, source).train(4)
    saved = snapshot(first)
    file = first.save()
    first.train(5)
    second = Run(base, dtype, source, seed=1).load(file)
    assert_same(snapshot(second), saved)
    second.train(5)
    assert_same(snapshot(second), snapshot(first))
    wide = torch.promote_types(dtype, torch.float32)
    assert [a.dtype for a in second.optimizer.split().anchor] == [wide] * 2
    assert [s.dtype for s in second.optimizer.split().support] == [torch.bool] * 2
    first.optimizer.finalize()
    second.optimizer.finalize()
    assert_same(snapshot(second), snapshot(first))
    assert sum(int((w == 0).sum()) for w in second.optimizer.sparse_parameters().values()) == 40


def test_a_state_from_before_the_first_step_resumes():
    first = Run("adam")
    second = Run("adam", seed=1).load(first.save())
    assert_same(snapshot(second.train(4)), snapshot(first.train(4)))


def test_a_loaded_state_shares_no_memory_with_ours():
    first, second = Run().train(2), Run(seed=1)
    state = first.optimizer.state_dict()
    second.optimizer.load_state_dict(state)
    weight = first.model[0].weight
    anchor = second.optimizer.split().anchor[0]
    assert anchor.data_ptr() != first.optimizer.state[weight]["anchor"].data_ptr()


def test_saving_changes_nothing_and_names_our_entries():
    run = Run("adam", source="squared gradient").train(4)
    before = snapshot(run)
    state = run.optimizer.state_dict()
    ours = {"safe_anchor", "safe_support", "safe_importance"}
    theirs = {"step", "exp_avg", "exp_avg_sq"}
    assert [set(entry) for entry in state["state"].values()] == [
        theirs | ours,
        theirs,
        theirs | ours,
        theirs,
    ]
    assert [group["safe_steps"] for group in state["param_groups"]] == [4]
    assert_same(snapshot(run), before)
    assert "safe_steps" not in run.optimizer.param_groups[0]


def test_loading_leaves_the_given_state_as_it_was():
    state = Run().train(2).optimizer.state_dict()
    keys = [list(state["param_groups"][0]), [list(entry) for entry in state["state"].values()]]
    Run(seed=1).optimizer.load_state_dict(state)
    assert [list(state["param_groups"][0]), [list(e) for e in state["state"].values()]] == keys


def without(key):
    return lambda state: state["state"][2].pop(key)


def replaced(key, value):
    return lambda state: state["state"][2].update({key: value})


BAD_STATES = {
    "no anchor": (without("safe_anchor"), "safe_anchor .*for 2.weight"),
    "no support": (without("safe_support"), "safe_support .*for 2.weight"),
    "no importance": (without("safe_importance"), "must hold safe_importance for 2.weight"),
    "another shape": (
        replaced("safe_anchor", torch.zeros(8, 4)), r"safe_anchor of shape \(4, 8\) for 2.weight"
    ),
    "another shape of the support": (
        replaced("safe_support", torch.ones(4, dtype=torch.bool)), "safe_support .*2.weight"
    ),
    "another shape of the importance": (
        replaced("safe_importance", torch.ones(5)), "safe_importance .*2.weight"
    ),
    "sparse elsewhere": (
        lambda state: state["state"][3].update(safe_anchor=torch.zeros(4)), "makes parameter 3"
    ),
    "no steps": (lambda state: state["param_groups"][0].pop("safe_steps"), "safe_steps"),
    "another group": (
        lambda state: state["param_groups"].append(state["param_groups"][0]), "with 4 parameters"
    ),
    "another number of parameters": (
        lambda state: state["param_groups"][0]["params"].pop(), "with 4 parameters"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_STATES))
def test_a_bad_state_is_an_error_and_changes_nothing(name):
    damage, message = BAD_STATES[name]
    state = copy.deepcopy(Run("adam", source="squared gradient").train(2).optimizer.state_dict())
    run = Run("adam", source="squared gradient", seed=1).train(4)
    before = snapshot(run)
    good = copy.deepcopy(state)
    damage(state)
    with pytest.raises(ValueError, match=message):
        run.optimizer.load_state_dict(state)
    assert_same(snapshot(run), before)
    run.optimizer.load_state_dict(good)


def test_the_state_of_a_plain_optimizer_is_refused():
    run = Run("sgd")
    plain = BASES["sgd"](run.model.parameters())
    with pytest.raises(ValueError, match="that of a SparseOptimizer"):
        run.optimizer.load_state_dict(plain.state_dict())


def test_a_state_with_an_importance_is_refused_where_there_is_none():
    state = Run(source="squared gradient").train(2).optimizer.state_dict()
    for group in state["param_groups"]:
        del group["safe_method"]
    with pytest.raises(ValueError, match=r"must not hold safe_importance for 0\.weight"):
        Run(source="none").optimizer.load_state_dict(state)


def test_our_state_stays_out_of_the_base():
    run = Run("adam").train(3)
    for p in run.model.parameters():
        assert set(run.optimizer.base.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        assert float(run.optimizer.base.state[p]["step"]) == 3
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for p in run.model.parameters():
        assert set(run.optimizer.base.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


@short_run
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("base", [*BASES, "plain sgd"])
@pytest.mark.parametrize("source", ["none", "squared gradient"])
def test_a_distributed_checkpoint_on_disk_resumes(base, source, frozen, tmp_path):
    first = Run(base, source=source).train(4)
    if frozen:
        first.optimizer.finalize(freeze=True)
    model, optimizer = distributed.get_state_dict(first.model, first.optimizer)
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    second = Run(base, source=source, seed=1)
    if frozen:  # after the base has made its state
        distributed.get_optimizer_state_dict(second.model, second.optimizer)
        second.optimizer.finalize(freeze=True)
    model, optimizer = distributed.get_state_dict(second.model, second.optimizer)
    state = {"model": model, "optimizer": optimizer}
    checkpoint.load(state, checkpoint_id=tmp_path)
    distributed.set_state_dict(
        second.model,
        second.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert second.optimizer.frozen == frozen
    first, second = first.train(3), second.train(3)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same(snapshot(second), snapshot(first))


def test_a_flattened_distributed_state_is_refused():
    run = Run("adam").train(1)
    flat = distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    state = distributed.get_optimizer_state_dict(run.model, run.optimizer, options=flat)
    with pytest.raises(ValueError, match=r"got no 'safe_steps'\. Load .* was saved with flatten"):
        distributed.set_optimizer_state_dict(run.model, run.optimizer, state, options=flat)


def test_a_state_from_before_the_first_step_fixes_nothing():
    # As Accelerate does when it prepares an optimizer.
    run = Run()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(1.0)
    assert_same(snapshot(run.train(3)), snapshot(shifted(Run()).train(3)))


def shifted(run):
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(1.0)
    return run


def test_the_state_of_another_base_is_refused():
    run = Run("adam").train(2)
    before = snapshot(run)
    with pytest.raises(ValueError, match="with the same base: this is Adam, got SGD"):
        run.optimizer.load_state_dict(Run("sgd").train(2).optimizer.state_dict())
    assert_same(snapshot(run), before)
    run.train(1)


def test_the_sparsity_of_a_group_is_part_of_the_method():
    def make(sparsity):
        model = nn.Linear(8, 4)
        groups = [{"params": model.parameters(), "sparsity": sparsity}]
        base = torch.optim.SGD(groups, lr=0.1)
        return SparseOptimizer(base, safe_core.admm(0.5), model=model)

    with pytest.raises(ValueError, match=r"same method: .*sparsity=0.1.*, got .*sparsity=0.9"):
        make(0.1).load_state_dict(make(0.9).state_dict())


def test_a_long_method_is_cut_to_where_it_differs():
    def make(steps):
        model = nn.Linear(8, 4)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return SparseOptimizer(base, safe_core.safe(0.5, steps=steps), model=model)

    with pytest.raises(ValueError, match=r"this is \.\.\.\S.*steps=35.*, got .*steps=40") as found:
        make(70).load_state_dict(make(80).state_dict())
    assert len(str(found.value)) < 450


class Nameless(SquaredGradient):
    """An importance that says nothing of itself."""

    __repr__ = object.__repr__


def test_a_mark_holds_no_address():
    assert described(Nameless()) == "Nameless()"

    class Bare:
        pass

    assert described(Bare()).endswith("Bare")


# Copies


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_as_the_original(way, source, base):
    run = Run(base, source=source).train(4)
    before = snapshot(run)
    twin = way(run)
    assert twin.optimizer.param_groups is twin.optimizer.base.param_groups
    assert_same(snapshot(twin), before)
    twin.train(5)
    assert_same(snapshot(run), before)
    run.train(5)
    assert_same(snapshot(twin), snapshot(run))


def test_no_copy_is_taken_within_the_perturbed_block():
    run = Run()
    run.model(torch.ones(1, 6)).sum().backward()
    with run.optimizer.perturbed():
        for take in (copy.deepcopy, pickle.dumps):
            with pytest.raises(ValueError, match="a copy must come after"):
                take(run.optimizer)
        with pytest.raises(ValueError, match=r"report\(\) must come after"):
            run.optimizer.report()


def test_a_copy_taken_after_the_perturbed_block_must_compute_it_anew():
    run = Run()
    run.model(torch.ones(1, 6)).sum().backward()
    with run.optimizer.perturbed():
        run.model(torch.ones(1, 6)).sum().backward()
    twin = copy.deepcopy(run.optimizer)
    with pytest.raises(ValueError, match="perturbed"):
        twin.step()


# Parameter groups


def test_groups_are_shared_with_the_base():
    run = Run()
    for _ in range(2):
        assert run.optimizer.param_groups is run.optimizer.base.param_groups
        run.optimizer.load_state_dict(run.optimizer.state_dict())
    loaded = Run(seed=1).load(run.save())
    assert loaded.optimizer.param_groups is loaded.optimizer.base.param_groups


@pytest.mark.parametrize("when", ["fresh", "loaded"])
@pytest.mark.parametrize("attached", ["ours", "base"])
def test_a_learning_rate_scheduler_works_on_either(attached, when):
    scheduled, by_hand = Run(), Run()
    optimizer = scheduled.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer if attached == "ours" else optimizer.base, step_size=1, gamma=0.5
    )
    if when == "loaded":
        optimizer.load_state_dict(Run().optimizer.state_dict())
    for step in range(4):
        by_hand.optimizer.param_groups[0]["lr"] = 0.1 * 0.5**step
        assert optimizer.base.param_groups[0]["lr"] == 0.1 * 0.5**step
        by_hand.train(1)
        scheduled.train(1)
        scheduler.step()
    assert_same(snapshot(scheduled), snapshot(by_hand))


@short_run
def test_a_group_may_be_added():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])
    base = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(safe_core.DenseWeightWarning, match="base does not hold"):
        optimizer = SparseOptimizer(
            base, safe_core.safe(0.5, rho=0.1, dual_update_interval=2), model=model
        )

    def closure():
        optimizer.zero_grad()
        loss = sum(layer(torch.ones(2, 4)).square().mean() for layer in model)
        loss.backward()
        return loss

    optimizer.step(closure)
    old = [a.clone() for a in optimizer.split().anchor]
    start = model[1].weight.detach().clone()
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.01})
    assert optimizer.param_groups is base.param_groups
    assert len(base.param_groups) == 2
    assert base.param_groups[1]["momentum"] == 0.9
    assert list(optimizer.sparse_parameters()) == ["0.weight", "1.weight"]
    split = optimizer.split()
    assert torch.equal(split.anchor[0], old[0])
    assert torch.equal(split.anchor[1], safe_core.project(start, 0.5).values)
    optimizer.step(closure)
    assert not torch.equal(model[1].weight, start)
    optimizer.finalize()
    assert sum(int((layer.weight == 0).sum()) for layer in model) == 20


@short_run
def test_a_group_that_does_not_fit_is_not_added():
    linear, bad = nn.Linear(4, 4), nn.Linear(5, 4)
    model = nn.ModuleList([linear, bad])
    base = torch.optim.SGD(linear.parameters(), lr=0.1)
    with pytest.warns(safe_core.DenseWeightWarning, match="base does not hold"):
        optimizer = SparseOptimizer(base, safe_core.safe("2:4"), model=model)
    with pytest.raises(ValueError, match=r"input axis of 1\.weight"):
        optimizer.add_param_group({"params": bad.parameters()})
    assert len(base.param_groups) == len(optimizer.param_groups) == 1
    assert list(optimizer.sparse_parameters()) == ["0.weight"]
    optimizer.finalize()
    assert int((linear.weight == 0).sum()) == 8


def test_hooks_run_on_ours():
    run = Run()
    calls = []
    run.optimizer.register_step_pre_hook(lambda *args: calls.append("before step"))
    run.optimizer.register_step_post_hook(lambda *args: calls.append("after step"))
    run.optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("before save"))
    run.optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": "added"})
    run.optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, state: {k: v for k, v in state.items() if k != "note"}
    )
    run.optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("loaded"))
    run.train(1)
    state = run.optimizer.state_dict()
    assert state["note"] == "added"
    run.optimizer.load_state_dict(state)
    assert calls == ["before step", "after step", "before save", "loaded"]


def test_looking_at_an_optimizer_does_not_fix_where_the_split_starts():
    model = nn.Linear(4, 2)
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), safe_core.admm(0.5), model=model
    )
    optimizer.sparse_parameters()
    optimizer.split()
    optimizer.state_dict()
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 9.0).reshape(2, 4))
    anchor = optimizer.split().anchor[0]
    torch.testing.assert_close(anchor, torch.tensor([[0.0] * 4, [5.0, 6.0, 7.0, 8.0]]))


def test_an_initialising_step_is_no_step_of_the_method():
    model = nn.Linear(4, 2)
    base = torch.optim.Adam(model.parameters(), lr=0.0)
    method = safe_core.admm(0.5, dual_update_interval=1)
    optimizer = SparseOptimizer(base, method, model=model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.steps == 0
    assert set(base.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(optimizer.state.values())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()  # a warm-up from a rate of zero does count
    assert optimizer.steps == 1


def rising(step):
    return 0.1 * step


@pytest.mark.parametrize(
    "change", [{"rho": 0.2}, {"penalty": 0.3}, {"state_dtype": "bfloat16"}, {"penalty": rising}]
)
def test_the_state_of_another_method_is_refused_unless_its_mark_is_dropped(change):
    state = Run(**change).train(2).optimizer.state_dict()
    run = Run().train(1)
    before = snapshot(run)
    with pytest.raises(ValueError, match="must be that of an optimizer with the same method"):
        run.optimizer.load_state_dict(state)
    assert_same(snapshot(run), before)
    Run(**change).optimizer.load_state_dict(copy.deepcopy(state))
    for group in state["param_groups"]:
        del group["safe_method"]
    run.optimizer.load_state_dict(state)
    assert run.optimizer.steps == 2


def test_a_mark_names_functions_and_not_their_addresses():
    state = Run(penalty=rising).optimizer.state_dict()
    assert "penalty=rising" in state["param_groups"][0]["safe_method"]


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="must hold 'state' and 'param_groups', got the keys none"):
        Run().optimizer.load_state_dict({})


def test_the_keys_of_a_checkpoint_stay():
    """Checkpoints outlive releases: a change here needs a way to load the old ones."""
    run = Run(source="squared gradient", perturbation_interval=2, reuse=0.5).train(2)
    state = run.optimizer.state_dict()
    ours = {key for entry in state["state"].values() for key in entry if key.startswith("safe_")}
    assert ours == {"safe_anchor", "safe_support", "safe_importance", "safe_flat_direction"}
    group = state["param_groups"][0]
    settings = {key: value for key, value in group.items() if key.startswith("safe_")}
    assert settings == {
        "safe_steps": 2,
        "safe_frozen": False,
        "safe_started": True,
        "safe_finalized_at": -1,
        "safe_base": "SGD",
        "safe_method": (
            "Method(sparsity=Unstructured(sparsity=0.5), "
            "constraint=ADMM(penalty=Constant(value=0.1), dual_update_interval=3), "
            "perturbation=SAM(rho=Constant(value=0.5), interval=2, reuse=0.5), "
            "importance=SquaredGradient(decay=0.7))"
        ),
    }
