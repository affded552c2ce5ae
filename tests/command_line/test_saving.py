"""The folder that `prune` writes: read back, complete, and never lost with a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import SHORT, failed, refused, run
from safetensors.torch import load_file, save_file

from safe_core.command_line.drafts import written_at_once
from safe_core.command_line.saving import Imprint, check_saved

FAST = [*SHORT, "--method", "magnitude"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of this test's own."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


# Reading back


def test_a_folder_that_differs_from_memory_is_refused(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = transformers.PreTrainedModel.save_pretrained
    name = "model.layers.0.mlp.up_proj.weight"

    def damaged(self: Any, path: Any) -> None:
        save(self, path)
        tensors = load_file(path / "model.safetensors")
        tensors[name][tensors[name] == 0] = 1e-3
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", damaged)
    out = tmp_path / "out"
    message = failed("prune", folder, "--calibration", text, "--out", out, *FAST)
    assert f"got {name} with 0 zeros instead of 256 in" in message
    (kept,) = tmp_path.glob("out.kept-*")
    assert f"The finished model is kept in {kept}" in message
    assert not out.exists()


def test_outputs_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    imprint = Imprint.of(model, {None: torch.arange(8)[None]})
    check_saved(imprint, folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="must give the outputs of the model in memory"):
        check_saved(imprint, copy)


# Other files


def test_other_files_of_the_folder_are_copied(folder: Path, text: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    for name in ("preprocessor_config.json", "chat_template.jinja", "LICENSE", "labels.txt"):
        (source / name).write_text("{}")
    for name in ("README.md", "model.onnx", "pytorch_model.bin", ".gitattributes"):
        (source / name).write_text("old")
    (source / "onnx").mkdir()
    result = run("prune", source, "--calibration", text, "--out", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.output
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"preprocessor_config.json", "chat_template.jinja", "LICENSE", "labels.txt"}
    assert not names & {"model.onnx", "pytorch_model.bin", ".gitattributes", "onnx"}
    modes = {oct(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {oct((tmp_path / "new").stat().st_mode)}
    assert "pruned by safe_core" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("wanted", ["", "auto_map", "option"])
def test_code_is_copied_where_it_is_used(
    folder: Path, text: Path, tmp_path: Path, wanted: str
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    (source / "__init__.py").write_text("")
    if wanted == "auto_map":
        processor = {"auto_map": {"AutoProcessor": "own.Own"}}
        (source / "preprocessor_config.json").write_text(json.dumps(processor))
    result = run(
        "prune", source, "--calibration", text, "--out", tmp_path / "out", *FAST,
        *(["--trust-remote-code"] if wanted == "option" else []),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "__init__.py").is_file() is bool(wanted)
    note = "note: not copied, because no configuration names code by auto_map: __init__.py\n"
    assert (note in result.stderr) is not bool(wanted)


# Places that cannot be written


def test_places_that_a_rename_cannot_replace_are_refused_at_the_start(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_core.command_line.preparation.read_model", None)  # not even loaded
    prune = ["prune", folder, "--calibration", text, *FAST, "--out"]
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    message = refused(*prune, link)
    assert f"got the symbolic link {link}: name a folder beside" in message
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "real")
    assert "got the mount point" in refused(*prune, tmp_path / "real")
    with written_at_once(tmp_path / "busy"):
        message = refused(*prune, tmp_path / "busy")
    assert "by one run at a time, but another writes" in message


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from safe_core.command_line.drafts import written_at_once\n"
        "with written_at_once(Path(sys.argv[1])) as draft:\n"
        "    (draft.path / 'half').write_text('')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "out")]
    subprocess.run(command, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial"
    with written_at_once(tmp_path / "out") as draft:
        assert list(draft.path.iterdir()) == []
        (draft.path / "whole").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["whole"]


# Full disks


def full_beside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every save fail outside of a place, as safetensors does on a full disk."""
    save = transformers.PreTrainedModel.save_pretrained

    def fail(self: Any, path: Any) -> None:
        save(self, path)
        if place not in Path(path).parents:
            raise RuntimeError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)


def test_a_full_disk_keeps_the_model_elsewhere(
    folder: Path, text: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_beside(temporary, monkeypatch)
    out = tmp_path / "out"
    message = failed("prune", folder, "--calibration", text, "--out", out, *FAST)
    assert f"out must have room for the model, but {out} could not be written: Error" in message
    (kept,) = temporary.glob("out.kept-*")
    assert f"The finished model is kept in {kept}: make room, then move it" in message
    monkeypatch.undo()
    model = transformers.AutoModelForCausalLM.from_pretrained(kept)
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 256
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_keeps_finished_blocks(
    folder: Path, text: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_beside(tmp_path / "nowhere", monkeypatch)
    work, out = tmp_path / "work", tmp_path / "out"
    prune = ["prune", folder, "--calibration", text, "--out", out, *FAST]
    message = failed(*prune, "--work-dir", work)
    assert f"The finished blocks are kept in {work}: make room, then give the same" in message
    assert list(temporary.iterdir()) == []
    message = failed(*prune)
    assert "Make room, or name another --out; --work-dir keeps finished blocks" in message
    assert list(temporary.iterdir()) == []
    monkeypatch.undo()
    result = run(*prune, "--work-dir", work)
    assert result.exit_code == 0, result.output
    assert f"resuming after 2 finished blocks in {work}" in result.stderr
    assert "block 1 of 2" not in result.stderr


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_the_space_is_reserved_before_work_starts(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    out = tmp_path / "out"
    needed = (folder / "model.safetensors").stat().st_size

    def stop(*arguments: Any, **options: Any) -> None:
        seen.extend(file.stat().st_size for file in tmp_path.glob(".out.partial/reserved-*"))
        raise ValueError("stop")

    monkeypatch.setattr("safe_core.command_line.pruning._applied", stop)
    prune = ["prune", folder, "--calibration", text, "--out", out, *FAST]
    assert failed(*prune) == "safe-core: stop\n"
    assert seen == [needed]
    monkeypatch.undo()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert "of free disk space, got" in refused(*prune)
    assert not list(tmp_path.glob(".out*"))


def test_a_limit_of_file_sizes_is_found_before_work_starts(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        said = failed("prune", folder, "--calibration", text, "--out", tmp_path / "out", *FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "out needs" in said
    assert "block 1" not in said
    assert not list(tmp_path.glob("*out*"))
