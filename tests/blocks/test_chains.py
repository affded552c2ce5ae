"""Refuse blocks that do not form a chain before anything is pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from safe_core.adapters.torch.blocks.pruning import plan_pruning, prune_blocks


class Layer(nn.Module):
    """A block that may take another width than it returns, or merge every two positions."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.linear, self.stride = nn.Linear(inputs, outputs), stride

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x)[:, :: self.stride]
        return found


class Stage(nn.Module):
    """Layers, after a reduction in every stage but the first."""

    def __init__(self, width: int, layers: int, *, reduces: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(width, width, 2, stride=2) if reduces else nn.Identity()
        self.layers = nn.ModuleList([Layer(width, width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


class Listed(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.others = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


INPUTS = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))


def staged() -> nn.Module:
    return Listed(*(Stage(4, 2, reduces=i > 0) for i in range(3)))


def refused(model: nn.Module, inputs: Any, **options: Any) -> str:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match="blocks must return hidden states of the shape and"
    ) as error:
        prune_blocks(model, inputs, "magnitude", 0.5, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        staged,
        lambda: Listed(Layer(4, 8), Layer(8, 8), Layer(8, 4)),  # one class, other widths
        lambda: Listed(Layer(4, 4), Layer(4, 8), Layer(8, 8)),
    ],
)
def test_blocks_of_one_class_that_change_the_shape_are_refused(make: Any) -> None:
    message = refused(make(), INPUTS)
    assert "in Listed; choose other blocks with blocks=, such as " in message
    assert message.endswith("others")


def test_a_message_without_other_lists_names_none() -> None:
    model = nn.Sequential(nn.Sequential(Layer(4, 8), Layer(8, 4)))
    assert refused(model, INPUTS, blocks="0").endswith("in Sequential")


def test_a_block_whose_attributes_change_the_shape_is_named() -> None:
    model = Listed(Layer(4, 4), Layer(4, 4, stride=2), Layer(4, 4))
    with pytest.raises(ValueError, match=r"blocks\.1 takes .*\(4, 8, 4\) and returns") as error:
        prune_blocks(model, INPUTS, "magnitude", 0.5, batch_size=4)
    assert str(error.value).endswith("; choose other blocks with blocks=, such as others")


def test_only_the_layers_of_the_chosen_stage_are_pruned() -> None:
    model = staged()
    prune_blocks(model, INPUTS, "magnitude", 0.5, blocks="blocks.1.layers")
    pruned = {name for name, p in model.named_parameters() if bool((p == 0).any())}
    assert pruned == {f"blocks.1.layers.{i}.linear.weight" for i in range(2)}


def test_blocks_of_one_class_with_different_inner_widths_are_pruned() -> None:
    def block(inner: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, inner), nn.Linear(inner, 4))

    report = prune_blocks(Listed(block(6), block(8)), INPUTS, "magnitude", 0.5)
    assert report.sparsity == 0.5


def test_stages_of_a_model_of_images_are_refused() -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 2, 1])
    model = transformers.ConvNextModel(config)
    images = {"pixel_values": torch.randn(6, 3, 32, 32)}
    message = refused(model, images)
    assert "in ConvNextModel" in message
    assert "encoder.stages.2.layers" in message
    plan = plan_pruning(model, images, "wanda", 0.5, blocks="encoder.stages.2.layers")
    assert len(plan.weights) == 4


def test_hidden_states_that_are_not_finite_are_named() -> None:
    model = Stage(4, 3, reduces=False)
    data = torch.randn(2, 4, 4)
    with torch.no_grad():
        model.layers[0].linear.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"got NaN in the inputs or outputs of layers\.0"):
        plan_pruning(model, data, "magnitude", 0.5)
