"""The step in PyTorch as it runs: in place over lists, in pieces, compiled, sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import output_of
from torch import nn

import safe_core
from safe_core import ASAM, SAM, schedules
from safe_core.adapters.torch import SparseOptimizer, kernels

SHAPES = [(3,), (5, 7), (40, 11), (2, 3, 4), ()]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.fixture(params=[1, 30, 2**17], ids=lambda size: f"group-{size}")
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kernels, "_GROUP", request.param)
    return request.param


@pytest.mark.parametrize("transposed", [False, True])
def test_the_penalty_in_pieces_is_that_of_the_formula(group: int, transposed: bool) -> None:
    g, x, anchor = (
        [t.mT.clone().mT if transposed and t.ndim > 1 else t for t in tensors(seed)]
        for seed in range(3)
    )
    wanted = [
        (a.double() + 0.3 * (b.double() - c.double())).float()
        for a, b, c in zip(g, x, anchor, strict=True)
    ]
    kernels.add_penalty_(g, x, anchor, 0.3)
    for got, want in zip(g, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [SAM(0.5), ASAM(0.5)], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_moving_is_adding_the_perturbation(group: int, kind: SAM, dtype: torch.dtype) -> None:
    x, g = tensors(0, dtype), tensors(1, dtype)
    before = [t.clone() for t in x]
    wanted = [
        (a.to(e.dtype) + e).to(dtype)
        for a, e in zip(x, kind.perturbation(x, g, rho=0.5), strict=True)
    ]
    moved = kernels.MovedParameters()
    moved.move(x, moved.prepare(x), kind.direction(x, g, rho=0.5))
    for got, want, old in zip(x, wanted, before, strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.equal(got, old)
    moved.restore()
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("accelerated", [False, True])
def test_an_unusable_gradient_moves_nothing(bad: float, accelerated: bool) -> None:
    x, g = tensors(0), tensors(1)
    for t in g:
        t.fill_(bad)
    direction = SAM(0.5).direction(x, g, rho=0.5)
    if accelerated:
        steps = kernels._written_out(g, direction)
        assert all(torch.equal(e, torch.zeros_like(e)) for e in steps)
    else:
        before = [t.clone() for t in x]
        moved = kernels.MovedParameters()
        moved.move(x, moved.prepare(x), direction)
        assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_an_accelerator_writes_out_the_same_perturbation() -> None:
    x, g = tensors(0), tensors(1)
    direction = SAM(0.5).direction(x, g, rho=0.5)
    for got, want in zip(kernels._written_out(g, direction), direction.perturbation(), strict=True):
        assert torch.equal(got, want)


def test_what_was_not_saved_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    # An interrupt between two groups must not bring back memory that was never written.
    monkeypatch.setattr(kernels, "_GROUP", 1)
    x, g = tensors(0), tensors(1)
    before = [t.clone() for t in x]
    add, calls = torch._foreach_add_, iter(range(3))

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        add(*args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_add_", interrupted)
    moved = kernels.MovedParameters()
    with pytest.raises(KeyboardInterrupt):
        moved.move(x, moved.prepare(x), SAM(0.5).direction(x, g, rho=0.5))
    moved.restore()
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_copies_keep_their_memory_and_follow_the_parameters() -> None:
    moved, x = kernels.MovedParameters(), tensors(0)
    first = [t.data_ptr() for t in moved.prepare(x)]
    assert [t.data_ptr() for t in moved.prepare(x)] == first
    x[1].data = torch.zeros(4, 4)
    copies = moved.prepare(x)
    assert [c.shape for c in copies] == [t.shape for t in x]
    assert copies[0].data_ptr() == first[0]


class Run:
    """A small regression, trained for some steps."""

    METHOD = safe_core.safe(
        0.75, rho=0.05, penalty=schedules.cosine(0.1, steps=12), dual_update_interval=3
    )

    def __init__(
        self, make_base: Callable[..., Any], method: safe_core.Method = METHOD, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        self.data = torch.randn(32, 8), torch.randn(32, 2)
        self.optimizer = SparseOptimizer(
            make_base(self.model.parameters()), method, model=self.model, **options
        )

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(self.data[0]), self.data[1])
        loss.backward()
        return loss

    def steps(self, count: int) -> list[torch.Tensor]:
        for _ in range(count):
            self.optimizer.step(self.closure)
        return [p.detach().clone() for p in self.model.parameters()]


BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


@pytest.mark.every_second
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("sgd", Run.METHOD),
        ("adam", Run.METHOD),
        ("adam", safe_core.elsa(0.75, penalty=0.1, dual_update_interval=3)),
    ],
    ids=["sgd", "adam", "elsa"],
)
def test_compiled_steps_are_the_same_steps_compiled_once(base: str, method: Any) -> None:
    eager, compiled = Run(BASES[base], method), Run(BASES[base], method, compile=True)
    compiled.steps(4)  # the base optimizer makes its state, a dual update passes
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert programs > 0
    for got, want in zip(compiled.steps(8), eager.steps(12), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
def test_compiled_steps_run_the_hooks_of_the_base_and_take_phases() -> None:
    eager, compiled = Run(BASES["sgd"]), Run(BASES["sgd"], compile=True)
    calls: list[int] = []
    compiled.steps(1)
    hook = compiled.optimizer.base.register_step_post_hook(lambda *_: calls.append(1))
    compiled.steps(2)
    hook.remove()
    assert len(calls) == 2
    for _ in range(2):
        compiled.closure()
        with compiled.optimizer.perturbed():
            compiled.closure()
        compiled.optimizer.step()
    for got, want in zip(compiled.steps(1), eager.steps(6), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
def test_compiled_steps_follow_the_settings_of_groups() -> None:
    def grouped(params: Any) -> torch.optim.Optimizer:
        first, *rest = params
        groups = [{"params": [first], "rho": 0.3, "penalty": 0.5}, {"params": rest}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    runs = [Run(grouped), Run(grouped, compile=True)]
    wanted, got = (run.steps(4) for run in runs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    plain = Run(BASES["sgd"]).steps(4)
    assert not torch.allclose(got[0], plain[0], rtol=1e-3)


@pytest.mark.parametrize("broken", ["add_penalty_", "base"])
def test_a_step_that_fails_after_the_second_gradient_leaves_x(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(BASES["sgd"])
    before = run.steps(2)

    def fail(*_: Any) -> None:
        raise RuntimeError("lost")

    if broken == "base":
        run.optimizer.base.step = fail
    else:
        monkeypatch.setattr(kernels, broken, fail)
    with pytest.raises(RuntimeError, match="lost"):
        run.optimizer.step(run.closure)
    for p, x in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(p, x)


def test_x_is_back_before_the_base_steps_whatever_has_a_gradient() -> None:
    run = Run(BASES["sgd"])
    before, seen = run.steps(1), []
    calls = iter(range(2))

    def closure() -> torch.Tensor:
        loss = run.closure()
        if next(calls) == 0:  # the first weight is not perturbed
            run.model[0].weight.grad = None
        return loss

    def look() -> None:
        seen.extend(p.detach().clone() for p in run.model.parameters())

    run.optimizer.base.step = look
    run.optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


def test_compile_is_a_flag() -> None:
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        Run(BASES["sgd"], compile="yes")


def test_a_dual_update_makes_no_new_anchor_on_the_cpu() -> None:
    run = Run(BASES["sgd"])
    run.steps(1)
    weight = run.model[0].weight
    before, values = run.optimizer.state[weight]["anchor"], run.optimizer.split().anchor[0]
    run.steps(2)
    assert run.optimizer.state[weight]["anchor"].data_ptr() == before.data_ptr()
    assert not torch.equal(run.optimizer.split().anchor[0], values)


@pytest.fixture(scope="module")
def sharded_output() -> list[str]:
    return output_of("-P", "-c", SHARDED).split("\n")


def test_shards_select_what_the_whole_selects(sharded_output: list[str]) -> None:
    cases = [line for line in sharded_output if line.startswith("case")]
    assert len(cases) == 12, sharded_output
    assert all(line.endswith("agrees") for line in cases), cases


def test_every_pattern_selects_over_shards(sharded_output: list[str]) -> None:
    cases = [line for line in sharded_output if line.startswith("pattern")]
    assert cases == ["pattern agrees"] * (15 * 2 + 3)


def test_shards_round_as_the_whole_rounds(sharded_output: list[str]) -> None:
    assert [line for line in sharded_output if "rounding" in line] == ["rounding agrees"] * 12


def test_collectives_of_a_sharded_projection_do_not_grow(sharded_output: list[str]) -> None:
    sizes = [int(line.split()[-1]) for line in sharded_output if line.startswith("bytes")]
    assert len(sizes) == 2
    assert 0 < sizes[0] == sizes[1] < 2**20
    # The check for NaN, two histograms, and the counts above and at the threshold.
    assert sharded_output.count("all_reduce") == 2 * 4
    calls = [line for line in sharded_output if line.startswith("calls")]
    assert len(calls) == 2
    assert not any("gather" in line or "scatter" in line for line in calls), calls


SHARDED = """
import warnings
warnings.filterwarnings("ignore")
import torch, torch.distributed as dist
import safe_core.adapters.torch, torch.distributed.tensor.debug  # once, before the processes part
from processes import fork


def work(rank, path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.placement_types import _StridedShard
    from safe_core import NM, Block, Channel, Layout, Unstructured, project
    from safe_core.backends.torch_sharding import sharded_like
    from safe_core.backends import backend_of
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=4)
    line = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    rows, columns, copies = Shard(0), Shard(1), Replicate()
    torch.manual_seed(0)
    whole = [torch.round(2 * torch.randn(s)) * 0.7 for s in ((13, 6), (6, 10), (9,))]
    for plan in (
        [(line, [rows])] * 3,
        [(line, [columns]), (line, [rows]), (line, [copies])],
        [(grid, [rows, columns]), (grid, [copies, rows]), (grid, [rows, copies])],
        [(grid, [columns, copies]), None, (line, [rows])],
    ):
        parts = [x if p is None else distribute_tensor(x, *p) for x, p in zip(whole, plan)]
        floor = Unstructured(0.4, floor=0.9)
        for pattern in (Unstructured(0.4), floor, Unstructured(0.4, "tensor")):
            wanted, got = project(whole, pattern), project(parts, pattern)
            full = [[x.full_tensor() if hasattr(x, "full_tensor") else x for x in l] for l in got]
            same = all(torch.equal(a, b) for w, g in zip(wanted, full) for a, b in zip(w, g))
            kept = all(getattr(a, "placements", 0) == getattr(b, "placements", 0)
                       for a, b in zip(got.values, parts))
            if rank == 0:
                print("case", "agrees" if same and kept else "differs")
        narrow = backend_of(parts[0]).stochastic_bfloat16
        for a, b in zip(narrow(whole, step=3), narrow(parts, step=3)):
            same = torch.equal(a, b.full_tensor() if hasattr(b, "full_tensor") else b)
            if rank == 0:
                print("rounding", "agrees" if same else "differs")
    strided = _StridedShard(0, split_factor=2)
    weight = torch.round(2 * torch.randn(16, 24)) * 0.7
    stacked = torch.round(2 * torch.randn(4, 6, 8)) * 0.7
    per_input = torch.arange(24.0) % 5
    experts = Layout(input_axes=(2,), output_axes=(1,), batch_axes=(0,))
    for pattern, x, plan, moved in (
        (NM(2, 4), weight, (line, [rows]), False),
        (NM(2, 4), weight, (line, [columns]), True),
        (NM(2, 6), weight, (line, [columns]), False),
        (NM(2, 4), weight, (grid, [columns, columns]), True),
        (NM(5, 24), weight, (grid, [columns, rows]), True),
        (NM(2, 5, "dense"), weight, (grid, [strided, rows]), False),
        (Unstructured(0.4, "row"), weight, (line, [columns]), True),
        (Unstructured(0.4, "row"), weight, (grid, [rows, columns]), True),
        (Unstructured(0.4), weight, (grid, [strided, rows]), False),
        (Unstructured(0.4, "tensor"), stacked, (line, [columns]), True),
        (Channel(0.4), weight, (line, [columns]), True),
        (Channel(0.4), weight, (grid, [strided, rows]), False),
        (Channel(0.4, "tensor"), stacked, (grid, [rows, Shard(2)]), True),
        (Block((4, 4), 0.4), weight, (line, [rows]), False),
        (Block((4, 2), 0.4), weight, (grid, [rows, columns]), False),
        (Block((8, 4), 0.4), weight, (line, [rows]), True),  # columns can be sharded instead
        (Block((8, 24), 0.4), weight, (line, [rows]), True),  # neither can
        (Block((2, 2), 0.4, "tensor"), stacked, (line, [rows]), False),
    ):
        part, layout = distribute_tensor(x, *plan), experts if x is stacked else None
        for p in (None, per_input) if x is weight else (None,):
            q = p if p is None else sharded_like(part, p.reshape(1, -1))
            wanted = project(x, pattern, p, layout=layout)
            with CommDebugMode() as calls:
                got = project(part, pattern, q, layout=layout)
            # Over gloo, torch gathers in the place of an exchange of all with all.
            gathers = any("gather" in str(call) for call in calls.get_comm_counts())
            same = torch.equal(got.values.full_tensor(), wanted.values) and (
                got.support.placements == part.placements) and gathers == moved
            if rank == 0:
                print("pattern", "agrees" if same else f"differs {pattern} {plan} {gathers}")
    moved, reduced = [0], dist.all_reduce
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast"):
        def count(tensor, *args, _call=getattr(dist, name), **kwargs):
            for t in [tensor] if torch.is_tensor(tensor) else tensor:
                moved[0] += t.numel() * t.element_size()
            if rank == 0:
                print("all_reduce" if _call is reduced else "another")
            return _call(tensor, *args, **kwargs)
        setattr(dist, name, count)
    for n in (2**10, 2**14):
        x = distribute_tensor(torch.randn(n), line, [Shard(0)])
        moved[0] = 0
        with CommDebugMode() as calls:
            project(x, 0.9)
        if rank == 0:
            print("bytes", moved[0])
            print("calls", sorted(str(name) for name in calls.get_comm_counts()))
    dist.destroy_process_group()


fork(4, work)
"""
