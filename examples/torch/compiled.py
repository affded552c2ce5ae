"""torch.compile: compile the model and the optimizer step.

    python examples/torch/compiled.py

The learning rate is a tensor. A Python number would be a constant of the program, so every
change by the scheduler would compile the step again.
"""

from __future__ import annotations

import argparse

import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    train, test = datasets()
    batches, model = loader(train), network().to(device)
    steps = options.epochs * len(batches)
    method = safe_core.safe(0.9, steps=steps)
    rate = torch.tensor(0.05, device=device)
    base = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model, compile=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    compiled = torch.compile(model)

    for _ in range(options.epochs):
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(compiled(x), y).backward()
            with optimizer.perturbed():
                torch.nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
            scheduler.step()
    optimizer.finalize()
    optimizer.check_sparsity()
    print(f"accuracy {accuracy(model, test):.1f}%")


if __name__ == "__main__":
    main()
