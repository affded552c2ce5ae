"""ELSA in a plain loop over FSDP2: shard the model, then wrap the optimizer.

    torchrun --standalone --nproc-per-node 2 examples/torch/elsa_fsdp.py

Trains a small Llama from scratch, every layer sharded by itself. The gradient of the loss is
clipped before `optimizer.step()`, which adds the penalty. Weights, z and u stay sharded.
"""

from __future__ import annotations

import argparse
import itertools
import os

import torch
import torch.distributed as dist
from hugging_face import LENGTH, Source
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=32, help="at most 32, one epoch")
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    loss = train(options.steps)  # frees the model before its process group
    if dist.get_rank() == 0:
        print(f"loss {loss:.2f}, exactly sparse")
    dist.barrier()
    dist.destroy_process_group()


def train(steps: int) -> float:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    method = safe_core.elsa(0.5, penalty=1.0, dual_update_interval=4)
    base = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    # Create it after sharding the model. All linear layers but the head, as in the paper.
    optimizer = SparseOptimizer(base, method, model=model, where=lambda name, p: "proj" in name)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

    dataset = Source(512)
    batches = DataLoader(dataset, 8, sampler=DistributedSampler(dataset, shuffle=False))
    for batch in itertools.islice(batches, steps):
        rows = {name: tensor.to(device) for name, tensor in batch.items()}
        optimizer.zero_grad()
        loss = model(**rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.finalize()
    optimizer.check_sparsity()
    return loss.item()


if __name__ == "__main__":
    main()
