"""Keep the results of runs as lines of JSON, so that finished runs can be skipped."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

__all__ = ["append", "lines"]


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file, or none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, runs: Iterable[dict[str, Any]], *, hidden: Collection[str] = ()) -> None:
    """Append each run to a file as it ends, and print it without the ``hidden`` fields."""
    for line in runs:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print({key: value for key, value in line.items() if key not in hidden}, flush=True)
