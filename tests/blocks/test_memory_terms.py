"""The predicted memory holds what recording inputs and dual updates take."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from safe_core.adapters.torch.blocks.memory import BlockSize
from safe_core.adapters.torch.blocks.statistics import InputRecorder, block_weights
from safe_core.adapters.transformers import prune_blocks
from safe_core.reconstruction import Reconstruction

VOCABULARY = 64


def llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["wanda", "magnitude"])
def test_passes_are_counted(how: str, dtype: torch.dtype) -> None:
    ids = torch.randint(VOCABULARY, (8, 128))
    report = prune_blocks(llama(dtype), ids, how, 0.5, measure_memory=True, device="cpu")
    assert report.peak == pytest.approx(report.predicted.device, rel=0.1)


@pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
@pytest.mark.parametrize(
    "recipe",
    [
        Reconstruction(epochs=2, start="dense"),
        Reconstruction(epochs=2, start="wanda", importance="wanda"),
        Reconstruction(epochs=2, published=True, dual_update_interval=1),
    ],
)
def test_dual_updates_are_counted(recipe: Reconstruction) -> None:
    ids = torch.randint(VOCABULARY, (4, 8))  # few, so that the state is most of it
    model = llama(torch.float32)
    report = prune_blocks(model, ids, recipe, 0.5, measure_memory=True, device="cpu")
    assert report.peak == pytest.approx(report.predicted.device, rel=0.1)


def test_a_dual_update_without_perturbation_needs_one_more_array() -> None:
    layer = nn.Linear(64, 32, bias=False)
    weights = {"weight": None}
    size = BlockSize.of(layer, weights, ["weight"], torch.device("cpu"))
    entries = 64 * 32
    plain = size.reconstruction(0, perturbs=False)
    assert plain == entries * (4 * 4 + 5 + 5 + 4)  # x, g, m, v; z and mask; twice as much, x + u
    assert size.reconstruction(0, perturbs=True) == plain  # the copy is x + u, too
    busy = 10 * 4 * entries
    assert size.reconstruction(busy, perturbs=False) == entries * (4 * 4 + 5) + busy


def test_a_recorder_finds_weights_without_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = nn.Linear(4, 2, bias=False)
        recorder = InputRecorder(layer, block_weights(layer), "squares")
        (sums,) = recorder.begin()
        with recorder, torch.no_grad():
            layer(torch.ones(3, 4))
        assert sums.shape == (1, 4)
        assert int(recorder.statistics()["weight"].tokens.shape[0]) == 1
