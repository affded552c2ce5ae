"""The option `--dry-run`: the plan and its numbers are right, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from command_line import SHORT, TEXT, byte_tokenizer, config, failed, refused, run

from safe_core.command_line.dry_run import plan_folder
from safe_core.command_line.pruning import PruningJob, prune_folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("disk", [False, True])
def test_a_dry_run_tells_the_plan_and_writes_nothing(
    folder: Path, text: Path, tmp_path: Path, disk: bool
) -> None:
    before = files(tmp_path), files(folder)
    work = ["--offload", "disk", "--work-dir", tmp_path / "work"] if disk else []
    result = run(
        "prune", folder, "--calibration", text, "--out", tmp_path / "a" / "out", *SHORT, *work,
        "--epochs", 3, "--batch-size", 2, "--ignore", "o_proj", "--sparsity", "0.5",
        "--sparsity", "down=2:4", "--dry-run", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (files(tmp_path), files(folder)) == before
    said = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "model.layers.*.self_attn.q_proj.weight 2 16 x 16 512 50.0000% 0.5, scope tensor",
        "model.layers.*.mlp.down_proj.weight 2 16 x 32 1,024 50.0000% 2:4",
        "total 12 4,096 50.0000%",
        "not pruned, because --only or --ignore leaves it out: model.layers.0.self_attn.o_proj."
        "weight, model.layers.1.self_attn.o_proj.weight (2 in all)",
        "not pruned, because it is outside model.layers: model.embed_tokens.weight, "
        "lm_head.weight (2 in all)",
        "method: safe+",
        "dual update interval (K): 1",
        "steps: 6",
        f"calibration: 4 samples, 128 tokens, from {len(TEXT):,} tokens of text",
    ):
        assert line in said
    text_of = "\n".join(said)
    assert "derived" not in text_of
    assert "penalty (lambda): 0 to " in text_of
    assert "memory: model 25.2 KiB, beside it device " in text_of
    assert " for the new folder, " in text_of
    assert "\ntime: about 0:0" in text_of
    assert " for 2 blocks (measured " in text_of
    assert "s for model.layers.0, and " in text_of
    assert "\nerror of model.layers.0 when pruned: " in text_of
    assert "saved in" not in text_of


def test_the_plan_in_python_agrees_with_the_run(folder: Path, text: Path, tmp_path: Path) -> None:
    job = PruningJob(folder, [text], "0.29", method="wanda", samples=4, length=32)
    said: list[str] = []
    plan = plan_folder(job, tmp_path / "out", say=said.append)
    assert said[-1] == "pruning one block of each kind, to measure the time"
    result = prune_folder(job, tmp_path / "out")
    assert [(w.name, w.shape) for w in plan.weights] == [(w.name, w.shape) for w in result.weights]
    found = {w.name: w.zeros / w.entries for w in result.weights}
    assert {w.name: w.sparsity for w in plan.weights} == pytest.approx(found)
    assert plan.sparsity == pytest.approx(result.sparsity)
    assert 0.25 < plan.sparsity < 0.29  # rounded down in each row
    assert plan.memory == result.report.predicted
    assert plan.time.measured[0].loss == result.report.blocks[0].loss
    assert plan.dense["lm_head.weight"] == "it is outside model.layers"
    assert dict(plan.settings)["solver"] == "Wanda"
    assert (plan.samples, plan.tokens, plan.finished) == (4, 128, 0)
    assert plan.disk_bytes == (folder / "model.safetensors").stat().st_size
    assert plan.free_bytes > 0


def test_rows_show_which_layers_get_which_pattern(text: Path, tmp_path: Path) -> None:
    deep = transformers.LlamaForCausalLM(config(num_hidden_layers=10))
    deep.save_pretrained(tmp_path / "deep")
    byte_tokenizer().save_pretrained(tmp_path / "deep")
    many = [x for i in range(10) for x in ("--sparsity", rf"\.{i}\.mlp.down=0.{10 + i}")]
    result = run(
        "prune", tmp_path / "deep", "--calibration", text, "--out", tmp_path / "out", *SHORT,
        "--method", "magnitude", "--only", "q_proj|down", *many,
        "--sparsity", r"layers\.([0-2]|9)=2:8", "--sparsity", "0.5", "--dry-run", "--shard",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        "note: --shard has no effect in one process; start several with torchrun" in result.stderr
    )
    said = [" ".join(line.split()) for line in result.stdout.splitlines()]
    attention = "self_attn.q_proj.weight"
    assert f"model.layers.[0-2,9].{attention} 4 16 x 16 1,024 75.0000% 2:8" in said
    assert f"model.layers.[3-8].{attention} 6 16 x 16 1,536 50.0000% 0.5, scope tensor" in said
    down = "model.layers.*.mlp.down_proj.weight 10 16 x 32 5,120 9.96% to 19.00% differs by name"
    assert down in said


def test_finished_blocks_are_left_out_of_the_time(folder: Path, text: Path, tmp_path: Path) -> None:
    prune = ["prune", folder, "--calibration", text, *SHORT, "--method", "wanda", "--work-dir",
             tmp_path / "work"]  # fmt: skip
    assert run(*prune, "--out", tmp_path / "one").exit_code == 0
    before = [(file, file.stat().st_mtime_ns) for file in files(tmp_path)]
    found = run(*prune, "--out", tmp_path / "two", "--dry-run")
    assert "for 0 of 2 blocks (measured " in found.stdout
    assert [(file, file.stat().st_mtime_ns) for file in files(tmp_path)] == before


def test_a_dry_run_finds_what_a_run_refuses(folder: Path, text: Path, tmp_path: Path) -> None:
    prune = ["prune", folder, "--calibration", text, *SHORT, "--dry-run", "--out"]
    assert "outside of the model folder" in refused(*prune, folder / "sparse")
    message = failed(*prune, tmp_path / "out", "--sparsity", "3:12")
    assert "12 must divide the inputs of every weight for --sparsity 3:12" in message
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert "new or empty folder" in refused(*prune, taken)
