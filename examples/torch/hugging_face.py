"""Hugging Face Trainer: add a mixin and pass the optimizer.

The mixin evaluates the sparse network, so the best checkpoint is the best sparse one, and its
folder loads with `from_pretrained`.

    python examples/torch/hugging_face.py

Trains a small language model from scratch on the source of Python's standard library.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import safe_core
from safe_core.adapters.torch import SparseOptimizer, SparseTrainerMixin

LENGTH = 64


class Source(Dataset[dict[str, torch.Tensor]]):
    """Hold byte sequences from the source of Python's standard library."""

    def __init__(self, pieces: int) -> None:
        text = Path(argparse.__file__).read_bytes() + Path(tempfile.__file__).read_bytes()
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.pieces = pieces

    def __len__(self) -> int:
        return self.pieces

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * LENGTH % (len(self.bytes) - LENGTH)
        piece = self.bytes[start : start + LENGTH]
        return {"input_ids": piece, "labels": piece}


class SparseTrainer(SparseTrainerMixin, Trainer):
    """A `Trainer` that computes two gradients per step."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    method = safe_core.safe(0.5, rho=0.01, penalty=1e-3, dual_update_interval=8)
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = SparseOptimizer(base, method, model=model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 4),
            save_steps=max(1, options.steps // 4),
            save_total_limit=1,
            load_best_model_at_end=True,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = SparseTrainer(
            model=model,
            args=arguments,
            train_dataset=Source(512),
            eval_dataset=Source(32),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        )
        result = trainer.train()
        best = trainer.state.best_model_checkpoint
        assert best is not None
        loaded = GPT2LMHeadModel.from_pretrained(best)
    optimizer.check_sparsity()
    same = all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    print(f"the best of the saved networks is kept: {same}")
    print(f"{optimizer.steps} steps, loss {result.training_loss:.2f}, exactly sparse")


if __name__ == "__main__":
    main()
