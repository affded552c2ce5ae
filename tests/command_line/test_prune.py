"""The command `prune`: the folder that it writes, resuming, settings and refusals."""

from __future__ import annotations

import errno
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import SHORT, TEXT, byte_tokenizer, refused, run
from typer.testing import Result

from safe_core import Unstructured
from safe_core.adapters.transformers import PruningSettings, calibration_batches
from safe_core.command_line.inspection import inspect_checkpoint
from safe_core.command_line.pruning import PruningJob
from safe_core.reconstruction import Reconstruction
from safe_core.solvers import named_solvers

ROOT = Path(__file__).parents[2]


@pytest.mark.every_second
@pytest.mark.parametrize(
    ("method", "sparsity"),
    [("safe", "0.29"), ("safe+", "2:4"), ("safe+-published", "0.5"), ("magnitude", "4:8"),
     ("wanda", "0.5"), ("sparsegpt", "0.5"), ("alps", "2:4")],
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
    assert "block 2 of 2, relative error " in result.stderr
    (row,) = [x for x in result.stdout.splitlines() if x.startswith("model.layers.*.mlp.down_proj")]
    zeros = sum(inspected[f"model.layers.{i}.mlp.down_proj.weight"].zeros for i in range(2))
    assert row.split()[1:7] == ["2", "16", "x", "32", "1,024", f"{zeros:,}"]
    assert "squared error of a block, relative to its outputs: " in result.stdout
    assert "loss" not in result.stderr + result.stdout


TRAINED = ["| epochs | 1 |", "up epochs | 0 |"]
SAFE = [
    *TRAINED, "| starts at | the solution of alps |", "(rho) | none |", "| constraint | Pull |",
    "(lambda) | 0 to 0 (", "(K) | 1 |", "| steps | 1 |",
    "rate | 0.01 times the root mean square of the weights |",
    "| optimizer | Adam, betas 0.9 and 0.95 |",
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
    "safe+-published": [
        *TRAINED,
        "| starts at | the dense weights |",
        "(rho) | 0.0002 |",
        "| constraint | ADMM |",
        "(lambda) | 0.001 |",
        "(K) | 32 |",
        "rate | 0.0002 |",
        "| method | safe+-published |",
    ],
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
    (kept,) = tmp_path.glob("out.kept-*")
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
    assert "out must be a folder that can be created" in result.stderr
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

    monkeypatch.setattr("safe_core.command_line.preparation.plan_pruning", stop)
    message = refused(
        "prune", folder, "--calibration", text, "--calibration", other, "--out", tmp_path / "out",
        *SHORT, "--sparsity", "0.25", "--scope", "row", "--seed", 7, "--epochs", 9, "--batch-size",
        3, "--learning-rate", 0.5, "--target-inputs", "dense", "--propagate", "dense",
        "--offload", "none", "--work-dir", tmp_path / "work", "--device", "cpu", "--blocks",
        "model.layers", "--only", r"layers\.1\..*up", "--rho", 0.01, "--penalty", 0.1,
        "--dual-update-interval", 5, "--start", "sparsegpt",
    )  # fmt: skip
    assert "must run on a window of 32 tokens, but fails: stop" in message
    batches = seen.pop("batches")
    wanted = calibration_batches(byte_tokenizer(), [TEXT, TEXT[::-1]], samples=4, length=32, seed=7)
    assert torch.equal(batches, wanted)
    where = seen["settings"].where
    assert where("model.layers.1.mlp.up_proj.weight", None)
    assert not where("model.layers.0.mlp.up_proj.weight", None)
    assert seen == {
        "solver": Reconstruction(
            importance="wanda", epochs=9, batch_size=3, learning_rate=0.5, rho=0.01, penalty=0.1,
            dual_update_interval=5, start="sparsegpt",
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

    for wrong in ("half", "1.0", "-0.1", "2:1", "nan", "50%", "2:", "1e400", "", "."):
        assert "a fraction such as 0.5, N:M such as 2:4" in message("--sparsity", wrong)
    hint = ": N of every M weights are kept, so N must be below M\n"
    assert message("--sparsity", "4:2").endswith(f"got '4:2'{hint}")
    found = message("--sparsity", "2/4")
    assert "got '2/4': write 2:4 to keep 2 of every 4, or 0.5 for that fraction" in found
    assert message("--method", "SAFE+").endswith("got 'SAFE+': write safe+\n")
    unknown = message("--method", "obd")
    assert all(name in unknown for name in named_solvers())
    assert "file.py:SOLVER" in unknown
    assert "epochs must be left out" in message("--method", "wanda", "--epochs", 3)
    assert "scope must be left out" in message("--sparsity", "2:4", "--scope", "row")
    assert "epochs must be at least 1" in message("--epochs", 0)
    for model, hub in ((tmp_path / "nowhere", "ORGANISATION/NAME"), (Path("own/lm-7.b"),) * 2):
        found = message(model=model)
        assert f"model must be an existing local folder, got {model}. " in found
        assert f"`hf download {hub} --local-dir model`" in found
        assert f"huggingface_hub.snapshot_download('{hub}', local_dir='model')" in found
    named = 'of this machine, such as "cuda", "cuda:1" or "xpu", got'
    assert message("--device", "gpu").endswith(f"{named} 'gpu'\n")
    assert f"{named} 'cuda:99': " in message("--device", "cuda:99")
    again = text.parent / ".." / text.parent.name / text.name
    assert f"name each file once, got {text} 2 times" in message("--calibration", again)
    assert "length must be at least 2 tokens, so that" in message("--length", 1)
    for count in (0, -3):
        assert f"samples must be at least 1, got {count}" in message("--samples", count)
    assert "sparsity must be above 0 for some weight, got 0" in message("--sparsity", 0)
    found = message("--field", "body")
    assert "field must be left out without a file of records, such as" in found
    weights = folder / "model.safetensors"
    assert f"model must be a folder, got the file {weights}: pass" in message(model=weights)
    for nothing in (["0.0"], ["q_proj=0"], ["0", "--sparsity", "q_proj=.0"]):
        assert "sparsity must be above 0 for some weight" in message("--sparsity", *nothing)
    for inside in (folder, folder / "sparse", folder / ".." / folder.name):
        found = refused("prune", folder, "--calibration", text, "--out", inside, *SHORT)
        assert f"outside of the model folder, such as {folder}-sparse, got {inside}" in found
    down = "model.layers.0.self_attn.q_proj.weight"
    for groups, instead in (("3:12", "2:8 or 0.75"), ("4:6", "0.333333")):
        found = message("--sparsity", groups, *SHORT)
        assert f"got 16 of {down}: --sparsity {instead} would do\n" in found
    with pytest.raises(TypeError, match=r"calibration must be a list of files, got 'text\.txt'"):
        PruningJob("model", "text.txt")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert "must hold model.safetensors" in message(model=bare)
    (bare / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "must hold a tokenizer" in (found := message(model=bare))
    assert "; for a model that takes no text, pass --inputs\n" in found
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "must hold text, got none" in message(file=empty)
    empty.write_text("too short")
    assert "at least 35 tokens" in message(*SHORT, file=empty)
    assert "got 9: give longer texts, or a smaller --length\n" in message(*SHORT, file=empty)
    found = message("--samples", 4, "--length", 8, file=empty)
    assert "got 9: give longer texts, or a smaller --samples or --length\n" in found
    assert "at most the model's 64 positions" in message("--samples", 2, "--length", 128)
    assert "work_dir must name a folder" in message(*SHORT, "--offload", "disk")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "could not be loaded" in message(*SHORT, model=broken)
    assert not out.exists()
    monkeypatch.setattr("os.posix_fallocate", full_disk)
    assert "of free disk space, got" in message(*SHORT)
    assert list(tmp_path.glob(".*")) == []
    monkeypatch.undo()
    out.mkdir()
    (out / "file").touch()
    assert "new or empty folder" in message(*SHORT)
    assert [x.name for x in out.iterdir()] == ["file"]


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


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
        assert "then pass --trust-remote-code" in refused(*command)
    assert run("inspect", own).exit_code == 0
    assert not marker.exists()
    for command in (prune, measure):
        result = run(*command, "--trust-remote-code")
        assert result.exit_code == 0, result.output
    assert marker.exists()
    assert (out / "own_code.py").is_file()
    again = run("perplexity", out, "--text", text, "--length", 32, "--trust-remote-code")
    assert again.exit_code == 0, again.output


def test_a_run_that_diverges_is_told(folder: Path, text: Path, tmp_path: Path) -> None:
    result = run(
        "prune", folder, "--calibration", text, "--sparsity", "0.5", "--out", tmp_path / "out",
        "--method", "safe", "--epochs", 2, "--learning-rate", 50, "--start", "dense",
        "--device", "cpu", *SHORT,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "differ from the dense model by more than their whole output" in result.output
