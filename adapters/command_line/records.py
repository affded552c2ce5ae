"""Read the records of JSON and parquet files, one field of each."""

from __future__ import annotations

import io
import json
import reprlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from safe_core._installed import require

from .checkpoint_files import DamagedFileError

__all__ = ["decoded", "field_values", "has_records"]

_LINES = (".jsonl", ".ndjson")  # a record on each line
_PARQUET = (".parquet", ".pq")
_RECORDS = (*_LINES, ".json", *_PARQUET)


def has_records(file: Path) -> bool:
    """Return whether a file holds records, by the end of its name.

    Examples
    --------
    >>> has_records(Path("data.PARQUET")), has_records(Path("text.txt"))
    (True, False)
    """
    return file.suffix.lower() in _RECORDS


def decoded(file: Path) -> str:
    """Return the text of a UTF-8 file, with every kind of line end as ``"\\n"``.

    Raises
    ------
    ValueError
        If it is of another encoding.
    """
    try:
        return io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"text file must be UTF-8, got another encoding in {file}") from error


def field_values(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of a field in each record of a file.

    Files that end in ``.jsonl`` or ``.ndjson`` hold a record on each line, files that end in
    ``.json`` a list of them, and those in ``.parquet`` a record in each row.

    Parameters
    ----------
    file : pathlib.Path
    fields : sequence of str
        Names of fields, of which the first that a record has counts. A record of JSON that is no
        object is a value itself.

    Raises
    ------
    ModuleNotFoundError
        If pyarrow is missing, for parquet files.
    ValueError
        If the file is damaged, or a record has none of the fields.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = file.write_text('{"text": "one"}\\n{"text": "two"}')
    >>> list(field_values(file, ["text"]))
    [('line 1', 'one'), ('line 2', 'two')]
    """
    if file.suffix.lower() in _PARQUET:
        yield from _of_parquet(file, fields)
        return
    for place, record in _of_json(file):
        if isinstance(record, dict):
            yield place, record[_chosen(file, fields, record, f" in {place}")]
        else:
            yield place, record


def _chosen(file: Path, fields: Sequence[str], found: Collection[str], place: str) -> str:
    """Return the first of the fields that is found."""
    for name in fields:
        if name in found:
            return name
    wanted = " or ".join(map(repr, fields))
    chats = "messages" in found and "messages" not in fields
    hint = (
        "pass --chat-template to turn messages into text"
        if chats
        else "name the field with --field"
    )
    raise ValueError(
        f"{file} must hold the field {wanted} in each record, got "
        f"{', '.join(map(repr, found)) or 'none'}{place}: {hint}"
    )


def _of_json(file: Path) -> Iterator[tuple[str, Any]]:
    content = decoded(file)
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


def _of_parquet(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    require(f"the parquet file {file}", "pyarrow", extra="parquet")
    from pyarrow.lib import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(file) as opened:
            name = _chosen(file, fields, opened.schema_arrow.names, "")
            for batch in opened.iter_batches(columns=[name]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", value
    except (OSError, ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedFileError(f"{file} must be a complete parquet file: {reason}") from error
