"""The commands `compress` and `decompress`: nothing changes, and damage is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from command_line import config, refused, run
from safetensors.torch import load_file, save_file

import safe_core
from safe_core.adapters.torch import load_compressed
from safe_core.command_line import compression

PATTERNS = {"gate_proj": 0.9, "up_proj": "2:4", "down_proj": 0.5}


def sparse_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config()).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            for part, sparsity in PATTERNS.items():
                if part in name:
                    p.copy_(safe_core.project(p, sparsity).values)
    return model


@pytest.fixture(params=["10GB", "10KB"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A sparse model folder with one file or with shards, and other files."""
    path = tmp_path / "model"
    sparse_model().save_pretrained(path, max_shard_size=request.param)
    (path / "README.md").write_text("a model card")
    (path / "LICENSE").write_text("a licence")
    (path / "model.onnx").write_text("weights with zeros")
    return path


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_model_comes_back_bit_for_bit(source: Path, tmp_path: Path) -> None:
    small, back = tmp_path / "small", tmp_path / "back"
    result = run("compress", source, "--out", small)
    assert result.exit_code == 0, result.output
    assert "2:4, " in result.stdout
    assert "times smaller" in result.stdout
    assert "not copied: model.onnx" in result.stderr
    assert (small / "README.md").read_text() == "a model card"
    assert not list(small.glob("model.safetensors*"))
    wanted, found = everything(source), load_compressed(small)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16))
    assert "note: no tensor" not in result.stdout
    result = run("decompress", small, "--out", back)
    assert result.exit_code == 0
    assert " times larger\n" in result.stdout
    assert "smaller" not in result.stdout
    names = {file.name for file in source.iterdir()} - {"model.onnx"}
    assert {file.name for file in back.iterdir()} == names
    for file in source.glob("*.json"):
        assert json.loads((back / file.name).read_text()) == json.loads(file.read_text())
    restored = transformers.AutoModelForCausalLM.from_pretrained(back)
    for a, b in zip(restored.state_dict().values(), sparse_model().state_dict().values(),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("source", ["10GB"], indirect=True)
def test_inspect_reads_a_compressed_folder_and_prune_refuses_it(
    source: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    run("compress", source, "--out", small)
    tables = [json.loads(run("inspect", f, "--json").stdout)["tensors"] for f in (source, small)]
    assert tables[0] == tables[1]
    message = refused("prune", small, "--calibration", source / "LICENSE", "--out", tmp_path / "x")
    assert "restore them with `safe-core decompress" in " ".join(message.split())
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(small)


def test_a_dense_model_gains_nothing_and_is_told(folder: Path, tmp_path: Path) -> None:
    result = run("compress", folder, "--out", tmp_path / "small")
    assert "1.1 times larger\nnote: no tensor has enough zeros to take" in result.stdout


@pytest.mark.parametrize("source", ["10KB"], indirect=True)
def test_what_cannot_be_compressed_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    run("compress", source, "--out", small)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold .safetensors files, got none" in refused("compress", empty, "--out", out)
    assert "it is compressed already" in refused("compress", small, "--out", out)
    assert "which is not compressed" in refused("decompress", source, "--out", out)
    assert "out must be outside of" in refused("compress", source, "--out", source / "x")
    assert "out must be a new or empty folder" in refused("compress", source, "--out", small)
    cut = Path(shutil.copytree(small, tmp_path / "cut"))
    shard = sorted(cut.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "is damaged" in refused("decompress", cut, "--out", out)
    shard.unlink()
    assert f"{shard.name} is missing" in refused("decompress", cut, "--out", out)
    assert not out.exists()


def test_a_file_that_reads_back_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    save_file({"w": torch.eye(32)}, source / "model.safetensors")
    read = compression.read_file

    def other(file: Path) -> object:
        return ((name, raw._replace(data=raw.data ^ 1)) for name, raw in read(file))

    monkeypatch.setattr(compression, "read_file", other)
    message = refused("compress", source, "--out", tmp_path / "out")
    assert "must hold the tensors of its source, got another w" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
