"""A small regression that trainers train, batch by batch in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(48, 8, generator=generator), torch.randn(48, 4, generator=generator)
    )


def batches() -> DataLoader[Any]:
    return DataLoader(dataset(), 8)


class Regression(nn.Module):
    """The network with its loss, as Hugging Face asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, inputs: Any, targets: Any) -> dict[str, Any]:
        return {"loss": nn.functional.mse_loss(self.network(inputs), targets)}
