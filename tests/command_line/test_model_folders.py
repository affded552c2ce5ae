"""Folders of models: damaged, quantised and hostile ones are refused before work starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import SHORT, byte_tokenizer, config, refused, run
from safetensors.torch import load_file, save_file

from safe_core.command_line.model_folder import load_model, read_model
from safe_core.command_line.perplexity import check_length


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def changed_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def both(folder: Path, text: Path) -> list[str]:
    """The messages of the commands that load a model; prune must not begin."""
    out = folder.with_name("out")
    messages = [
        refused("perplexity", folder, "--text", text, "--length", 32, "--device", "cpu"),
        refused("prune", folder, "--calibration", text, "--out", out, *SHORT),
    ]
    assert not out.exists()
    for message in messages:
        assert message.count("\n") == 1
        assert "Traceback" not in message
    return messages


# Damage


def test_damaged_files_end_in_one_line(copy: Path, text: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, said in (
        (whole[:-50], "is cut off"),
        (whole[:100], "must be a complete safetensors file"),
        (b"", "must be a complete safetensors file"),
        (pointer, "model.safetensors must hold the data itself, got a pointer of git-lfs"),
    ):
        weights.write_bytes(content)
        for message in (*both(copy, text), refused("inspect", copy)):
            assert said in message
    weights.write_bytes(whole)
    for name, content, said in (
        ("config.json", pointer, "got a pointer of git-lfs"),
        ("config.json", b"{", "config.json must be a JSON file"),
        ("config.json", b"[1]", "config.json must be a JSON object"),
        ("tokenizer.json", pointer, "got a pointer of git-lfs"),
        ("tokenizer.json", b'{"model": 3}', "the tokenizer in"),
    ):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        for message in both(copy, text):
            assert said in message
        (copy / name).write_bytes(kept)


def test_shapes_that_differ_are_named(copy: Path, text: Path) -> None:
    changed_config(copy, intermediate_size=48)
    for message in both(copy, text):
        assert "weights of the shapes that its config.json asks for, got (16, 32) for" in message
        assert "down_proj.weight instead of (16, 48)" in message


def test_shards_and_index_that_disagree(copy: Path, text: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    last = sorted(tensors)[-1]
    save_file({k: v for k, v in tensors.items() if k != last}, copy / "one.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "one.safetensors")}))
    for message in (*both(copy, text), refused("inspect", copy)):
        assert f"one.safetensors must hold {last}, as its index says, but does not" in message
    shutil.copy(copy / "one.safetensors", copy.parent / "one.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../one.safetensors")}))
    for message in (*both(copy, text), refused("inspect", copy)):
        assert "must name shards inside its folder" in message


def test_checkpoints_of_torch_are_pruned_and_checked(
    copy: Path, text: Path, tmp_path: Path
) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    out = tmp_path / "sparse"
    result = run("prune", copy, "--calibration", text, "--out", out, *SHORT, "--method", "wanda")
    assert result.exit_code == 0, result.output
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[:-200])
    for message in (*both(copy, text), refused("inspect", copy)):
        assert "pytorch_model.bin must be a complete PyTorch checkpoint" in message
    (copy / "pytorch_model.bin").write_bytes(b"hello world")
    for message in (*both(copy, text), refused("inspect", copy)):
        assert "must be a safetensors file or a PyTorch checkpoint" in message


def test_missing_weights_are_named(copy: Path, text: Path) -> None:
    changed_weights(copy, lambda tensors: tensors.pop("model.norm.weight"))
    for message in both(copy, text):
        assert "all weights of a LlamaForCausalLM, got no model.norm.weight (1 missing)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copy: Path, text: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    changed_weights(copy, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    for message in both(copy, text):
        assert f"must hold finite weights, got NaN or infinity in {name}" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_fifos_in_a_folder_are_refused(copy: Path, text: Path) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(copy / "generation_config.json")
    for message in both(copy, text):
        assert "generation_config.json must be a regular file" in message


# Quantised


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_models_are_refused_before_work_starts(
    copy: Path, text: Path, nested: bool
) -> None:
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    changed_config(copy, **({"text_config": quantised} if nested else quantised))
    message = refused("prune", copy, "--calibration", text, "--out", copy / "out", *SHORT)
    assert "16 bits or more, got" in message
    assert "quantised by mxfp4" in message
    assert "dequantised" in message


def test_weights_of_8_bits_without_a_configuration_are_refused(copy: Path, text: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    changed_weights(copy, change)
    out = copy.with_name("out")
    message = refused("prune", copy, "--calibration", text, "--out", out, *SHORT)
    assert f"16 bits or more, got F8_E4M3 for {name}" in message
    assert not out.exists()


# What a configuration cannot do


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_a_configuration_names_is_not_fetched(
    copy: Path, text: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    changed_config(copy, **{key: "somebody/attention"})
    fetched: list[Any] = []

    def fetch(*arguments: Any, **options: Any) -> None:
        fetched.append(arguments)
        raise ImportError("a kernel of the hub")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetch)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    result = run("perplexity", copy, "--text", text, "--length", 32, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert not fetched
    loaded = load_model(copy)
    assert loaded.config._attn_implementation in ("sdpa", "eager")


def test_the_dtype_of_the_files_wins_over_the_configuration(
    copy: Path, text: Path, tmp_path: Path
) -> None:
    changed_config(copy, dtype="float32", torch_dtype="float32")
    assert {p.dtype for p in load_model(copy).parameters()} == {torch.bfloat16}
    changed_config(copy, dtype="float16")
    out = tmp_path / "out"
    prune = ["prune", copy, "--calibration", text, *SHORT, "--method", "magnitude", "--out", out]
    result = run(*prune)
    assert result.exit_code == 0, result.output
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    shutil.rmtree(out)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    changed_weights(copy, widen)
    result = run(*prune)
    assert result.exit_code == 0, result.output
    assert (
        "note: 1 tensors are loaded in another dtype than that of the files, such as "
        "model.norm.weight in bfloat16 instead of float32"
    ) in result.stderr


def test_tensors_that_the_model_does_not_use_are_told(copy: Path) -> None:
    changed_weights(copy, lambda tensors: tensors.update({"tower.w": torch.ones(2, 2)}))
    (note,) = read_model(copy).notes
    assert "1 tensors of the files are no part of a LlamaForCausalLM, such as tower.w" in note


# Positions


@pytest.mark.parametrize(
    ("made", "limit"),
    [
        (lambda: transformers.GPT2Config(n_positions=24, n_embd=8, n_head=1, n_layer=1), 24),
        (lambda: transformers.LlavaConfig(text_config=config().to_dict()), 64),
        (lambda: transformers.MptConfig(max_seq_len=48, d_model=8, n_heads=1, n_layers=1), 48),
        (lambda: transformers.WhisperConfig(max_target_positions=40), 40),
        (lambda: transformers.T5Config(), None),
    ],
)
def test_limits_of_positions_in_every_spelling(made: Any, limit: int | None) -> None:
    model = torch.nn.Module()
    model.config = made()
    if limit is None:
        check_length(model, 4096)
        return
    check_length(model, limit)
    with pytest.raises(ValueError, match=f"at most the model's {limit} positions"):
        check_length(model, limit + 1)


def test_a_window_that_the_model_cannot_take_is_no_traceback(tmp_path: Path, text: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    roberta = transformers.RobertaConfig(
        vocab_size=256, num_hidden_layers=1, max_position_embeddings=34, pad_token_id=1, **sizes
    )
    transformers.RobertaModel(roberta).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    message = refused(
        "prune", tmp_path / "model", "--calibration", text, "--out", tmp_path / "out",
        "--samples", 2, "--length", 34,
    )  # fmt: skip
    assert "RobertaModel must run on a window of 34 tokens, but fails: index 34" in message
