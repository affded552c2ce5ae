"""Prune a block of LLaMA-2-7B's shapes, and compare its peak of memory with the prediction."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from safe_core.adapters.torch.blocks import SafeReconstruction, plan_pruning

from .timing import Result, wait

__all__ = ["large_block"]

SPARSITY = 0.5
SOLVERS: dict[str, Any] = {
    "magnitude": "magnitude",
    "Wanda": "wanda",
    "SparseGPT": "sparsegpt",
    "ALPS": "alps",
    "SAFE+, an epoch": SafeReconstruction(importance="wanda", epochs=1),
}


def large_block(*, hidden: int, samples: int, length: int) -> list[Result]:
    """Prune one random block by each method, in bfloat16 on a GPU and in float32 elsewhere.

    A ratio of seconds is to the first method. A ratio of bytes is the measured peak to the
    prediction, which should lie between 0.8 and 1.2.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 512, (samples, length), generator=generator)
    case = f"a Llama block of width {hidden}, {samples} samples of {length} tokens"
    found = []
    for name, solver in SOLVERS.items():
        plan = plan_pruning(_model(hidden, length, device), tokens, solver, SPARSITY, device=device)
        start = time.perf_counter()
        report = plan.apply(measure_memory=True)
        wait(None)
        found.append((name, time.perf_counter() - start, report.peak, plan.memory.device))
    first = found[0][1]
    return [
        *(Result(case, name, taken, "s", taken / first) for name, taken, _, _ in found),
        *(
            Result(f"{case}: the peak against the prediction", name, peak / 1e9, "GB", peak / told)
            for name, _, peak, told in found
        ),
    ]


def _model(hidden: int, length: int, device: str) -> nn.Module:
    """Return a Llama of one random block, with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=1,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=length,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model
