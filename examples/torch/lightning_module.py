"""Lightning: a callback validates and keeps the sparse network.

    python examples/torch/lightning_module.py [--manual] [--precision bf16-mixed]

Works by automatic optimization in float32 and bf16, by manual optimization otherwise.
Automatic optimization passes a closure to the optimizer, and `SparseOptimizer` calls it
twice. With fp16 or accumulated batches, Lightning runs the closure itself, once, and
`SparseOptimizer` raises an error. Use manual optimization there and write the two passes. The
best checkpoint holds the sparse network, and `trainer.fit(..., ckpt_path=...)` resumes from it.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import lightning
import torch
from digits import accuracy, datasets, loader, network
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, random_split

import safe_core
from safe_core.adapters.torch import SparseCallbackMixin, SparseOptimizer, perturbed


class SparseCallback(SparseCallbackMixin, lightning.Callback):
    """Show the sparse network to validation and to checkpoints; finalize at the end."""


class Digits(lightning.LightningModule):
    """Train a network with SAFE by automatic optimization."""

    accumulated = 1

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation_loss", self.loss(batch))

    def configure_optimizers(self) -> SparseOptimizer:
        # Of the whole run; by manual optimization, the trainer counts batches.
        steps = int(self.trainer.estimated_stepping_batches) // self.accumulated
        method = safe_core.safe(0.9, steps=steps)
        base = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return SparseOptimizer(base, method, model=self)


class ManualDigits(Digits):
    """Train by manual optimization, with two accumulated batches per step."""

    accumulated = 2

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.waiting: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.waiting = []

    def training_step(self, batch: Any, index: int) -> None:
        self.waiting.append(batch)
        if len(self.waiting) < self.accumulated:
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
    training, validation = random_split(train, [1000, 257])
    module = ManualDigits() if options.manual else Digits()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="validation_loss")
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            precision=options.precision,
            callbacks=[SparseCallback(), best],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(training), DataLoader(validation, 64))
        kept = type(module).load_from_checkpoint(best.best_model_path)
    zeros = sum(int((p == 0).sum()) for p in kept.parameters())
    print(f"the best checkpoint has {zeros} zeros, accuracy {accuracy(kept.network, test):.1f}%")
    print(f"accuracy {accuracy(module.network, test):.1f}%")


if __name__ == "__main__":
    main()
