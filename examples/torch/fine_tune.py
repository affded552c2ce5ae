"""After training: finalize, recalibrate batch normalisation, fine-tune with a fixed mask.

    python examples/torch/fine_tune.py [--logs DIRECTORY]

Prints a report on the constraint after training. ``--logs`` also writes one per epoch to
TensorBoard, which no extra installs: ``pip install tensorboard``.
"""

from __future__ import annotations

import argparse

import rich
import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer, recalibrate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--logs", help="directory for TensorBoard")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = datasets()
    batches, model = loader(train), network()
    loss_fn = torch.nn.CrossEntropyLoss()
    steps = options.epochs * len(batches)
    method = safe_core.safe(0.95, steps=steps)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)
    writer = None
    if options.logs:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.logs)

    def epoch() -> None:
        for x, y in batches:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)

    for _ in range(options.epochs):
        epoch()
        if writer:
            optimizer.report().log(writer)
    rich.print(optimizer.report().table())
    optimizer.finalize(freeze=True)
    print(f"finalized: accuracy {accuracy(model, test):.1f}%")
    recalibrate(model, batches, samples=1000)
    print(f"recalibrated: accuracy {accuracy(model, test):.1f}%")
    for group in optimizer.param_groups:
        group["lr"] = 0.005
    for _ in range(max(1, options.epochs // 5)):
        epoch()
    optimizer.check_sparsity()
    print(f"fine-tuned: accuracy {accuracy(model, test):.1f}%")


if __name__ == "__main__":
    main()
