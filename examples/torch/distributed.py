"""Several processes: DDP, or FSDP2 with sharded parameters.

    torchrun --standalone --nproc-per-node 2 examples/torch/distributed.py [--shard]

DDP averages both gradients over the processes, so every process computes the same
perturbation. With ``--local-ascent``, each process perturbs along the gradient of its own
batch (m-sharpness), and the first backward pass needs no communication. Under FSDP2,
parameters, anchors and masks stay sharded; selection adds up counts over the processes.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from digits import datasets
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--shard", action="store_true", help="use FSDP2 instead of DDP")
    parser.add_argument("--local-ascent", action="store_true", help="m-sharpness; DDP only")
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    loss = train(options)  # frees the model before its process group
    if dist.get_rank() == 0:
        print(f"loss {loss:.3f}, exactly sparse")
    dist.barrier()
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> float:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).to(device)
    if options.shard:
        fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)
    dataset, _ = datasets()
    sampler = DistributedSampler(dataset, drop_last=True)
    batches = DataLoader(dataset, 32, sampler=sampler, drop_last=True)
    method = safe_core.safe(0.9, steps=options.epochs * len(batches))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)  # create it after wrapping the model

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            local = isinstance(model, DistributedDataParallel) and options.local_ascent
            with model.no_sync() if local else nullcontext():
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
            with optimizer.perturbed():
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.finalize()
    optimizer.check_sparsity()
    return loss.item()


if __name__ == "__main__":
    main()
