"""A model that is saved for LiteRT computes the same there, or nothing is written."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from litert_files import operators, run, scales_of_compressed, types
from torch import Tensor, nn
from torch.nn import functional

import safe_core
from safe_core.adapters.torch import save_litert
from safe_core.litert import UnsupportedError, candidates, flatbuffer
from safe_core.litert.flatbuffer import File

IMAGES = torch.linspace(-2, 2, 4 * 3 * 12 * 12).sin().reshape(4, 3, 12, 12)
VECTORS = torch.linspace(-3, 3, 4 * 32).sin().reshape(4, 32) * 3


class Residual(nn.Module):
    """A residual block with batch norm and activations in place."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential(
            nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class Many(nn.Module):
    """Several functions of one input."""

    def __init__(self, *parts: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.parts = parts
        self.modules_ = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))

    def forward(self, x: Tensor) -> list[Any]:
        return [part(x) for part in self.parts]


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Residual(8, 16, 1),
        Residual(16, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def perceptron(pattern: Any = None, width: int = 64) -> nn.Sequential:
    """Three layers, of which a pattern makes the first two sparse.

    The outputs of each layer differ in size, so that a wrong scale would show.
    """
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
    )
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(torch.linspace(0.3, 3, len(layer.weight))[:, None])
    if pattern is not None:
        with torch.no_grad():
            for layer in (layers[0], layers[2]):
                layer.weight.copy_(safe_core.project(layer.weight, pattern).values)
    return layers


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "activations": (
        lambda: Many(
            nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Sigmoid(),
            nn.Tanh(), nn.ELU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.Softplus(), nn.Hardswish(),
            nn.Hardsigmoid(), nn.Mish(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Hardtanh(-0.5, 2),
            lambda x: (x.abs() + 1).sqrt().log(), lambda x: x.clamp(min=-1) ** 3, torch.erf,
        ),
        VECTORS,
    ),
    "linear layers": (
        lambda: Many(
            nn.Linear(32, 7, bias=False), lambda x: nn.functional.linear(x, torch.ones(3, 32)),
            lambda x: x[:, None] @ torch.ones(32, 2), lambda x: 1 - x, lambda x: 2 / (x.abs() + 1),
            lambda x: torch.cat([x[:, :3], x[:, 5:9] * 2], 1), lambda x: x.reshape(-1, 4, 8).mT,
            lambda x: torch.stack(x.chunk(2, 1), 1).sum(1), lambda x: x.mean(), nn.Dropout(0.5),
            lambda x: functional.pad(x, (1, 2)), lambda x: x.amax(1, keepdim=True).expand(-1, 3),
        ),
        VECTORS,
    ),
    "norms": (
        lambda: Many(
            nn.LayerNorm(32), nn.RMSNorm(32), nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8)),
            nn.Sequential(nn.Unflatten(1, (4, 8)), nn.GroupNorm(2, 4)),
            nn.LayerNorm(32, elementwise_affine=False),
        ),
        VECTORS,
    ),
    "convolutions": (
        lambda: Many(
            nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0)),
            nn.Conv2d(3, 6, 3, padding=2, dilation=2), nn.Conv2d(3, 6, 3, groups=3, bias=False),
            nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5, 2, 1)),
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)),
        ),
        IMAGES,
    ),
    "pooling": (
        lambda: Many(
            nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1),
            nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3), lambda x: x.mean((2, 3)),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
            nn.Softmax(1),
        ),
        IMAGES,
    ),
    "a transformer layer": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 8)),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"),
        ),
        VECTORS,
    ),
    "a recurrent layer": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 8)), nn.LSTM(8, 6, batch_first=True)), VECTORS,
    ),
    "an embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(24, 2)),
        torch.arange(12).reshape(4, 3) % 11,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        # The Llama of another test has these layers.
        pytest.param(
            name, marks=pytest.mark.long if name in ("a transformer layer", "an embedding") else ()
        )
        for name in LAYERS
    ],
)
def test_layers_compute_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    report = save_litert(make(), inputs, tmp_path / "model.tflite", batch_size=None)
    assert report.error < 1e-5
    assert (tmp_path / "model.tflite").stat().st_size == report.size


def test_batch_norm_is_folded_and_images_are_transposed_once(tmp_path: Path) -> None:
    model = residual_network()
    report = save_litert(model, IMAGES, tmp_path / "model.tflite")
    assert report.error < 1e-5
    kinds = [kind for kind, _ in operators(report.path)]
    assert sorted(set(kinds)) == [
        "ADD", "CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "MEAN", "PAD", "PADV2", "RESHAPE",
        "TRANSPOSE",
    ]  # fmt: skip
    assert kinds.count("TRANSPOSE") == 1
    assert [layer.name for layer in report.layers][:3] == ["0", "4.conv1", "4.conv2"]
    (found,) = run(report.path, IMAGES[:1].numpy())
    np.testing.assert_allclose(found, model.eval()(IMAGES[:1]).detach(), rtol=1e-4, atol=1e-5)
    assert model.training is False


def test_a_model_in_int8(tmp_path: Path) -> None:
    report = save_litert(residual_network(), IMAGES, tmp_path / "model.tflite", "int8")
    assert report.error < 0.05
    assert report.size < 30_000  # of 65 kB in float32
    assert types(report.path) == {"INT8", "FLOAT32"}
    kinds = [kind for kind, _ in operators(report.path)]
    assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == 1
    assert set(report.seconds) == {"this file", "dense float32"}


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("pattern", "weights", "stored"),
    [
        (safe_core.Block((1, 4), 0.9), "float32", "1x4"),
        (safe_core.Block((1, 16), 0.9), "float32", "1x4"),
        (safe_core.Block((1, 16), 0.9), "int8", "1x16"),
        (safe_core.Unstructured(0.9), "float32", "packed"),
        (safe_core.Unstructured(0.99), "float32", "csr"),
        (None, "float32", "dense"),
        (safe_core.Unstructured(0.9), "int8", "packed"),
    ],
)
def test_sparse_weights_make_the_file_smaller(
    pattern: Any, weights: str, stored: str, tmp_path: Path
) -> None:
    model = perceptron(pattern)
    path = tmp_path / "model.tflite"
    report = save_litert(model, VECTORS, path, weights, compute="sparse")
    assert [layer.format for layer in report.layers] == [stored, stored, "dense"]
    assert report.error < (1e-5 if weights == "float32" else 0.05)
    dense = save_litert(perceptron(), VECTORS, tmp_path / "dense.tflite", weights)
    share = {"1x4": 0.2, "1x16": 0.2, "csr": 0.1, "packed": 0.6, "dense": 1.01}[stored]
    assert report.dense_size == dense.size == dense.dense_size
    assert any("was optimizer.finalize() called?" in x for x in report.notes) is (pattern is None)
    saved = dense.size - report.size
    whole = 4 * (32 * 64 + 64 * 64) / (1 if weights == "float32" else 4)
    assert saved > (1 - share) * whole - 1500  # names, segments and operators
    versions = {version for kind, version in operators(path) if kind == "FULLY_CONNECTED"}
    assert (8 in versions) is (stored in ("1x4", "1x16", "csr"))
    if stored == "1x16":
        assert scales_of_compressed(path) == [1, 1]
    zeros = "\n".join(report.notes)
    assert ("'0' (90% zeros), '2' (90% zeros) are computed dense" in zeros) is (stored == "packed")


def test_a_pointwise_convolution_in_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU())
    with torch.no_grad():
        flat = model[2].weight[:, :, 0, 0]
        flat.copy_(safe_core.project(flat, safe_core.Block((1, 4), 0.9)).values)
    report = save_litert(model, IMAGES, tmp_path / "model.tflite", compute="sparse")
    assert [layer.format for layer in report.layers] == ["dense", "1x4"]
    assert report.error < 1e-5


def test_the_file_takes_the_batch_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    model = perceptron()
    report = save_litert(model, {"input": VECTORS}, path, batch_size=2)
    (found,) = run(path, VECTORS[:2].numpy())
    np.testing.assert_allclose(found, model(VECTORS[:2]).detach(), rtol=1e-4, atol=1e-6)
    assert "batch size 2" in str(report)
    with pytest.raises(ValueError, match=r"batch_size must divide .*got 3 for shapes"):
        save_litert(model, VECTORS, path, batch_size=3)


def test_another_operator_version_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flatbuffer, "SPARSE_VERSION", 9)
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=r"nothing was written to .*model.tflite$"):
        save_litert(perceptron(safe_core.Block((1, 4), 0.9)), VECTORS, path, compute="sparse")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["a weight", "the end"])
def test_a_damaged_file_is_not_written(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was at the path before stays there."""

    def serialized(graph: Any) -> File:
        content, indices = flatbuffer.serialized(graph)
        if damage == "the end":
            return File(content[:100], indices)
        weight = graph.operations[0].weight.data
        other = (-weight).tobytes()
        return File(content.replace(weight.tobytes(), other), indices)

    monkeypatch.setattr(candidates, "serialized", serialized)
    path = tmp_path / "model.tflite"
    path.write_text("an older file")
    with pytest.raises(ValueError, match=r"the file must .*nothing was written to"):
        save_litert(perceptron(), VECTORS, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize("cast", [lambda x: x.float(), lambda x: x.to(torch.float32)])
def test_assertions_of_dtypes_are_left_out(
    cast: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    report = save_litert(Many(cast, lambda x: cast(x).relu()), VECTORS, tmp_path / "model.tflite")
    assert report.error < 1e-6


def test_a_llama_from_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )
    tokens = {"input_ids": torch.arange(24).reshape(3, 8)}
    report = save_litert(model, tokens, tmp_path / "model.tflite")
    assert report.error < 1e-5
    assert "model.layers.0.mlp.down_proj" in {layer.name for layer in report.layers}


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Sequential(nn.Linear(32, 4), Cumulative()), VECTORS, r"cumsum.*module '1' \(Cumul"),
        (nn.Sequential(nn.ConvTranspose2d(3, 2, 2)), IMAGES, r"module '0'.*transposed"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1, groups=2)), IMAGES, "module '1'.*2"),
        (nn.Sequential(nn.BatchNorm1d(32, track_running_stats=False)), VECTORS, "module '0'.*run"),
    ],
)
def test_what_cannot_be_expressed_is_named(
    model: nn.Module, inputs: Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        save_litert(model, inputs, tmp_path / "model.tflite", batch_size=None)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    for error, message, arguments in (
        (TypeError, "model must be", {"model": 3}),
        (TypeError, "example_inputs must", {"example_inputs": (3,)}),
        (ValueError, "weights must be one of 'float32', 'int8'", {"weights": "int4"}),
        (ValueError, "compute must be one of", {"compute": "slow"}),
        (ValueError, "batch_size must be at least 1, got 0", {"batch_size": 0}),
        (ValueError, "tolerance must be", {"tolerance": -1}),
        (ValueError, "path must be in a folder that exists", {"path": tmp_path / "a" / "b"}),
    ):
        given = {"model": perceptron(), "example_inputs": VECTORS, "path": path, **arguments}
        with pytest.raises(error, match=message):
            save_litert(**given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_with_fewer_digits_than_the_file_is_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"got {dtype} in 0.weight: pass model.float\(\), because"
    ):
        save_litert(perceptron().to(dtype), VECTORS.to(dtype), tmp_path / "model.tflite")


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_an_error_above_the_tolerance_names_the_remedy(weights: str, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=r"raise tolerance= to accept the error$") as raised:
        save_litert(perceptron(), VECTORS, path, weights, tolerance=1e-9)
    assert f"nothing was written to {path}; " in str(raised.value)
    assert ("pass more samples of real data" in str(raised.value)) is (weights == "int8")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (VECTORS[:, :31], r"got shape \(4, 31\) float32: .*; the first axis counts samples$"),
        (VECTORS.double(), r"got shape \(4, 32\) float64: .*Double"),
        (VECTORS.long(), r"got shape \(4, 32\) int64: .*Long"),
        (VECTORS[0], r"got shape \(32,\) float32: .*; the first axis counts samples$"),
        ({"x": VECTORS}, r"got shape \(4, 32\) float32: .*unexpected keyword argument 'x'"),
    ],
)
def test_wrong_inputs_are_named(inputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"example_inputs must be inputs of the model, {message}"):
        save_litert(perceptron(), inputs, tmp_path / "model.tflite")


def test_errors_of_tracing_are_neither_logged_nor_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(*args: Any, **kwargs: Any) -> Any:
        logger.error("a traceback")
        print("a graph", file=sys.stderr)
        raise RuntimeError("it branches")

    logger, records = logging.getLogger("torch.export.tested"), list[logging.LogRecord]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logger.addHandler(handler)
    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(ValueError, match="got RuntimeError: it branches"):
        save_litert(perceptron(), VECTORS, tmp_path / "model.tflite")
    assert not records
    assert capsys.readouterr().err == ""
    logger.error("as before")
    logger.removeHandler(handler)
    assert len(records) == 1


def test_a_model_with_control_flow_is_refused(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"model must be one that torch.export.export can trace"):
        save_litert(Branch(), VECTORS, tmp_path / "model.tflite")
