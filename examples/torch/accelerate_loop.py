"""Accelerate: `prepare` wraps the optimizer; `perturbed` and `unwrap` find it again.

accelerate launch examples/torch/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer, perturbed, unwrap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator()
    train, test = datasets()
    batches, model = accelerator.prepare(loader(train)), network()
    steps = options.epochs * len(batches)  # of each process
    method = safe_core.safe(0.9, steps=steps)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss_fn = torch.nn.CrossEntropyLoss()

    for _ in range(options.epochs):
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(model(x), y))
            with perturbed(optimizer):
                accelerator.backward(loss_fn(model(x), y))
            optimizer.step()
    unwrap(optimizer).finalize()
    unwrap(optimizer).check_sparsity()
    print(f"accuracy {accuracy(accelerator.unwrap_model(model), test):.1f}%")


if __name__ == "__main__":
    main()
