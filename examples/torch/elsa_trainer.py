"""ELSA with the Trainer of Hugging Face: pass the optimizer, change nothing else.

ELSA takes one gradient per step, so any trainer works. `max_grad_norm` clips the gradient of the
loss before `optimizer.step()`, which then adds the penalty, as ELSA wants.

    python examples/torch/elsa_trainer.py [--folder CHECKPOINTS] [--resume CHECKPOINT]

Trains a small Llama from scratch on the source of Python's standard library. A checkpoint of the
Trainer holds z and u in its `optimizer.pt`, so a resumed run ends with the same bits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from hugging_face import LENGTH, Source
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--resume", help="folder of a checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(options, options.folder or Path(folder))


def train(options: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)  # in practice, from_pretrained(..., dtype=torch.float32)
    method = safe_core.elsa(0.5, penalty=1.0, dual_update_interval=4)
    base = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    # All linear layers but the head, as in the paper.
    optimizer = SparseOptimizer(base, method, model=model, where=lambda name, p: "proj" in name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        per_device_train_batch_size=8,
        save_steps=max(1, options.steps // 2),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    # Without a scheduler, the Trainer makes the one that its arguments name.
    optimizers = (optimizer, None)
    trainer = Trainer(model, arguments, train_dataset=Source(512), optimizers=optimizers)
    result = trainer.train(resume_from_checkpoint=options.resume)
    optimizer.finalize()
    optimizer.check_sparsity()
    trainer.save_model()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    print(f"{optimizer.steps} steps, loss {result.training_loss:.2f}, exactly sparse")
    print(f"sum of weights {weights.double().sum().item()!r}")


if __name__ == "__main__":
    main()
