"""Several processes over gloo train what one process trains."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from processes import fork, output_of

TOLERANCE = 1e-6
_IMPORTED = (
    "safe_core.adapters.torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
)
STEPS = 8
KINDS = {
    2: (
        "ddp", "ddp-reuse", "fsdp", "fsdp-reuse", "fsdp-untuned", "tp", "local", "fsdp-packed",
        "tp-packed", "fsdp-float8", "fsdp-channels", "tp-channels", "ddp-elsa", "fsdp-elsa",
    ),
    4: ("ddp", "fsdp", "mixed", "mixed-untuned", "mixed-packed", "tp-fsdp", "tp-fsdp-channels"),
}  # fmt: skip


# "tp", "fsdp-packed", "mixed-packed" and "tp-channels", among others, run the same code.
REPEATED = {
    2: ("tp-packed", "fsdp-channels"),
    4: ("ddp", "fsdp", "mixed", "mixed-untuned", "tp-fsdp-channels"),
}


@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        *(
            (world, [kind for kind in KINDS[world] if kind not in REPEATED[world]])
            for world in KINDS
        ),
        *(pytest.param(*case, marks=pytest.mark.long) for case in REPEATED.items()),
    ],
    ids=["two", "four", "two, other kinds", "four, other kinds"],
)
def test_processes_train_what_one_trains(world: int, kinds: Sequence[str]) -> None:
    printed = output_of(__file__, str(world), *kinds)
    print(printed)
    found = [line.split() for line in printed.splitlines() if line.startswith("largest")]
    assert [kind for _, kind, *_ in found] == list(kinds)
    for _, kind, difference, supports, gathered, reported in found:
        assert float(difference) < TOLERANCE, printed
        assert supports == "same", printed
        assert gathered == "none", (kind, printed)
        assert float(reported) < 1e-5, (kind, printed)
    assert printed.count("flat parameters refused") == 1


def _work(rank: int, world: int, kinds: list[str], path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for kind in kinds:
        line = _compare(kind, mesh, rank, world)
        if rank == 0:
            print(line, flush=True)
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        cpu = torch.device("cpu")
        _optimizer(FullyShardedDataParallel(_network(), device_id=cpu), "ddp")
    except ValueError as error:
        if rank == 0 and "must be sharded by torch.distributed.fsdp.fully_shard" in str(error):
            print("flat parameters refused")
    dist.destroy_process_group()


def _compare(kind: str, mesh: Any, rank: int, world: int) -> str:
    """Train in one of the ways, and alone; say how far apart the results are."""
    import torch
    from torch.distributed.tensor.debug import CommDebugMode

    rows = slice(rank * 32 // world, (rank + 1) * 32 // world)
    wrapped = kind
    for suffix in ("-channels", "-packed", "-float8", "-elsa"):
        wrapped = wrapped.removesuffix(suffix)
    model = _wrap(wrapped, _network(), mesh)
    optimizer = _optimizer(model, kind)
    if kind.endswith("reuse"):
        _train_by_closure(model, optimizer, rows)
    else:
        if wrapped == "tp-fsdp":  # the pairs of tensor parallelism see the same rows
            rows = slice(rank // 2 * 16, (rank // 2 + 1) * 16)
        seen = slice(None) if wrapped == "tp" else rows
        _train(model, optimizer, seen, local=kind == "local")
    alone = _network()
    reference = _optimizer(alone, kind)
    if kind == "local":
        _train_locally(alone, reference, world)
    elif kind.endswith("reuse"):
        _train_by_closure(alone, reference, slice(None))
    else:
        _train(alone, reference, slice(None))
    split, wanted = optimizer.split(), reference.split()
    pairs = zip(split.support, wanted.support, strict=True)
    supports = all(torch.equal(_whole(a), b) for a, b in pairs)
    reported = _relative(optimizer.report(), reference.report())
    _check_refusals(optimizer, reference)
    with CommDebugMode() as calls:
        optimizer.finalize()
    gathers = [str(name) for name in calls.get_comm_counts() if "reduce" not in str(name)]
    reference.finalize()
    reported = max(reported, _relative(optimizer.finalized, reference.finalized))
    optimizer.check_sparsity()
    difference = max(
        float((_whole(p.detach()) - q).abs().max())
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )
    same = "same" if supports else "other"
    return f"largest {kind} {difference:.3g} {same} {'+'.join(gathers) or 'none'} {reported:.3g}"


def _relative(found: Any, wanted: Any) -> float:
    """Return the largest relative difference between the figures of two runs."""
    pairs = zip(found.tensors, wanted.tensors, strict=True)
    return max(
        abs(x - y) / max(abs(y), 1e-3) for a, b in pairs for x, y in zip(a[1:], b[1:], strict=True)
    )


def _check_refusals(optimizer: Any, reference: Any) -> None:
    """Every process must raise what one process alone does."""
    messages = []
    for each in (optimizer, reference):
        try:
            each.check_sparsity()
        except ValueError as error:
            messages.append(str(error).replace("module.", ""))
    assert len(messages) == 2, messages
    assert messages[0] == messages[1], messages


def _network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4)
    )


def _wrap(kind: str, model: Any, mesh: Any) -> Any:
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    if kind in ("ddp", "ddp-reuse", "local"):
        # The views are gradients that the reducer writes to in place.
        views = kind == "ddp-reuse"
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    if kind == "tp":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(model, mesh, plan)
    if kind.startswith("fsdp"):
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if kind == "fsdp-reuse":  # which keeps what was gathered, unless told to let go
            model.set_reshard_after_backward(False)
        return model
    if kind == "tp-fsdp":  # two axes of the mesh cut one axis of a weight
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return fully_shard(parallelize_module(model, grid["tp"], plan), mesh=grid["fsdp"])
    # Sharded over pairs, replicated between them.
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))


def _optimizer(model: Any, kind: str) -> Any:
    import torch

    import safe_core
    from safe_core.adapters.torch import SparseOptimizer

    method = safe_core.safe(
        0.7,
        **(
            {"steps": 4 * STEPS}
            if kind.endswith("untuned")
            else {"rho": 0.05, "penalty": 0.1, "dual_update_interval": 3}
        ),
        importance=None if kind == "tp-fsdp" else safe_core.SquaredGradient(0.9),
        **({"perturbation_interval": 2, "reuse": 0.5} if kind.endswith("reuse") else {}),
    )
    stored: dict[str, dict[str, Any]] = {
        "packed": {"packed_support": True},
        "float8": {"state_dtype": "float8_e4m3fn"},
    }
    changed = stored.get(kind.rpartition("-")[2], {})
    method = replace(method, constraint=replace(method.constraint, **changed))
    if kind.endswith("channels"):
        first = safe_core.ChannelSAM(0.05, adaptive=True, scope="tensor")
        second = safe_core.ChannelSAM(0.05)
        by_channel = safe_core.Staged(first, second, STEPS // 2)
        method = safe_core.Method(0.7, safe_core.ADMM(0.1, 3), perturbation=by_channel)
    if kind.endswith("elsa"):  # its score is the second moment of the base, which is sharded too
        method = safe_core.elsa(0.7, penalty=0.1, dual_update_interval=3)
    base, given = torch.optim.Adam(model.parameters(), lr=0.01), None
    if kind == "tp-fsdp":
        generator = torch.Generator().manual_seed(2)
        shapes = {"0.weight": (12,), "2.weight": (20, 20), "4.weight": (4, 1)}
        given = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return SparseOptimizer(base, method, model=model, importance=given)


def _loss(model: Any, rows: slice) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 12, generator=generator), torch.randn(32, 4, generator=generator)
    return torch.nn.functional.mse_loss(model(x[rows]), y[rows])


def _train(model: Any, optimizer: Any, rows: slice, *, local: bool = False) -> None:
    import contextlib

    for _ in range(STEPS):
        optimizer.zero_grad()
        with model.no_sync() if local else contextlib.nullcontext():
            _loss(model, rows).backward()
        if optimizer.method.plan().perturbs:
            with optimizer.perturbed():
                _loss(model, rows).backward()
        optimizer.step()


def _train_by_closure(model: Any, optimizer: Any, rows: slice) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = _loss(model, rows)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)


def _train_locally(model: Any, optimizer: Any, world: int) -> None:
    """m-sharpness in one process: a perturbation for every part of the batch."""
    for _ in range(STEPS):
        sums: list[Any] = []
        for i in range(world):
            rows = slice(i * 32 // world, (i + 1) * 32 // world)
            optimizer.zero_grad()
            _loss(model, rows).backward()
            with optimizer.perturbed():
                _loss(model, rows).backward()
            gradients = [p.grad / world for p in model.parameters()]
            sums = gradients if not sums else [a + b for a, b in zip(sums, gradients, strict=True)]
        for p, gradient in zip(model.parameters(), sums, strict=True):
            p.grad = gradient
        optimizer.step()


def _whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def main() -> None:
    """Fork the processes; exit with the worst of their codes."""
    warnings.filterwarnings("ignore")
    for name in _IMPORTED:
        importlib.import_module(name)  # once, before the processes part

    world, kinds = int(sys.argv[1]), sys.argv[2:]
    fork(world, lambda rank, store: _work(rank, world, kinds, store))


if __name__ == "__main__":
    main()
