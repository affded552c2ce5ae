"""Read texts: plain files of UTF-8, and the records of JSON and parquet files."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_files import check_file
from .records import decoded, field_values, has_records

__all__ = ["TextFile", "read_text_file"]


class TextFile(NamedTuple):
    """The contents of a text file, and what identifies them.

    Attributes
    ----------
    name : str
    nbytes : int
    sha256 : str
    text : str
        With every kind of line end as ``"\\n"``. The texts of records are joined by empty lines,
        and chats by nothing.
    """

    name: str
    nbytes: int
    sha256: str
    text: str


def read_text_file(
    file: Path, field: str | None = None, chat: Callable[[Any], str] | None = None
) -> TextFile:
    """Read a text file, which must exist, be UTF-8 or hold records, and not be empty.

    A byte order mark is not part of the text. Files that end in ``.jsonl`` or ``.ndjson`` hold
    a record on each line, files that end in ``.json`` a list of them, and those in ``.parquet`` a
    record in each row. A record is a text, or an object with the text in a field.

    Parameters
    ----------
    file : pathlib.Path
    field : str, optional
        The field of the text, or of the messages of a chat. The default is ``"text"``. With
        ``chat`` it is ``"messages"`` in records that have it.
    chat : callable, optional
        Makes a text of the messages, or of the single text, of each record, see
        `safe_core.command_line.chats.chat_renderer`. A file of UTF-8 is a single text.

    Raises
    ------
    ModuleNotFoundError
        If pyarrow is missing, for parquet files.
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
    text = ("\n\n" if chat is None else "").join(_texts(file, field, chat))
    if not text.strip():
        raise ValueError(f"text file must hold text, got none in {file}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return TextFile(file.name, file.stat().st_size, digest, text)


def _texts(file: Path, field: str | None, chat: Callable[[Any], str] | None) -> Iterator[str]:
    usual = ["text"] if chat is None else ["messages", "text"]
    for place, value in _values(file, usual if field is None else [field]):
        if chat is not None:
            try:
                yield chat(value)
            except ValueError as error:
                raise ValueError(f"{file} must hold messages in {place}: {error}") from error
        elif isinstance(value, str):
            yield value
        else:
            hint = (
                ": pass --chat-template to turn messages into text"
                if isinstance(value, list)
                else ": remove records without a text"
                if value is None
                else ""
            )
            raise ValueError(
                f"{file} must hold texts, or objects with a text, got {reprlib.repr(value)} in "
                f"{place}{hint}"
            )


def _values(file: Path, fields: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the places and values of records, or the only text of a file without records."""
    if has_records(file):
        yield from field_values(file, fields)
    elif text := decoded(file):
        yield "its only text", text
