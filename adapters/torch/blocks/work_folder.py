"""A folder that keeps every finished block, so that an interrupted run can be resumed."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from safe_core._installed import require

from ...locks import try_lock

__all__ = ["WorkFolder", "check_work_folder", "existing_folder"]

_MANIFEST = "manifest.json"
_LOCK = "lock"
_ACTIVATIONS = ("inputs-*.bin", "targets-*.bin")


def check_work_folder(path: str | os.PathLike[str]) -> None:
    """Check that a folder is new, empty or that of an earlier run, and change nothing.

    Raises
    ------
    ValueError
        If it is not a folder, holds files but no manifest, or holds an invalid manifest.

    Examples
    --------
    >>> check_work_folder("/dev/null")
    Traceback (most recent call last):
    ValueError: work_dir must be a new or empty folder, or that of an earlier run, got /dev/null
    """
    folder = Path(path)
    rule = f"work_dir must be a new or empty folder, or that of an earlier run, got {folder}"
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise ValueError(rule)
        return
    if (folder / _MANIFEST).is_file():
        _read_manifest(folder / _MANIFEST)
        return
    # A run that is killed before it writes its manifest leaves these two files.
    ours = (_LOCK, f"{_MANIFEST}.part")
    others = sorted(f.name for f in folder.iterdir() if f.name not in ours or not f.is_file())
    if others:
        more = ", ..." if len(others) > 3 else ""
        raise ValueError(f"{rule}, which holds {', '.join(others[:3])}{more}")


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder itself, or the innermost one above it that exists.

    Examples
    --------
    >>> existing_folder("/dev/no/such/folder").as_posix()
    '/dev'
    """
    whole = Path(path).absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {
            "settings": dict(found["settings"]),
            "notes": list(found["notes"]),
            "blocks": list(found["blocks"]),
            "digests": list(found["digests"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"work_dir must hold a manifest of this library, got {file} with {error!r}"
        ) from error


class WorkFolder:
    """Finished blocks and a manifest of them, written atomically.

    A file is written under another name, flushed to the disk and renamed. The manifest names
    a block only after its file exists.

    Parameters
    ----------
    path : path
        Created if it does not exist.
    settings : mapping of str to str
        Settings that must be the same to resume.
    notes : sequence of str
        Written by the first run, and read by those that resume it.

    Attributes
    ----------
    finished : list of dict
        The entries given to `save`, block by block.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings, an invalid manifest or other files, or
        another run is using it.

    Examples
    --------
    >>> import contextlib, tempfile, torch
    >>> with tempfile.TemporaryDirectory() as path:
    ...     with contextlib.closing(WorkFolder(path, {"seed": "0"})) as folder:
    ...         folder.save({"w": torch.ones(1)}, {"loss": 0.5})
    ...     with contextlib.closing(WorkFolder(path, {"seed": "0"})) as again:
    ...         again.finished, again.load(0)["w"]
    ([{'loss': 0.5}], tensor([1.]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, str],
        notes: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        self.notes = list(notes)
        self.finished: list[dict[str, Any]] = []
        self._digests: list[str] = []  # of the files
        check_work_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            if (self.path / _MANIFEST).exists():
                self._read()
                _remove_leftovers(self.path)
            else:
                self._write_manifest([], [])
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        manifest = _read_manifest(self.path / _MANIFEST)
        found, self.finished = manifest["settings"], manifest["blocks"]
        self.notes, self._digests = manifest["notes"], manifest["digests"]
        if found != self.settings:
            raise ValueError(
                f"work_dir must be of a run with the same settings: {self.path} was begun "
                f"{_difference(found, self.settings)}; name another folder to begin anew"
            )

    def close(self) -> None:
        """Unlock the folder for other runs; the end of the process does so too."""
        self._lock.close()

    def _file(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def load(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a finished block, on the CPU.

        Raises
        ------
        ValueError
            If its file is missing or was changed.
        """
        require("work_dir", "safetensors", extra="transformers")
        from safetensors.torch import load

        path = self._file(index)
        data = path.read_bytes() if path.exists() else None
        if data is None or _digest(data) != self._digests[index]:
            raise ValueError(
                f"work_dir must hold block {index} as it was written, got "
                f"{'no' if data is None else 'another'} {path.name} in {self.path}: name another "
                "folder to begin anew"
            )
        return load(data)

    def save(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Save the next block.

        Raises
        ------
        OSError
            If it cannot be written, as on a full disk. Earlier blocks stay.
        """
        require("work_dir", "safetensors", extra="transformers")
        from safetensors.torch import save

        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        index = len(self.finished)
        try:
            data = save(plain)
            _write(self._file(index), data)
            self._write_manifest([*self.finished, dict(entry)], [*self._digests, _digest(data)])
        except OSError as error:
            raise OSError(
                error.errno,
                f"work_dir must have room for block {index}, got {error.strerror or error}; the "
                f"blocks before it stay in {self.path}",
            ) from error

    def _write_manifest(self, finished: list[dict[str, Any]], digests: list[str]) -> None:
        manifest = {
            "settings": self.settings,
            "notes": self.notes,
            "blocks": finished,
            "digests": digests,
        }
        _write(self.path / _MANIFEST, json.dumps(manifest, indent=1).encode())
        self.finished, self._digests = finished, digests


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the setting that best explains how two runs differ.

    Other weights also change the sparsity by name, so weights come first. Other samples may
    follow from another seed, so batches come last.
    """
    keys = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    key = min(keys, key=lambda key: _FOLLOWING.get(key, 0))
    was, got = then.get(key), now.get(key)
    if key == "batches":
        return "with other batches"
    if key == "weights" and was and got:
        return f"with {_other_weight(was, got)}"
    return f"with {key}={_excerpt(was, got)}, got {key}={_excerpt(got, was)}"


def _excerpt(text: str | None, other: str | None) -> str | None:
    """Return a text, shortened to the part where it begins to differ from another."""
    if text is None or len(text) <= _LONG:
        return text
    pairs = itertools.zip_longest(text, other or "")
    same = next(i for i, (a, b) in enumerate(pairs) if a != b)
    start = max(0, same - _LONG // 4)
    return f"{'...' if start else ''}{text[start : start + _LONG]}..."


_FOLLOWING = {"batches": 1, "weights": -1}
_LONG = 200  # characters


def _other_weight(was: str, got: str) -> str:
    """Describe the first weight that only one of two runs prunes."""
    try:
        blocks = [[set(names) for names in ast.literal_eval(text)] for text in (was, got)]
    except (ValueError, SyntaxError, TypeError):  # the manifest is damaged
        return "other weights"
    for i, (old, new) in enumerate(zip(*blocks, strict=False)):
        for name in sorted(old ^ new):
            whose = "was pruned, and is" if name in old else "was dense, and is pruned"
            tail = " dense now" if name in old else " now"
            return f"a block {i} in which {name} {whose}{tail}"
    return "another number of blocks"


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed run left: incomplete files and activations."""
    for pattern in ("block-*.safetensors.part", f"{_MANIFEST}.part", *_ACTIVATIONS):
        for file in path.glob(pattern):
            file.unlink()


def _locked(path: Path) -> IO[bytes]:
    """Return an open file that is locked until it is closed or the process ends."""
    file = open(path / _LOCK, "ab")  # noqa: SIM115 (open as long as the run)
    if try_lock(file) is False:
        file.close()
        raise ValueError(
            f"work_dir must be of one run at a time, got {path}, where another is at work"
        )
    return file


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
