"""Data and network of the examples: scikit-learn's digits and a small convolutional network."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

SPLIT = 1257


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test set: images of 8 by 8 in one channel, and labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    return TensorDataset(x[:SPLIT], y[:SPLIT]), TensorDataset(x[SPLIT:], y[SPLIT:])


def loader(
    dataset: Dataset[tuple[Tensor, ...]], batch_size: int = 64
) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of shuffled batches of equal size."""
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True)


def network(dropout: float = 0.0) -> nn.Sequential:
    """Return two convolutions with batch normalisation, followed by two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Return the accuracy in percent."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    x, y = (t.to(device) for t in dataset.tensors)
    right = (model(x).argmax(dim=1) == y).float().mean()
    model.train(was_training)
    return 100 * float(right)
