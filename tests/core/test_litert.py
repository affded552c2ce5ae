"""The graph, its formats of weights, and the process that runs a file."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import safe_core.litert
from safe_core.litert import export, run_file
from safe_core.litert.build import Builder
from safe_core.litert.export import relative_error
from safe_core.litert.flatbuffer import serialized
from safe_core.litert.graph import Compressed, Quantization
from safe_core.litert.notes import notes
from safe_core.litert.process import Answer, FileRuntimeError, measure
from safe_core.litert.quantization import quantize
from safe_core.litert.report import LayerFormat, LiteRTReport
from safe_core.litert.simplify import simplify
from safe_core.litert.sparsity import compress, kernel_format, smallest


def expanded(found: Compressed, columns: int) -> np.ndarray[Any, Any]:
    """The array that a compressed one stands for, written without the library."""
    rows = int(np.prod(found.outer))
    blocks = np.zeros((rows, columns // found.block, found.block), found.values.dtype)
    position = 0
    for row in range(rows):
        for index in found.indices[found.segments[row] : found.segments[row + 1]]:
            blocks[row, index] = found.values[position : position + found.block]
            position += found.block
    assert position == found.values.size
    return blocks.reshape(*found.outer, columns)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("shape", [(6, 32), (3, 2, 2, 16), (300, 1040)])
def test_compressed_weights_expand_to_the_same(shape: tuple[int, ...], block: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32) * (rng.random(shape) < 0.1)
    weight[0] = 0
    found = compress(weight, block)
    assert np.array_equal(expanded(found, shape[-1]), weight)
    assert found.indices.itemsize == (1 if shape[-1] // block <= 256 else 2)
    assert found.nbytes == found.values.nbytes + found.segments.nbytes + found.indices.nbytes


def test_formats_follow_the_zeros() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(64, 64)).astype(np.float32)
    scattered = dense * (rng.random((64, 64)) < 0.1)
    four = dense * np.repeat(rng.random((64, 16)) < 0.1, 4, axis=1)
    sixteen = dense * np.repeat(rng.random((64, 4)) < 0.1, 16, axis=1)
    found = [kernel_format(w, 1, "float32") for w in (dense, scattered, four, sixteen)]
    assert found == [None, None, "1x4", "1x4"]
    found = [kernel_format(w, 1, "int8") for w in (dense, scattered, four, sixteen)]
    assert found == [None, None, None, "1x16"]
    half = dense * np.repeat(rng.random((64, 16)) < 0.5, 4, axis=1)
    assert kernel_format(half, 1, "float32") is None
    assert kernel_format(half, 1, "float32", always=True) == "1x4"
    assert smallest(dense) is None
    assert smallest(four).block == 4  # type: ignore[union-attr]


def test_transposes_cancel() -> None:
    """Convolutions of images with channels first need two transposes in all."""
    graph = Builder()
    x = graph.input("x", (2, 3, 8, 8))
    graph.outputs = [x]
    for _ in range(2):
        y = graph.convolution(
            graph.transpose(graph.outputs[0], (0, 2, 3, 1)),
            graph.constant(np.ones((3, 3, 3, 3))),
            strides=(1, 1),
            padding=[(1, 1), (1, 1)],
            dilation=(1, 1),
        )
        y = graph.transpose(y, (0, 3, 1, 2))
        y = graph.binary("ADD", y, graph.outputs[0])
        y = graph.binary("MUL", graph.unary("TANH", y), np.ones((1, 3, 1, 1)))
        graph.outputs = [graph.pad(y, [(0, 0), (0, 0), (1, 0), (0, 0)])]
    simplify(graph)
    kinds = [op.kind for op in graph.operations]
    assert kinds.count("TRANSPOSE") == 2
    assert graph.outputs[0].shape == (2, 3, 10, 8)


def test_scales_and_shifts_fold_into_weights() -> None:
    graph = Builder()
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(4, 8)), rng.normal(size=4)
    y = graph.linear(graph.input("x", (1, 8)), graph.constant(weight))
    for kind, value in (("MUL", scale), ("ADD", 2 * scale), ("SUB", 1.0), ("DIV", 2.0)):
        y = graph.binary(kind, y, value)
    graph.outputs = [graph.unary("RELU", graph.binary("SUB", 3.0, y))]
    simplify(graph)
    (op,) = graph.operations
    assert op.options["fusedActivationFunction"] == 1
    _, w, b = (None if x is None else x.data for x in op.inputs)
    np.testing.assert_allclose(w, -weight * scale[:, None] / 2, rtol=1e-6)
    np.testing.assert_allclose(b, 3 - (2 * scale - 1) / 2, rtol=1e-6)


def test_an_output_without_weights_keeps_its_bias_in_int8() -> None:
    graph = Builder()
    weight, bias = np.eye(2, 4), np.asarray([0.3, 5.0])
    weight[1] = 0
    x = graph.input("x", (1, 4))
    y = graph.linear(x, graph.constant(weight), graph.constant(bias))
    graph.outputs = [y]
    new, _ = quantize(graph, {id(x): (-1.0, 1.0), id(y): (-1.0, 6.0)}, {})
    held = next(op for op in new.operations if op.kind == "FULLY_CONNECTED").inputs[2]
    assert held is not None
    assert held.data is not None
    assert isinstance(held.quantization, Quantization)
    np.testing.assert_allclose(held.data * held.quantization.scale, bias, rtol=0.01)


def test_tied_weights_are_stored_once() -> None:
    graph = Builder()
    x = graph.input("x", (1, 64))
    for _ in range(3):
        x = graph.linear(x, graph.constant(np.eye(64)))
    graph.outputs = [x]
    assert 4 * 64 * 64 < len(serialized(graph).content) < 2 * 4 * 64 * 64


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.tflite"
    file.write_bytes(b"nothing")
    with pytest.raises(FileRuntimeError, match="the runtime refused the file"):
        measure([file], [[np.zeros(1, np.float32)]], 1, tmp_path, 0.0)


def test_a_graph_that_cannot_run_is_refused(tmp_path: Path) -> None:
    graph = Builder()
    graph.outputs = [
        graph.add("ADD", [graph.input("x", (2, 3)), graph.constant(np.ones(2))], (2, 3))
    ]
    file = tmp_path / "x.tflite"
    file.write_bytes(serialized(graph).content)
    with pytest.raises(FileRuntimeError, match="the runtime refused the file"):
        measure([file], [[np.zeros((2, 3), np.float32)]], 1, tmp_path, 0.0)


def test_the_process_imports_numpy_and_the_runtime_only() -> None:
    script = Path(safe_core.litert.__file__).with_name("run_file.py")
    tree = ast.parse(script.read_text())
    modules = {x.name for n in ast.walk(tree) if isinstance(n, ast.Import) for x in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    used = {"__future__", "json", "statistics", "sys", "time", "typing"}
    assert modules == used | {"numpy", "ai_edge_litert.interpreter"}


class Computer:
    """A clock, and files whose first call after another file takes longer than the others."""

    def __init__(self) -> None:
        self.now, self.readings, self.last = 0.0, 0, None

    def clock(self) -> float:
        self.readings += 1
        self.now += 1e-6
        return self.now

    def file(self, seconds: float) -> Any:
        def invoke() -> None:
            self.now += seconds if self.last is file else 3 * seconds
            self.last = file

        file = SimpleNamespace(invoke=invoke, get_input_details=list, get_output_details=list)
        return file


def test_files_are_timed_with_what_they_keep_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    computer = Computer()
    monkeypatch.setattr(run_file, "_CLOCK", computer.clock)
    monkeypatch.setattr(run_file, "time", SimpleNamespace(perf_counter=lambda: computer.now))
    known = [5e-6, 1e-5, 0.002]
    files = [computer.file(seconds) for seconds in known]
    found = run_file.times(files, [], 0.0, 4)
    assert found[:2] == pytest.approx(known[:2], rel=2e-3)
    assert found[2] == pytest.approx(known[2], rel=1e-3)
    assert computer.readings < 100  # not one for each call
    computer.now = 0.0
    run_file.times(files, [], 0.1, 4)
    assert 0.1 < computer.now < 0.12
    run_file.times(files[2:], [], 100.0, 4)
    assert computer.now < 1.0  # 200 blocks


@pytest.mark.parametrize(("sparse", "chosen"), [(0.5, "1x4"), (1.02, "1x4"), (3.0, "packed")])
def test_the_faster_file_is_kept(
    sparse: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*arguments: Any) -> Answer:
        return measure(*arguments)._replace(seconds=[sparse, 1.0])

    monkeypatch.setattr(export, "measure", timed)
    graph = Builder()
    weight = np.zeros((8, 64), np.float32)
    weight[3, 8:12] = 1
    graph.outputs = [graph.linear(graph.input("x", (1, 64)), graph.constant(weight))]
    settings = export.check_settings(
        "test", weights="float32", batch_size=None, compute="fastest", tolerance=None
    )
    inputs = np.arange(64, dtype=np.float32)[None]
    path = tmp_path / "m.tflite"
    report = export.save_graph(graph, [[inputs]], [[inputs @ weight.T]], path, settings)
    assert [layer.format for layer in report.layers] == [chosen]
    assert report.latency == min(sparse, 1.0 if chosen == "packed" else sparse)
    slower = "Kernels that skip zeros take 3 times as long on this machine"
    assert any(slower in note for note in report.notes) is (chosen == "packed")


def test_errors_are_relative_to_the_usual_size_of_an_output() -> None:
    zero, one = np.zeros((1, 2)), np.asarray([[3.0, 4.0]])
    assert relative_error([[zero], [one]], [[zero], [one]]) == 0
    found = relative_error([[zero + 0.1], [one]], [[zero], [one]])
    assert found == pytest.approx(0.1 * 2**0.5 / (5 / 2**0.5))
    assert np.isnan(relative_error([[zero], [one * np.nan]], [[zero], [one]]))
    assert np.isnan(relative_error([[zero[0]]], [[zero]]))


def test_a_report_is_a_table() -> None:
    layers = (LayerFormat("fc", (8, 16), 0.9, "1x4", 64, 512),)
    times = {"this file": 1e-3, "dense float32": 2e-3}
    report = LiteRTReport(Path("a/m.tflite"), "float32", 1, layers, 900, 1348, 1e-7, times, ("!",))
    assert str(report).splitlines() == [
        "m.tflite: float32, 900 B (dense: 1.3 KiB), largest relative error 1.0e-07",
        "  layer  weights  zeros  format  size  dense",
        "  fc     8 x 16   90.0%  1x4     64 B  512 B",
        "time of a call with one thread, batch size 1:",
        "  this file      1 ms",
        "  dense float32  2 ms, 2 times this file",
        "!",
    ]
    assert report.latency == 1e-3


def test_a_report_names_a_file_that_computes_dense_and_wraps_its_notes() -> None:
    layers = (LayerFormat("0", (8, 16), 0.9, "packed", 64, 128),)
    times = {"this file": 1e-3, "dense float32": 2e-3}
    found = notes(layers, "int8", times, "")
    report = LiteRTReport(Path("m.tflite"), "int8", None, layers, 9, 99, 0.0, times, found)
    lines = str(report).splitlines()
    assert lines[4:6] == [
        "  this file (computes dense int8)  1 ms",
        "  dense float32                    2 ms, 2 times this file",
    ]
    assert lines[6].startswith("'0' (90% zeros) is computed dense, since the zeros are not in")
    assert 80 < len(lines[6]) <= 100
    assert " ".join(lines[6:]) == found[0]


@pytest.mark.parametrize(
    ("sparsity", "stored", "compute", "told"),
    [
        (0.3, "packed", "sparse", True),
        (0.3, "packed", "fastest", False),
        (0.6, "packed", "sparse", False),
        (0.4, "1x4", "sparse", False),
    ],
)
def test_missing_zeros_are_told(sparsity: float, stored: str, compute: str, told: bool) -> None:
    layer = LayerFormat("fc", (8, 16), sparsity, stored, 64, 128)
    found = notes([layer], "float32", {"this file": 1.0}, "", compute=compute)
    hint = "No layer has enough zeros to skip; was optimizer.finalize() called?"
    assert (hint in found) is told
