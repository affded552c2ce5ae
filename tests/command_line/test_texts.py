"""Texts for calibration and perplexity: byte order marks, records of JSON and parquet files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from command_line import SHORT, TEXT, byte_tokenizer, failed, run

from safe_core._installed import install_command
from safe_core.adapters.transformers import calibration_batches
from safe_core.command_line.perplexity import text_tokens
from safe_core.command_line.text_files import read_text_file


def test_a_byte_order_mark_is_no_text(folder: Path, tmp_path: Path) -> None:
    file, plain = tmp_path / "mark.txt", tmp_path / "plain.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    plain.write_text(TEXT)
    found = read_text_file(file)
    assert found.text == TEXT
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    outputs = [
        run("perplexity", folder, "--text", x, "--length", 32, "--device", "cpu", "--json").stdout
        for x in (file, plain)
    ]
    assert outputs[0] == outputs[1]
    sizes = {"samples": 2, "length": len(TEXT) - 1}
    with pytest.warns(UserWarning, match="texts hold"):
        batches = [calibration_batches(byte_tokenizer(), x, **sizes) for x in (file, plain)]
    assert bool((batches[0] == batches[1]).all())


def write_records(file: Path, records: list[Any]) -> None:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=1)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("\n".join(map(json.dumps, records)) + "\n\n")


@pytest.mark.every_second
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL", ".parquet"])
def test_records_give_their_texts(folder: Path, tmp_path: Path, suffix: str) -> None:
    records = [{"text": "one\nline", "content": "x"}, {"text": "", "content": "y"}]
    file = tmp_path / f"data{suffix}"
    write_records(file, records)
    found = read_text_file(file)
    assert found.text == "one\nline\n\n"
    assert found.nbytes == len(file.read_bytes())
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_text_file(file, "content").text == "x\n\ny"
    if suffix != ".parquet":
        write_records(file, [*records, "a plain text"])
        assert read_text_file(file).text == "one\nline\n\n\n\na plain text"
    write_records(file, [{"body": TEXT[:400]}, {"body": TEXT[400:]}])
    measure = ["perplexity", folder, "--text", file, "--length", 32, "--device", "cpu", "--json"]
    assert "must hold the field 'text' in each record, got 'body'" in failed(*measure)
    plain = tmp_path / "plain.txt"
    plain.write_text(f"{TEXT[:400]}\n\n{TEXT[400:]}")
    wanted = run(*measure[:3], plain, *measure[4:]).stdout
    assert run(*measure, "--field", "body").stdout == wanted
    prune = ["prune", folder, "--calibration", file, "--samples", 2, "--length", 32, "--method",
             "magnitude", "--out", tmp_path / "out"]  # fmt: skip
    assert "--field" in failed(*prune)
    assert run(*prune, "--field", "body").exit_code == 0


def test_files_of_several_kinds_are_joined(folder: Path, text: Path, tmp_path: Path) -> None:
    files = [text, *(tmp_path / f"data{suffix}" for suffix in (".jsonl", ".parquet"))]
    for file in files[1:]:
        write_records(file, [{"text": f"of {file.suffix}", "id": 1}])
    tokens = text_tokens(byte_tokenizer(), files)
    wanted = byte_tokenizer()(f"{TEXT}\n\nof .jsonl\n\nof .parquet")["input_ids"]
    assert tokens.tolist() == wanted
    calibration = [part for file in files for part in ("--calibration", file)]
    out = tmp_path / "out"
    result = run("prune", folder, *calibration, *SHORT, "--method", "magnitude", "--out", out)
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    for file in files:
        assert f"| {file.name} | {len(file.read_bytes()):,} | `{sha256(file)}` |" in card


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_parquet_files_that_are_wrong_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.parquet"
    write_records(file, [{"body": "a" * 1000, "n": 1}, {"body": None, "n": 2}])
    message = r"the field 'text' in each record, got 'body', 'n': name the field with --field"
    with pytest.raises(ValueError, match=message):
        read_text_file(file)
    with pytest.raises(ValueError, match=r"objects with a text, got None in row 2: remove records"):
        read_text_file(file, "body")
    whole = file.read_bytes()
    for content in (whole[:-20], b"hello", whole[:40] + bytes(60) + whole[100:], whole[:-60]):
        file.write_bytes(content)
        message = failed("perplexity", folder, "--text", file, "--field", "body")
        assert f"{file} must be a complete parquet file: " in message
        assert message.count("\n") == 1
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = failed("perplexity", folder, "--text", file)
    install = install_command("transformers", "parquet")
    assert f"this command needs pyarrow: {install}" in message
    with pytest.raises(ModuleNotFoundError, match=r"data\.parquet needs pyarrow: pip install"):
        read_text_file(file)


def test_chats_without_their_template_name_the_option(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    write_records(file, [{"messages": [{"role": "user", "content": "Hello"}]}])
    with pytest.raises(ValueError, match="got 'messages' in line 1: pass --chat-template to turn"):
        read_text_file(file)
    write_records(file, [{"content": "Hello"}])
    with pytest.raises(ValueError, match="got 'content' in line 1: name the field with --field"):
        read_text_file(file)


def test_records_that_are_wrong_are_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    for content, message in (
        ('{"text": "a"}\n{"text": 3}', "must hold texts, or objects with a text, got 3 in line 2"),
        ('{"text": "a"}\n\n{"text', "must hold JSON in line 3"),
        ("[1]", r"must hold texts, or objects with a text, got \[1\] in line 1"),
        ("[" * 10**5, "must hold JSON in line 1"),
        ("\n", "must hold text, got none"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_text_file(file)
    whole = file.with_suffix(".json")
    whole.write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="must hold a list of records"):
        read_text_file(whole)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="a pointer of git-lfs"):
        read_text_file(file)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.txt")
        with pytest.raises(ValueError, match="must be a regular file"):
            read_text_file(tmp_path / "fifo.txt")
