"""Gradient accumulation: the second pass replays the micro-batches of the first.

    python examples/torch/accumulation.py

Both gradients are those of the whole batch. `RandomState` replays the random numbers of the
first pass in the second, so each micro-batch gets the same dropout mask in both.
"""

from __future__ import annotations

import argparse

import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import RandomState, SparseOptimizer

MICRO = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = datasets()
    batches, model = loader(train, 128), network(dropout=0.2)
    loss_fn = torch.nn.CrossEntropyLoss()
    steps = options.epochs * len(batches)
    method = safe_core.safe(0.9, steps=steps)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)

    def accumulate(micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for x, y in micro_batches:
            (loss_fn(model(x), y) / len(micro_batches)).backward()

    for _ in range(options.epochs):
        for x, y in batches:
            micro_batches = list(zip(x.chunk(MICRO), y.chunk(MICRO), strict=True))
            optimizer.zero_grad()
            random = RandomState.record()
            accumulate(micro_batches)
            with optimizer.perturbed(replay=random):
                accumulate(micro_batches)
            optimizer.step()
    optimizer.finalize()
    optimizer.check_sparsity()
    print(f"accuracy {accuracy(model, test):.1f}%")


if __name__ == "__main__":
    main()
