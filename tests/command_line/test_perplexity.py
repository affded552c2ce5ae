"""The command `perplexity`: windows, scores and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import TEXT, byte_tokenizer, config, refused, run

from safe_core.command_line.model_folder import chosen_device
from safe_core.command_line.perplexity import perplexity


def log_likelihoods(model: Any, ids: torch.Tensor) -> np.ndarray:
    """log p(token i + 1 | tokens up to i) in float64, written out."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double().numpy()
    top = logits.max(axis=1, keepdims=True)
    normal = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return normal[np.arange(len(ids) - 1), ids[1:].numpy()]


def test_perplexity_is_that_of_separate_windows(folder: Path, text: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    assert len(ids) == len(TEXT)
    windows = [ids[i : i + 48] for i in range(0, len(ids) - 47, 48)]
    wanted = np.concatenate([log_likelihoods(model, w) for w in windows])
    result = run("perplexity", folder, "--text", text, "--length", 48, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["loss"] == pytest.approx(-wanted.mean(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(-wanted.mean()), rel=1e-5)
    assert found["predictions"] == len(wanted) == 47 * len(windows)
    assert (found["windows"], found["unused"]) == (len(windows), len(ids) - 48 * len(windows))
    means = np.asarray([-log_likelihoods(model, w).mean() for w in windows])
    error = found["perplexity"] * means.std(ddof=1) / math.sqrt(len(windows))
    assert found["standard_error"] == pytest.approx(error, rel=1e-3)
    several = perplexity(model, ids, 48, batch_size=5)
    assert several.loss == pytest.approx(found["loss"], rel=1e-4)  # products in bfloat16
    line = run("perplexity", folder, "--text", text, "--length", 48, "--device", "cpu").stdout
    assert line.startswith(f"perplexity {found['perplexity']:.4f} ± {error:.2g} (loss ")
    assert f" of {folder} on {text.name}, " in line
    assert perplexity(model, ids[:48], 48).standard_error is None
    # Published programs multiply the mean of a window by its length, and divide by all lengths.
    scaled = [48 * log_likelihoods(model, w).mean() for w in windows]
    assert -sum(scaled) / (48 * len(windows)) == pytest.approx(found["loss"], rel=1e-6)


def test_progress_in_a_log(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("perplexity", folder, "--text", text, "--length", 32, "--device", "cpu")
    assert " left" not in run(*arguments).stderr  # it is done at once
    monkeypatch.setattr("safe_core.command_line.progress_bar._SILENCE", 0.0)
    result = run(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.endswith(" left")]
    assert 5 < len(lines) <= 20
    assert " windows, 0:0" in lines[0]
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("stride", [1, 7, 31, 32])
def test_overlapping_windows_score_each_token_once(folder: Path, stride: int) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").train()
    ids = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])[:150]
    found = perplexity(model, ids, 33, stride, batch_size=4)
    scored, wanted, start = set(), [], 0
    while True:  # as a reader of the protocol would write it
        start = min(start, len(ids) - 33)
        window = log_likelihoods(model.eval(), ids[start : start + 33])
        for place, value in enumerate(window, start=start + 1):
            if place not in scored:
                scored.add(place)
                wanted.append(value)
        if start + 33 == len(ids):
            break
        start += stride
    assert scored == set(range(1, 150))
    assert found.predictions == len(wanted) == 149
    assert found.loss == pytest.approx(-np.mean(wanted), rel=1e-3)
    assert found.unused == 0
    assert 0 < (found.standard_error or 0) < found.perplexity


def lambda_module(value: float) -> torch.nn.Module:
    """A model with the same logit everywhere."""
    module = torch.nn.Module()
    module.forward = lambda ids: torch.full((*ids.shape, 9), value)
    return module


def test_an_encoder_is_refused_before_a_head_is_made_up(tmp_path: Path, text: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    message = refused("perplexity", tmp_path / "bert", "--text", text)
    assert "must hold a causal language model, got BertModel, which predicts no next" in message


def test_perplexity_refuses_what_it_cannot_measure(folder: Path, text: Path) -> None:
    def measure(*more: object, model: Path = folder, file: Path = text) -> str:
        return refused("perplexity", model, "--text", file, "--device", "cpu", *more)

    assert "at most the model's 64 positions, got 65" in measure("--length", 65)
    assert "length must be at least 2" in measure("--length", 1)
    assert "stride must be at most --length 8, got 9" in measure("--length", 8, "--stride", 9)
    assert "must be an existing local folder" in measure(model=folder / "nowhere")
    bare = text.parent / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    message = measure(model=bare)
    assert "copy the tokenizer's files from the folder of the original model, or call " in message
    assert message.endswith(f"tokenizer.save_pretrained('{bare}') in Python\n")
    short = text.with_name("short.txt")
    short.write_text("abc")
    shorter = "at least one window of --length 64, got 3: use a longer text or a smaller --length\n"
    assert shorter in measure("--length", 64, file=short)
    short.write_text(" \n")
    assert "must hold text" in measure(file=short)
    short.write_bytes(b"\xff\xfe")
    assert "UTF-8" in measure(file=short)
    assert "must exist" in measure(file=text.with_name("nowhere"))
    with pytest.raises(ValueError, match="finite log likelihoods"):
        perplexity(lambda_module(math.nan), torch.arange(9), 3)
    small = transformers.LlamaForCausalLM(config())
    with pytest.raises(ValueError, match="tokenizer is that of another model"):
        perplexity(small, torch.arange(250, 260), 3)
    for wrong, got in (
        (torch.zeros(9), r"torch\.float32 of shape \(9,\)"),
        (torch.zeros(1, 9, dtype=torch.int64), r"torch\.int64 of shape \(1, 9\)"),
        ([1, 2], "<class 'list'>"),
    ):
        with pytest.raises(TypeError, match=f"integer tensor with one axis, got {got}"):
            perplexity(torch.nn.Linear(1, 1), wrong)


@pytest.mark.parametrize(
    ("found", "chosen"), [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda"), ("xpu", "xpu")]
)
def test_auto_is_a_device_with_float64(
    monkeypatch: pytest.MonkeyPatch, found: str | None, chosen: str
) -> None:
    device = None if found is None else torch.device(found)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **options: device)
    assert chosen_device("auto") == torch.device(chosen)
