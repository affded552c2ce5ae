"""Pruning of transformers block by block: families, SAFE, memory, faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import safe_core
from safe_core import Layout, Unstructured
from safe_core.adapters.transformers import (
    Progress,
    SafeReconstruction,
    calibration_batches,
    plan_pruning,
    prune_blocks,
)
from safe_core.adapters.transformers_memory import Activations, TensorBytes

VOCABULARY, WIDTH, LENGTH = 61, 16, 16
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = dict(num_key_value_heads=1, head_dim=8)


def configs() -> dict[str, Any]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**TEXT, **GROUPED),
        "mistral": t.MistralConfig(**TEXT, **GROUPED, sliding_window=4),
        "qwen3": t.Qwen3Config(**TEXT, **GROUPED),
        "gemma2": t.Gemma2Config(**TEXT, **GROUPED, sliding_window=4),
        "gemma3": t.Gemma3TextConfig(
            **TEXT, **GROUPED, layer_types=["sliding_attention", "full_attention"], sliding_window=4
        ),
        "phi": t.PhiConfig(**TEXT),
        "opt": t.OPTConfig(**TEXT, ffn_dim=32, word_embed_proj_dim=WIDTH),
        "gpt2": t.GPT2Config(**TEXT | {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_inner": 32}),
        "gpt_neox": t.GPTNeoXConfig(**TEXT),
        "bert": t.BertConfig(**TEXT),
        "mixtral": t.MixtralConfig(**TEXT, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "vit": t.ViTConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=2,
        ),
    }  # fmt: skip


CONFIGS = configs()
AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AUTO.get(family, transformers.AutoModelForCausalLM).from_config(CONFIGS[family])
    for p in model.parameters():  # so that no weight is symmetric or zero, biases included
        p.data = torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.05) + (p.ndim == 1)
    return model.to(dtype).eval()


def inputs_of(family: str, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return torch.randn(samples, 3, 8, 8, generator=generator)
    return torch.randint(3, VOCABULARY, (samples, LENGTH), generator=generator)


def wanda(weight: Tensor, gram: Tensor, sparsity: Any, *, layout: Layout | None = None) -> Any:
    return safe_core.project(weight, sparsity, importance=gram.diagonal(), layout=layout)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_pruned_exactly(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    report = prune_blocks(model, inputs_of(family), wanda, 0.5, batch_size=4)
    assert report.dense == ()
    assert len(report.blocks) == 2
    for block in report.blocks:
        assert len(block.weights) >= 4
        for name, weight in block.weights.items():
            p = model.get_parameter(f"{block.name}.{name}")
            assert weight.kept * 2 == weight.entries == p.numel()
            assert int((p == 0).sum()) == p.numel() // 2
            assert bool((p == dense[f"{block.name}.{name}"])[p != 0].all())
    pruned = {f"{block.name}.{name}" for block in report.blocks for name in block.weights}
    for name, p in model.state_dict().items():
        assert name in pruned or torch.equal(p, dense[name])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, p in model.state_dict().items():
        assert torch.equal(p, loaded.state_dict()[name])
