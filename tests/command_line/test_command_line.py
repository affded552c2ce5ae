"""The command line on a small model: inspect, perplexity and prune, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tracemalloc
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from array_backends import bits
from safetensors.numpy import save_file
from sparse_arrays import grouped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from safe_core import Unstructured
from safe_core.adapters.transformers import PruningSettings, calibration_batches
from safe_core.command_line.app import app
from safe_core.command_line.checkpoint_files import read_tensors
from safe_core.command_line.inspection import inspect_checkpoint
from safe_core.command_line.model_folder import chosen_device
from safe_core.command_line.perplexity import perplexity
from safe_core.command_line.pruning import PruningJob
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import named_solvers

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(120))
SHORT = ["--samples", "4", "--length", "32"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that must fail, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("safe-core: ")
    return result.stderr


def byte_tokenizer() -> Any:
    """A token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


def config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16, and a text beside it."""
    path = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config()).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# Files


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
    assert "got nothing" in refused("inspect", tmp_path / "nowhere")
    assert "must hold weights" in refused("inspect", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"w": np.ones((8, 8), "f4")}, file)
    whole = file.read_bytes()
    for broken, message in (
        (whole[:-4], "w cut off"),
        (whole[:20], "whole safetensors file"),
        (b"", "whole safetensors file"),
        (whole[:8] + b"[" + whole[9:], "header of safetensors"),
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
        ({"shape": [1] * 70 + [4]}, "shapes that an array can have"),
        ({"shape": [0, 2**70], "data_offsets": [0, 0]}, "shapes that an array can have"),
    ):
        file.write_bytes(with_header({"w": good | broken}))
        found = refused("inspect", file)
        assert message in found
        assert "for w" in found
        assert str(file) in found
    for broken in ({"w": 3}, {"w": {}}, {"w": [1]}):
        file.write_bytes(with_header(broken))
        assert "for w" in refused("inspect", file)
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


# Perplexity


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
    several = perplexity(model, ids, 48, batch_size=5)
    assert several.loss == pytest.approx(found["loss"], rel=1e-4)  # products in bfloat16
    line = run("perplexity", folder, "--text", text, "--length", 48, "--device", "cpu").stdout
    assert line.startswith(f"perplexity {found['perplexity']:.4f} ")
    # Published programs multiply the mean of a window by its length, and divide by all lengths.
    scaled = [48 * log_likelihoods(model, w).mean() for w in windows]
    assert -sum(scaled) / (48 * len(windows)) == pytest.approx(found["loss"], rel=1e-6)


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
    for message in (
        refused("perplexity", tmp_path / "bert", "--text", text),
        refused("prune", tmp_path / "bert", "--calibration", text, "--sparsity", "2:4",
                "--out", tmp_path / "out", *SHORT),
    ):  # fmt: skip
        assert "must hold a causal language model, got BertModel" in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_told(folder: Path, text: Path, tmp_path: Path) -> None:
    result = run(
        "prune", folder, "--calibration", text, "--sparsity", "0.5", "--out", tmp_path / "out",
        "--method", "safe", "--epochs", 2, "--learning-rate", 50, "--device", "cpu", *SHORT,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "differ from the dense model by more than their whole output" in result.output


def test_perplexity_refuses_what_it_cannot_measure(folder: Path, text: Path) -> None:
    def measure(*more: object, model: Path = folder, file: Path = text) -> str:
        return refused("perplexity", model, "--text", file, "--device", "cpu", *more)

    assert "at most the model's 64 positions, got 65" in measure("--length", 65)
    assert "length must be at least 2" in measure("--length", 1)
    assert "stride must be at most length=8, got 9" in measure("--length", 8, "--stride", 9)
    assert "must be a local folder" in measure(model=folder / "nowhere")
    short = text.with_name("short.txt")
    short.write_text("abc")
    assert "at least length=64 for one window, got 3" in measure("--length", 64, file=short)
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
        with pytest.raises(TypeError, match=f"integer tensor of one axis, got {got}"):
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


# Pruning


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [("safe+", "2:4"), ("safe", "0.29"), ("wanda", "0.5"), ("magnitude", "4:8"),
     ("sparsegpt", "0.5"), ("alps", "2:4")],
)  # fmt: skip
def test_prune_saves_a_sparse_model(
    folder: Path, text: Path, tmp_path: Path, method: str, sparsity: str
) -> None:
    out = tmp_path / "new" / "out"
    epochs = ["--epochs", 1] if method.startswith("safe") else []
    result = run(
        "prune", folder, "--calibration", text, "--out", out, "--method", method, *SHORT,
        "--sparsity", sparsity, *epochs,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    inspected = {x.name: x.analysis for x in inspect_checkpoint(out).tensors}
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        zeros = int((p == 0).sum())
        assert inspected[name].zeros == zeros
        if "_proj" not in name:
            assert zeros == 0
            assert method.startswith("safe") or torch.equal(p, q)
        elif ":" in sparsity:
            n, m = map(int, sparsity.split(":"))
            kept = (p.reshape(len(p), -1, m) != 0).sum(dim=-1)
            assert (kept == n).all()
        else:
            rows = 16 if method == "wanda" else None  # compared within outputs
            n = p.shape[1] if rows else p.numel()
            wanted = n * round(100 * float(sparsity)) // 100
            counts = (p == 0).sum(dim=1) if rows else (p == 0).sum()[None]
            assert (counts == wanted).all()
        assert p.dtype == torch.bfloat16
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
    assert list(out.parent.iterdir()) == [out]  # nothing is left of the draft
    card = (out / "README.md").read_text()
    for part in (
        hashlib.sha256(TEXT.encode()).hexdigest(), "4 windows of 32 tokens",
        version("transformers"), version("torch"), *CARDS[method],
    ):  # fmt: skip
        assert part in card
    settings = card.partition("## Calibration")[0]
    assert not any(python in settings for python in ("=", "None", "NM(", "Unstructured"))
    assert result.stdout.splitlines()[-1] == f"saved in {out}"
    assert "block 2 of 2, loss" in result.stderr
    (row,) = [x for x in result.stdout.splitlines() if x.startswith("model.layers.1.mlp.down_proj")]
    name = "model.layers.1.mlp.down_proj.weight"
    assert row.split()[4:6] == ["512", str(inspected[name].zeros)]


SAFE = [
    "(rho) | 0.0002 |", "| constraint | ADMM |", "(lambda) | 0.001 |", "(K) | 32 |",
    "| epochs | 1 |", "up epochs | 0 |",
    "| peak learning rate | 0.0002 |", "| optimizer | Adam, betas 0.9 and 0.95 |",
    "| batch | 8 samples |", "| inputs of a block | outputs of the pruned blocks before it |",
    "| targets of a block | its dense outputs for the outputs of the pruned blocks before it |",
]  # fmt: skip
CARDS = {
    "safe+": [
        *SAFE,
        "| method | safe+ |",
        "| requested sparsity | 2:4 |",
        "| magnitude times norm of input |",
    ],
    "safe": [*SAFE, "| method | safe |", "| 0.29, scope tensor |", "| magnitude |"],
    "wanda": ["| method | wanda |", "| solver | Wanda |", "| 0.5, scope row |"],
    "magnitude": ["| solver | Magnitude |", "| requested sparsity | 4:8 |"],
    "sparsegpt": ["| solver | SparseGPT |", "| block size | 128 |", "| damping | 0.01 |"],
    "alps": ["| solver | ALPS |", "| iterations | 300 |", "| seed | 0 |"],
}


def test_prune_goes_on_and_repeats_itself(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune(out: str, *more: object) -> Result:
        return run(
            "prune", folder, "--calibration", text, "--out", tmp_path / out, *SHORT,
            "--method", "safe+", "--epochs", 1, "--seed", 3, *more,
        )  # fmt: skip

    work = ["--work-dir", tmp_path / "work", "--offload", "disk"]
    whole = transformers.PreTrainedModel.save_pretrained

    def fail(self: Any, path: Any) -> None:
        whole(self, path)
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    result = prune("one", *work)
    assert (result.exit_code, "no space left" in result.stderr) == (1, True)
    assert not (tmp_path / "one").exists()
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    assert prune("one", *work).exit_code == prune("two").exit_code == 0
    files = [tmp_path / out / "model.safetensors" for out in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_finished_model_is_not_lost(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", transformers.PreTrainedModel.save_pretrained
    prune = ["prune", folder, "--calibration", text, *SHORT, "--method", "magnitude", "--out"]

    def meanwhile(self: Any, path: Any) -> None:
        save(self, path)
        text.unlink()
        out.mkdir()
        (out / "file").touch()

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", meanwhile)
    result = run(*prune, out)
    (kept,) = tmp_path.glob(".out.partial-*")
    assert result.exit_code == 1
    assert f"'{out}'\nThe finished" in result.stderr
    assert result.stderr.endswith(f"\nThe finished model is kept in {kept}\n")
    assert [file.name for file in out.iterdir()] == ["file"]
    assert (kept / "model.safetensors").is_file()
    assert hashlib.sha256(TEXT.encode()).hexdigest() in (kept / "README.md").read_text()
    monkeypatch.undo()
    text.write_text(TEXT)
    result = run(*prune, text / "out")
    assert result.exit_code == 1
    assert "out must be where a folder can be made" in result.stderr
    assert "block 1 of" not in result.stderr  # found before anything is pruned


def test_settings_reach_the_pruning(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    other = text.with_name("other.txt")
    other.write_text(TEXT[::-1])

    def stop(model: Any, batches: Any, solver: Any, sparsity: Any, **settings: Any) -> None:
        seen.update(settings, batches=batches, solver=solver, sparsity=sparsity)
        raise ValueError("stop")

    monkeypatch.setattr("safe_core.command_line.pruning.plan_pruning", stop)
    message = refused(
        "prune", folder, "--calibration", text, "--calibration", other, "--out", tmp_path / "out",
        *SHORT, "--sparsity", "0.25", "--scope", "row", "--seed", 7, "--epochs", 9, "--batch-size",
        3, "--learning-rate", 0.5, "--target-inputs", "dense", "--propagate", "dense",
        "--offload", "none", "--work-dir", tmp_path / "work", "--device", "cpu", "--blocks",
        "model.layers", "--only", r"layers\.1\..*up", "--rho", 0.01, "--penalty", 0.1,
        "--dual-update-interval", 5,
    )  # fmt: skip
    assert message == "safe-core: stop\n"
    batches = seen.pop("batches")
    wanted = calibration_batches(byte_tokenizer(), [TEXT, TEXT[::-1]], samples=4, length=32, seed=7)
    assert torch.equal(batches, wanted)
    where = seen["settings"].where
    assert where("model.layers.1.mlp.up_proj.weight", None)
    assert not where("model.layers.0.mlp.up_proj.weight", None)
    assert seen == {
        "solver": Reconstruction(
            importance="wanda", epochs=9, batch_size=3, learning_rate=0.5, rho=0.01, penalty=0.1,
            dual_update_interval=5,
        ),
        "sparsity": Unstructured(0.25, scope="row"),
        "settings": PruningSettings(
            target_inputs="dense",
            propagate="dense",
            batch_size=3,
            seed=7,
            blocks="model.layers",
            where=where,
            device=torch.device("cpu"),
            offload="none",
            work_dir=tmp_path / "work",
        ),
    }  # fmt: skip


OWN_SOLVER = """
from dataclasses import dataclass
import safe_core
from safe_core.solvers import LayerSolver

@dataclass(frozen=True)
class Own(LayerSolver):
    name, needs, default_scope = "own", "nothing", "row"
    power: float = 2.0

    def __call__(self, weight, statistics, sparsity, /, *, layout=None):
        assert statistics is None
        return safe_core.project(weight, sparsity, layout=layout)

def function(weight, gram, sparsity, *, layout):
    return safe_core.project(weight, sparsity, importance=gram.diagonal(), layout=layout)

constant = 3
"""


def test_a_solver_of_ones_own_prunes(folder: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN_SOLVER)
    prune = ["prune", folder, "--calibration", text, *SHORT, "--sparsity", "0.5", "--only", "mlp"]
    for name, settings in (("Own", ["| power | 2.0 |"]), ("function", [])):
        out = tmp_path / name
        result = run(*prune, "--out", out, "--method", f"{file}:{name}")
        assert result.exit_code == 0, result.output
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        for key, p in model.named_parameters():
            if "mlp" not in key:
                assert bool((p != 0).all())
            else:
                assert int((p == 0).sum()) == p.numel() // 2
                assert name != "Own" or set((p == 0).sum(dim=1).tolist()) == {p.shape[1] // 2}
        card = (out / "README.md").read_text()
        for part in (f"own.py:{name} |", f"| solver | {name} |", "matches `mlp` |", *settings):
            assert part in card
    prune += ["--out", tmp_path / "out", "--method"]
    assert "method must name an object of" in refused(*prune, f"{file}:Missing")
    assert "solver must be a name, a solver such as" in refused(*prune, f"{file}:constant")
    assert "method must name a file or a module that can be run" in refused(
        *prune, tmp_path / "no.py:Own"
    )
    file.write_text("import nothing_of_this_name")
    assert "ModuleNotFoundError" in refused(*prune, f"{file}:Own")
    assert "method must name a file or a module that can be run" in refused(*prune, "no_module:Own")
    assert "only must be a regular expression" in refused(*prune, "wanda", "--only", "(")


def test_prune_refuses_before_it_begins(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def message(*more: object, model: Path = folder, file: Path = text) -> str:
        return refused("prune", model, "--calibration", file, "--out", out, *more)

    for wrong in ("half", "1.0", "-0.1", "2:1", "nan", "50%", "2:", "1e400"):
        assert "fraction in [0, 1) such as 0.5, or N:M" in message("--sparsity", wrong)
    unknown = message("--method", "obd")
    assert all(name in unknown for name in named_solvers())
    assert "file.py:SOLVER" in unknown
    assert "epochs must be left out" in message("--method", "wanda", "--epochs", 3)
    assert "scope must be left out" in message("--sparsity", "2:4", "--scope", "row")
    assert "epochs must be at least 1" in message("--epochs", 0)
    for model, hub in ((tmp_path / "nowhere", "ORGANISATION/NAME"), (Path("own/lm-7.b"),) * 2):
        found = message(model=model)
        assert f"model must be a local folder, got {model}, where there is none" in found
        assert f"`hf download {hub} --local-dir model`" in found
        assert f"huggingface_hub.snapshot_download('{hub}', local_dir='model')" in found
    named = 'by the name that torch has for it, such as "cuda", "cuda:1" or "xpu", got'
    assert message("--device", "gpu").endswith(f"{named} 'gpu'\n")
    assert f"{named} 'cuda:99': " in message("--device", "cuda:99")
    again = text.parent / ".." / text.parent.name / text.name
    assert f"name each file once, got {text} 2 times" in message("--calibration", again)
    assert "length must be at least 2 tokens, so that" in message("--length", 1)
    for inside in (folder, folder / "sparse", folder / ".." / folder.name):
        found = refused("prune", folder, "--calibration", text, "--out", inside, *SHORT)
        assert f"outside of the model's folder, such as {folder}-sparse, got {inside}" in found
    down = "model.layers.0.self_attn.q_proj.weight"
    for groups, instead in (("3:12", "2:8 or 0.75"), ("4:6", "0.333333")):
        found = message("--sparsity", groups, *SHORT)
        assert f"got 16 of {down}: --sparsity {instead} would do" in found
    with pytest.raises(TypeError, match=r"calibration must be a list of files, got 'text\.txt'"):
        PruningJob("model", "text.txt")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert "must hold a tokenizer" in message(model=bare)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "must hold text, got none" in message(file=empty)
    empty.write_text("too short")
    assert "at least 35 tokens" in message(*SHORT, file=empty)
    assert "at most the model's 64 positions" in message("--samples", 2, "--length", 128)
    assert "work_dir must name a folder" in message(*SHORT, "--offload", "disk")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "could not be loaded" in message(*SHORT, model=broken)
    encoder = tmp_path / "encoder"
    byte_tokenizer().save_pretrained(encoder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=256, num_hidden_layers=1, **sizes)
    transformers.BertModel(bert).save_pretrained(encoder)
    result = run("prune", encoder, "--calibration", text, "--out", out, *SHORT)
    assert result.exit_code == 1
    assert "must hold a causal language model, got BertModel" in result.stderr
    assert not out.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Free)
    assert "out must have room for" in message(*SHORT)
    monkeypatch.undo()
    out.mkdir()
    (out / "file").touch()
    assert "new or an empty folder" in message(*SHORT)
    assert [x.name for x in out.iterdir()] == ["file"]


class Free:
    free = 3


OWN_CODE = """
import pathlib
import transformers

(pathlib.Path({marker!r})).touch()

class OwnConfig(transformers.LlamaConfig):
    model_type = "own"

class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_asked(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, marker, out = tmp_path / "own", tmp_path / "executed", tmp_path / "out"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    plain = json.loads((own / "config.json").read_text())
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (own / "config.json").write_text(json.dumps(plain | {"model_type": "own", "auto_map": auto}))
    (own / "own_code.py").write_text(OWN_CODE.format(marker=str(marker)))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(tmp_path / "hf")
    prune = ["prune", own, "--calibration", text, "--out", out, *SHORT, "--method", "magnitude"]
    measure = ["perplexity", own, "--text", text, "--length", 32]
    for command in (prune, measure):
        assert "give --trust-remote-code" in refused(*command)
    assert run("inspect", own).exit_code == 0
    assert not marker.exists()
    for command in (prune, measure):
        result = run(*command, "--trust-remote-code")
        assert result.exit_code == 0, result.output
    assert marker.exists()
    assert (out / "own_code.py").is_file()
    again = run("perplexity", out, "--text", text, "--length", 32, "--trust-remote-code")
    assert again.exit_code == 0, again.output
