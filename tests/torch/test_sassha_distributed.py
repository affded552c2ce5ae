"""Two processes over gloo train by Sassha what one process trains."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from processes import ENVIRONMENT, fork

STEPS = 5


def test_processes_train_what_one_trains() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )
    assert finished.returncode == 0, finished.stderr
    found = dict(line.split() for line in finished.stdout.splitlines() if " " in line)
    assert float(found["alone"]) < 1e-12
    assert float(found["accumulated"]) < 1e-12
    assert float(found["safe"]) < 1e-12
    # Each process on its own averages of curvature would be another run.
    assert float(found["apart"]) > 1e-4


def _work(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    groups = [dist.new_group([i]) for i in range(2)]
    for kind in ("alone", "accumulated", "safe", "apart"):
        model = DistributedDataParallel(_network())
        group = groups[rank] if kind == "apart" else None
        _train(model, kind, [slice(8 * rank + 4 * i, 8 * rank + 4 * i + 4) for i in (0, 1)], group)
        reference = _network()
        _train(reference, kind, [slice(0, 16)], groups[rank])
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        difference = max(float((a - b).abs().max()) for a, b in pairs)
        if rank == 0:
            print(kind, difference, flush=True)
    dist.destroy_process_group()


def _network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def _train(model: Any, kind: str, rows: list[slice], group: Any) -> None:
    import contextlib

    import torch

    import safe_core
    from safe_core.adapters.torch import Sassha, SparseOptimizer

    rho = 0.0 if kind == "safe" else 0.1
    optimizer: Any = Sassha(
        model.parameters(), lr=0.02, rho=rho, hessian_interval=2, process_group=group
    )
    if kind == "safe":
        method = safe_core.safe(0.5, rho=0.1, penalty=0.1, dual_update_interval=2)
        optimizer = SparseOptimizer(optimizer, method, model=model)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (5, 2))
    x = x * torch.linspace(0.2, 3, 16)[:, None]  # so that the halves differ in curvature
    parts = (
        rows if kind == "accumulated" or len(rows) == 1 else [slice(rows[0].start, rows[-1].stop)]
    )

    def backward() -> None:
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = torch.nn.functional.mse_loss(model(x[part]), y[part]) / len(parts)
                optimizer.backward(loss)

    for _ in range(STEPS):
        optimizer.zero_grad()
        backward()
        with optimizer.perturbed():
            backward()
        optimizer.step()


if __name__ == "__main__":
    fork(2, _work)
