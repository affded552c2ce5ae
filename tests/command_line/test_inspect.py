"""The command `inspect`: what it counts, and which files it refuses."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from array_backends import bits
from command_line import config, refused, run
from safetensors.numpy import save_file
from sparse_arrays import grouped

from safe_core.command_line.checkpoint_files import read_tensors
from safe_core.command_line.inspection import inspect_checkpoint
from safe_core.inspection import analyse


def test_inspect_counts_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "half": grouped(rng, (8, 16), 2, 4).astype(ml_dtypes.bfloat16),
        "full": rng.standard_normal((4, 4)).astype("f4"),
        "count": np.asarray(7),
        "bias": np.zeros(4, "f4"),
        "none": np.zeros((0, 3), "f4"),
    }
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    result = run("inspect", file, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    half = found["tensors"]["half"]
    assert (half["shape"], half["dtype"], half["pattern"]) == ([8, 16], "BF16", "2:4")
    assert (half["zeros"], half["sparsity"], half["compressed_bytes"]) == (64, 0.5, 128 + 16)
    alone, everything = found["totals"]["weights"], found["totals"]["all"]
    assert (alone["entries"], alone["zeros"]) == (128 + 16, 64)
    assert (everything["entries"], everything["zeros"]) == (128 + 16 + 1 + 4, 64 + 4)
    assert everything["sparsity"] == 68 / 149
    assert (alone["dense_bytes"], alone["compressed_bytes"]) == (256 + 64, 144 + 64)
    assert everything["dense_bytes"] == 256 + 64 + 8 + 16
    table = run("inspect", tmp_path).stdout
    (row,) = [line.split() for line in table.splitlines() if line.startswith("half")]
    assert row[-7:] == ["50.00%", "2:4", "1", "256", "B", "144", "B"]
    lines = [" ".join(line.split()) for line in table.splitlines()[-2:]]
    assert lines[0].startswith("total of weights (two axes or more) 144 44.44% ")
    assert lines[1].startswith("total of all, with biases and norms 149 45.64% ")
    for tensor in read_tensors(file):
        np.testing.assert_array_equal(tensor.array.ravel(), _stored(weights[tensor.name]).ravel())


def _stored(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind == "i" else bits(x)


def test_shards_and_files_of_torch_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config()).bfloat16()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    state = {**model.state_dict(), "tied": model.lm_head.weight}
    torch.save({"state": state, "step": 3}, tmp_path / "model.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    one = {x.name: x.analysis for x in inspect_checkpoint(tmp_path / "one").tensors}
    shards = inspect_checkpoint(tmp_path / "shards")
    index = inspect_checkpoint(tmp_path / "shards" / "model.safetensors.index.json")
    assert {x.name: x.analysis for x in shards.tensors} == one
    assert index == shards
    assert one["model.layers.0.mlp.up_proj.weight"].zero_columns == 8
    for name, prefix in (("model.pt", "state."), ("old.pt", "")):
        report = inspect_checkpoint(tmp_path / name)
        named = {x.name.removeprefix(prefix): x for x in report.tensors}
        assert named.pop("tied").same_as == f"{prefix}lm_head.weight"
        assert {key: x.analysis for key, x in named.items()} == one
        assert report.totals() == shards.totals()
    for tensor in read_tensors(tmp_path / "model.pt"):
        assert tensor.dtype == "bfloat16"


def test_memory_does_not_grow_with_tensors(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4096, 2048), dtype="f4")
    save_file({"a": x, "b": x}, tmp_path / "model.safetensors")
    tracemalloc.start()
    inspect_checkpoint(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 2


class _Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_code_in_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for new in (True, False):
        torch.save({"w": _Malicious()}, "bad.pt", _use_new_zipfile_serialization=new)
        assert "could run code" in refused("inspect", "bad.pt")
        assert "system" in refused("inspect", "bad.pt")
    assert not Path("executed").exists()


def test_broken_files_are_named(tmp_path: Path) -> None:
    assert "must be an existing file or folder" in refused("inspect", tmp_path / "nowhere")
    assert "must hold model.safetensors" in refused("inspect", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"w": np.ones((8, 8), "f4")}, file)
    whole = file.read_bytes()
    for broken, message in (
        (whole[:-4], "w is cut off"),
        (whole[:20], "complete safetensors file"),
        (b"", "complete safetensors file"),
        (whole[:8] + b"[" + whole[9:], "have a safetensors header"),
    ):
        file.write_bytes(broken)
        assert message in refused("inspect", file)
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for broken, message in (
        ({"data_offsets": [0, 8, 16]}, "two data_offsets"),
        ({"data_offsets": 16}, "two data_offsets"),
        ({"data_offsets": [0, "16"]}, "two data_offsets"),
        ({"data_offsets": [-4, 12]}, "two data_offsets"),
        ({"shape": [2.0, 2]}, "a shape"),
        ({"shape": [True, 4]}, "a shape"),
        ({"shape": None}, "a shape"),
        ({"dtype": ["F32"]}, "a dtype"),
        ({"shape": [3, 2]}, "got 16 bytes for w, F32 of shape (3, 2)"),
        ({"shape": [1] * 70 + [4]}, "shapes that NumPy supports"),
        ({"shape": [0, 2**70], "data_offsets": [0, 0]}, "shapes that NumPy supports"),
    ):
        file.write_bytes(with_header({"w": good | broken}))
        found = refused("inspect", file)
        assert message in found
        assert "for w" in found
        assert str(file) in found
    for broken in ({"w": 3}, {"w": {}}, {"w": [1]}):
        file.write_bytes(with_header(broken))
        assert "for w" in refused("inspect", file)
    file.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "lost.safetensors"}}))
    assert "lost.safetensors" in refused("inspect", tmp_path)
    index.write_text("[]")
    assert "weight_map" in refused("inspect", index)
    (tmp_path / "model.bin").write_bytes(b"no weights")
    refused("inspect", tmp_path / "model.bin")


def with_header(header: Any) -> bytes:
    """A safetensors file of any header, with 16 bytes of data."""
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + bytes(16)


def test_optimizer_state_is_not_counted_as_weights(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "all": [{"inner": optimizer.state_dict()}], "epoch": 3},
        tmp_path / "training.pt",
    )
    report = inspect_checkpoint(tmp_path / "training.pt")
    totals = report.totals()
    assert totals["weights"]["entries"] == 16
    assert totals["all"]["entries"] == 20
    assert totals["optimizer"]["entries"] == 2 * 20 + 2  # two moments, two counts of steps
    assert {x.name for x in report.tensors if not x.optimizer} == {"model.weight", "model.bias"}
    table = run("inspect", tmp_path / "training.pt").stdout
    assert "total of the optimizer's state" in table
    plain = json.loads(run("inspect", tmp_path / "training.pt", "--json").stdout)["tensors"]
    assert plain["all.0.inner.state.0.exp_avg"]["optimizer"] is True
    assert "optimizer" not in plain["model.weight"]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert "optimizer" not in inspect_checkpoint(tmp_path / "model.pt").totals()


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"],
)
def test_floats_of_8_bits_are_counted_by_their_values(tmp_path: Path, dtype: str) -> None:
    kind, every = getattr(torch, dtype), torch.arange(256, dtype=torch.uint8).view(4, 64)
    values = every.view(kind).float()
    torch.save({"w": every.view(kind)}, tmp_path / "m.pt")
    safetensors.torch.save_file({"w": every.view(kind)}, tmp_path / "m.safetensors")
    tie = int((values.abs() == values.abs()[values.abs() > 0].min()).sum())
    for name in ("m.pt", "m.safetensors"):
        (row,) = inspect_checkpoint(tmp_path / name).tensors
        assert (row.analysis.zeros, row.analysis.ties) == (int((values == 0).sum()), tie)
    ones = torch.full((2, 8), 0x80, dtype=torch.uint8).view(kind)
    torch.save({"w": ones}, tmp_path / "m.pt")
    zeros = inspect_checkpoint(tmp_path / "m.pt").tensors[0].analysis.zeros
    assert zeros == int((ones.float() == 0).sum())


def test_layers_are_listed_by_their_numbers(tmp_path: Path) -> None:
    names = [f"layers.{i}.w" for i in (0, 1, 2, 10, 11)]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "m.safetensors")
    listed = [x.split()[0] for x in run("inspect", tmp_path / "m.safetensors").stdout.splitlines()]
    assert listed[1:6] == names
    other = ["layers.10.w", "layers.2.w", "head"]
    torch.save({name: torch.ones(2, 2) for name in other}, tmp_path / "m.pt")
    listed = [x.split()[0] for x in run("inspect", tmp_path / "m.pt").stdout.splitlines()]
    assert listed[1:4] == other


def test_packed_floats_of_torch_are_not_counted(tmp_path: Path) -> None:
    packed = torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"w": packed}, tmp_path / "m.pt")
    (line, *_) = (x for x in run("inspect", tmp_path / "m.pt").stdout.splitlines() if "w " in x)
    assert " ".join(line.split()) == "w 4 x 8 float4_e2m1fn_x2 packed 32 B 32 B"
    total = run("inspect", tmp_path / "m.pt").stdout.splitlines()[-1]
    assert "0 not counted" in " ".join(total.split())


def test_complex_numbers_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"c": torch.zeros(4, 4, dtype=torch.complex64)}, file)
    (tensor,) = read_tensors(file)
    assert (tensor.dtype, tensor.shape, tensor.array, tensor.format) == ("C64", (4, 4), None, None)


@pytest.mark.parametrize(
    "name",
    ["float8_e8m0fnu", "float8_e4m3b11fnuz", "float8_e3m4", "float6_e2m3fn", "float6_e3m2fn",
     "float4_e2m1fn"],
)  # fmt: skip
def test_arrays_of_ml_dtypes_are_counted_by_their_values(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = np.arange(2 ** int(name[5]), dtype="u1")
    values = np.abs(bits.view(dtype).astype("f4"))
    found = analyse(bits.view(dtype))
    assert found.zeros == int((values == 0).sum())
    assert found.ties == int((values == values[values > 0].min()).sum())


def test_files_of_torch_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = {
        "transposed": base.t(),
        "slice": base[1:5, ::2],
        "expanded": torch.tensor([1.0, 0.0]).expand(3, 2),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "flags": torch.tensor([True, False]),
        "numbers": (torch.arange(5), "text", 3.5, None, b"bytes", {1, 2}),
    }
    for new in (False, True):
        if new:  # torch cannot read these back in its old format
            state["unsigned"] = torch.arange(3).to(torch.uint16)
        torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
        loaded = torch.load(tmp_path / "m.pt", weights_only=True)
        loaded["numbers.0"] = loaded.pop("numbers")[0]
        found = {tensor.name: tensor.array for tensor in read_tensors(tmp_path / "m.pt")}
        assert found.keys() == loaded.keys()
        for name, tensor in loaded.items():
            plain = tensor.detach().contiguous().numpy()
            wanted = plain.view(f"u{plain.itemsize}") if plain.dtype.kind == "f" else plain
            np.testing.assert_array_equal(found[name], wanted)


def test_dtypes_that_are_not_known_are_called_so(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    entries = {
        "new[/b]": {"dtype": "Q3", "shape": [5], "data_offsets": [0, 8]},
        "four": {"dtype": "F4", "shape": [16], "data_offsets": [8, 16]},
    }
    file.write_bytes(with_header(entries))
    result = run("inspect", file)
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert lines["new[/b]"] == "5 Q3 unknown dtype 8 B 8 B"
    assert lines["four"] == "16 F4 packed 8 B 8 B"
