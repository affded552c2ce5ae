"""Sharded models are evaluated at the sparse weights, and train on from x, over two processes."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
from processes import fork, output_of

KINDS = ("fsdp", "tp")
_IMPORTED = (
    "safe_core.adapters.torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)


def test_a_sharded_model_shows_what_an_unsharded_one_does() -> None:
    printed = output_of(__file__).split()
    assert sorted(printed) == sorted(2 * [f"{kind}:same" for kind in KINDS])


def _work(rank: int, path: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for kind in KINDS:
        _compare(kind)
        os.write(1, f"{kind}:same\n".encode())
    dist.destroy_process_group()


def _compare(kind: str) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    import safe_core
    from safe_core.adapters.torch import SparseOptimizer

    mesh = init_device_mesh("cpu", (2,))
    alone, split = _network(), _network()
    if kind == "fsdp":
        fully_shard(split[0], mesh=mesh)
        fully_shard(split, mesh=mesh)
    else:
        parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    method = safe_core.safe(0.7, rho=0.05, penalty=0.1, dual_update_interval=2)
    runs = []
    for model in (split, alone):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        runs.append((model, SparseOptimizer(base, method, model=model)))
    blind = SparseOptimizer(
        torch.optim.SGD(split.parameters(), lr=0.1), method, where=lambda name, p: p.ndim == 2
    )
    _refused(blind)
    for _ in range(2):
        # Each forward pass leaves FSDP's root with gathered weights.
        found = [_looked(model, optimizer) for model, optimizer in runs]
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted)
        for model, optimizer in runs:
            _train(model, optimizer)
    for model, optimizer in runs:
        model(torch.ones(2, 12))
        optimizer.finalize()
        optimizer.check_sparsity()
    torch.testing.assert_close(*(model(torch.ones(2, 12)) for model, _ in runs))


def _network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))


def _looked(model: Any, optimizer: Any) -> list[Any]:
    """Outputs at x, at C(x) and at x again."""
    import torch

    inputs = torch.linspace(-1, 1, 24).reshape(2, 12)
    with torch.no_grad():
        before = model(inputs)
        with optimizer.sparse_weights():
            optimizer.check_sparsity()
            inside = model(inputs)
        after = model(inputs)
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)
    return [before, inside]


def _train(model: Any, optimizer: Any) -> None:
    import torch

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 96).reshape(8, 12)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def _refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="needs model= for sharded parameters"):
        optimizer.sparse_weights().__enter__()


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)  # once, before the processes part
    fork(2, _work)
