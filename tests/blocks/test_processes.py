"""Several processes over gloo prune what one process prunes."""

from __future__ import annotations

import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import fork, output_of
from torch import Tensor, nn

from safe_core.adapters.torch.blocks import SafeReconstruction, plan_pruning, prune_blocks
from safe_core.adapters.torch.blocks.work_folder import WorkFolder

WIDTH = 8


class Block(nn.Module):
    """Two layers behind a norm, and experts that take the samples of one sign."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.stacked = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(self.norm(x))))
        positive = x[..., 0].mean(dim=1) > 0
        for e, chosen in enumerate((positive, ~positive)):
            places = chosen.nonzero()[:, 0]
            if len(places):  # without a sample, an expert has no gradient
                part = x[places]
                y = y.index_add(0, places, self.experts[e](part) + part @ self.stacked[e])
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


def mixtral() -> nn.Module:
    import transformers  # takes seconds, and only some processes need it

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    found = transformers.MixtralForCausalLM(config).double()
    found.set_experts_implementation("eager")  # others have no kernels in float64
    return found


def samples(count: int, *lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, lengths[i % len(lengths)], WIDTH) for i in range(count)]
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return [torch.randn(s, generator=generator, dtype=torch.float64) @ mixed / 3 for s in shapes]


def tokens(count: int) -> Tensor:
    return torch.randint(0, 31, (count, 6), generator=torch.Generator().manual_seed(2))


def trained(**changes: Any) -> SafeReconstruction:
    """SAFE+ for a few steps. ALPS amplifies rounding, so most tests start from SparseGPT."""
    return SafeReconstruction(
        **{"importance": "wanda", "epochs": 2, "batch_size": 3, "start": "sparsegpt"} | changes
    )


PUBLISHED = {"published": True, "start": None, "dual_update_interval": 2}
SEVEN = samples(7, 5)


def halves(weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Any) -> tuple[Tensor, Tensor]:
    """Keep the even inputs, by a support that repeats one row."""
    support = (torch.arange(weight.shape[1]) % 2 == 0).expand(weight.shape)
    return (weight * support).T.contiguous().T, support


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any], float]] = {
    # The model, the solver, the samples, the settings, and the largest difference of a weight.
    **{name: (blocks, name, SEVEN, {}, 1e-13) for name in ("magnitude", "wanda", "sparsegpt")},
    "views": (blocks, trained(start=halves), SEVEN, {}, 1e-12),
    "alps": (blocks, "alps", SEVEN, {}, 1e-6),
    "safe+": (blocks, trained(start="alps"), SEVEN, {}, 1e-6),
    "safe": (blocks, trained(importance=None), SEVEN, {}, 1e-12),
    "two passes": (blocks, trained(rho=1e-3), SEVEN, {}, 1e-12),
    # At the dense weights the loss is 0 and its gradient rounding, along which they perturb.
    "safe-published": (blocks, trained(importance=None, **PUBLISHED), SEVEN, {}, 2e-3),
    "safe+-published": (blocks, trained(**PUBLISHED), SEVEN, {}, 2e-3),
    "one sample": (blocks, trained(), samples(1, 5), {}, 1e-12),
    # Training increases the loss of the sample of the first process, but not of both.
    "one is worse": (
        blocks, trained(batch_size=2, learning_rate=0.04), samples(2, 5)[::-1], {}, 1e-10
    ),
    "lengths": (blocks, trained(), samples(9, 5, 2, 3), {"batch_size": 2}, 1e-12),
    "dense inputs": (blocks, trained(), SEVEN, {"propagate": "dense"}, 1e-12),
    "dense targets": (blocks, trained(), SEVEN, {"target_inputs": "dense"}, 1e-12),
    "experts by wanda": (mixtral, "wanda", tokens(5), {}, 1e-13),
    "experts by sparsegpt": (mixtral, "sparsegpt", tokens(5), {}, 1e-12),
    "experts by safe+": (mixtral, trained(), tokens(5), {}, 1e-11),
    "on disk": (blocks, "wanda", SEVEN, {"offload": "disk", "work_dir": "disk"}, 1e-13),
    "sharded": (blocks, trained(rho=1e-3, epochs=1), SEVEN, {"shard": True}, 1e-12),
    "sharded in groups": (
        blocks, trained(epochs=1), SEVEN, {"shard": True, "sparsity": "2:4"}, 1e-12
    ),
    "sharded start is kept": (
        blocks, trained(learning_rate=9.0), SEVEN, {"shard": True, "target_inputs": "dense"}, 1e-12
    ),
    "sharded experts": (mixtral, trained(epochs=1), tokens(5), {"shard": True}, 1e-11),
    "resumed": (blocks, trained(), SEVEN, {"work_dir": "interrupted"}, 1e-12),
}  # fmt: skip
FEWER = (
    "wanda", "alps", "safe+", "two passes", "safe-published", "one sample", "lengths", "sharded",
    "sharded in groups",
)  # fmt: skip
# The other cases run the same code.
REPEATED = (
    "magnitude", "sparsegpt", "safe", "two passes", "lengths", "dense targets", "safe+-published",
    "experts by wanda", "experts by sparsegpt", "sharded in groups", "sharded start is kept",
)  # fmt: skip
FAULTS = ("disk", "solver", "argument", "batches", "progress", "unshared")


def finished(world: int, *kinds: str) -> dict[str, str]:
    """Run processes, and return what the first printed about each kind."""
    printed = output_of(__file__, str(world), *kinds)
    return dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)


def test_two_processes_prune_what_one_prunes() -> None:
    kinds = [name for name in CASES if name not in REPEATED]
    assert finished(2, *kinds) == dict.fromkeys(kinds, "the same")


@pytest.mark.long  # test_memory_terms.py checks the prediction for one process
def test_two_processes_hold_a_share() -> None:
    assert finished(2, "memory") == {"memory": "as predicted"}


@pytest.mark.long  # the first test runs most of this code
@pytest.mark.parametrize(("processes", "kinds"), [(2, REPEATED), (4, FEWER)])
def test_more_processes_and_cases_prune_what_one_prunes(
    processes: int, kinds: tuple[str, ...]
) -> None:
    assert finished(processes, *kinds) == dict.fromkeys(kinds, "the same")


@pytest.mark.long
def test_an_error_in_one_process_ends_all() -> None:
    assert finished(3, *FAULTS) == {
        "disk": "no room | No block of blocks was pruned, all are dense",
        "solver": "process 2 of 3 failed: the solver fails in 2 | No block of blocks was pruned, "
        "all are dense",
        "argument": "process 1 of 3 failed: sparsity must be a fraction in [0, 1), such as 0.95, "
        "got 1.5: write 0.015 for 1.5 percent",
        "batches": "batches must be the same in all processes, got another in process 2 than in "
        "process 0; distributed=False prunes in each process alone",
        "progress": "no room | blocks.0 to blocks.0 are pruned and stay so; the rest is dense",
        "unshared": "solver must be one that sums over processes, which BlockSolver.distributed "
        "says, got Unshared() in 3 processes",
    }


# What follows runs in the processes.


def world() -> int:
    return dist.get_world_size()


def work(rank: int, size: int, store: str, kinds: list[str]) -> None:
    signal.alarm(600)  # so that processes that wait for each other end with the test
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    folder = Path(store).parent
    for kind in kinds:
        if kind == "memory":
            found = memory()
        else:
            found = fault(kind, rank, folder) if kind in FAULTS else compared(kind, rank, folder)
        if rank == 0:
            print(f"{kind}: {found}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def compared(kind: str, rank: int, folder: Path) -> str:
    """Prune together and alone, and say how the results differ."""
    make, solver, data, settings, largest = CASES[kind]
    pruned, told = make(), []
    settings = {"sparsity": 0.5, **settings}
    if "work_dir" in settings:
        settings = settings | {"work_dir": folder / settings["work_dir"]}
    if kind == "resumed":
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            prune_blocks(make(), data, solver, progress=interrupt, **settings)
        if rank == 0:
            shutil.copytree(settings["work_dir"], folder / "copy")
        dist.barrier()
    report = prune_blocks(pruned, data, solver, progress=told.append, **settings)
    if kind == "on disk":
        held = len(data) // world() + (rank < len(data) % world())
        assert report.predicted.disk == 2 * held * data[0].nbytes
    weights = [p.detach() for p in pruned.parameters()]
    firsts: list[Any] = [None] * world()
    dist.all_gather_object(firsts, (weights, report.blocks))
    assert all(map(torch.equal, weights, firsts[0][0]))
    assert bool(told) == (rank == 0)
    if rank > 0:
        return ""
    assert kind != "on disk" or not list(settings["work_dir"].glob("*.bin"))
    one = make()
    settings = {key: value for key, value in settings.items() if key not in ("work_dir", "offload")}
    if kind == "resumed":  # which one process can do, too
        prune_blocks(one, data, solver, distributed=False, **settings, work_dir=folder / "copy")
        torch.testing.assert_close(weights, list(one.parameters()), rtol=0, atol=largest)
        one = make()
    wanted = prune_blocks(one, data, solver, distributed=False, **settings)
    pairs = list(zip(weights, one.parameters(), strict=True))
    if not all(torch.equal(a == 0, b == 0) for a, b in pairs):
        return "other supports"
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    if difference > largest:
        return f"weights differ by {difference:.1g}"
    for a, b in zip(report.blocks, wanted.blocks, strict=True):
        assert a.weights == b.weights
        assert a.loss == pytest.approx(b.loss, rel=1e4 * largest)
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e4 * largest)
    assert report.dense == wanted.dense
    return "the same"


def memory() -> str:
    """Compare the prediction with the peak and, in training, with that of one process."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=128, intermediate_size=384, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    data = torch.randint(0, 31, (16, 64), generator=torch.Generator().manual_seed(3))
    solver, wrong = trained(epochs=1, batch_size=8), ""
    for how, shard in (("sparsegpt", False), (solver, False), (solver, True)):
        llama = transformers.LlamaForCausalLM(config)
        report = prune_blocks(llama, data, how, 0.5, measure_memory=True, shard=shard)
        if report.peak != pytest.approx(report.predicted.device, rel=0.2):
            wrong += f"{report.peak} instead of {report.predicted.device}, "
    alone = plan_pruning(llama, data, solver, 0.5, distributed=False).memory
    if report.predicted.device > 0.8 * alone.device:
        wrong += f"{report.predicted}, but {alone} in one process"
    return wrong or "as predicted"  # not earlier, since other processes would wait


def interrupt(progress: Any) -> None:
    if progress.block == 1:
        raise KeyboardInterrupt


def fault(kind: str, rank: int, folder: Path) -> str:
    """Return the error that ends the first process."""
    from safe_core.adapters.torch.blocks import BlockSolver

    class Unshared(BlockSolver):
        name = "unshared"

        def prune(self, problem: Any) -> Any:
            raise AssertionError

        def memory(self, size: Any, work: Any) -> int:
            return 0

        def __repr__(self) -> str:
            return "Unshared()"

    def failing(weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Any) -> Any:
        if rank == 2:
            raise ValueError("the solver fails in 2")
        return weight, weight == weight

    def full(*given: Any) -> None:
        raise OSError("no room")

    solver = {"solver": failing, "unshared": Unshared()}.get(kind, "wanda")
    pruned = blocks()
    arguments: dict[str, Any] = {
        "batches": SEVEN[:-1] if kind == "batches" and rank == 2 else SEVEN,
        "sparsity": 1.5 if kind == "argument" and rank == 1 else 0.5,
        "progress": full if kind == "progress" else None,
        "work_dir": folder / "full" if kind == "disk" else None,
    }
    with pytest.MonkeyPatch.context() as patch:
        if kind == "disk":
            patch.setattr(WorkFolder, "save", full)
        with pytest.raises((ValueError, OSError, RuntimeError)) as error:
            prune_blocks(pruned, solver=solver, **arguments)
    said = " | ".join([str(error.value), *getattr(error.value, "__notes__", [])])
    if kind in ("disk", "solver"):
        dense = all(map(torch.equal, pruned.parameters(), blocks().parameters()))
        everywhere: list[Any] = [None] * world()
        dist.all_gather_object(everywhere, dense)
        said += ", all are dense" if all(everywhere) else f", {everywhere} are dense"
    return said


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    size, *asked = sys.argv[1:]
    if any("experts" in kind for kind in asked):
        mixtral()  # imports Transformers once, before the fork
    fork(int(size), lambda rank, store: work(rank, int(size), store, asked))
