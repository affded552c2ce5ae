"""Make a trained dense model sparse: train on under the constraint, then save it.

    python examples/torch/from_dense.py [--sparsity 0.95] [--epochs 20]

Compares the result with projecting the dense model at once, both with recomputed batch
statistics. Prints the accuracy of the sparse network during training too.
"""

from __future__ import annotations

import argparse
import copy

import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer, recalibrate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = datasets()
    batches, model = loader(train), network()
    loss_fn = torch.nn.CrossEntropyLoss()

    # The dense model: in practice you load it.
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        for x, y in batches:
            base.zero_grad()
            loss_fn(model(x), y).backward()
            base.step()
    print(f"dense: accuracy {accuracy(model, test):.1f}%")

    at_once = copy.deepcopy(model)
    base = torch.optim.SGD(at_once.parameters(), lr=0.0)
    SparseOptimizer(base, safe_core.magnitude(options.sparsity), model=at_once).finalize()
    recalibrate(at_once, batches)
    print(f"projected at once: accuracy {accuracy(at_once, test):.1f}%")

    steps = options.epochs * len(batches)
    base = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    method = safe_core.safe(options.sparsity, steps=steps)
    optimizer = SparseOptimizer(base, method, model=model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for epoch in range(1, options.epochs + 1):
        for x, y in batches:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            scheduler.step()
        if epoch % 5 == 0:
            with optimizer.sparse_weights():
                print(f"epoch {epoch}: sparse accuracy {accuracy(model, test):.1f}%")
    optimizer.finalize()
    recalibrate(model, batches)
    optimizer.check_sparsity()
    print(f"trained on: accuracy {accuracy(model, test):.1f}%")


if __name__ == "__main__":
    main()
