"""Choose the penalty: compare what several values do to the same run.

    python examples/torch/penalty.py [--base sgd] [--coupled] [--penalties 3 10 30]

Prints for each value its total pull, the accuracy before and after the projection, and the
relative distance ``|x - proj(x)| / |x|`` that the projection removes.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer, recalibrate

MOMENTUM = 0.9


def train(penalty: float, options: argparse.Namespace) -> str:
    """Train a network and describe the result."""
    torch.manual_seed(options.seed)
    train, test = datasets()
    batches, model = loader(train), network()
    base: torch.optim.Optimizer
    if options.base == "sgd":
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=MOMENTUM)
    else:
        base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    method = safe_core.safe(
        options.sparsity, rho=0.05, penalty=penalty, decoupled=not options.coupled
    )
    optimizer = SparseOptimizer(base, method, model=model)
    steps = options.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    rates = 0.0
    for _ in range(options.epochs):
        for x, y in batches:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            rates += optimizer.param_groups[0]["lr"]
            scheduler.step()
    before = accuracy(model, test)
    optimizer.finalize()
    recalibrate(model, batches)
    assert optimizer.finalized is not None
    return (
        f"penalty {penalty:g}, total {_total(penalty * rates, options)}: accuracy {before:.1f}% "
        f"before, {accuracy(model, test):.1f}% after, distance {optimizer.finalized.distance:.3f}"
    )


def _total(total: float, options: argparse.Namespace) -> str:
    """Return the sum of the penalty times the learning rate, as the weights receive it."""
    if options.coupled and options.base == "adamw":
        return "unknown"  # Adam divides the penalty by the size of the gradients
    # A coupled penalty passes through the momentum of SGD, which multiplies it.
    return f"{total / (1 - MOMENTUM) if options.coupled else total:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--coupled", action="store_true")
    parser.add_argument("--penalties", type=float, nargs="+", default=[1, 3, 10, 30, 100])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # The smallest penalties are meant to be too small.
    warnings.simplefilter("ignore", safe_core.FinalizeWarning)
    for penalty in options.penalties:
        print(train(penalty, options), flush=True)


if __name__ == "__main__":
    main()
