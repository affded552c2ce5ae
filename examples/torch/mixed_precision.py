"""Mixed precision: float32 parameters, 16-bit arithmetic, and a gradient scaler for fp16.

    python examples/torch/mixed_precision.py [--half]

A gradient scaler does not support closures, so the two passes are written out. The first
gradient needs no unscaling, because scaling the loss does not change e. The scaler unscales
once, before clipping. If the second gradient overflows, the scaler skips the step and the state
of the optimizer does not change.
"""

from __future__ import annotations

import argparse

import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--half", action="store_true", help="use fp16 with a scaler, not bf16")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if options.half else torch.bfloat16

    torch.manual_seed(0)
    train, test = datasets()
    batches, model = loader(train), network().to(device)
    loss_fn = torch.nn.CrossEntropyLoss()
    steps = options.epochs * len(batches)
    method = safe_core.safe(0.9, steps=steps)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SparseOptimizer(base, method, model=model)
    scaler = torch.amp.GradScaler(device, enabled=options.half)

    for _ in range(options.epochs):
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            with torch.autocast(device, dtype=dtype):
                loss = loss_fn(model(x), y)
            scaler.scale(loss).backward()
            with optimizer.perturbed():
                with torch.autocast(device, dtype=dtype):
                    loss = loss_fn(model(x), y)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # clips only the loss gradient
            scaler.step(optimizer)
            scaler.update()
    optimizer.finalize()
    optimizer.check_sparsity()
    print(f"{optimizer.steps} of {steps} steps taken, accuracy {accuracy(model, test):.1f}%")


if __name__ == "__main__":
    main()
