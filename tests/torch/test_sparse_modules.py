"""Layers that skip zeros compute the same, and are chosen by their times alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safe_core
from safe_core.adapters.torch import sparse_modules
from safe_core.adapters.torch.sparse_layers import SparseLinear, sparse_forms

X = torch.linspace(-1, 1, 6 * 64, dtype=torch.float64).sin().reshape(6, 64)


def pruned(layer: Any, sparsity: Any) -> Any:
    with torch.no_grad():
        layer.weight.copy_(safe_core.project(layer.weight, sparsity).values)
    return layer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        pruned(nn.Linear(64, 32), 0.9),
        nn.ReLU(),
        pruned(nn.Linear(32, 32, bias=False), safe_core.Block((8, 8), 0.75)),
        nn.Linear(32, 4),
    ).double()


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times of the forms in the place of measured ones; forms without one take 9 seconds."""
    known = {"dense": 3.0, "CSR": 1.0, "sparse": 2.0}

    def timed(
        candidates: Mapping[str, Callable[[], Any]], repeats: int, clock: Any = None
    ) -> dict[str, list[float]]:
        for run in candidates.values():
            run()
        return {name: [known.get(name, 9.0)] * repeats for name in candidates}

    monkeypatch.setattr("safe_core.adapters.torch.sparse_model.interleaved", timed)
    return known


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("form", ["CSR", "BSR 4x4", "BSR 8x8"])
@pytest.mark.parametrize("shape", [(6, 64), (1, 64), (64,), (2, 3, 64), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_computes_the_same(form: str, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = pruned(nn.Linear(64, 32, bias=bias).double(), safe_core.Block((8, 8), 0.75))
    x = torch.randn(shape, dtype=torch.float64)
    sparse = dict(sparse_forms(layer))[form]()
    found = sparse(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, layer(x))
    assert sparse.weight.crow_indices().dtype == torch.int32
    for name, value in layer.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], value)


def test_square_blocks_are_tried_only_where_they_fit() -> None:
    layer = pruned(nn.Linear(64, 32), safe_core.Block((8, 8), 0.75))
    assert [name for name, _ in sparse_forms(layer)] == ["CSR", "BSR 4x4", "BSR 8x8"]
    assert [name for name, _ in sparse_forms(pruned(nn.Linear(64, 32), 0.8))] == ["CSR"]
    assert [name for name, _ in sparse_forms(nn.Linear(63, 30))] == ["CSR"]


@pytest.mark.filterwarnings("error")
def test_the_fastest_form_replaces_a_layer(seconds: dict[str, float]) -> None:
    seconds["BSR 8x8"] = 0.5
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = sparse_modules(model, X)
    assert found.replaced == {"0": "CSR", "2": "BSR 8x8"}
    assert found.seconds == {"dense": 3.0, "sparse": 2.0}
    assert isinstance(found.model[2], SparseLinear)
    torch.testing.assert_close(found.model(X), model(X))
    # The model that was given is as before, and shares what stays dense.
    assert type(model[0]) is nn.Linear
    assert model.training
    assert found.model[3].weight is model[3].weight
    state = found.model.state_dict()
    assert list(state) == list(before)
    for name, value in before.items():
        assert torch.equal(state[name], value)
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(RuntimeError, match="0 must be loaded as a dense layer"):
        found.model.load_state_dict(before)
    lines = str(found).splitlines()
    assert " ".join(lines[1].split()) == "0 32 x 64 90.0% 6 3000 ms CSR 1000 ms CSR"
    assert lines[2].endswith("BSR 8x8")
    assert lines[3] == "whole model: 3000 ms dense, 2000 ms sparse, 1.50 times faster"


def test_what_is_not_faster_stays_dense(seconds: dict[str, float]) -> None:
    model = network()
    seconds["CSR"] = 2.8
    found = sparse_modules(model, X)
    assert found.model is model
    assert [layer.reason for layer in found.layers] == ["no form is a tenth faster"] * 2
    assert "unchanged, because no layer gets faster" in str(found)
    seconds.update({"CSR": 1.0, "sparse": 2.8})
    found = sparse_modules(model, X)
    assert found.model is model
    assert found.replaced == {}
    assert [layer.reason for layer in found.layers] == ["the whole model is not a tenth faster"] * 2
    assert "2800 ms sparse, 1.07 times as fast, so it stays as it is" in str(found)
    seconds["sparse"] = 6.0
    assert "0.50 times as fast, so it stays" in str(sparse_modules(model, X))


class Mixed(nn.Module):
    """Layers of every kind, of which one is never called and one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv1d(8, 8, 1)
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.unused = nn.Linear(8, 8)
        self.few = nn.Linear(8, 8)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.tied = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        return self.head(self.computed(self.few(self.again(self.twice(self.conv(x.mT).mT)))))


def test_every_other_layer_has_a_reason(seconds: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = Mixed()
    for name, layer in (("conv", model.conv), ("twice", model.twice), ("unused", model.unused),
                        ("few", model.few), ("out", model.attention.out_proj)):  # fmt: skip
        pruned(layer, 0.3 if name == "few" else 0.75)
    with torch.no_grad():
        model.attention.in_proj_weight[::2] = 0
        model.computed.parametrizations.weight.original0[::2] = 0
        model.head.weight[1:] = 0
    found = sparse_modules(model, torch.randn(4, 3, 8))
    assert {layer.name: layer.reason for layer in found.layers} == {
        "attention.in_proj_weight": "MultiheadAttention has no sparse kernel",
        "attention.out_proj": "NonDynamicallyQuantizableLinear has no sparse kernel",
        "conv": "Conv1d has no sparse kernel",
        "twice": "",
        "unused": "the model does not call it",
        "few": "fewer than half of the entries are zero",
        "head": "",
        "computed.weight": "the layer computes its weight, which torch.nn.utils.parametrize."
        'remove_parametrizations(layer, "weight") ends',
    }
    assert found.replaced == {"twice": "CSR", "head": "CSR"}
    assert found.model.tied.weight is model.tied.weight
    (twice,) = (layer for layer in found.layers if layer.name == "twice")
    assert (twice.rows, twice.seconds["dense"]) == (2 * 12, 2 * 3.0)
    assert found.model.again is found.model.twice
    assert isinstance(found.model.again, SparseLinear)


def test_an_encoder_layer_keeps_its_fast_path(seconds: dict[str, float]) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    pruned(layer.linear1, 0.9)
    found = sparse_modules(layer, torch.randn(2, 3, 16))
    assert [x.reason for x in found.layers] == ["attention reads the weight itself"]


def test_a_dtype_without_kernels_is_named(seconds: dict[str, float]) -> None:
    found = sparse_modules(network().bfloat16(), X.bfloat16())
    reason = "CPU kernels take float32 and float64; pass model.float()"
    assert [layer.reason for layer in found.layers] == [reason] * 2


def test_missing_zeros_are_told() -> None:
    model = nn.Sequential(nn.Linear(64, 8).double())
    assert str(sparse_modules(model, X)) == (
        "the model has no zeros; was optimizer.finalize() called?"
    )
    pruned(model[0], 0.3)
    *_, last = str(sparse_modules(model, X)).splitlines()
    assert last == "no layer has enough zeros to skip; was optimizer.finalize() called?"


def test_outputs_that_differ_are_refused(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseLinear, "forward", lambda self, input: nn.functional.linear(
        input, 2 * self.weight.to_dense(), self.bias))  # fmt: skip
    with pytest.raises(ValueError, match="model must compute the same with sparse layers"):
        sparse_modules(network(), X)


def test_a_model_may_be_a_layer(seconds: dict[str, float]) -> None:
    layer = pruned(nn.Linear(64, 32), 0.9).double()
    found = sparse_modules(layer, {"input": X})
    assert isinstance(found.model, SparseLinear)
    torch.testing.assert_close(found.model(X), layer(X))


def test_times_are_measured() -> None:
    found = sparse_modules(network(), X, repeats=2)
    assert all(0 < taken < 1 for layer in found.layers for taken in layer.seconds.values())
    assert {"dense", "CSR"} <= found.layers[0].seconds.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 needs a GPU")
def test_two_of_four_on_a_gpu(seconds: dict[str, float]) -> None:
    layer = pruned(nn.Linear(128, 128), "2:4").half().cuda()
    seconds["2:4"] = 1.0
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    found = sparse_modules(nn.Sequential(layer), x)
    assert found.replaced == {"0": "2:4"}
    torch.testing.assert_close(found.model(x), layer(x))
    assert torch.equal(found.model.state_dict()["0.weight"], layer.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, X), "model must be a torch.nn.Module"),
        ((nn.Linear(2, 2), 3), "example_inputs must be a tensor"),
    ],
)
def test_a_bad_argument_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sparse_modules(*arguments)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        sparse_modules(network(), X, repeats=0)
    with pytest.raises(
        ValueError, match=r"example_inputs must be .* got shape \(6, 63\) float64: "
    ):
        sparse_modules(network(), X[:, 1:])
