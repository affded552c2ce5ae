"""GGUF files: read, measured, inspected and pruned to an ordinary folder; damage is refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from command_line import SHORT, failed, refused, run
from gguf_models import llama, write_gguf

from safe_core._installed import install_command
from safe_core.command_line.checkpoint_files import read_tensors
from safe_core.command_line.gguf_files import gguf_metadata
from safe_core.command_line.model_folder import load_tokenizer, read_model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with one file of blocks."""
    path = tmp_path / "tiny"
    path.mkdir()
    write_gguf(path / "tiny.gguf", llama(), "Q8_0")
    return path


DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "Q8_0": torch.float32,
    "Q4_1": torch.float32,
}


@pytest.mark.parametrize("kind", list(DTYPES))
def test_a_file_is_loaded_as_an_ordinary_model(tmp_path: Path, kind: str) -> None:
    made = write_gguf(tmp_path / "tiny.gguf", llama(), kind)
    model, notes = read_model(tmp_path)
    for name, p in model.named_parameters():
        assert p.dtype == DTYPES[kind]
        assert torch.equal(p, made[name].to(p.dtype)), name
    assert not hasattr(model.config, "quantization_config")
    assert notes == (
        (f"note: the weights were quantised ({kind}), and are float32 now",)
        if kind.startswith("Q")
        else ()
    )
    tokens = load_tokenizer(tmp_path)("the end")["input_ids"]
    assert (len(tokens), tokens[0]) == (6, 256)


def test_a_file_is_pruned_to_an_ordinary_folder(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    result = run(
        "prune", tiny, "--calibration", text, "--out", out, *SHORT, "--method", "wanda",
        "--sparsity", "2:4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the weights were quantised (Q8_0), and are float32 now" in result.stderr
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert not list(out.glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert type(model) is transformers.LlamaForCausalLM
    p = model.model.layers[1].mlp.down_proj.weight
    assert bool(((p.reshape(-1, 4) != 0).sum(-1) == 2).all())
    said = transformers.AutoTokenizer.from_pretrained(out)
    assert said("the end")["input_ids"] == load_tokenizer(tiny)("the end")["input_ids"]
    card = (out / "README.md").read_text()
    assert "| weights | `tiny.gguf`, dequantised from Q8_0 |" in card
    assert "# tiny, pruned" in card
    measure = ["--text", text, "--length", 32, "--device", "cpu", "--json"]
    losses = [json.loads(run("perplexity", x, *measure).stdout)["loss"] for x in (tiny, out)]
    assert losses[0] != losses[1]
    assert losses == pytest.approx([np.log(258)] * 2, rel=0.05)


def test_the_file_is_chosen_among_several(tiny: Path, text: Path, tmp_path: Path) -> None:
    measure = ["perplexity", tiny, "--text", text, "--length", 32, "--device", "cpu"]
    prune = ["prune", tiny, "--calibration", text, "--out", tmp_path / "out", *SHORT]
    one = run(*measure).stdout
    torch.manual_seed(1)
    write_gguf(tiny / "other.gguf", transformers.LlamaForCausalLM(llama().config))
    for command in (measure, prune, ["inspect", tiny]):
        assert "must hold one GGUF file, got other.gguf, tiny.gguf: choose" in refused(*command)
    for command in (measure, prune):
        message = refused(*command, "--gguf-file", "none.gguf")
        assert "gguf_file must be one of other.gguf, tiny.gguf in" in message
    assert run(*measure, "--gguf-file", "tiny.gguf").stdout == one
    assert run(*measure, "--gguf-file", "other.gguf").stdout != one
    assert run("inspect", tiny / "other.gguf").exit_code == 0
    # Weights that transformers finds by itself count, unless a file is named.
    llama().save_pretrained(tiny)
    load_tokenizer(tiny, gguf_file="tiny.gguf").save_pretrained(tiny)
    assert run(*measure).stdout not in ("", one)
    assert run(*measure, "--gguf-file", "tiny.gguf").stdout == one
    message = refused("perplexity", tiny / "tiny.gguf", "--text", text)
    assert "must be a folder, got" in message
    assert "with --gguf-file tiny.gguf" in message


def test_inspect_counts_plain_types_and_lists_blocks(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    half = np.zeros((2, 64), "f2")
    half[:, ::2] = 1.5
    writer.add_tensor("half", half)
    q8 = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(np.ones((3, 64), "f4"), q8)
    writer.add_tensor("blocks", blocks, raw_dtype=q8)
    writer.add_array("general.tags", ["a", "b"])
    writer.add_string("general.license", "mit")
    for part in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{part}")()
    writer.close()
    found = json.loads(run("inspect", tmp_path, "--json").stdout)["tensors"]
    assert (found["half"]["zeros"], found["half"]["shape"]) == (64, [2, 64])
    assert found["blocks"] == {
        "shape": [3, 64], "dtype": "Q8_0", "dense_bytes": 3 * 2 * 34, "compressed_bytes": 3 * 2 * 34
    }  # fmt: skip
    assert "packed" in run("inspect", tmp_path).stdout
    assert gguf_metadata(tmp_path / "x.gguf") == {
        "general.architecture": "llama",
        "general.license": "mit",
    }


def test_the_sizes_of_blocks_are_those_of_the_format() -> None:
    from safe_core.command_line import gguf_files

    for kind, (count, width) in gguf.GGML_QUANT_SIZES.items():
        if count == 1:
            assert gguf_files._PLAIN[kind][0] == kind.name
        else:
            assert gguf_files._BLOCKS[kind] == (kind.name, count, width)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused("perplexity", tiny, "--text", text)
    install = install_command("transformers", "gguf")
    assert f"this command needs {package}: {install}" in message
    assert run("inspect", tiny).exit_code == 0
    with pytest.raises(ModuleNotFoundError, match=f"a GGUF file needs {package}: pip install"):
        read_model(tiny)


# Damage


def test_damaged_files_end_in_one_line(tiny: Path, text: Path) -> None:
    file = tiny / "tiny.gguf"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

    def changed(at: int, code: str, value: int) -> bytes:
        put = struct.pack(f"<{code}", value)
        return whole[:at] + put + whole[at + len(put) :]

    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    scores = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    name = whole.index(b"output_norm.weight") + len(b"output_norm.weight")
    for content, said in (
        (whole[:-50], "blk.1.ffn_norm.weight is cut off"),
        (whole[:100], "must be a complete GGUF file, but it is cut off"),
        (b"", "must be a GGUF file, got other contents"),
        (b"GGML" + whole[4:], "must be a GGUF file, got other contents"),
        (pointer, "must hold the data itself, got a pointer of git-lfs"),
        (changed(4, "I", 1), "of version 2 or 3, got version 1"),
        (changed(4, "I", 3 << 24), "must be a little-endian GGUF file"),
        (changed(8, "Q", 2**60), "must have names of at most 4096 characters"),
        (changed(16, "Q", 2**60), "must be a complete GGUF file"),
        (changed(tokens, "I", 77), "metadata of types of GGUF, got type 77"),
        (changed(tokens + 8, "Q", 2**62), "must be a complete GGUF file"),
        (changed(scores + 8, "Q", 2**62), "must be a complete GGUF file"),
        (changed(name, "I", 99), "at most 8 axes for each tensor, got 99 for output_norm.weight"),
        (changed(name + 4, "Q", 2**62), "is cut off"),
        (changed(name + 12, "I", 33), "tensors of known types, got 33 for output_norm.weight"),
        (changed(name + 12, "I", 12), "whole blocks of 256 entries, got (32,) of Q4_K"),
        (changed(name + 16, "Q", 0), "must hold tensors that do not overlap"),
    ):
        file.write_bytes(content)
        for message in (
            refused("inspect", file),
            refused("perplexity", tiny, "--text", text),
            refused("prune", tiny, "--calibration", text, "--out", tiny.with_name("out"), *SHORT),
        ):
            assert said in message
            assert message.count("\n") == 1
    assert not tiny.with_name("out").exists()


def test_parts_and_files_without_a_weight_are_refused(tiny: Path, text: Path) -> None:
    prune = ["prune", tiny, "--calibration", text, "--out", tiny.with_name("out"), *SHORT]
    part = tiny / "tiny-00001-of-00002.gguf"
    (tiny / "tiny.gguf").rename(part)
    assert "got a part of a model, tiny-00001-of-00002.gguf: merge" in refused(*prune)
    model: Any = llama()
    model.config.num_hidden_layers = 3
    model.model.layers.append(model.model.layers[0])
    part.unlink()
    write_gguf(tiny / "tiny.gguf", model)
    whole = (tiny / "tiny.gguf").read_bytes()
    (tiny / "tiny.gguf").write_bytes(whole.replace(b"blk.2.ffn_up", b"blk.9.ffn_up"))
    message = failed(*prune)
    assert "got no model.layers.2.mlp.up_proj.weight (1 missing)" in message


def test_plain_types_are_mapped_without_reading_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), "BF16")
    found = {tensor.name: tensor for tensor in read_tensors(tmp_path / "tiny.gguf")}
    stored = found["blk.0.ffn_down.weight"].array
    assert stored is not None
    bits = torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16)
    wanted = llama().model.layers[0].mlp.down_proj.weight.bfloat16()
    assert torch.equal(bits, wanted)
