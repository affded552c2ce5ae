"""Lightning: automatic optimization for float32 and bf16, manual optimization otherwise.

    python examples/torch/lightning_module.py [--manual] [--precision bf16-mixed]

Automatic optimization passes a closure to the optimizer, and `SparseOptimizer` calls it
twice. With fp16 or accumulated batches, Lightning runs the closure itself, once, and
`SparseOptimizer` raises an error. Use manual optimization there and write the two passes.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from digits import accuracy, datasets, loader, network

import safe_core
from safe_core.adapters.torch import SparseOptimizer, perturbed, unwrap


class Digits(lightning.LightningModule):
    """Train a network with SAFE by automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> SparseOptimizer:
        method = safe_core.safe(0.9, rho=0.05, penalty=0.05)
        base = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return SparseOptimizer(base, method, model=self)

    def on_train_end(self) -> None:
        optimizer = unwrap(self.optimizers())
        optimizer.finalize()
        optimizer.check_sparsity()


class ManualDigits(Digits):
    """Train by manual optimization, with two accumulated batches per step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.waiting: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.waiting = []

    def training_step(self, batch: Any, index: int) -> None:
        self.waiting.append(batch)
        if len(self.waiting) < 2:
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in self.waiting:
            self.manual_backward(self.loss(part) / len(self.waiting))
        with perturbed(optimizer):
            for part in self.waiting:
                self.manual_backward(self.loss(part) / len(self.waiting))
        optimizer.step()
        self.waiting = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--manual", action="store_true")
    options = parser.parse_args()

    lightning.seed_everything(0)
    train, test = datasets()
    module = ManualDigits() if options.manual else Digits()
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(train))
    print(f"accuracy {accuracy(module.network, test):.1f}%")


if __name__ == "__main__":
    main()
