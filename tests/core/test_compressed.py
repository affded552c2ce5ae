"""Tensors without their zeros come back bit for bit, and damaged files raise."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_core.compressed import RawTensor, forms, read_compressed, write_compressed
from safe_core.compressed.forms import WIDTHS, chosen_form
from safe_core.packing import packed
from safe_core.tensor_files import DamagedFileError, read_header


def raw(values: Any, dtype: str = "F32") -> RawTensor:
    values = np.asarray(values)
    flat = np.ascontiguousarray(values.reshape(-1))
    return RawTensor(dtype, values.shape, flat.view(np.uint8))


def random(shape: tuple[int, ...], dtype: str, kept: float, seed: int = 0) -> RawTensor:
    """Random bits, among them those of NaNs and -0, of which a fraction is not zero."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2 ** (8 * WIDTHS[dtype]), shape, dtype=f"u{WIDTHS[dtype]}")
    return raw(np.where(rng.random(shape) < kept, bits, 0).astype(bits.dtype), dtype)


def two_of_four(shape: tuple[int, ...], most: int = 2) -> RawTensor:
    rng = np.random.default_rng(1)
    places = rng.random((math.prod(shape) // 4, 4)).argsort(axis=1) < most
    return raw(np.where(places.reshape(shape), rng.integers(1, 2**16, shape), 0).astype("u2"),
               "BF16")  # fmt: skip


def assert_same(found: RawTensor, wanted: RawTensor) -> None:
    assert (found.dtype, found.shape) == wanted[:2]
    np.testing.assert_array_equal(found.data, wanted.data)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("shape", [(7, 13), (3, 1, 24), (), (0, 3), (1,)])
def test_every_dtype_comes_back_bit_for_bit(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {f"w{kept}": random(shape, dtype, kept) for kept in (0, 0.1, 0.5, 1)}
    path = tmp_path / "m.safetensors"
    saved = write_compressed(path, tensors)
    found = read_compressed(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert saved.stored_bytes <= saved.dense_bytes
    assert saved.stored_bytes == sum(e.stop - e.start for e in read_header(path).entries)


@pytest.mark.parametrize("shape", [(4, 8), (5, 12), (1, 4), (2, 3, 20)])
@pytest.mark.parametrize("most", [2, 1])
def test_two_of_four_come_back_at_every_length(
    shape: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forms, "_CHUNK", 24)
    tensor = two_of_four(shape, most)
    path = tmp_path / "m.safetensors"
    saved = write_compressed(path, {"w": tensor})
    n = math.prod(shape)
    if most == 2 and -(-n // 12) < -(-n // 8):
        assert saved.forms == {"w": "2:4"}
        assert saved.stored_bytes == n + -(-n // 12)
    assert_same(read_compressed(path)["w"], tensor)


def test_the_smallest_form_is_chosen() -> None:
    tensors = {
        "dense": random((32, 32), "F32", 1),
        "bitmask": random((32, 32), "F32", 0.5),
        "2:4": two_of_four((24, 32)),
    }
    assert {name: chosen_form(tensor).name for name, tensor in tensors.items()} == {
        name: name for name in tensors
    }
    assert chosen_form(tensors["2:4"]).nbytes == 24 * 32 + 64
    # Groups along another axis, and groups with fewer non-zeros, are smaller as a mask.
    assert chosen_form(two_of_four((24, 32), most=1)).name == "bitmask"
    along_rows = tensors["2:4"].data.view("u2").reshape(24, 32).T.copy()
    assert chosen_form(raw(along_rows, "BF16")).name == "bitmask"
    assert chosen_form(RawTensor("F4", (2, 8), np.zeros(8, np.uint8))).name == "dense"


def test_chunks_and_the_bits_of_a_mask_are_those_of_packed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forms, "_CHUNK", 24)
    tensor = random((7, 31), "F16", 0.3)
    path = tmp_path / "m.safetensors"
    write_compressed(path, {"w": tensor})
    assert_same(read_compressed(path)["w"], tensor)
    header = read_header(path)
    (mask,) = (entry for entry in header.entries if entry.name == "w.bitmask")
    held = path.read_bytes()[header.begin + mask.start : header.begin + mask.stop]
    assert held == packed(tensor.data.view("u2") != 0).tobytes()


def test_shards_hold_all_tensors_and_aliases(tmp_path: Path) -> None:
    tensors = {f"w{i}": random((16, 16), "F32", 0.5, i) for i in range(4)}
    path = tmp_path / "m.safetensors"
    saved = write_compressed(
        path, tensors, aliases={"tied": "w3"}, max_shard_size=1200, metadata={"format": "pt"}
    )
    assert [file.name for file in saved.files] == [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
        "m.safetensors.index.json",
    ]
    assert saved.forms["tied"] == "same as w3"
    for place in (tmp_path, saved.files[-1]):
        found = read_compressed(place)
        assert found.keys() == {*tensors, "tied"}
        assert found["tied"] is found["w3"]
        for name, tensor in tensors.items():
            assert_same(found[name], tensor)
    assert read_header(saved.files[0]).metadata["format"] == "pt"
    saved.files[1].unlink()
    with pytest.raises(DamagedFileError, match=r"m-00002-of-00002.safetensors is missing"):
        read_compressed(tmp_path)


def test_a_result_is_a_short_text(tmp_path: Path) -> None:
    tensors = {"w": raw(np.eye(64, dtype="f4")), "b": raw(np.ones(64, "f4"))}
    saved = write_compressed(tmp_path / "m.safetensors", tensors, aliases={"tied": "b"})
    assert str(saved) == (
        "m.safetensors: 1.0 KiB instead of 16.2 KiB, 16.25 times smaller\n"
        "tensors: 1 bitmask, 1 dense, 1 same as another"
    )
    saved = write_compressed(tmp_path / "m.safetensors", tensors, max_shard_size=1)
    assert str(saved).startswith("m-00001-of-00002.safetensors and 2 more files: 1.0 KiB")
    assert str(write_compressed(tmp_path / "m.safetensors", {})).endswith("tensors: none")


def test_values_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": random((3, 3), "U8", 0.3), "b": random((5, 5), "F64", 0.3)}
    write_compressed(tmp_path / "m.safetensors", tensors)
    header = read_header(tmp_path / "m.safetensors")
    assert header.begin % 8 == 0
    for entry in header.entries:
        assert entry.start % WIDTHS[entry.dtype] == 0


def test_the_reader_in_the_docs_reads_every_form(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "zeros.md").read_text()
    (code,) = (
        c for c in re.findall(r"```{testcode}\n(.*?)```", page, re.DOTALL) if "def read" in c
    )
    assert len(code.splitlines()) < 60
    names: dict[str, Any] = {}
    exec(code[: code.index("\nfor name, array")], names)
    tensors = {dtype: random((7, 12), dtype, 0.4) for dtype in WIDTHS} | {
        "2:4": two_of_four((5, 20)), "full": random((3, 4), "F32", 1), "one": random((), "I64", 1),
    }  # fmt: skip
    path = tmp_path / "m.safetensors"
    saved = write_compressed(path, tensors, aliases={"tied": "F32"})
    assert set(saved.forms.values()) == {"dense", "bitmask", "2:4", "same as F32"}
    found = names["read"](path)
    assert found["tied"] is found["F32"]
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype.itemsize == WIDTHS[tensor.dtype]
        assert found[name].tobytes() == tensor.data.tobytes()


# Damage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"a": random((16, 16), "F32", 0.5), "b": two_of_four((24, 32))}
    write_compressed(
        tmp_path / "m.safetensors", tensors | {"c": random((4, 4), "F32", 1)}, aliases={"d": "a"}
    )
    return tmp_path / "m.safetensors"


def test_a_file_that_is_cut_off_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match=r"m\.safetensors must"):
            read_compressed(path)


def test_every_changed_byte_of_the_data_is_found(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    for place in range(read_header(path).begin, len(whole), 13):
        whole[place] ^= 4
        path.write_bytes(whole)
        with pytest.raises(DamagedFileError, match=r"but .* is damaged"):
            read_compressed(path)
        whole[place] ^= 4


def change(path: Path, edit: Any) -> None:
    """Write a file again with another description of its tensors."""
    data, begin = path.read_bytes(), read_header(path).begin
    header = json.loads(data[8:begin])
    told = json.loads(header["__metadata__"]["safe_core"])
    edit(told)
    header["__metadata__"]["safe_core"] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda told: told.update(version=2), "must have version 1, got 2"),
        (lambda told: told.pop("tensors"), "must say how its tensors are stored"),
        (lambda told: told.update(tensors=[1]), "must say how its tensors are stored"),
        (lambda told: told["tensors"]["a"].update(form="zip"), "forms of version 1, got 'zip'"),
        (lambda told: told["tensors"]["a"].update(shape=[16, 2**40]), "but a is damaged"),
        (lambda told: told["tensors"]["a"].update(shape=[16, 17]), "but a is damaged"),
        (lambda told: told["tensors"]["a"].update(shape=[255]), "but a is damaged"),
        (lambda told: told["tensors"]["b"].update(shape=[-1]), "but b is damaged"),
        (lambda told: told["tensors"]["b"].update(form="bitmask"), "must hold b.bitmask"),
        (lambda told: told["tensors"]["c"].update(shape=[2, 8]), "but c is damaged"),
        (lambda told: told["tensors"]["c"].update(crc32=[]), "but c is damaged"),
        (lambda told: told["tensors"]["d"].update({"as": "x"}), "the tensor that d shares"),
        (lambda told: told["tensors"].pop("b"), "must describe all its tensors, got b.groups"),
    ],
)
def test_a_wrong_description_is_refused(path: Path, edit: Any, message: str) -> None:
    change(path, edit)
    with pytest.raises(DamagedFileError, match=message):
        read_compressed(path)


def test_places_that_do_not_fit_the_values_are_refused() -> None:
    def fits(form: str, size: int, *where: int) -> bool:
        stored = np.asarray([1, 2], np.uint8)
        places = np.asarray(where, np.uint8)
        return forms.decode(form, 1, stored, places, np.zeros(size, np.uint8))

    assert fits("bitmask", 5, 3)
    for where in ([7], [1], [3, 0]):
        assert not fits("bitmask", 5, *where)
    assert not fits("bitmask", 1, 3)
    assert fits("2:4", 4, 0)
    assert not fits("2:4", 4, 216)


# Arguments


def test_a_bad_argument_is_named(tmp_path: Path) -> None:
    tensor, path = random((8, 8), "F32", 0.1), tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*m\.pt"):
        write_compressed(tmp_path / "m.pt", {"w": tensor})
    with pytest.raises(ValueError, match=r"got 'w\.bitmask' beside 'w'"):
        write_compressed(path, {"w": tensor, "w.bitmask": tensor})
    with pytest.raises(ValueError, match="max_shard_size must be at least 1, got 0"):
        write_compressed(path, {"w": tensor}, max_shard_size=0)
    for metadata in ({"safe_core": "x"}, {"step": 3}):
        with pytest.raises(ValueError, match="metadata must map strings"):
            write_compressed(path, {"w": tensor}, metadata=metadata)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"folder .* must hold \.safetensors files, got none"):
        read_compressed(tmp_path)
    text = b"{}      "
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"m\.safetensors, which is not compressed"):
        read_compressed(path)


def test_an_interrupted_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Any:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("safe_core.compressed.writing.places", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_compressed(tmp_path / "m.safetensors", {"w": random((8, 8), "F32", 0.1)})
    assert list(tmp_path.iterdir()) == []
