"""The command `inspect` on damaged and hostile files: one clear line, in little memory and time."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refused, run
from safetensors.numpy import save_file

from safe_core.command_line.checkpoint_files import weight_sources
from safe_core.command_line.inspection import inspect_checkpoint

STATE = {"w": torch.arange(6.0).reshape(2, 3), "deep": [{"b": torch.ones(2).bfloat16()}]}


def saved(file: Path, content: Any, **options: Any) -> Path:
    torch.save(content, file, **options)
    return file


def archive(
    file: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes
) -> Path:
    """Write a file as ``torch.save`` does, around any pickle."""
    with zipfile.ZipFile(file, "w", compression) as written:
        written.writestr("m/data.pkl", program)
        for key, data in more.items():
            written.writestr(f"m/data/{key.removeprefix('s')}", data)
    return file


class Storage:
    """Stands for a storage of four float32 in `dumped`."""


def view(size: Any, stride: Any, offset: Any = 0) -> Any:
    class View:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, None)

    return View()


def dumped(content: Any, numel: int = 4) -> bytes:
    """A pickle as ``torch.save`` writes, in which every `Storage` is the storage 0."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            if isinstance(found, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", numel
            return None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    return stream.getvalue()


# Limits of memory and time


def test_containers_are_visited_once(tmp_path: Path) -> None:
    nested: Any = [torch.ones(2, 2)]
    for _ in range(8):
        nested = [nested] * 100  # 1e16 leaves
    report = inspect_checkpoint(saved(tmp_path / "wide.pt", {"a": nested}))
    assert len(report.tensors) == 1
    ring: list[Any] = [torch.ones(2, 2)]
    ring.append(ring)
    assert [x.name for x in inspect_checkpoint(saved(tmp_path / "ring.pt", ring)).tensors] == ["0"]


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    message = refused("inspect", archive(tmp_path / "deep.pt", program))
    assert "containers that are more than 100 levels deep" in message
    header = b"[" * 100_000
    file = tmp_path / "deep.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "must have a safetensors header" in refused("inspect", file)


def test_long_names_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "long.pt", {"k" * 3000: {"l" * 3000: torch.ones(1)}})
    assert "names of at most 4096 characters, got 6001" in refused("inspect", file)
    save_file({"k" * 5000: np.ones(1, "f4")}, tmp_path / "long.safetensors")
    assert "names of at most 4096 characters" in refused("inspect", tmp_path / "long.safetensors")


def test_compressed_archives_are_refused_before_they_grow(tmp_path: Path) -> None:
    zeros = bytes(2**28)
    file = archive(
        tmp_path / "bomb.pt", dumped(view((2**26,), (1,)), 2**26), zipfile.ZIP_DEFLATED, s0=zeros
    )
    del zeros
    assert file.stat().st_size < 2**20
    tracemalloc.start()
    message = refused("inspect", file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a compressed archive" in message
    assert peak < 2**25


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        ((5,), (1,), 0, "too little data for tensor of shape (5,)"),
        ((2, 2), (1, 3), 0, "too little data"),
        ((1,), (1,), 4, "too little data"),
        ((10**12,), (1,), 0, "too little data"),
        ((10**11, 10**3), (0, 0), 0, "views of more than 16 times its size"),
        ((2, 2), (2, -1), 1, "sizes that are not numbers"),
        ((2.0,), (1,), 0, "sizes that are not numbers"),
        ((2,), (1, 1), 0, "must be a complete PyTorch checkpoint"),
        ((2**70,), (0,), 0, "sizes that are not numbers"),
        ((0, 2**62), (1, 1), 0, "shapes that NumPy supports"),
        ((1,) * 70, (1,) * 70, 0, "shapes that NumPy supports"),
    ],
)
def test_views_are_checked_before_they_are_made(
    tmp_path: Path, size: Any, stride: Any, offset: int, message: str
) -> None:
    file = archive(tmp_path / "m.pt", dumped(view(size, stride, offset)), s0=bytes(16))
    assert message in refused("inspect", file)


def test_empty_tensors_with_a_long_axis(tmp_path: Path) -> None:
    file = archive(tmp_path / "m.pt", dumped({"w": view((0, 10**11), (1, 1))}), s0=bytes(16))
    (row,) = inspect_checkpoint(file).tensors
    assert (row.shape, row.analysis.entries) == ((0, 10**11), 0)
    header = {"w": {"dtype": "F32", "shape": [0, 10**11], "data_offsets": [0, 0]}}
    (tmp_path / "m.safetensors").write_bytes(with_header(header))
    assert inspect_checkpoint(tmp_path / "m.safetensors").tensors[0].analysis.entries == 0


def with_header(header: Any, data: bytes = b"") -> bytes:
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data


def test_data_that_is_claimed_twice_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    file = tmp_path / "m.safetensors"
    file.write_bytes(with_header({"a": entry, "b": entry}, bytes(8)))
    assert "tensors that do not overlap, but b does" in refused("inspect", file)


def test_pickles_with_too_many_steps_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_core.command_line.pickles._MOST_STEPS", 1000)
    file = archive(tmp_path / "m.pt", b"\x80\x02" + b"]0" * 1000 + b"].")
    assert "a pickle of more than 1,000 steps" in refused("inspect", file)
    monkeypatch.setattr("safe_core.tensor_files._MOST_VALUES", 5)
    header = {"w": {"dtype": "F32", "shape": [0, 1, 1, 1, 1], "data_offsets": [0, 0]}}
    (tmp_path / "m.safetensors").write_bytes(with_header(header))
    assert "a header of at most 5 values" in refused("inspect", tmp_path / "m.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_fifos_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "m.bin")
    for path in (tmp_path, tmp_path / "m.bin", "/dev/zero"):
        assert "must be a regular file" in refused("inspect", path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert "must be a regular file" in refused("inspect", tmp_path)


# Wrong files


def test_files_of_other_kinds(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", STATE).read_bytes()
    old = saved(tmp_path / "old.pt", STATE, _use_new_zipfile_serialization=False).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    for content, message in (
        (b"hello world", "must be a safetensors file or a PyTorch checkpoint, got a damaged"),
        (b"", "an empty file"),
        (b" \0\0\0TFL3" + bytes(40), r"of another kind, which begins with b' \x00\x00\x00TFL3'"),
        (b"GGUF" + bytes(40), "must be a safetensors file or a PyTorch checkpoint"),
        (whole[:-30], "must be a complete PyTorch checkpoint"),
        (whole[:100], "must be a complete PyTorch checkpoint"),
        (old[:-4], "too little data of storage"),
        (old[: len(old) // 2], "a damaged pickle, at byte"),
        (pickle.dumps({"w": [1.0]}, 2), "another kind of pickle"),
        (pointer, "a pointer of git-lfs: run `git lfs pull`"),
    ):
        for name in ("m.bin", "m.pt"):
            (tmp_path / name).write_bytes(content)
            found = refused("inspect", tmp_path / name)
            assert message in found
            assert str(tmp_path / name) in found
            assert found.count("\n") == 1
    (tmp_path / "model.safetensors").write_bytes(pointer)
    assert "a pointer of git-lfs: run `git lfs pull`" in refused("inspect", tmp_path)
    with zipfile.ZipFile(archive(tmp_path / "script.pt", b"\x80\x02N."), "a") as script:
        script.writestr("m/constants.pkl", b"\x80\x02).")
    assert "a TorchScript program, which holds code" in refused("inspect", tmp_path / "script.pt")


def test_each_shard_is_compared_with_its_own_names_only(tmp_path: Path) -> None:
    # All names for each shard would take shards x names comparisons.
    for shard in ("a", "b"):
        save_file({f"{shard}{i}": np.ones(1, "f4") for i in range(2)}, tmp_path / shard)
    spelled = {"a0": "a", "a1": "./a", "b0": "b", "b1": "b"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": spelled}))
    sources = {file.name: sorted(names or ()) for file, names in weight_sources(index).items()}
    assert sources == {"a": ["a0", "a1"], "b": ["b0", "b1"]}


def test_an_index_stays_in_its_folder_and_agrees_with_its_shards(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones(2, "f4")}, tmp_path / "other.safetensors")
    save_file({"w": np.ones(2, "f4")}, folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"

    def written(names: Any) -> Path:
        index.write_text(json.dumps({"weight_map": names}))
        return folder

    for outside in (
        "../other.safetensors",
        str(tmp_path / "other.safetensors"),
        "a/../../b",
        "C:x",
    ):
        message = refused("inspect", written({"w": outside}))
        assert f"must name shards inside its folder, got {outside}" in message
    message = refused("inspect", written({"w": "one.safetensors", "lost": "one.safetensors"}))
    assert "one.safetensors must hold lost, as its index says, but does not" in message
    assert "with a weight_map" in refused("inspect", written({"w": 3}))
    assert "with a weight_map" in refused("inspect", written([1]))
    index.write_text("[" * 10**5)
    assert "must be a JSON file" in refused("inspect", folder)
    assert run("inspect", written({"w": "one.safetensors"})).exit_code == 0


def test_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    name = "w\x1b[2J\r\nsafe\u202e"
    file = tmp_path / "m.safetensors"
    save_file({name: np.ones((2, 2), "f4")}, file)
    result = run("inspect", file)
    assert result.exit_code == 0
    assert r"w\x1b[2J\r\nsafe\u202e" in result.stdout
    assert "\x1b" not in result.stdout
    assert name in json.loads(run("inspect", file, "--json").stdout)["tensors"]
    torch.save({name: torch.ones(2, 2).to_sparse()}, tmp_path / "m.pt")
    message = refused("inspect", tmp_path / "m.pt")
    assert r"for w\x1b[2J\r\nsafe\u202e" in message


def test_many_tensors_are_summarised(tmp_path: Path) -> None:
    blocks = {f"layers.{i}.w": np.full((2, 2), i % 2, "f4") for i in range(1500)}
    save_file(blocks | {"head": np.ones((2, 3), "f4")}, tmp_path / "m.safetensors")
    lines = run("inspect", tmp_path).stdout.splitlines()
    assert len(lines) == 5
    (row,) = [line for line in lines if line.startswith("layers.*.w (1,500)")]
    assert row.split()[-7:] == ["50.00%", "mixed", "3,000", "23.4", "KiB", "12.5", "KiB"]
    assert len(inspect_checkpoint(tmp_path).tensors) == 1501
    save_file({"x" * i: np.ones(1, "f4") for i in range(1, 1200)}, tmp_path / "m.safetensors")
    lines = run("inspect", tmp_path).stdout.splitlines()
    assert any(line.startswith("and 199 more tensors, see --json") for line in lines)


# Random damage


def mutations(whole: bytes, rng: random.Random) -> bytes:
    """Damage a file: flip bytes, cut it off, repeat, remove or insert a piece."""
    data = bytearray(whole)
    kind = rng.randrange(5)
    at, n = rng.randrange(len(data)), rng.randrange(1, 40)
    if kind == 0:
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at : at + n]
    elif kind == 3:
        del data[at : at + n]
    else:
        data[at : at + n] = rng.randbytes(n)
    return bytes(data)


def within_pickle(whole: bytes, rng: random.Random) -> bytes:
    """Damage only the pickle of an archive, whose checksums torch does not need."""
    start, stop = whole.index(b"\x80\x02"), whole.index(b"PK\x03\x04", 10)
    part = bytearray(whole[start:stop])
    for _ in range(rng.randrange(1, 4)):
        part[rng.randrange(len(part))] = rng.choice((rng.randrange(256), *b"(.)}]tRuseqQ\x85\x86"))
    return whole[:start] + bytes(part) + whole[stop:]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("m.safetensors", mutations),
        ("new.pt", mutations),
        ("new.pt", within_pickle),
        ("old.pt", mutations),
    ],
)
def test_random_damage_ends_in_a_clear_error(
    tmp_path: Path, kind: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    file = tmp_path / kind
    if kind == "m.safetensors":
        save_file({"w": np.ones((2, 3), "f4"), "b": np.zeros(4, "i1")}, file)
    else:
        saved(file, STATE, _use_new_zipfile_serialization=kind == "new.pt")
    whole, rng, messages = file.read_bytes(), random.Random(kind), []
    for _ in range(300):
        file.write_bytes(damage(whole, rng))
        tracemalloc.start()
        try:
            inspect_checkpoint(file).table()
        except ValueError as error:
            messages.append(str(error))
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**24
    assert len(messages) > 20
    assert all(str(file) in message for message in messages)


def test_random_bytes_end_in_a_clear_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    for suffix in (".bin", ".safetensors"):
        file = tmp_path / f"m{suffix}"
        for start in (b"", b"PK\x03\x04", b"\x80\x02", b"\x20\0\0\0\0\0\0\0{"):
            for _ in range(40):
                file.write_bytes(start + rng.randbytes(rng.randrange(200)))
                with pytest.raises(ValueError, match=str(file)):
                    inspect_checkpoint(file)
