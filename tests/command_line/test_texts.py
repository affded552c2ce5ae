"""Texts for calibration and perplexity: byte order marks, and the records of JSON files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from command_line import TEXT, byte_tokenizer, failed, run

from safe_core.adapters.transformers import calibration_batches
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
    batches = [calibration_batches(byte_tokenizer(), x, **sizes) for x in (file, plain)]
    assert bool((batches[0] == batches[1]).all())


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".json"])
def test_records_give_their_texts(folder: Path, tmp_path: Path, suffix: str) -> None:
    records = [{"text": "one\nline", "content": "x"}, "a plain text", {"text": "", "content": "y"}]
    file = tmp_path / f"data{suffix}"
    lines = "\n".join(map(json.dumps, records)) + "\n\n"
    file.write_text(json.dumps(records) if suffix == ".json" else lines)
    assert read_text_file(file).text == "one\nline\n\na plain text\n\n"
    wide = [{"body": TEXT[:400]}, {"body": TEXT[400:]}]
    file.write_text(json.dumps(wide) if suffix == ".json" else "\n".join(map(json.dumps, wide)))
    measure = ["perplexity", folder, "--text", file, "--length", 32, "--device", "cpu", "--json"]
    assert "must hold the field 'text' in each record, got 'body' in" in failed(*measure)
    plain = tmp_path / "plain.txt"
    plain.write_text(f"{TEXT[:400]}\n\n{TEXT[400:]}")
    wanted = run(*measure[:3], plain, *measure[4:]).stdout
    assert run(*measure, "--text-field", "body").stdout == wanted
    prune = ["prune", folder, "--calibration", file, "--samples", 2, "--length", 32, "--method",
             "magnitude", "--out", tmp_path / "out"]  # fmt: skip
    assert "--text-field" in failed(*prune)
    assert run(*prune, "--text-field", "body").exit_code == 0


def test_records_that_are_wrong_are_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    for content, message in (
        ('{"text": "a"}\n{"text": 3}', "must hold text in the field 'text', got 3 in line 2"),
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
