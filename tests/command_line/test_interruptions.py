"""Ctrl-C and SIGTERM: what is kept, how to go on, and nothing of torch's insides."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import SHORT, failed, refused, run
from typer.testing import Result

from safe_core.adapters.torch.blocks.run import Run

FAST = [*SHORT, "--method", "magnitude"]


def interrupt_at(block: int, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run._prune

    def prune(self: Any, i: int) -> Any:
        if i == block:
            how()
        return whole(self, i)

    monkeypatch.setattr(Run, "_prune", prune)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_memory() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_full_memory_says_what_is_kept(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    interrupt_at(1, fill_memory, monkeypatch)
    arguments = ("prune", folder, "--calibration", text, "--out", out, *FAST, "--work-dir", work)
    told = failed(*arguments)
    assert "safe-core: out of memory: DefaultCPUAllocator: can't allocate" in told
    assert "Try a smaller --batch-size." in told
    assert f"Kept 1 finished block in {work}" in told


@pytest.mark.parametrize(
    "place", ["safe_core.command_line.preparation", "transformers.LlamaForCausalLM"]
)
def test_full_memory_before_the_first_block_is_named(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        fill_memory()

    name = "from_pretrained" if place.startswith("transformers") else "plan_pruning"
    monkeypatch.setattr(f"{place}.{name}", full)
    told = refused("prune", folder, "--calibration", text, "--out", tmp_path / "out", *FAST)
    assert "safe-core: out of memory: DefaultCPUAllocator" in told


@pytest.mark.parametrize("how", [ctrl_c, terminate])
def test_an_interrupted_run_says_what_is_kept_and_resumes(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    work = tmp_path / "work"

    def prune(*more: object) -> Result:
        out = tmp_path / "out"
        return run("prune", folder, "--calibration", text, "--out", out, *FAST, *more)

    interrupt_at(1, how, monkeypatch)
    result = prune("--work-dir", work)
    assert result.exit_code == 130
    assert result.stderr.endswith(
        f"safe-core: interrupted\nKept 1 finished block in {work}. The same command resumes there\n"
    )
    result = prune()
    assert result.exit_code == 130
    assert "safe-core: interrupted\nNothing was kept. With --work-dir, an" in result.stderr
    assert not list(tmp_path.glob(".out*"))
    monkeypatch.undo()
    result = prune("--work-dir", work)
    assert result.exit_code == 0
    assert f"resuming after 1 finished block in {work}" in result.stderr
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_refused_resume_names_what_differs(folder: Path, text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    start = ["prune", folder, "--out", tmp_path / "out", "--work-dir", work, "--method"]
    calibrate = ["--calibration", text, *SHORT]
    assert run(*start, "wanda", *calibrate).exit_code == 0
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    again = [*start[:3], tmp_path / "again", *start[4:]]
    for changed, differs in (
        (["wanda", *calibrate, "--seed", 1], "seed was 0, now 1"),
        (["wanda", *calibrate, "--batch-size", 3], "batch_size was 8, now 3"),
        (["wanda", "--calibration", other, *SHORT], "the calibration samples differ"),
        (["wanda", "--calibration", text, *SHORT[:3], 31], "the calibration samples differ"),
        (["wanda", *calibrate, "--only", "mlp"],
         "self_attn.k_proj.weight of block 0 was pruned, and is dense now"),
        (["magnitude", *calibrate, "--scope", "row"],
         "solver was Wanda(), now Magnitude()"),
    ):  # fmt: skip
        for more in ([], ["--dry-run"]):
            message = failed(*again, *changed, *more)
            assert f"same settings, got {work}: {differs}; name another folder" in message
        assert "resuming" not in run(*again, *changed).stderr


def test_what_a_killed_write_left_in_the_work_folder_is_removed(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    prune = ["prune", folder, "--calibration", text, *FAST, "--work-dir", work, "--out"]
    assert run(*prune, tmp_path / "one").exit_code == 0
    for name in ("block-00001.safetensors.part", "manifest.json.part", "inputs-0.bin"):
        (work / name).write_bytes(b"half")
    (work / "notes.part").write_text("of the user")
    assert run(*prune, tmp_path / "out").exit_code == 0
    assert {file.name for file in work.iterdir()} == {
        "block-00000.safetensors", "block-00001.safetensors", "manifest.json", "lock", "notes.part"
    }  # fmt: skip


def test_a_foreign_or_overlapping_work_folder_is_refused_at_the_start(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    theirs = {"lock": "theirs", "inputs-1.bin": "data", "block-00000.safetensors.part": "more"}
    for name, content in theirs.items():
        (foreign / name).write_text(content)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    out = tmp_path / "out"
    before = sorted(file.name for file in folder.iterdir())
    for work, said in (
        (foreign, "or that of an earlier run, got"),
        (tmp_path / "file", "must be a new or empty folder"),
        (tmp_path / "link", "must be a new or empty folder"),
        (tmp_path / "fifo", "must be a new or empty folder"),
        (folder, "must be a new or empty folder"),
        (folder / "work", "work_dir must be outside of the model folder"),
        (out, "work_dir must be outside of --out"),
        (out / "work", "work_dir must be outside of --out"),
    ):
        message = refused(
            "prune", folder, "--calibration", text, "--out", out, *FAST, "--work-dir", work
        )
        assert said in message.replace("\n", " ")
    assert {file.name: file.read_text() for file in foreign.iterdir()} == theirs
    assert sorted(file.name for file in folder.iterdir()) == before
    assert not out.exists()
    work = tmp_path / "work"
    message = refused(
        "prune", folder, "--calibration", text, "--out", work / "out", *FAST, "--work-dir", work
    )
    assert "--out must be outside of work_dir" in message.replace("\n", " ")
    assert not work.exists()
    (foreign / "lock").unlink()
    for content in ('{"name": "a web page"}', "[]", "no JSON"):
        (foreign / "manifest.json").write_text(content)
        message = refused(
            "prune", folder, "--calibration", text, "--out", out, *FAST, "--work-dir", foreign
        )
        assert "work_dir must hold a manifest of this library" in message.replace("\n", " ")
    assert {file.name for file in foreign.iterdir()} == {*theirs, "manifest.json"} - {"lock"}
    assert (foreign / "inputs-1.bin").read_text() == "data"
