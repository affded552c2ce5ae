"""Read texts: plain files of UTF-8, and the records of JSON files."""

from __future__ import annotations

import hashlib
import io
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_files import check_file

__all__ = ["TextFile", "read_text_file"]

_LINES = (".jsonl", ".ndjson")  # a record on each line
_JSON = (*_LINES, ".json")


class TextFile(NamedTuple):
    """The contents of a text file, and what identifies them.

    Attributes
    ----------
    name : str
    nbytes : int
    sha256 : str
    text : str
        With every kind of line end as ``"\\n"``. The texts of records are joined by empty lines.
    """

    name: str
    nbytes: int
    sha256: str
    text: str


def read_text_file(file: Path, field: str = "text") -> TextFile:
    """Read a text file, which must exist, be UTF-8 and not be empty.

    A byte order mark is not part of the text. Files that end in ``.jsonl`` or ``.ndjson`` hold
    a record on each line, and files that end in ``.json`` a list of them. A record is a text,
    or an object with the text in ``field``.

    Raises
    ------
    ValueError
        If the file is none of these.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "text.txt"
    >>> _ = file.write_bytes(b"one\\r\\ntwo")
    >>> found = read_text_file(file)
    >>> found.nbytes, found.text
    (8, 'one\\ntwo')
    >>> read_text_file(Path("nowhere.txt"))
    Traceback (most recent call last):
    ValueError: text file must exist, got nowhere.txt
    """
    if not file.exists():
        raise ValueError(f"text file must exist, got {file}")
    check_file(file)
    content = file.read_bytes()
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"text file must be UTF-8, got another encoding in {file}") from error
    if file.suffix.lower() in _JSON:
        text = "\n\n".join(_texts(file, text, field))
    if not text.strip():
        raise ValueError(f"text file must hold text, got none in {file}")
    return TextFile(file.name, len(content), hashlib.sha256(content).hexdigest(), text)


def _texts(file: Path, content: str, field: str) -> Iterator[str]:
    for place, record in _records(file, content):
        if isinstance(record, str):
            yield record
            continue
        if not isinstance(record, dict):
            raise ValueError(
                f"{file} must hold texts, or objects with a text, got {reprlib.repr(record)} in "
                f"{place}"
            )
        if field not in record:
            raise ValueError(
                f"{file} must hold the field {field!r} in each record, got "
                f"{', '.join(map(repr, record)) or 'none'} in {place}: name the field with "
                "--text-field"
            )
        if not isinstance(record[field], str):
            raise ValueError(
                f"{file} must hold text in the field {field!r}, got "
                f"{reprlib.repr(record[field])} in {place}"
            )
        yield record[field]


def _records(file: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of a JSON file, each with its place."""
    if file.suffix.lower() in _LINES:
        for i, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield f"line {i}", _parsed(file, line, f" in line {i}")
        return
    records = _parsed(file, content, "")
    if not isinstance(records, list):
        raise ValueError(f"{file} must hold a list of records, got {reprlib.repr(records)}")
    for i, record in enumerate(records, start=1):
        yield f"record {i}", record


def _parsed(file: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON{place}: {error}") from None
