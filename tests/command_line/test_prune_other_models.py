"""The command `prune` on encoders, and on models of images and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import SHORT, byte_tokenizer, failed, refused, run
from safetensors.torch import save_file

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def vit() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_hidden_layers=2, **SIZES)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(6, 3, 8, 8)}


def clip() -> tuple[Any, dict[str, torch.Tensor]]:
    vision = dict(image_size=8, patch_size=4, num_hidden_layers=2, projection_dim=8, **SIZES)
    text = dict(vocab_size=64, num_hidden_layers=1, max_position_embeddings=8, projection_dim=8,
                **SIZES)  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    inputs = {
        "input_ids": torch.randint(3, 60, (6, 8)),
        "pixel_values": torch.randn(6, 3, 8, 8),
    }
    return transformers.CLIPModel(config), inputs


def wav2vec2() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.Wav2Vec2Config(
        num_hidden_layers=2, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=32, **SIZES,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(6, 400)}


def convnext() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 2, 1])
    return transformers.ConvNextModel(config), {"pixel_values": torch.randn(6, 3, 32, 32)}


def t5() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.T5Config(
        vocab_size=256, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    ids = torch.randint(3, 250, (6, 12))
    model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("make", "blocks", "weight"),
    [
        (vit, None, "mlp.fc1.weight"),
        (clip, "vision_model.encoder.layers", "mlp.fc1.weight"),
        (wav2vec2, None, "intermediate_dense.weight"),
        (convnext, "encoder.stages.2.layers", "pwconv1.weight"),
        (t5, "encoder.block", "wi.weight"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_models_that_take_no_text_are_pruned_with_inputs(
    tmp_path: Path, make: Any, blocks: str | None, weight: str, suffix: str
) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    file = tmp_path / f"inputs{suffix}"
    if suffix == ".npz":
        np.savez(file, **{name: x.numpy() for name, x in inputs.items()})
    else:
        save_file({name: x.contiguous() for name, x in inputs.items()}, file)
    out = tmp_path / "out"
    chosen = [] if blocks is None else ["--blocks", blocks]
    result = run(
        "prune", tmp_path / "model", "--inputs", file, "--out", out, "--sparsity", "2:4",
        "--method", "wanda", "--samples", 4, *chosen,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    loaded = type(model).from_pretrained(out)
    found = [p for name, p in loaded.named_parameters() if name.endswith(weight)]
    pruned = [p for p in found if bool((p == 0).any())]
    assert len(pruned) == 2
    assert all(bool(((p.reshape(-1, 4) != 0).sum(-1) == 2).all()) for p in pruned)
    assert (out / "preprocessor_config.json").is_file()
    card = (out / "README.md").read_text()
    assert "At most 4 rows of the inputs in" in card
    assert f"| inputs{suffix} |" in card


def test_an_encoder_is_pruned_with_a_text(tmp_path: Path, text: Path) -> None:
    config = transformers.BertConfig(vocab_size=256, num_hidden_layers=2, **SIZES)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    result = run(
        "prune", tmp_path / "bert", "--calibration", text, "--out", tmp_path / "out", *SHORT,
        "--method", "wanda",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    weight = loaded.bert.encoder.layer[1].output.dense.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_a_text_for_a_model_that_takes_other_arguments(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    model, _ = vit()
    model.save_pretrained(tmp_path / "model")
    prune = ["prune", tmp_path / "model", "--out", tmp_path / "out", *SHORT]
    message = refused(*prune, "--calibration", text)
    assert "must hold a tokenizer" in message
    assert "--inputs" in message
    byte_tokenizer().save_pretrained(tmp_path / "model")
    message = refused(*prune, "--calibration", text)
    assert "ViTModel must run on a window of 32 tokens, but fails: " in message
    assert (
        "pass --inputs with arrays named after its arguments, pixel_values, bool_masked_pos"
        in message
    )
    assert "safe_core.adapters.transformers.prune_blocks" in message
    assert not (tmp_path / "out").exists()


def test_blocks_that_form_no_chain_are_no_traceback(tmp_path: Path) -> None:
    model, inputs = convnext()
    model.save_pretrained(tmp_path / "model")
    save_file(inputs, tmp_path / "inputs.safetensors")
    message = failed(
        "prune", tmp_path / "model", "--inputs", tmp_path / "inputs.safetensors", "--out",
        tmp_path / "out", "--method", "magnitude",
    )  # fmt: skip
    assert message.startswith("safe-core: blocks must return hidden states of the shape and")
    assert "in ConvNextModel; choose other blocks with --blocks, such as encoder." in message
    assert "encoder.stages.2.layers" in message


@pytest.mark.parametrize(
    ("make", "blocks", "others"),
    [
        (clip, "vision_model.encoder.layers", "text_model.encoder.layers"),
        (t5, "decoder.block", "encoder.block"),
        (
            convnext,
            "encoder.stages.2.layers",
            "encoder.stages.0.layers, encoder.stages.1.layers, encoder.stages.3.layers",
        ),
        (vit, None, None),
    ],
)
def test_lists_of_blocks_that_are_not_pruned_are_named(
    tmp_path: Path, make: Any, blocks: str | None, others: str | None
) -> None:
    model, inputs = make()
    model.save_pretrained(tmp_path / "model")
    save_file({n: x.contiguous() for n, x in inputs.items()}, tmp_path / "inputs.safetensors")
    chosen = [] if blocks is None else ["--blocks", blocks]
    result = run(
        "prune", tmp_path / "model", "--inputs", tmp_path / "inputs.safetensors", "--out",
        tmp_path / "out", "--method", "magnitude", "--samples", 4, *chosen,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    note = f"note: only {blocks} is pruned, not {others}; --blocks chooses\n"
    assert (note in result.stderr) == (others is not None)
    assert ("note: only" in result.stderr) == (others is not None)


def test_inputs_are_checked(folder: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "inputs.npz"

    def message(*more: object, given: Path = file) -> str:
        return refused("prune", folder, "--inputs", given, "--out", tmp_path / "out", *more)

    assert "got both" in message("--calibration", text)
    assert "got neither" in refused("prune", folder, "--out", tmp_path / "out")
    assert "inputs must be an existing file" in message()
    np.savez(file, a=np.zeros((2, 3), "f4"), b=np.zeros((3, 3), "f4"))
    assert "as many rows each, got a with 2, b with 3" in message()
    np.savez(file, a=np.asarray([{}], dtype=object))
    assert "must be a complete .npz file of numbers" in message()
    np.savez(file, a=np.zeros((0, 3), "f4"))
    assert "got a with 0" in message()
    file.write_bytes(file.read_bytes()[:50])
    assert "must be a complete .npz file of numbers" in message()
    other = tmp_path / "inputs.pt"
    other.touch()
    assert "must be a .safetensors or .npz file" in message(given=other)
    np.savez(file, images=np.zeros((2, 3), "f4"))
    found = message()
    assert "LlamaForCausalLM must run on a row of inputs.npz, but fails" in found
    assert "Its signature does not name images. Its arguments are input_ids, " in found
    np.savez(file, inputs_embeds=np.full((2, 3, 16), np.nan, "f4"))
    assert "must be finite, got NaN or infinity in inputs_embeds of" in message()
    np.savez(file, input_ids=np.full((2, 8), 256))
    assert "below 256, got 256" in message()
