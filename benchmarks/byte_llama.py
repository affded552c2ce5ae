"""Train a small Llama over bytes on the source of Python's standard library.

python -m benchmarks.byte_llama --out MODEL_DIR
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import source

__all__ = ["byte_tokenizer", "train"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of the text in UTF-8."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    # Bytes that are printable stand for themselves, and the others, in order, for what follows.
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    vocabulary = {chr(b) if chr(b) in alphabet else next(others): b for b in range(256)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def train(
    out: Path, *, hidden: int, layers: int, steps: int, batch: int, length: int, seed: int
) -> float:
    """Train and save a model folder with a tokenizer; return the mean loss of the last 50 steps.

    Uses AdamW with a cosine schedule from 2e-3 after a warm-up, in bfloat16 on a GPU.
    """
    torch.manual_seed(seed)
    byte_tokenizer().save_pretrained(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=max(2048, length),
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {device}")
    tokens = source(held_out=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    total = torch.zeros((), device=device)
    for step in track(range(steps), "training"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = _loss(model, tokens, batch, length)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.detach() * (step >= steps - 50)
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f}", flush=True)
            model.save_pretrained(out)
    model.save_pretrained(out)
    return float(total) / min(steps, 50)


def _loss(model: nn.Module, tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    starts = torch.randint(len(tokens) - length, (batch,), device=tokens.device)
    rows = tokens[starts[:, None] + torch.arange(length, device=tokens.device)]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        return model(input_ids=rows, labels=rows).loss


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.byte_llama", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"loss {train(**vars(options)):.4f}")


if __name__ == "__main__":
    main()
