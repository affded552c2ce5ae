"""An operation without a shape function makes the prediction of memory run the block for real."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safe_core.adapters.transformers import prune_blocks


@torch.library.custom_op("safe_core_tests::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return odd(self.linear(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("error", [TypeError, RuntimeError, ValueError, None])
def test_no_traceback_of_torch_is_printed(
    error: type[Exception] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    def shape(x: torch.Tensor) -> torch.Tensor:
        if error is None:
            return torch.empty_like(x)
        raise error("no shape")

    odd.register_fake(shape)
    report = prune_blocks(Model(), torch.randn(8, 8), "wanda", 0.5)
    assert report.sparsity == 0.5
    found = capfd.readouterr()
    assert "Traceback" not in found.err + found.out
