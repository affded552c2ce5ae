"""Resume: an interrupted run continues bit for bit.

    python examples/torch/resume.py checkpoint.pt

Saves a checkpoint after every epoch, and starts from it if it exists. The file holds
everything that the next step depends on: the model, the state of the random number generator,
and the optimizer with its base, anchors, masks and step count. On a GPU, also save
`torch.cuda.get_rng_state_all()`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = datasets()
    batches, model = loader(train), network(dropout=0.1)
    steps = options.epochs * len(batches)  # of the whole run, also when it resumes
    method = safe_core.safe(0.9, steps=steps, importance=safe_core.SquaredGradient(0.9))
    base = torch.optim.AdamW(model.parameters(), lr=2e-3)
    optimizer = SparseOptimizer(base, method, model=model)
    start = 0
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        start = saved["epoch"]
        print(f"resumed after epoch {start}", flush=True)

    for epoch in range(start, options.epochs):
        for x, y in batches:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "epoch": epoch + 1,
        }
        partial = options.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, options.checkpoint)  # replaces the file in one step, never half of it
        print(f"saved epoch {epoch + 1}", flush=True)
    optimizer.finalize()
    optimizer.check_sparsity()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    print(
        f"accuracy {accuracy(model, test):.1f}%, sum of weights {weights.double().sum().item()!r}"
    )


if __name__ == "__main__":
    main()
