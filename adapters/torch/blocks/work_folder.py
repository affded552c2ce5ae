"""A folder that keeps every finished block, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from safe_core._installed import require

from ...locks import try_lock
from .changed_settings import changed_settings

__all__ = ["WorkFolder", "check_work_folder", "earlier_run", "existing_folder"]

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


def earlier_run(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of an earlier run in a folder, or None if there is none.

    Raises
    ------
    ValueError
        If it is invalid, or of a run with other settings.

    Examples
    --------
    >>> earlier_run("/dev/null", {"seed": "0"}) is None
    True
    """
    file = Path(path) / _MANIFEST
    if not file.is_file():
        return None
    found = _read_manifest(file)
    if found["settings"] != settings:
        raise ValueError(
            f"work_dir must be of a run with the same settings, got {path}: "
            f"{changed_settings(found['settings'], settings)}; name another folder to begin anew"
        )
    return found


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
    settings : mapping of str to description
        Settings that must be the same to resume, in types that JSON has.
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
        settings: Mapping[str, Any],
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
        manifest = earlier_run(self.path, self.settings)
        assert manifest is not None  # the file exists
        self.finished, self.notes = manifest["blocks"], manifest["notes"]
        self._digests = manifest["digests"]

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
